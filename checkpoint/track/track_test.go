package track

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/internal/osthread"
	"github.com/tranship/tranship/internal/testenv"
)

func ignore(checkpoint.Extent) error { return nil }

// registered counts the mappings of a process that a userfaultfd protects.
func registered(t *testing.T, pid int) int {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range bytes.Lines(raw) {
		if flags, ok := bytes.CutPrefix(line, []byte("VmFlags:")); ok && bytes.Contains(flags, []byte(" uw")) {
			n++
		}
	}
	return n
}

func TestCloseLeavesNothingBehind(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedKernel(t, 6, 7)
	r := newRig(t, UffdWP)
	a := r.mmap(1024)
	r.write(a, 1024)
	r.collect()
	r.do("madvise %d %d %d", a, 16*page, unix.MADV_DONTNEED)
	r.collect()
	if n := registered(t, r.victim.pid()); n == 0 {
		t.Fatal("nothing is registered while it is tracked")
	}
	if left := userfaultfds(r.victim.pid()); len(left) > 0 {
		t.Errorf("descriptors %v are in the process", left)
	}
	for range 2 {
		if err := r.tracker.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := registered(t, r.victim.pid()); n > 0 {
		t.Errorf("%d mappings are still registered", n)
	}
	if left := userfaultfds(os.Getpid()); len(left) > 0 {
		t.Errorf("descriptors %v are left in the tracker's process", left)
	}
	// Bit 57 of a page table entry is the mark of write-protection.
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", r.victim.pid()))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	raw := make([]byte, 1024*8)
	if _, err := f.ReadAt(raw, int64(a/page*8)); err != nil {
		t.Fatal(err)
	}
	for i := range 1024 {
		if entry := binary.NativeEndian.Uint64(raw[i*8:]); entry&(1<<57) != 0 || i < 16 && entry&entrySwap != 0 {
			t.Fatalf("page %d still carries a mark: %#x", i, entry)
		}
	}
	r.write(a, 1024)
	r.tracker, err = New(UffdWP, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r.collect()
	r.verify()
}

func TestCloseAfterTheProcessDied(t *testing.T) {
	each(t, func(t *testing.T, kind Kind) {
		r := newRig(t, kind)
		r.collect()
		if err := r.victim.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := r.victim.cmd.Wait(); err == nil {
			t.Fatal("the victim survived")
		}
		if stats := r.collect(); stats.Processes != 0 {
			t.Errorf("%d processes, want none", stats.Processes)
		}
		if err := r.tracker.Close(); err != nil {
			t.Error(err)
		}
	})
}

// A dump may have it already, whose pages nobody can read any more.
func TestAFrozenProcessThatDiesIsNotSkipped(t *testing.T) {
	each(t, func(t *testing.T, kind Kind) {
		r := newRig(t, kind)
		r.collect()
		stopProcess(t, r.victim.pid())
		if err := r.victim.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		collect := func() error {
			_, err := r.tracker.Collect(t.Context(), r.procs, Options{Frozen: true}, ignore)
			return err
		}
		waitFor(t, "the victim to be a zombie", func() bool {
			st, err := readStat(fmt.Sprintf("/proc/%d/stat", r.victim.pid()))
			return err == nil && st.state == 'Z' && st.threads == 1
		})
		if err := collect(); !errors.Is(err, ErrDied) {
			t.Errorf("of a zombie: %v", err)
		}
		if err := r.victim.cmd.Wait(); err == nil {
			t.Fatal("the victim survived")
		}
		if err := collect(); !errors.Is(err, ErrDied) {
			t.Errorf("of one that is gone: %v", err)
		}
	})
}

func TestASeccompFilterThatKillsForUserfaultfdIsNotTriggered(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedKernel(t, 6, 7)
	r := newRig(t, UffdWP)
	r.do("seccomp %d", unix.SYS_USERFAULTFD)
	a := r.mmap(64)
	r.write(a, 64)
	r.collect()
	r.write(a+page, 3)
	r.collect()
	r.verify()
	r.resume()
	// The filter is in force all the same.
	if _, err := r.victim.try("uffd %d %d", a, page); err == nil {
		t.Error("the victim could call userfaultfd")
	}
	r.unfollow(r.victim.pid())
}

func TestAProcessWithItsOwnUserfaultfdIsRefused(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedKernel(t, 6, 7)
	for _, when := range []string{"before it is tracked", "while it is tracked"} {
		t.Run(when, func(t *testing.T) {
			r := newRig(t, UffdWP)
			if when == "while it is tracked" {
				r.collect()
			}
			a := r.mmap(64)
			r.write(a, 64)
			own := int(r.do("uffd %d %d", a, 64*page))
			_, err := r.tracker.Collect(t.Context(), r.procs, Options{}, ignore)
			var refused *ProcessError
			if !errors.Is(err, ErrForeignUserfaultfd) || !errors.As(err, &refused) {
				t.Fatalf("error %v, want %v", err, ErrForeignUserfaultfd)
			}
			if refused.HostPID != r.victim.pid() || !strings.Contains(err.Error(), fmt.Sprint(r.victim.pid())) {
				t.Errorf("the error %q does not name the process", err)
			}
			if left := userfaultfds(r.victim.pid()); !slices.Equal(left, []int{own}) {
				t.Errorf("descriptors %v, want only its own, %d", left, own)
			}
		})
	}
}

func TestATracedProcessIsRefused(t *testing.T) {
	testenv.NeedRoot(t)
	testenv.NeedKernel(t, 6, 7)
	b := startBlocked(t, "read")
	b.sleeps(unix.SYS_READ)
	err := onTracer(func() error {
		traced, err := seize(b.pid())
		if err != nil {
			return err
		}
		tracker, err := New(UffdWP, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		_, err = tracker.Collect(t.Context(), []checkpoint.Process{{PID: 1, HostPID: b.pid()}}, Options{}, ignore)
		if !errors.Is(err, ErrTraced) {
			t.Errorf("error %v, want %v", err, ErrTraced)
		}
		return errors.Join(tracker.Close(), traced.detach())
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestDirectIOIsLookedForEverywhere(t *testing.T) {
	dir := t.TempDir()
	if surveyFiles(os.Getpid()).pinning {
		testenv.Missing(t, "a process without a file system that may pin pages")
	}
	err := osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_FILES); err != nil {
			return err
		}
		if _, err := unix.Open(filepath.Join(dir, "of a thread"), os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600); err != nil {
			return err
		}
		if !surveyFiles(os.Getpid()).pinning {
			t.Error("a file that only a thread has open is not seen")
		}
		return nil // the thread ends, and its table with it
	})
	if err != nil {
		testenv.Missing(t, "direct I/O on the temporary directory: "+err.Error())
	}
	f, err := os.OpenFile(filepath.Join(dir, "direct"), os.O_CREATE|os.O_RDWR|unix.O_DIRECT, 0o600)
	if err != nil {
		testenv.Missing(t, "direct I/O on the temporary directory: "+err.Error())
	}
	defer f.Close()
	if !surveyFiles(os.Getpid()).pinning {
		t.Error("a file opened with O_DIRECT is not seen")
	}
	if !surveyFiles(-1).pinning {
		t.Error("a process that cannot be looked at must count as one with direct I/O")
	}
}

func TestProcessesOfAPIDNamespace(t *testing.T) {
	testenv.NeedRoot(t)
	v := startVictim(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS})
	if pid := v.do(t, "hello"); pid != 1 {
		t.Fatalf("the victim has pid %d in its namespace", pid)
	}
	second := v.do(t, "children")
	// The list also holds processes of others and some that never were.
	procs, err := ProcessesOf([]int{os.Getpid(), children(v.pid())[0], v.pid(), 1 << 22}, v.pid())
	if err != nil {
		t.Fatal(err)
	}
	if len(procs) != 2 || procs[0] != (checkpoint.Process{PID: 1, HostPID: v.pid()}) || procs[1].PID != checkpoint.PID(second) {
		t.Fatalf("processes %v, want 1 and %d", procs, second)
	}
	t.Run("they are tracked like others", func(t *testing.T) {
		each(t, func(t *testing.T, kind Kind) {
			tracker, err := New(kind, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			seen := map[checkpoint.PID]bool{}
			stats, err := tracker.Collect(t.Context(), procs, Options{}, func(e checkpoint.Extent) error {
				seen[e.PID] = true
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if stats.Processes != 2 || !seen[1] || !seen[checkpoint.PID(second)] {
				t.Errorf("%+v, pids %v, want both", stats, seen)
			}
			if err := tracker.Close(); err != nil {
				t.Error(err)
			}
		})
	})
	t.Run("a namespace below is part of it", func(t *testing.T) {
		inner := startVictim(t, &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS})
		got, err := ProcessesOf([]int{inner.pid(), v.pid(), os.Getpid()}, os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 3 {
			t.Errorf("processes %v, want three", got)
		}
		got, err = ProcessesOf([]int{inner.pid(), v.pid(), os.Getpid()}, v.pid())
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != 1 || got[0].HostPID != v.pid() {
			t.Errorf("processes %v, want only %d", got, v.pid())
		}
	})
}

func TestReadMemory(t *testing.T) {
	testenv.NeedRoot(t)
	v := startVictim(t, nil)
	const rw = unix.PROT_READ | unix.PROT_WRITE
	a := v.do(t, "mmap 0 %d %d 0", 4096*page, rw)
	v.do(t, "write %d %d", a, 4096*page)
	read := func(t *testing.T, addr uint64, pages int) ([]byte, []string) {
		t.Helper()
		buf := bytes.Repeat([]byte{0xaa}, pages*page)
		var gone []string
		err := ReadMemory(v.pid(), addr, buf, func(at uint64, n checkpoint.Pages) {
			gone = append(gone, fmt.Sprintf("%d+%d", (at-a)/page, n))
		})
		if err != nil {
			t.Fatal(err)
		}
		return buf, gone
	}
	truth, gone := read(t, a, 4096)
	if len(gone) > 0 || binary.NativeEndian.Uint64(truth[8:]) != a || binary.NativeEndian.Uint64(truth[4095*page+8:]) != a+4095*page {
		t.Fatalf("plain memory was not read: gone %v", gone)
	}
	t.Run("whatever its protection", func(t *testing.T) {
		v.do(t, "mprotect %d %d 0", a+100*page, 1000*page)
		v.do(t, "mprotect %d %d %d", a+2000*page, page, unix.PROT_EXEC)
		got, gone := read(t, a, 4096)
		if !bytes.Equal(got, truth) || len(gone) > 0 {
			t.Errorf("protected memory reads differently, gone %v", gone)
		}
		v.do(t, "mprotect %d %d 3", a, 4096*page)
	})
	t.Run("what is unmapped is zero and reported in runs", func(t *testing.T) {
		v.do(t, "munmap %d %d", a+10*page, 5*page)
		v.do(t, "munmap %d %d", a+100*page, 600*page)
		v.do(t, "munmap %d %d", a+4095*page, page)
		got, gone := read(t, a, 4096)
		if want := []string{"10+5", "100+600", "4095+1"}; !slices.Equal(gone, want) {
			t.Errorf("gone %v, want %v", gone, want)
		}
		want := bytes.Clone(truth)
		for _, r := range [][2]int{{10, 15}, {100, 700}, {4095, 4096}} {
			clear(want[r[0]*page : r[1]*page])
		}
		if !bytes.Equal(got, want) {
			t.Error("the rest reads differently")
		}
	})
	t.Run("guard pages are gone", func(t *testing.T) {
		if _, err := v.try("madvise %d %d 102", a+20*page, 2*page); err != nil {
			if !strings.Contains(err.Error(), unix.EINVAL.Error()) {
				t.Fatal(err)
			}
			t.Skip("kernel without MADV_GUARD_INSTALL (Linux 6.13)")
		}
		if _, gone := read(t, a+18*page, 8); !slices.Equal(gone, []string{"20+2"}) {
			t.Errorf("gone %v, want 20+2", gone)
		}
	})
	t.Run("a range that is not whole pages is refused", func(t *testing.T) {
		if err := ReadMemory(v.pid(), a+1, make([]byte, page), nil); err == nil {
			t.Error("an odd address was read")
		}
		if err := ReadMemory(v.pid(), a, make([]byte, 100), nil); err == nil {
			t.Error("an odd length was read")
		}
	})
	t.Run("all of a dead process is gone", func(t *testing.T) {
		if err := v.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = v.cmd.Wait()
		got, gone := read(t, a, 16)
		if !slices.Equal(gone, []string{"0+16"}) || !bytes.Equal(got, make([]byte, 16*page)) {
			t.Errorf("gone %v, want all of it, as zeros", gone)
		}
	})
}

func TestProbeNamesAKindThatWorks(t *testing.T) {
	kind, err := Probe()
	t.Logf("%s: %v", kind, err)
	if (kind == UffdWP) != (err == nil) {
		t.Errorf("kind %q with error %v", kind, err)
	}
	if _, err := New(kind, slog.New(slog.DiscardHandler)); err != nil {
		t.Error(err)
	}
	if os.Geteuid() == 0 && kind != UffdWP {
		testenv.NeedKernel(t, 6, 7)
		testenv.Missing(t, err.Error())
	}
}

func TestAnUnknownKindIsRefused(t *testing.T) {
	if _, err := New("guess", slog.New(slog.DiscardHandler)); err == nil {
		t.Error("it was accepted")
	}
}
