package criu

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/image"
	"github.com/tranship/tranship/checkpoint/track"
)

// onTmpfs runs the calling test again in a process with a tmpfs at /run, as real
// hosts have one: CRIU keeps no cache elsewhere. It says whether this is it.
func onTmpfs(t *testing.T) bool {
	t.Helper()
	if os.Getenv("CRIU_TEST_RUN") == t.Name() {
		if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", "/run", "tmpfs", 0, "")); err != nil {
			t.Fatal(err)
		}
		// What was inherited is open in the other mount namespace, where CRIU
		// would not find it.
		if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		return true
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), "CRIU_TEST_RUN="+t.Name())
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	switch {
	case err != nil:
		t.Fatalf("%v\n%s", err, out)
	case strings.Contains(string(out), "--- SKIP"):
		t.Skipf("%s", out)
	}
	return false
}

func needUnchanged(t *testing.T, path string) *Unchanged {
	t.Helper()
	if err := Warm(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	u, err := PrepareUnchanged(t.Context(), path, filepath.Join(t.TempDir(), "criu.kdat"))
	if err != nil {
		raw, readErr := os.ReadFile(cacheFile)
		if readErr == nil && len(raw) > dirtyTracking && raw[dirtyTracking] == 1 {
			t.Skipf("this kernel has soft-dirty bits: %v", err)
		}
		t.Fatal(err)
	}
	return u
}

// stored is a page of a dump: its content, or that it was left out.
type stored struct {
	lazy    bool
	content string
}

func pagesOf(t *testing.T, dir, pagemap string) map[uint64]stored {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, pagemap))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	pm, err := image.ReadPagemap(f)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.Open(filepath.Join(dir, fmt.Sprintf("pages-%d.img", pm.PagesID)))
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	out := map[uint64]stored{}
	for _, r := range pm.Runs {
		if r.Flags&image.Parent != 0 {
			t.Fatalf("%s: a page is still said to be elsewhere: %+v", dir, r)
		}
		for addr := r.Addr; addr < r.End(); addr += checkpoint.PageSize {
			page := stored{lazy: r.Flags&image.Lazy != 0}
			if r.Flags&image.Present != 0 {
				raw := make([]byte, checkpoint.PageSize)
				if _, err := io.ReadFull(content, raw); err != nil {
					t.Fatal(err)
				}
				page.content = string(raw)
			}
			out[addr] = page
		}
	}
	if n, err := content.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("%s has more pages than its pagemap says", content.Name())
	}
	return out
}

