package lazypages

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/pagestore"
	"github.com/tranship/tranship/internal/testenv"
)

// patience ends a test that hangs, long before the test binary's own limit.
const patience = 2 * time.Minute

// rig is a destination: a store, images, a page server, and the part of CRIU.
type rig struct {
	t     testing.TB
	store *pagestore.Store
	cfg   Config
	ctx   context.Context
	// serving is ctx unless a test cancels the server alone.
	serving context.Context

	client *Client
	done   chan error // Serve's result
	proc   *Process
	criu   *net.UnixConn
	tasks  []*restored
	// entered is called with the host pid of each task before it begins.
	entered func(pid int)
	// namespaced gives each task a pid namespace, in which it is 1.
	namespaced bool
	// every: a spawned server fills one in so many pieces; 0 is all.
	every int
	// owed says which pages of a process come after the restore; nil is none.
	owed func(page uint64) bool
	// seal: the store says which pages were put last, as a migration's does.
	seal bool
}

func newRig(t testing.TB) *rig {
	t.Helper()
	testenv.NeedRoot(t)
	shm, err := os.MkdirTemp("/dev/shm", "tranship-lazypages-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(shm) })
	store, err := pagestore.Create(filepath.Join(shm, "store"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	r := &rig{t: t, store: store, ctx: ctx, cfg: Config{
		Store: filepath.Join(shm, "store"), Images: dir,
		Socket:  filepath.Join(dir, "lazy-pages.socket"),
		Control: filepath.Join(dir, "control.socket"),
		Log:     slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelInfo})),
	}}
	t.Cleanup(func() { _ = store.Close() })
	return r
}

type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// put stores the pages of a process and its images, with stale content in the
// store for pages that the process had dropped.
func (r *rig) put(pid int, spec taskSpec) {
	r.t.Helper()
	var lazy []span
	buf := make([]byte, 256*page)
	for from := uint64(0); from < spec.Pages; {
		k, stale := spec.dumpedKind(from)
		if k != dataKind && !stale {
			from++
			continue
		}
		to := from
		for ; to < spec.Pages && to-from < 256; to++ {
			k, stale := spec.dumpedKind(to)
			if k != dataKind && !stale {
				break
			}
			fillPage(buf[(to-from)*page:][:page], spec.content(to)^map[bool]uint64{true: 0xbad, false: 0}[stale])
			if at := spec.Base + to*page; k == dataKind {
				if n := len(lazy); n > 0 && lazy[n-1].end == at {
					lazy[n-1].end += page
				} else {
					lazy = append(lazy, span{at, at + page})
				}
			}
		}
		if err := r.store.PutPages(checkpoint.PID(pid), spec.Base+from*page, buf[:(to-from)*page]); err != nil {
			r.t.Fatal(err)
		}
		from = to
	}
	r.owe(checkpoint.PID(pid), spec)
	if r.seal {
		if err := r.store.Seal(); err != nil {
			r.t.Fatal(err)
		}
	}
	whole := span{spec.Base, spec.Base + spec.Pages*page}
	vmas := []testVMA{{whole, lazyVMA, 1 | 1<<9, 0}}
	if spec.Wipe > 0 {
		cut := whole.end - spec.Wipe*page
		vmas = []testVMA{
			{span{whole.start, cut}, lazyVMA, 1 | 1<<9, 0},
			{span{cut, whole.end}, lazyVMA, 1 | 1<<9, 1 << madvWipeOnFork},
		}
	}
	writeImagesOf(r.t, r.cfg.Images, checkpoint.PID(pid), vmas, lazy)
}

// serve starts the server in this process.
func (r *rig) serve() {
	r.t.Helper()
	ready := make(chan struct{})
	r.cfg.Ready = func() { close(ready) }
	r.done = make(chan error, 1)
	ctx := r.serving
	if ctx == nil {
		ctx = r.ctx
	}
	go func() { r.done <- Serve(ctx, r.cfg) }()
	select {
	case <-ready:
	case err := <-r.done:
		r.t.Fatal(err)
	}
	r.client = At(r.cfg.Control)
	r.t.Cleanup(func() {
		if r.criu != nil {
			_ = r.criu.Close()
		}
		for _, task := range r.tasks {
			task.kill()
		}
		if t := r.t; t.Failed() && r.client != nil {
			if st, err := r.client.Status(context.Background()); err == nil {
				t.Logf("page server: %+v", st)
			}
		}
	})
}

