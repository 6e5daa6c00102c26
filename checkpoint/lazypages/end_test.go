package lazypages

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/internal/testenv"
)

// ended waits for the task and says how it ended.
func (p *restored) ended() syscall.WaitStatus {
	p.t.Helper()
	for p.out.Scan() { // Wait closes the pipe, so it is read to its end
		p.t.Log(p.out.Text())
	}
	_ = p.cmd.Wait()
	return p.cmd.ProcessState.Sys().(syscall.WaitStatus)
}

func (p *restored) mustBeKilled() {
	p.t.Helper()
	if ws := p.ended(); !ws.Signaled() || ws.Signal() != syscall.SIGKILL {
		p.t.Errorf("task %d was not killed: status %#x", p.pid, ws)
	}
}

// bytes is what the store takes.
func (r *rig) bytes() checkpoint.Bytes {
	r.t.Helper()
	n, err := r.store.Bytes()
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

func TestSeveralTasksAndAZombieShareOneRestore(t *testing.T) {
	r := newRig(t)
	r.serve()
	r.connect()
	var tasks []*restored
	for i := range 3 {
		spec := newSpec(t, 3000, []string{"read", "chaos", "hold"}[i])
		spec.Threads, spec.Ops = 2, 60
		tasks = append(tasks, r.restore(spec))
		if _, err := r.criu.Write(binary.NativeEndian.AppendUint32(nil, uint32(0xffffffff-41))); err != nil { // -42
			t.Fatal(err)
		}
	}
	r.finish()
	for _, task := range tasks {
		task.say("go")
	}
	tasks[0].expect("ok")
	tasks[1].expect("ok")
	st := r.waitDone()
	if st.Tasks != 3 {
		t.Errorf("%d tasks", st.Tasks)
	}
	// The third has not looked at anything until everything is filled.
	tasks[2].expect("holding")
	tasks[2].say("verify")
	tasks[2].expect("ok")
}

func TestTasksAreKnownByThePIDOfTheirNamespace(t *testing.T) {
	t.Run("and are filled", func(t *testing.T) {
		r := newRig(t)
		r.namespaced = true
		r.serve()
		r.connect()
		spec := newSpec(t, 2000, "chaos")
		spec.Ops = 40
		task := r.restore(spec)
		r.finish()
		task.say("go")
		task.expect("ok")
		r.waitDone()
	})
	t.Run("and die with all of it", func(t *testing.T) {
		r := newRig(t)
		r.namespaced = true
		r.cfg.mayFill = func() bool { return false }
		ctx, cancel := context.WithCancel(r.ctx)
		defer cancel()
		r.serving = ctx
		r.serve()
		r.connect()
		task := r.restore(newSpec(t, 500, "parent"))
		r.finish()
		task.say("go")
		task.child() // 2, or some such
		task.expect("holding")
		cancel()
		if err := r.result(); !errors.Is(err, context.Canceled) {
			t.Errorf("result: %v", err)
		}
		task.mustBeKilled()
	})
}

func TestATaskMayExitWhileItIsFilled(t *testing.T) {
	r := newRig(t)
	r.cfg.mayFill = func() bool { return false } // it can end no other way
	r.serve()
	r.connect()
	task := r.restore(newSpec(t, 8000, "exit"))
	r.finish()
	task.say("go")
	task.expect("ok")
	if ws := task.ended(); ws.ExitStatus() != 0 {
		t.Fatalf("status %#x", ws)
	}
	st := r.waitDone()
	if st.Placed > 4000 {
		t.Errorf("%d pages were placed under a task that had read 1000", st.Placed)
	}
}

func TestChildrenThatOutliveTheTaskAreFilled(t *testing.T) {
	r := newRig(t)
	r.cfg.mayFill = func() bool { return false }
	r.serve()
	r.connect()
	task := r.restore(newSpec(t, 4000, "parent"))
	r.finish()
	task.say("go")
	child := task.child()
	defer func() { _ = unix.Kill(child, unix.SIGKILL) }()
	task.expect("holding")
	before := r.bytes()
	task.kill()
	// Only the child lacks pages now. It is alive, so they must be kept.
	r.await("the parent's death to be seen", func(st Status) bool { return st.Remaining <= checkpoint.Pages(before)/page && st.Forks == 1 })
	if got := r.bytes(); got == 0 || got > before {
		t.Errorf("the store takes %d bytes, %d before the parent died", got, before)
	}
	if err := unix.Kill(child, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.waitDone()
}

// child is the pid of a parent's child.
func (p *restored) child() int {
	p.t.Helper()
	for p.out.Scan() {
		var pid int
		if _, err := fmt.Sscanf(p.out.Text(), "child %d", &pid); err == nil {
			return pid
		}
		p.t.Log(p.out.Text())
	}
	p.t.Fatal("no child")
	return 0
}

// await asks for the status until it is as wanted.
func (r *rig) await(what string, enough func(Status) bool) {
	r.t.Helper()
	for {
		st, err := r.client.Status(r.ctx)
		if err != nil {
			r.t.Fatalf("%s: %v", what, err)
		}
		if enough(st) {
			return
		}
	}
}

func TestAFailedRestoreKillsItsTasksAndLeavesTheStoreForAnother(t *testing.T) {
	r := newRig(t)
	r.serve()
	r.connect()
	spec := newSpec(t, 2000, "hold")
	task := r.restore(spec)
	before := r.bytes()
	if err := r.criu.CloseWrite(); err != nil { // CRIU gives up
		t.Fatal(err)
	}
	var failed *FailedError
	if _, err := r.client.WaitFinished(r.ctx); !errors.As(err, &failed) {
		t.Fatalf("WaitFinished: %v", err)
	}
	if err := r.result(); err == nil || !strings.Contains(err.Error(), "EOF") {
		t.Fatalf("result: %v", err)
	}
	task.mustBeKilled()
	if got := r.bytes(); got != before {
		t.Fatalf("the store has %d bytes, had %d", got, before)
	}
	again := &rig{t: t, store: r.store, cfg: r.cfg, ctx: r.ctx}
	again.serve()
	again.connect()
	spec.Scenario = "read"
	second := again.restore(spec)
	again.finish()
	second.say("go")
	second.expect("ok")
	// The pages of the first attempt's pid are nobody's.
	if _, err := again.client.WaitDone(again.ctx); err != nil {
		t.Fatal(err)
	}
	if err := again.result(); err != nil {
		t.Fatal(err)
	}
}

func TestARestoreWhoseCRIUDiesHasFailed(t *testing.T) {
	r := newRig(t)
	r.serve()
	// CRIU's connection outlives CRIU, because its tasks have it too.
	criu := exec.Command(os.Args[0])
	criu.Env = append(os.Environ(), connectEnv+"="+r.cfg.Socket)
	out, err := criu.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := criu.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = criu.Process.Kill(); _ = criu.Wait() }()
	var fd int
	if _, err := fmt.Fscan(out, &fd); err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(criu.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	copied, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.FileConn(os.NewFile(uintptr(copied), "criu"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r.criu = conn.(*net.UnixConn)
	task := r.restore(newSpec(t, 100, "hold"))
	if err := criu.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := r.result(); err == nil || !strings.Contains(err.Error(), "EOF") {
		t.Fatalf("result: %v", err)
	}
	task.mustBeKilled()
}

func TestWhatCannotBeServedIsKilledWithItsChildren(t *testing.T) {
	for _, tc := range []struct {
		name string
		fail func(r *rig, cancel context.CancelCauseFunc, task *restored)
		want string
	}{
		{"the store's pages are lost", func(r *rig, _ context.CancelCauseFunc, task *restored) {
			if err := os.Truncate(filepath.Join(r.cfg.Store, fmt.Sprint(task.pid)+".pages"), 0); err != nil {
				r.t.Fatal(err)
			}
		}, "page was lost"},
		{"the server is cancelled", func(_ *rig, cancel context.CancelCauseFunc, _ *restored) {
			cancel(errors.New("told to end"))
		}, "told to end"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			ctx, cancel := context.WithCancelCause(r.ctx)
			defer cancel(nil)
			r.serving = ctx
			release := make(chan struct{})
			r.cfg.mayFill = func() bool {
				select {
				case <-release:
					return true
				default:
					return false
				}
			}
			r.serve()
			r.connect()
			tasks := []*restored{r.restore(newSpec(t, 2000, "parent")), r.restore(newSpec(t, 2000, "hold"))}
			r.finish()
			tasks[0].say("go")
			child := tasks[0].child()
			tasks[0].expect("holding")
			tc.fail(r, cancel, tasks[0])
			close(release)
			if err := r.result(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("result: %v", err)
			}
			for _, task := range tasks {
				task.mustBeKilled()
			}
			if stat, alive := statOf(child); alive {
				t.Errorf("the child lives on: %v", stat)
				_ = unix.Kill(child, unix.SIGKILL)
			}
			var failed *FailedError
			if _, err := r.client.WaitDone(context.Background()); !errors.As(err, &failed) || !failed.Status.Finished {
				t.Errorf("WaitDone: %v", err)
			}
		})
	}
}

// A shard whose memory limit is below what it had is for the kernel to judge: it
// kills, and the server neither hangs nor resumes.
func TestATaskWithoutRoomForItsPagesIsKilled(t *testing.T) {
	testenv.NeedRoot(t)
	group := memoryCgroup(t, 48<<20)
	r := newRig(t)
	r.entered = func(pid int) {
		if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(fmt.Sprint(pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	r.serve()
	r.connect()
	spec := newSpec(t, 1<<15, "hold") // 128 MiB
	spec.Dense = true
	task := r.restore(spec)
	r.finish()
	task.mustBeKilled()
	if err := r.result(); err != nil {
		t.Logf("the server gave up first: %v", err)
	}
	if size := r.bytes(); size != 0 && r.lastState() == StateDone {
		t.Errorf("the store still takes %d bytes", size)
	}
}

func (r *rig) lastState() State {
	r.t.Helper()
	st, err := ReadStatus(r.cfg.Control)
	if err != nil {
		r.t.Fatal(err)
	}
	return st.State
}

// killWhileFilling kills a page server that has placed some of a task's pages
// and not all. It may be too fast for that now and then.
func killWhileFilling(t *testing.T) (*rig, *restored) {
	t.Helper()
	for range 5 {
		r := newRig(t)
		r.spawn()
		r.connect()
		spec := newSpec(t, 1<<17, "hold")
		spec.Dense = true
		task := r.restore(spec)
		r.finish()
		full := r.bytes()
		for r.bytes() == full {
		}
		if err := unix.Kill(r.proc.PID(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = r.proc.Wait()
		if r.bytes() > 0 {
			return r, task
		}
		task.kill()
	}
	t.Fatal("it placed 512 MiB before it could be killed, five times")
	return nil, nil
}

// memoryCgroup makes a cgroup with a memory limit, of either version, under the
// test's own.
func memoryCgroup(t *testing.T, limit int) string {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		root, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
		if fields[1] == "" {
			root, file = "/sys/fs/cgroup", "memory.max"
		} else if fields[1] != "memory" {
			continue
		}
		dir := filepath.Join(root, fields[2], fmt.Sprintf("tranship-test-%d", os.Getpid()))
		if os.Mkdir(dir, 0o755) != nil {
			continue
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
		if os.WriteFile(filepath.Join(dir, file), []byte(fmt.Sprint(limit)), 0) == nil {
			return dir
		}
	}
	testenv.Missing(t, "a memory cgroup that can have children")
	return ""
}

func TestAnOrphanIsFoundByItsMissingPages(t *testing.T) {
	r := newRig(t)
	r.cfg.mayFill = func() bool { return false }
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	r.serving = ctx
	r.serve()
	r.connect()
	// Two tasks of one session; the first leaves an orphan.
	tasks := []*restored{r.restore(newSpec(t, 500, "parent")), r.restore(newSpec(t, 500, "hold"))}
	r.finish()
	tasks[0].say("go")
	child := tasks[0].child()
	defer func() { _ = unix.Kill(child, unix.SIGKILL) }()
	tasks[0].kill()
	cancel()
	if err := r.result(); !errors.Is(err, context.Canceled) {
		t.Errorf("result: %v", err)
	}
	// A process that was killed may still be on its way out, but without memory.
	const vsize = 23 - 3 // proc_pid_stat(5); the first of these fields is the third
	if stat, alive := statOf(child); alive && stat[vsize] != "0" {
		t.Errorf("the orphan lives on: %v", stat)
	}
	tasks[1].mustBeKilled()
}

func TestAServerMayEndBeforeARestore(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(r.ctx)
	defer cancel()
	r.serving = ctx
	r.serve()
	cancel()
	if err := r.result(); !errors.Is(err, context.Canceled) {
		t.Fatalf("result: %v", err)
	}
	var failed *FailedError
	if _, err := r.client.WaitFinished(r.ctx); !errors.As(err, &failed) {
		t.Errorf("WaitFinished: %v", err)
	}
	if _, err := os.Stat(r.cfg.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}

	again := &rig{t: t, store: r.store, cfg: r.cfg, ctx: r.ctx}
	again.serve()
	again.connect()
	task := again.restore(newSpec(t, 100, "read"))
	again.finish()
	task.say("go")
	task.expect("ok")
	again.waitDone()
}

func TestTheDeathOfAServerIsNoticed(t *testing.T) {
	t.Run("before a restore, and the next one takes over", func(t *testing.T) {
		r := newRig(t)
		r.spawn()
		waited := make(chan error, 1)
		go func() {
			_, err := r.client.WaitFinished(r.ctx)
			waited <- err
		}()
		r.await("a watcher", func(Status) bool { return true })
		if err := unix.Kill(r.proc.PID(), unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := r.result(); err == nil {
			t.Fatal("a killed process ended well")
		}
		if err := <-waited; !errors.Is(err, ErrServerGone) {
			t.Fatalf("WaitFinished: %v", err)
		}
		again := &rig{t: t, store: r.store, cfg: r.cfg, ctx: r.ctx}
		again.spawn()
		again.connect()
		task := again.restore(newSpec(t, 500, "read"))
		again.finish()
		task.say("go")
		task.expect("ok")
		again.waitDone()
	})
	t.Run("while filling, and nobody fills from what is left", func(t *testing.T) {
		r, task := killWhileFilling(t)
		if _, err := r.client.WaitDone(r.ctx); !errors.Is(err, ErrServerGone) {
			t.Fatalf("WaitDone: %v", err)
		}
		task.kill()
		again := &rig{t: t, store: r.store, cfg: r.cfg, ctx: r.ctx}
		again.serve()
		again.connect()
		// The same pid once more, which CRIU would give it, sent by this process.
		if err := sendPID(again.criu, int32(os.Getpid())); err != nil {
			t.Fatal(err)
		}
		_ = again.criu.Close()
		if err := again.result(); err == nil {
			t.Fatal("accepted")
		}
		f := &family{task: Task{PID: checkpoint.PID(task.pid)}, store: r.store}
		if err := f.load(r.cfg.Images); !errors.Is(err, errUsed) {
			t.Fatalf("a store that was used: %v", err)
		}
	})
}

func sendPID(conn *net.UnixConn, pid int32) error {
	_, err := conn.Write(binary.NativeEndian.AppendUint32(nil, uint32(pid)))
	return err
}

func TestStrangersAreRefused(t *testing.T) {
	for _, tc := range []struct {
		name string
		say  func(conn *net.UnixConn) error
		want string
	}{
		{"a number that is no pid", func(c *net.UnixConn) error { return sendPID(c, pidLimit+1) }, "not a pid"},
		{"pid zero", func(c *net.UnixConn) error { return sendPID(c, 0) }, "not a pid"},
		{"half a pid", func(c *net.UnixConn) error {
			_, err := c.Write([]byte{1, 0})
			return errors.Join(err, c.CloseWrite())
		}, "EOF"},
		{"a pid without a descriptor", func(c *net.UnixConn) error {
			_, err := c.Write([]byte{9, 0, 0, 0, 0})
			return err
		}, "0 descriptors"},
		{"a descriptor without a pid", func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix([]byte{9, 0, 0, 0}, unix.UnixRights(0), nil)
			return err
		}, "before its pid"},
		{"a pid that is not the sender's", func(c *net.UnixConn) error {
			if err := sendPID(c, int32(os.Getpid()+1)); err != nil {
				return err
			}
			_, _, err := c.WriteMsgUnix([]byte{0}, unix.UnixRights(0), nil)
			return err
		}, "has another pid"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			r.serve()
			r.connect()
			if err := tc.say(r.criu); err != nil {
				t.Fatal(err)
			}
			if err := r.result(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestARestoreWithoutTasksIsDone(t *testing.T) {
	r := newRig(t)
	// The names of containerd's work directories can be too long for a socket.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 30))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r.cfg.Control = filepath.Join(dir, "control")
	r.serve()
	r.connect()
	watching, cancel := context.WithTimeout(r.ctx, time.Minute)
	defer cancel()
	r.finish()
	if _, err := r.client.WaitDone(watching); err != nil {
		t.Fatal(err)
	}
	if err := r.result(); err != nil {
		t.Fatal(err)
	}
}