// A dump in which CRIU touched no page has the same pages, and the same in them,
// as one in which it read them all.
func TestAnUnchangedDumpHasTheSamePages(t *testing.T) {
	path := needCRIU(t)
	if !onTmpfs(t) {
		return
	}
	u := needUnchanged(t, path)
	// The victim lives in this mount namespace, so CRIU has to as well.
	if err := unix.Mount(u.kdat, cacheFile, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	v := startVictim(t)
	if err := v.freeze(true); err != nil {
		t.Fatal(err)
	}
	dump := func(change func(*DumpConfig)) string {
		d, err := StartDumper(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Kill()
		cfg := v.config(t)
		change(&cfg)
		if err := d.Dump(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		if cfg.Parent != "" {
			settle(t, cfg.ImageDir, v.pid)
		}
		if err := v.freeze(true); err != nil {
			t.Fatal(err)
		}
		return cfg.ImageDir
	}
	// Without lazy pages CRIU has left the process when the dump is complete.
	pagemap := fmt.Sprintf("pagemap-%d.img", v.pid)
	full := pagesOf(t, dump(func(cfg *DumpConfig) { cfg.LazyPages = false }), pagemap)
	for _, discard := range []bool{false, true} {
		dir := dump(func(cfg *DumpConfig) {
			cfg.Parent = "../parent"
			parent := filepath.Join(cfg.ImageDir, cfg.Parent)
			if err := errors.Join(os.RemoveAll(parent), os.Mkdir(parent, 0o700)); err != nil {
				t.Fatal(err)
			}
			var up unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
				t.Fatal(err)
			}
			if discard {
				if err := image.Discard(cfg.ImageDir, 2); err != nil {
					t.Fatal(err)
				}
			}
			if err := image.WriteParent(parent, []checkpoint.PID{checkpoint.PID(v.pid)}, uint64(up.Nano()/1e3)); err != nil {
				t.Fatal(err)
			}
		})
		got := pagesOf(t, dir, fmt.Sprintf("lazy-%d.img", v.pid))
		joined := pagesOf(t, dir, pagemap)
		for addr, have := range got {
			if joined[addr] != have {
				t.Errorf("page %#x is another one for CRIU", addr)
			}
		}
		for addr, have := range joined {
			if _, ok := got[addr]; !ok && !have.lazy {
				t.Errorf("page %#x is for CRIU alone", addr)
			}
		}
		if len(joined) <= len(got) {
			t.Errorf("%d pages for CRIU, %d in all: no runs were joined", len(joined), len(got))
		}
		lazy, present, stacks := 0, 0, 0
		for addr, want := range full {
			have, ok := got[addr]
			switch {
			case !ok:
				t.Errorf("page %#x is missing", addr)
			case have.lazy && !want.lazy:
				t.Errorf("page %#x is left to be placed where nobody will", addr)
			case have.lazy:
				lazy++
			case have.content != want.content:
				t.Errorf("page %#x has another content", addr)
			case want.lazy:
				stacks++
			default:
				present++
			}
		}
		// CRIU means to do so as well, but compares the wrong bits (is_stack).
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", v.pid))
		if err != nil {
			t.Fatal(err)
		}
		if stacks == 0 || stacks > len(threads) {
			t.Errorf("%d pages with stack pointers of %d threads are in the images", stacks, len(threads))
		}
		for addr := range got {
			if _, ok := full[addr]; !ok {
				t.Errorf("page %#x is too much", addr)
			}
		}
		if lazy < 100 || present < 10 {
			t.Errorf("%d lazy pages and %d others: too few to tell anything", lazy, present)
		}
		t.Logf("%d lazy pages, %d others", lazy, present)
	}
	if _, err := ReleaseSockets([]int{v.pid}); err != nil {
		t.Fatal(err)
	}
	if err := v.freeze(false); err != nil {
		t.Fatal(err)
	}
	v.mustEcho(t, "after")
}

func settle(t *testing.T, dir string, pid int) {
	t.Helper()
	n, err := image.Settle(dir, func(_ checkpoint.PID, addr uint64, buf []byte) error {
		return track.ReadMemory(pid, addr, buf, func(addr uint64, n checkpoint.Pages) { t.Errorf("%d pages at %#x are gone", n, addr) })
	})
	if err != nil {
		t.Fatal(err)
	}
	if n == 0 {
		t.Error("no page was read: CRIU did not leave them out")
	}
}

func TestAReplacedCRIUIsNotToldAnything(t *testing.T) {
	path := needCRIU(t)
	if !onTmpfs(t) {
		return
	}
	u := needUnchanged(t, path)
	u.path = "/bin/true"
	if _, err := StartDumper(path, u); !errors.Is(err, ErrNoUnchanged) {
		t.Fatalf("got %v", err)
	}
	d, err := StartDumper(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Kill()
	if d.Unchanged() {
		t.Error("it was told nevertheless")
	}
}

// Whatever thread is there first, the process's own mounts stay what they are.
func TestOnlyCRIUSeesTheOtherCache(t *testing.T) {
	path := needCRIU(t)
	if !onTmpfs(t) {
		return
	}
	u := needUnchanged(t, path)
	before, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for range 30 {
		d, err := StartDumper(path, u)
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", d.PID()))
		d.Kill()
		if err != nil || theirs == before {
			t.Fatalf("criu is in %s like the daemon, %v", theirs, err)
		}
		now, err := os.Readlink("/proc/self/ns/mnt")
		if err != nil || now != before {
			t.Fatalf("the process is in %s now, it was in %s, %v", now, before, err)
		}
	}
}

func TestWithoutACacheEveryPageIsReferenced(t *testing.T) {
	path := needCRIU(t)
	if !onTmpfs(t) {
		return
	}
	if _, err := PrepareUnchanged(t.Context(), path, filepath.Join(t.TempDir(), "kdat")); !errors.Is(err, ErrNoUnchanged) {
		t.Fatalf("got %v", err)
	}
	if err := os.WriteFile(cacheFile, make([]byte, 512), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := PrepareUnchanged(t.Context(), path, filepath.Join(t.TempDir(), "kdat")); !errors.Is(err, ErrNoUnchanged) {
		t.Fatalf("a cache of another layout: %v", err)
	}
}