// spawn starts the server as a process, as the daemon does.
func (r *rig) spawn() {
	r.t.Helper()
	r.t.Setenv(serverEnv, fmt.Sprint(max(1, r.every)))
	log := filepath.Join(r.cfg.Images, "page-server.log")
	proc, err := Spawn(r.ctx, []string{os.Args[0]}, r.cfg, log)
	if err != nil {
		r.t.Fatal(err)
	}
	r.proc = proc
	r.client = At(r.cfg.Control)
	r.t.Cleanup(func() {
		for _, task := range r.tasks {
			task.kill()
		}
		if err := LetGo(context.Background(), r.cfg.Store); err != nil {
			r.t.Error(err)
		}
		_ = r.proc.Wait()
		raw, err := os.ReadFile(log)
		if err != nil {
			r.t.Error(err)
		}
		if len(raw) > 0 {
			r.t.Logf("page server: %s", raw)
		}
	})
}

// connect is CRIU's one connection.
func (r *rig) connect() {
	r.t.Helper()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: r.cfg.Socket, Net: "unix"})
	if err != nil {
		r.t.Fatal(err)
	}
	r.criu = conn
	r.t.Cleanup(func() { _ = conn.Close() })
}

// finish is CRIU's last word.
func (r *rig) finish() {
	r.t.Helper()
	if _, err := r.criu.Write(binary.NativeEndian.AppendUint32(nil, restoreFinished)); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.client.WaitFinished(r.ctx); err != nil {
		r.t.Fatal(err)
	}
}

// waitDone expects a good end, and that the store has no page left.
func (r *rig) waitDone() Status {
	r.t.Helper()
	st, err := r.client.WaitDone(r.ctx)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.result(); err != nil {
		r.t.Fatal(err)
	}
	last, err := ReadStatus(r.cfg.Control)
	if err != nil {
		r.t.Fatal(err)
	}
	if last.State != StateDone || last.Remaining != 0 {
		r.t.Fatalf("status file says %+v", last)
	}
	if size, err := r.store.Bytes(); err != nil || size != 0 {
		r.t.Fatalf("the store still takes %d bytes, %v", size, err)
	}
	return st
}

// result is how the server ended.
func (r *rig) result() error {
	r.t.Helper()
	if r.proc != nil {
		return r.proc.Wait()
	}
	select {
	case err := <-r.done:
		return err
	case <-r.ctx.Done():
		r.t.Fatal("the server does not end")
		return nil
	}
}

// restored is a process that plays a restored task.
type restored struct {
	t    testing.TB
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Scanner
	spec taskSpec
	pid  int
}

