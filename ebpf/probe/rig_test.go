package probe

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/testenv"
)

// rig makes cgroups as runc does, in every hierarchy, and runs loads in them.
type rig struct {
	t       *testing.T
	unified bool
	// tops are the hierarchies by the controller that is needed of them.
	tops map[string]string
}

var rigs atomic.Uint32

func newRig(t *testing.T) *rig {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedKernel(t, 5, 15)
	r := &rig{t: t, tops: map[string]string{}}
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	r.unified = err == nil
	for _, c := range []string{"cpu", "cpuacct", "memory", "blkio"} {
		top := "/sys/fs/cgroup/" + c
		if r.unified {
			top = "/sys/fs/cgroup"
		}
		if _, err := os.Stat(top); err != nil {
			testenv.Missing(t, "the cgroup controller "+c)
		}
		r.tops[c] = top
	}
	return r
}

// root is the identity of everything.
func (r *rig) root() Identity {
	return Identity{Tasks: inode(r.t, r.tops["cpu"]), Block: inode(r.t, r.tops["blkio"])}
}

func (r *rig) open(pin string) *Probe {
	r.t.Helper()
	p, err := Open(Config{PinDir: pin, Unified: r.unified, Host: r.root()})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { _ = p.Close() })
	for _, part := range Parts {
		if err := p.Failed(part); err != nil {
			r.t.Errorf("%s: %v", part, err)
		}
	}
	return p
}

type cgroup struct {
	r    *rig
	path string
}

// cgroup makes one in all hierarchies, parents first; it goes with the test.
func (r *rig) cgroup(path string) cgroup {
	r.t.Helper()
	if !strings.Contains(path, "/") {
		path = fmt.Sprintf("tranship-probe-%d-%d-%s", os.Getpid(), rigs.Add(1), path)
	}
	c := cgroup{r, path}
	for name, top := range r.tops {
		dir := filepath.Join(top, path)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			r.t.Fatal(err)
		}
		r.t.Cleanup(func() {
			// The last process may still be on its way out.
			for deadline := time.Now().Add(10 * time.Second); ; {
				err := unix.Rmdir(dir)
				if err == nil || errors.Is(err, unix.ENOENT) {
					return
				}
				if time.Now().After(deadline) {
					r.t.Errorf("%s %s: %v", name, dir, err)
					return
				}
			}
		})
	}
	return c
}

func (c cgroup) id() Identity {
	return Identity{Tasks: inode(c.r.t, c.dir("cpu")), Block: inode(c.r.t, c.dir("blkio"))}
}

func (c cgroup) dir(controller string) string { return filepath.Join(c.r.tops[controller], c.path) }

