package track

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/internal/testenv"
)

// blocked is testdata/blocked.c: one thread in one system call.
type blocked struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// builtBlocked says that buildBlocked has left a directory to remove.
var builtBlocked bool

var buildBlocked = sync.OnceValues(func() (string, error) {
	builtBlocked = true
	dir, err := os.MkdirTemp("", "tranship-track-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "blocked")
	out, err := exec.Command("cc", "-O1", "-pthread", "-o", path, "testdata/blocked.c").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("cc: %w: %s", err, out)
	}
	return path, nil
})

func startBlocked(t *testing.T, mode string) *blocked {
	t.Helper()
	testenv.NeedRoot(t)
	if _, err := exec.LookPath("cc"); err != nil {
		testenv.Missing(t, "a C compiler")
	}
	path, err := buildBlocked()
	if err != nil {
		t.Fatal(err)
	}
	b := &blocked{t: t, cmd: exec.Command(path, mode)}
	b.cmd.Stderr = os.Stderr
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if b.in, err = b.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := b.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	b.out = bufio.NewReader(out)
	if err := start(b.cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Its session, because it may have children.
		_ = syscall.Kill(-b.cmd.Process.Pid, syscall.SIGKILL)
		_ = b.cmd.Wait()
	})
	b.expect("ready")
	return b
}

func (b *blocked) pid() int { return b.cmd.Process.Pid }

func (b *blocked) expect(want string) {
	b.t.Helper()
	line, err := b.out.ReadString('\n')
	if err != nil {
		b.t.Fatalf("waiting for %q: %v", want, err)
	}
	if got := strings.TrimSpace(line); got != want {
		b.t.Fatalf("it says %q, want %q", got, want)
	}
}

// sleeps waits until the only thread sleeps in the system call.
func (b *blocked) sleeps(nr int) {
	b.t.Helper()
	sleepsIn(b.t, b.pid(), nr)
}

func sleepsIn(t *testing.T, pid, nr int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("process %d to sleep in system call %d", pid, nr), func() bool {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
		return err == nil && strings.HasPrefix(string(raw), fmt.Sprint(nr)+" ")
	})
}

func (b *blocked) kill(sig syscall.Signal) {
	b.t.Helper()
	if err := syscall.Kill(b.pid(), sig); err != nil {
		b.t.Fatal(err)
	}
}

// disturb obtains a userfaultfd from the process a number of times.
func (b *blocked) disturb(times int) {
	b.t.Helper()
	for range times {
		fd, _, err := injectUserfaultfd(b.pid())
		if errors.Is(err, errBusy) {
			continue // a busy machine
		}
		if errors.Is(err, errGone) {
			return // it is through, and says how it went
		}
		if err != nil {
			b.t.Fatal(err)
		}
		if err := unix.Close(fd); err != nil {
			b.t.Fatal(err)
		}
	}
	if left := userfaultfds(b.pid()); len(left) > 0 {
		b.t.Errorf("descriptors %v are left in the process", left)
	}
}

func TestAnInjectedCallDoesNotDisturbABlockedOne(t *testing.T) {
	newline := func(b *blocked) {
		if _, err := io.WriteString(b.in, "x"); err != nil {
			b.t.Fatal(err)
		}
	}
	usr1 := func(b *blocked) { b.kill(syscall.SIGUSR1) }
	nothing := func(*blocked) {}
	for _, tt := range []struct {
		name, mode string
		nr         int // the number of the call it sleeps in, 0 if it runs
		end        func(b *blocked)
	}{
		{"a read goes on", "read", unix.SYS_READ, newline},
		{"a futex with a timeout neither ends early nor starts anew", "futex", unix.SYS_FUTEX, nothing},
		{"a sleep neither ends early nor starts anew", "nanosleep", unix.SYS_CLOCK_NANOSLEEP, nothing},
		{"a poll with a timeout neither ends early nor starts anew", "poll", sysPoll, nothing},
		{"a select with a timeout neither ends early nor starts anew", "select", sysSelect, nothing},
		{"a ppoll keeps its temporary mask and ends with a handler", "ppoll", unix.SYS_PPOLL, usr1},
		{"an epoll_wait does not see EINTR", "epoll", sysEpollWait, newline},
		{"an epoll_pwait does not see EINTR", "epoll-pwait", unix.SYS_EPOLL_PWAIT, newline},
		{"an epoll_wait sees EINTR when a handler runs", "epoll-signal", sysEpollWait, usr1},
		{"a sigtimedwait does not see EINTR", "sigtimedwait", unix.SYS_RT_SIGTIMEDWAIT, usr1},
		{"a pause ends with a handler only", "pause", sysPause, usr1},
		{"a running loop keeps its registers and floating point state", "compute", 0, nothing},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.nr < 0 {
				t.Skip("no such system call on this platform")
			}
			if runtime.GOARCH == "arm64" && strings.Contains(tt.mode, "epoll") {
				t.Skip("arm64 does not let a tracer restart a call that returned EINTR")
			}
			b := startBlocked(t, tt.mode)
			if tt.nr != 0 {
				b.sleeps(tt.nr)
			}
			b.disturb(100)
			tt.end(b)
			b.expect("ok")
		})
	}
}