// restore starts a task up to the point where it waits for CRIU to finish. Its
// pages are stored when its pid is known.
func (r *rig) restore(spec taskSpec) *restored {
	r.t.Helper()
	raw, err := json.Marshal(spec)
	if err != nil {
		r.t.Fatal(err)
	}
	conn, err := r.criu.File()
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close()
	// The shell holds the task back until its pages are stored.
	cmd := exec.Command("/bin/sh", "-c", `read -r line && exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), taskEnv+"="+string(raw))
	cmd.ExtraFiles = []*os.File{conn}
	cmd.Stderr = os.Stderr
	if r.namespaced {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	}
	task := &restored{t: r.t, cmd: cmd, spec: spec}
	if task.in, err = cmd.StdinPipe(); err != nil {
		r.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		r.t.Fatal(err)
	}
	task.out = bufio.NewScanner(out)
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	task.pid = cmd.Process.Pid
	r.tasks = append(r.tasks, task)
	r.t.Cleanup(task.kill)
	context.AfterFunc(r.ctx, func() { // ends a hanging expect, even if a child has the pipe
		_ = cmd.Process.Kill()
		_ = out.Close()
	})
	if r.entered != nil {
		r.entered(task.pid)
	}
	known := task.pid
	if r.namespaced {
		known = 1
	}
	r.put(known, spec)
	task.say("start")
	task.expect("registered")
	return task
}

func (p *restored) say(line string) {
	p.t.Helper()
	if _, err := fmt.Fprintln(p.in, line); err != nil {
		p.t.Fatal(err)
	}
}

func (p *restored) expect(want string) {
	p.t.Helper()
	for p.out.Scan() {
		switch line := p.out.Text(); {
		case line == want:
			return
		case strings.HasPrefix(line, "bad"):
			p.t.Fatal(line)
		default:
			p.t.Log(line)
		}
	}
	p.t.Fatalf("task %d ended before it said %q: %v", p.pid, want, p.cmd.Wait())
}

// kill ends the task; harmless when it has ended.
func (p *restored) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

func newSpec(t testing.TB, pages uint64, scenario string) taskSpec {
	seed := rand.Uint64()
	if s := os.Getenv("TRANSHIP_TEST_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("seed %d (set TRANSHIP_TEST_SEED to repeat)", seed)
	return taskSpec{Seed: seed, Base: 0x10_0000_0000, Pages: pages, Threads: 4, Ops: 400, Scenario: scenario}
}

func TestEveryPageIsWhatWasDumped(t *testing.T) {
	for _, tc := range []struct {
		name    string
		threads int
		pages   uint64
	}{
		{"one page", 1, 1},
		{"one thread", 1, 20_000},
		{"more threads than processors, all over the same pages", 8, 20_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			r.serve()
			r.connect()
			spec := newSpec(t, tc.pages, "read")
			spec.Threads = tc.threads
			task := r.restore(spec)
			r.finish()
			task.say("go")
			task.expect("ok")
			st := r.waitDone()
			t.Logf("%+v", st)
		})
	}
}

func TestMemoryThatChangesWhileItIsFilledStaysRight(t *testing.T) {
	for _, tc := range []struct {
		name    string
		threads int
		ops     int
		forks   bool
		wipe    uint64
		spawn   bool
		every   int64 // one in so many pieces is filled
		after   time.Duration
	}{
		{"one thread", 1, 800, false, 0, false, 8, 0},
		{"eight threads", 8, 200, false, 0, false, 8, 0},
		{"eight threads, filled as fast as can be", 8, 100, false, 0, false, 1, 0},
		{"eight threads, filled after a while", 8, 400, false, 0, false, 8, 50 * time.Millisecond},
		{"forking all the time", 4, 40, true, 0, false, 16, 0},
		{"forking before it is filled", 4, 40, true, 0, false, 16, 50 * time.Millisecond},
		{"forking with memory that is wiped on fork", 1, 40, true, 300, false, 16, 0},
		{"served by a process of its own", 6, 150, false, 0, true, 1, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			r.seal = true
			var asked atomic.Int64
			r.cfg.mayFill = func() bool { return asked.Add(1)%tc.every == 0 }
			r.cfg.FillAfter = tc.after
			if tc.spawn {
				r.spawn()
			} else {
				r.serve()
			}
			r.connect()
			spec := newSpec(t, 12_000, "chaos")
			spec.Threads, spec.Ops, spec.ForkOften, spec.Wipe = tc.threads, tc.ops, tc.forks, tc.wipe
			task := r.restore(spec)
			// The processes run before filling begins, which makes it last.
			task.say("go")
			r.finish()
			task.expect("ok")
			st := r.waitDone()
			t.Logf("%+v", st)
		})
	}
}

func TestWhatWasWrittenLastIsPlacedFirst(t *testing.T) {
	r := newRig(t)
	r.seal = true
	r.cfg.FillAfter = time.Hour
	var cancel func()
	r.serving, cancel = context.WithCancel(r.ctx)
	defer cancel()
	r.serve()
	r.connect()
	spec := newSpec(t, 3000, "hold")
	spec.Dense = true
	task := r.restore(spec)
	want := checkpoint.Pages(0)
	if err := r.store.Latest(checkpoint.PID(task.pid), func(addr uint64, n checkpoint.Pages) error {
		if end := addr + uint64(n.Bytes()); end != spec.Base+spec.Pages*page {
			t.Errorf("%d pages at %#x were not the last", n, addr)
		}
		want += n
		return nil
	}); err != nil || want == 0 || want >= 3000 {
		t.Fatalf("%d pages are known to be the last, %v", want, err)
	}
	r.finish()
	for tick := time.Tick(time.Millisecond); ; <-tick {
		st, err := r.client.Status(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if st.Placed == want {
			if st.State != StateFinished || st.Faults != 0 || st.Remaining != 3000-want {
				t.Errorf("%+v", st)
			}
			break
		}
	}
	task.say("go")
	task.expect("holding")
	task.say("verify")
	task.expect("ok")
	cancel()
	if err := r.result(); !errors.Is(err, context.Canceled) {
		t.Errorf("result: %v", err)
	}
}