// command prepares a program that joins the cgroup before it is executed.
func (c cgroup) command(args ...string) *exec.Cmd {
	var join strings.Builder
	// The accounts that are compared begin when cpu and cpuacct are joined, which
	// may be two hierarchies: one right after the other, and last, because a join
	// takes up to a millisecond.
	for _, name := range []string{"memory", "blkio", "cpuacct", "cpu"} {
		fmt.Fprintf(&join, "echo $$ >%s/cgroup.procs || exit 9; ", c.dir(name))
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", join.String() + `exec "$@"`, "sh"}, args...)...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// run runs a program in the cgroup to its end.
func (c cgroup) run(args ...string) {
	c.r.t.Helper()
	if err := c.command(args...).Run(); err != nil {
		c.r.t.Fatalf("%v: %v", args, err)
	}
}

// start starts this test binary as a load, which ends with the test, and waits
// until it says that it is there.
func (c cgroup) start(load string) (pid int) {
	c.r.t.Helper()
	cmd := c.command(os.Args[0])
	cmd.Env = append(os.Environ(), loadVariable+"="+load)
	out, err := cmd.StdoutPipe()
	if err != nil {
		c.r.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		c.r.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		c.r.t.Fatalf("load %s says %q, %v", load, line, err)
	}
	c.r.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st.Ino
}

// cpu is the cgroup's own account, in nanoseconds.
func (c cgroup) cpu() float64 {
	if c.r.unified {
		return 1000 * float64(field(c.r.t, filepath.Join(c.dir("cpu"), "cpu.stat"), "usage_usec"))
	}
	return float64(number(c.r.t, filepath.Join(c.dir("cpuacct"), "cpuacct.usage")))
}

// faults are the cgroup's own account, with those of cgroups below.
func (c cgroup) faults() (all, major float64) {
	prefix := "total_"
	if c.r.unified {
		prefix = ""
	}
	stat := filepath.Join(c.dir("memory"), "memory.stat")
	return float64(field(c.r.t, stat, prefix+"pgfault")), float64(field(c.r.t, stat, prefix+"pgmajfault"))
}

// accountBlock turns the cgroup's account for the device of dir on. Since Linux
// 6.10 v1 keeps one only for devices that are throttled somewhere: so it is, at
// a rate that nothing reaches.
func (c cgroup) accountBlock(dir string) {
	c.r.t.Helper()
	if c.r.unified {
		return
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		c.r.t.Fatal(err)
	}
	device := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	// Accounts are of whole disks.
	sys := "/sys/dev/block/" + device
	if _, err := os.Stat(sys + "/partition"); err == nil {
		sys, err = filepath.EvalSymlinks(sys)
		if err != nil {
			c.r.t.Fatal(err)
		}
		device = strings.TrimSpace(text(c.r.t, filepath.Join(filepath.Dir(sys), "dev")))
	}
	for _, what := range []string{"read", "write"} {
		limit := fmt.Sprintf("%s %d", device, uint64(1)<<40)
		if err := os.WriteFile(filepath.Join(c.dir("blkio"), "blkio.throttle."+what+"_bps_device"), []byte(limit), 0); err != nil {
			c.r.t.Fatal(err)
		}
	}
}

// block is the cgroup's own account in bytes, with those of cgroups below.
func (c cgroup) block() (read, write float64) {
	t := c.r.t
	if c.r.unified {
		for _, f := range strings.Fields(text(t, filepath.Join(c.dir("blkio"), "io.stat"))) {
			var n float64
			if _, err := fmt.Sscanf(f, "rbytes=%f", &n); err == nil {
				read += n
			} else if _, err := fmt.Sscanf(f, "wbytes=%f", &n); err == nil {
				write += n
			}
		}
		return read, write
	}
	for line := range strings.Lines(text(t, filepath.Join(c.dir("blkio"), "blkio.throttle.io_service_bytes_recursive"))) {
		f := strings.Fields(line)
		if len(f) != 3 {
			continue
		}
		n, err := strconv.ParseFloat(f[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		switch f[1] {
		case "Read":
			read += n
		case "Write":
			write += n
		}
	}
	return read, write
}

func text(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func number(t *testing.T, path string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(strings.TrimSpace(text(t, path)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func field(t *testing.T, path, name string) uint64 {
	t.Helper()
	for line := range strings.Lines(text(t, path)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == name {
			n, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("%s has no %s", path, name)
	return 0
}

// waited sums run_delay over the threads of processes, in nanoseconds.
func waited(t *testing.T, pids ...int) float64 {
	t.Helper()
	sum := 0.0
	for _, pid := range pids {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(tasks) == 0 {
			t.Fatalf("tasks of %d: %v", pid, err)
		}
		for _, path := range tasks {
			f := strings.Fields(text(t, path))
			n, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
	}
	return sum
}

// read refreshes and reads a slot.
func read(t *testing.T, p *Probe, slot int) Usage {
	t.Helper()
	if err := p.Refresh(); err != nil {
		t.Fatal(err)
	}
	u, _, err := p.Read(slot)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// reading is a slot and what the kernel's own account said before and after the
// slot was read: the two cannot be read at one moment, and on a busy machine a
// good part of a second may pass between them.
type reading struct {
	Usage
	least, most float64
}

// readWith reads a slot and an account, ten times, and keeps the reading whose
// halves are closest together.
func readWith(t *testing.T, p *Probe, slot int, account func() float64) reading {
	t.Helper()
	var best reading
	for i := range 10 {
		r := reading{least: account(), Usage: read(t, p, slot)}
		if r.most = account(); i == 0 || r.most-r.least < best.most-best.least {
			best = r
		}
	}
	return best
}

// agree compares what a slot gained between two readings with what the account
// gained, of which only bounds are known.
func agree(t *testing.T, what string, from, to reading, of func(Usage) uint64, tolerance float64) {
	t.Helper()
	got := float64(of(to.Usage) - of(from.Usage))
	least, most := to.least-from.most, to.most-from.least
	t.Logf("%s: %.0f, truth %.0f to %.0f (%+.3f to %+.3f %%)", what, got, least, most, 100*(got/least-1), 100*(got/most-1))
	if most-least > tolerance*least {
		t.Errorf("%s: the account was not to be read in time: %.0f to %.0f", what, least, most)
	}
	if least <= 0 || got < least*(1-tolerance) || got > most*(1+tolerance) {
		t.Errorf("%s: %.0f, truth %.0f to %.0f", what, got, least, most)
	}
}

func cpuNs(u Usage) uint64  { return u.CpuNs }
func waitNs(u Usage) uint64 { return u.WaitNs }
func faults(u Usage) uint64 { return u.MinorFaults + u.MajorFaults }

func within(t *testing.T, what string, got, want, tolerance float64) {
	t.Helper()
	off := 0.0
	if want != 0 {
		off = got/want - 1
	}
	t.Logf("%s: %.0f, truth %.0f (%+.3f %%)", what, got, want, 100*off)
	if want <= 0 || off > tolerance || off < -tolerance {
		t.Errorf("%s: %.0f, truth %.0f", what, got, want)
	}
}

// bpffs mounts one for the test.
func bpffs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, "mode=700"); err != nil {
		t.Fatalf("bpf file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "tranship")
}