func TestSignalsThatArriveDuringInjectedCallsAreDelivered(t *testing.T) {
	t.Run("none of 500 queued ones is lost", func(t *testing.T) {
		b := startBlocked(t, "signals")
		var injecting sync.WaitGroup
		over := make(chan struct{})
		injecting.Go(func() {
			for {
				select {
				case <-over:
					return
				default:
				}
				fd, _, err := injectUserfaultfd(b.pid())
				if errors.Is(err, errGone) {
					return
				}
				if errors.Is(err, errBusy) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				_ = unix.Close(fd)
			}
		})
		const realtime = syscall.Signal(34) // SIGRTMIN of the C library
		for range 500 {
			b.kill(realtime)
		}
		b.kill(realtime + 1)
		b.expect("ok")
		close(over)
		injecting.Wait()
	})
	t.Run("a handler without SA_RESTART ends a read, one with it does not", func(t *testing.T) {
		b := startBlocked(t, "read-signal")
		b.sleeps(unix.SYS_READ)
		b.disturb(10)
		b.kill(syscall.SIGUSR1)
		b.disturb(10)
		b.expect("ready")
		b.sleeps(unix.SYS_READ)
		b.disturb(10)
		b.kill(syscall.SIGUSR2)
		b.disturb(10)
		if _, err := io.WriteString(b.in, "x"); err != nil {
			t.Fatal(err)
		}
		b.expect("ok")
	})
}

func TestAStoppedProcessStaysStopped(t *testing.T) {
	b := startBlocked(t, "read")
	b.sleeps(unix.SYS_READ)
	stopProcess(t, b.pid())
	b.disturb(20)
	// The kernel stops it again on its own after the last detachment.
	waitFor(t, "the process to be stopped again", func() bool { return allStopped(t, b.pid()) })
	if _, err := io.WriteString(b.in, "x"); err != nil {
		t.Fatal(err)
	}
	b.disturb(1)
	waitFor(t, "the process to be stopped again", func() bool { return allStopped(t, b.pid()) })
	b.kill(syscall.SIGCONT)
	b.expect("ok")
}

func TestAStopThatArrivesDuringInjectedCallsTakesEffect(t *testing.T) {
	b := startBlocked(t, "read")
	b.sleeps(unix.SYS_READ)
	for range 50 {
		var injecting sync.WaitGroup
		injecting.Go(func() {
			fd, _, err := injectUserfaultfd(b.pid())
			if err != nil {
				t.Error(err)
				return
			}
			_ = unix.Close(fd)
		})
		b.kill(syscall.SIGSTOP)
		injecting.Wait()
		waitFor(t, "the process to stop", func() bool { return allStopped(t, b.pid()) })
		b.kill(syscall.SIGCONT)
	}
	if _, err := io.WriteString(b.in, "x"); err != nil {
		t.Fatal(err)
	}
	b.expect("ok")
}

