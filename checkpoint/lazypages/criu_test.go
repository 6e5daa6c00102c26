package lazypages

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/internal/testenv"
)

// criuPaths are where a CRIU of version 4.1 or later may be.
var criuPaths = []string{"/usr/local/lib/tranship/criu/criu", "/usr/local/sbin/criu", "/usr/sbin/criu"}

// findCRIU returns a CRIU that runs on this kernel.
func findCRIU(t *testing.T) string {
	t.Helper()
	for _, path := range criuPaths {
		out, err := exec.Command(path, "--version").CombinedOutput()
		var major, minor int
		if _, scanErr := fmt.Sscanf(string(out), "Version: %d.%d", &major, &minor); err == nil && scanErr == nil && major*100+minor >= 401 {
			return path
		}
	}
	testenv.Missing(t, fmt.Sprintf("CRIU 4.1 or later in one of %v", criuPaths))
	return ""
}

// victim remembers the digest of 64 MiB of data with holes, and when it gets
// SIGUSR1 checks the data in itself and in a child.
const victim = `
import os, sys, signal, hashlib, random
n = 64 << 20
data = bytearray(random.Random(7).randbytes(n))
for o in range(0, n, 1 << 16):
    data[o:o + 8192] = bytes(8192)
want = hashlib.sha256(data).hexdigest()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
sys.stdout.write("ready\n")
sys.stdout.flush()
null = os.open("/dev/null", os.O_RDWR)
for f in (0, 1, 2):
    os.dup2(null, f)
os.close(null)
signal.sigwait({signal.SIGUSR1})
child = os.fork()
got = hashlib.sha256(data).hexdigest()
if child == 0:
    os._exit(0 if got == want else 9)
status = os.waitpid(child, 0)[1]
with open(sys.argv[1], "w") as f:
    f.write("ok" if got == want and status == 0 else "got %s want %s child %d" % (got, want, status))
`

func TestCRIURestoresFromThePageServer(t *testing.T) {
	r := newRig(t)
	criu := findCRIU(t)
	python, err := exec.LookPath("python3")
	if err != nil {
		testenv.Missing(t, "python3")
	}
	work := r.cfg.Images
	result := filepath.Join(work, "result")

	// A process, dumped without its pages.
	source := exec.Command(python, "-c", victim, result)
	source.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	source.Dir = "/"
	out, err := source.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := source.Start(); err != nil {
		t.Fatal(err)
	}
	pid := source.Process.Pid
	defer func() { _ = source.Process.Kill(); _ = source.Wait() }()
	for in := bufio.NewScanner(out); in.Scan(); { // until it has let go of its output
	}
	ready, notify, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	dump := exec.Command(criu, "dump", "-t", fmt.Sprint(pid), "-D", work, "-o", "dump.log", "-v2", "--manage-cgroups=ignore",
		"--lazy-pages", "--address", "127.0.0.1", "--port", freePort(t), "--status-fd", "3")
	var said strings.Builder
	dump.Stdout, dump.Stderr = &said, &said
	dump.ExtraFiles = []*os.File{notify}
	err = dump.Start()
	_ = notify.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dump.Process.Kill(); _ = dump.Wait() }()
	if _, err := ready.Read(make([]byte, 1)); err != nil {
		_ = dump.Wait()
		t.Fatalf("dump: %v: %s: %s", err, said.String(), tail(filepath.Join(work, "dump.log")))
	}
	// CRIU waits for somebody to ask for pages; the process stands still.
	pages := r.copyLazyPages(pid)
	if err := errors.Join(source.Process.Kill(), dump.Process.Kill()); err != nil {
		t.Fatal(err)
	}
	_ = dump.Wait()
	_ = source.Wait() // only now: a tracer has the first word on a death

	r.spawn()
	finished := make(chan error, 1)
	go func() {
		_, err := r.client.WaitFinished(r.ctx)
		finished <- err
	}()
	restore := exec.CommandContext(r.ctx, criu, "restore", "-D", work, "-W", work, "-o", "restore.log", "-v2", "--manage-cgroups=ignore",
		"--lazy-pages", "--restore-detached")
	restore.Env = os.Environ()
	if raw, err := restore.CombinedOutput(); err != nil {
		t.Fatalf("restore: %v: %s: %s", err, raw, tail(filepath.Join(work, "restore.log")))
	}
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := <-finished; err != nil {
		t.Fatal(err)
	}
	if err := unix.PidfdSendSignal(pidfd, unix.SIGUSR1, nil, 0); err != nil {
		t.Fatal(err)
	}
	st := r.waitDone()
	t.Logf("%+v", st)
	if st.Tasks != 1 || st.Placed < pages*9/10 {
		t.Errorf("placed %d of %d pages for %d tasks", st.Placed, pages, st.Tasks)
	}
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if _, err := unix.Poll(fds, int(time.Minute/time.Millisecond)); err != nil || fds[0].Revents == 0 {
		t.Fatalf("the restored process does not end: %v", err)
	}
	if raw, err := os.ReadFile(result); err != nil || string(raw) != "ok" {
		t.Fatalf("the restored process found: %s, %v", raw, err)
	}
}

// freePort is a port of loopback that nobody listened on a moment ago. CRIU does
// not choose one itself.
func freePort(t *testing.T) string {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}

// copyLazyPages stores what CRIU has left to us, from the frozen process.
func (r *rig) copyLazyPages(pid int) checkpoint.Pages {
	r.t.Helper()
	d, err := readDumped(r.cfg.Images, checkpoint.PID(pid))
	if err != nil {
		r.t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		r.t.Fatal(err)
	}
	defer mem.Close()
	var sum checkpoint.Pages
	for _, s := range d.lazy {
		buf := make([]byte, s.end-s.start)
		_, err := mem.ReadAt(buf, int64(s.start))
		err = errors.Join(err, r.store.PutPages(checkpoint.PID(pid), s.start, buf))
		if err != nil {
			r.t.Fatalf("copy %#x+%#x: %v", s.start, len(buf), err)
		}
		sum += checkpoint.Pages(len(buf) / page)
	}
	if sum < 10_000 {
		r.t.Fatalf("CRIU left only %d pages to us: %s", sum, strings.TrimSpace(tail(filepath.Join(r.cfg.Images, "dump.log"))))
	}
	return sum
}