func TestARestartableSequenceStartsOverAfterAnInjectedCall(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("written for amd64")
	}
	b := startBlocked(t, "rseq")
	for range 10 {
		// Held for longer than the process takes for suspicious.
		_, err := onSomeThread(b.pid(), func(t *tracee, pc uint64) error {
			pause := unix.NsecToTimespec(int64(120 * time.Millisecond))
			if err := unix.Nanosleep(&pause, nil); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
			// The kernel looks at the sequence only on the way out of a call.
			_, err := t.call(pc, unix.SYS_GETPID, 0, 0, 0)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	b.kill(syscall.SIGUSR1)
	b.expect("ok")
}

// children lists the processes that a process with one thread, or whose threads
// do not end, has forked.
func children(pid int) []int {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil
	}
	var pids []int
	for _, path := range tasks {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for _, field := range strings.Fields(string(raw)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func TestAProcessThatWaitsForAVforkChildIsReportedInFull(t *testing.T) {
	b := startBlocked(t, "vfork")
	waitFor(t, "the child", func() bool { return len(children(b.pid())) == 1 })
	sleepsIn(t, children(b.pid())[0], unix.SYS_READ)
	parent := checkpoint.Process{PID: 1, HostPID: b.pid()}
	child := checkpoint.Process{PID: 2, HostPID: children(b.pid())[0]}

	tracker, err := New(UffdWP, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer tracker.Close()
	for range 2 {
		began := time.Now()
		var pages checkpoint.Pages
		stats, err := tracker.Collect(t.Context(), []checkpoint.Process{parent}, Options{}, func(e checkpoint.Extent) error {
			pages += e.Pages
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if stats.Untracked != 1 || pages < 32 {
			t.Errorf("%+v and %d pages, want one process untracked and reported in full", stats, pages)
		}
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("it took %v", took)
		}
	}
	// Parent and child have one memory: only one of them is tracked.
	collect := func(opt Options) (Stats, map[checkpoint.PID]checkpoint.Pages) {
		t.Helper()
		pages := map[checkpoint.PID]checkpoint.Pages{}
		stats, err := tracker.Collect(t.Context(), []checkpoint.Process{child, parent}, opt, func(e checkpoint.Extent) error {
			pages[e.PID] += e.Pages
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return stats, pages
	}
	if stats, pages := collect(Options{}); pages[child.PID] == 0 || stats.Untracked+stats.Deferred != 1 {
		t.Errorf("%+v and pages %v, want the child tracked", stats, pages)
	}
	if _, pages := collect(Options{Frozen: true}); pages[parent.PID] < 32 {
		t.Errorf("pages %v: a frozen process that shares its memory must be reported in full", pages)
	}
	if _, err := io.WriteString(b.in, "x"); err != nil {
		t.Fatal(err)
	}
	b.expect("ready")
	waitFor(t, "the parent to be tracked", func() bool {
		stats, _ := collect(Options{})
		return stats.Untracked == 0 && stats.Deferred == 0 && stats.Processes == 1
	})
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(b.in, "x"); err != nil {
		t.Fatal(err)
	}
	b.expect("ok")
}

func TestNoForkedChildKeepsADescriptor(t *testing.T) {
	b := startBlocked(t, "forks")
	tracker, err := New(UffdWP, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer tracker.Close()
	procs := []checkpoint.Process{{PID: 1, HostPID: b.pid()}}
	collect := func() {
		t.Helper()
		if _, err := tracker.Collect(t.Context(), procs, Options{}, ignore); err != nil {
			t.Fatal(err)
		}
	}
	holders := func() []int {
		return slices.DeleteFunc(append(children(b.pid()), b.pid()), func(pid int) bool { return len(userfaultfds(pid)) == 0 })
	}
	for range 20 {
		// Tracked anew each time, as children are forked.
		collect()
		// A child that was being forked at the time shows up later, and is dealt
		// with by the next round.
		for _, pid := range holders() {
			collect()
			if left := userfaultfds(pid); len(left) > 0 {
				t.Errorf("process %d, forked by %d, keeps descriptors %v", pid, b.pid(), left)
			}
		}
		if err := tracker.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.WriteString(b.in, "x"); err != nil {
		t.Fatal(err)
	}
	b.expect("ok")
}

func TestAProcessWithoutItsMainThreadIsRefused(t *testing.T) {
	b := startBlocked(t, "leader")
	waitFor(t, "the main thread to exit", func() bool {
		st, err := readStat(fmt.Sprintf("/proc/%d/stat", b.pid()))
		return err == nil && st.state == 'Z'
	})
	for _, kind := range []Kind{UffdWP, None} {
		tracker, err := New(kind, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		_, err = tracker.Collect(t.Context(), []checkpoint.Process{{PID: 7, HostPID: b.pid()}}, Options{}, ignore)
		var refused *ProcessError
		if !errors.Is(err, ErrMainThreadExited) || !errors.As(err, &refused) || refused.PID != 7 {
			t.Errorf("%s: error %v, want %v of process 7", kind, err, ErrMainThreadExited)
		}
		if err := tracker.Close(); err != nil {
			t.Error(err)
		}
	}
}
