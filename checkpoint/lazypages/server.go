package lazypages

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/pagestore"
	"github.com/tranship/tranship/internal/failpoint"
)

// server is one Serve.
type server struct {
	cfg      Config
	store    *pagestore.Store
	probe    prober
	count    counters
	running  chan struct{} // closed when CRIU has finished
	finished chan struct{} // closed when filling may begin
	lock     *os.File
	epoch    int
	keeper   *keeper // nil without a holder

	mu       sync.Mutex // guards what follows
	status   Status
	changed  chan struct{} // closed and replaced when status.State changes
	families []*family
	news     chan struct{} // closed and replaced when a puller may find something
	fillFrom time.Time
}

// Serve answers one restore: it returns nil when every page is placed. On an error,
// of ctx too, no task that was handed over runs any more.
//
//  1. listen for the daemon and for CRIU
//  2. receive tasks; serve each from the moment it comes
//  3. CRIU has finished: fill, give back
//  4. on an error: kill the tasks, then let go of their memory
func Serve(ctx context.Context, cfg Config) error {
	s, err := newServer(ctx, cfg)
	if err != nil {
		return err
	}
	if err := s.begin(ctx); err != nil {
		return errors.Join(err, s.close())
	}
	control, err := listen(cfg.Control)
	if err != nil {
		return errors.Join(err, s.close())
	}
	lazy, err := listenLazy(cfg.Socket)
	if err != nil {
		return errors.Join(err, control.Close(), s.close())
	}
	return s.serve(control, func() error { return s.serveRestore(ctx, lazy) })
}

// serve answers the daemon until work has ended, and leaves the last status.
func (s *server) serve(control *net.UnixListener, work func() error) error {
	controlDone := make(chan struct{})
	go func() {
		defer close(controlDone)
		s.serveControl(control)
	}()
	if s.cfg.Ready != nil {
		s.cfg.Ready()
	}
	err := work()
	if err != nil {
		s.setState(StateFailed, err)
	} else {
		s.setState(StateDone, nil)
	}
	err = errors.Join(err, s.writeStatus(), control.Close())
	<-controlDone
	return errors.Join(err, s.close())
}

// newServer opens what is there, once the server before is gone.
func newServer(ctx context.Context, cfg Config) (*server, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if _, err := os.Stat(cfg.Images); err != nil {
		return nil, fmt.Errorf("serve pages: images: %w", err)
	}
	locked, err := lock(ctx, cfg.Store)
	if err != nil {
		return nil, err
	}
	// Opened behind the lock: the one before may have written until then.
	store, err := pagestore.Open(cfg.Store)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("serve pages: %w", err), locked.Close())
	}
	probe, err := newProber()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("serve pages: %w", err), store.Close(), locked.Close())
	}
	return &server{
		cfg: cfg, store: store, probe: probe, lock: locked,
		running:  make(chan struct{}),
		finished: make(chan struct{}),
		changed:  make(chan struct{}),
		news:     make(chan struct{}),
		status:   Status{SchemaVersion: 1, State: StateListening},
	}, nil
}

// begin clears away what an earlier restore that failed has left, and starts a
// holder. It is long before the shard stands still.
func (s *server) begin(ctx context.Context) error {
	fail := func(err error) error { return fmt.Errorf("serve pages: an earlier restore: %w", err) }
	if err := LetGo(ctx, s.cfg.Store); err != nil {
		return fail(err)
	}
	if err := removeLogs(s.cfg.Store, func(int) bool { return true }); err != nil {
		return fail(err)
	}
	for _, path := range []string{filepath.Join(s.cfg.Store, fillFile), StatusFile(s.cfg.Control)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fail(err)
		}
	}
	return s.hold(fillState{SchemaVersion: 1})
}

// hold starts a holder if there is to be one.
func (s *server) hold(state fillState) error {
	if !s.cfg.Hold {
		return nil
	}
	self, err := procOf(os.Getpid())
	if err != nil {
		return err
	}
	state.Server = self
	s.keeper, err = newKeeper(s.cfg.Store, state, func(err error) {
		// The shard runs on; what remains is that nobody may kill this process.
		s.cfg.Log.Error("the userfaultfds have no second holder", "err", err)
	})
	return err
}

func (s *server) close() error {
	var err error
	if s.keeper != nil {
		err = s.keeper.close()
	}
	return errors.Join(err, s.probe.close(), s.store.Close(), s.lock.Close())
}

// serveRestore accepts CRIU's connection and stays until the last page.
func (s *server) serveRestore(ctx context.Context, lazy *net.UnixListener) error {
	conn, err := s.accept(ctx, lazy)
	if err != nil {
		return err
	}
	defer conn.Close()
	stopWatching, err := watchPeer(conn)
	if err != nil {
		return err
	}
	defer stopWatching()
	return s.serveTasks(ctx, func(ctx context.Context, g *errgroup.Group) error {
		defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(unixEpoch) })()
		return s.receive(ctx, g, conn)
	})
}

// serveTasks stays until the last page. take begins the families.
func (s *server) serveTasks(ctx context.Context, take func(context.Context, *errgroup.Group) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return take(gctx, g) })
	err := g.Wait()
	if err == nil {
		return s.release()
	}
	s.setError(err)
	// At once: whoever takes over if this process is killed now finds them dead.
	s.cfg.Log.Error("pages cannot be served; the tasks are killed", "err", err)
	// The context may be the reason, and this must be done all the same.
	if stopErr := s.stopTasks(context.WithoutCancel(ctx)); stopErr != nil {
		err = errors.Join(err, stopErr)
	}
	return errors.Join(err, s.release())
}

// accept waits for CRIU. One restore connects once; the socket is gone after.
func (s *server) accept(ctx context.Context, lazy *net.UnixListener) (*net.UnixConn, error) {
	defer context.AfterFunc(ctx, func() { _ = lazy.SetDeadline(unixEpoch) })()
	conn, err := lazy.AcceptUnix()
	err = errors.Join(err, os.Remove(s.cfg.Socket), lazy.Close())
	if ctx.Err() != nil {
		if conn != nil {
			_ = conn.Close()
		}
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("accept a restore: %w", err)
	}
	s.setState(StateRestoring, nil)
	return conn, nil
}

// receive takes what CRIU hands over, and starts a family for each task.
func (s *server) receive(ctx context.Context, g *errgroup.Group, conn *net.UnixConn) error {
	for {
		task, what, err := receiveTask(conn)
		if ctx.Err() != nil {
			task.close()
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("restore: %w", err)
		}
		switch what {
		case gotZombie:
			continue
		case gotFinished:
			return s.finish(ctx)
		}
		s.cfg.Log.Debug("task received", "pid", task.PID, "host_pid", task.HostPID)
		f, err := s.adopt(task)
		if err != nil {
			return err
		}
		s.start(ctx, g, f)
	}
}

func (s *server) start(ctx context.Context, g *errgroup.Group, f *family) {
	g.Go(func() error { return f.run(ctx) })
	// A family that waits must hear of the end of its siblings.
	context.AfterFunc(ctx, f.wakeUp)
}

// adopt makes the family of a task that was restored. From here on the task's
// descriptors belong to the server, whatever fails.
func (s *server) adopt(task Task) (*family, error) {
	f, err := s.newFamily(task)
	if err != nil {
		return nil, fmt.Errorf("serve pid %d: %w", task.PID, err)
	}
	if err := f.load(s.cfg.Images); err != nil {
		return nil, fmt.Errorf("serve pid %d: %w", task.PID, err)
	}
	host, err := procOf(task.HostPID)
	if err != nil {
		return nil, fmt.Errorf("serve pid %d: %w", task.PID, err)
	}
	f.start = host.Start
	f.logPath = logPath(s.cfg.Store, task.PID, s.epoch)
	fresh := snapshot{pid: task.PID, hostPID: task.HostPID, start: f.start, fresh: true, spaces: []savedSpace{{fd: task.UFFD}}}
	if f.events, err = createLog(f.logPath, fresh.encode(), minSlots); err != nil {
		return nil, fmt.Errorf("serve pid %d: %w", task.PID, err)
	}
	return f, nil
}

// newFamily makes a family without pages.
func (s *server) newFamily(task Task) (*family, error) {
	f := &family{
		task: task, store: s.store, probe: s.probe, count: &s.count, running: s.running, finish: s.finished,
		log: s.cfg.Log, mayFill: s.cfg.mayFill, spaces: []*space{{name: fmt.Sprintf("pid %d", task.PID), fd: task.UFFD}},
		wakeFD: -1, stride: minFill,
	}
	f.hungry = s.tellHungry
	s.mu.Lock()
	s.families = append(s.families, f)
	s.status.Tasks++
	s.mu.Unlock()
	var err error
	if f.wakeFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	for range min(maxLanes, runtime.GOMAXPROCS(0)) {
		buf, err := unix.Mmap(-1, 0, maxFill*checkpoint.PageSize,
			unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return nil, fmt.Errorf("buffer: %w", err)
		}
		f.bufs = append(f.bufs, buf)
	}
	return f, nil
}

// finish says that the restored tasks are about to run.
func (s *server) finish(ctx context.Context) error {
	at := time.Now()
	if s.keeper != nil {
		// From here on another server may take over, and before nobody is told.
		if err := s.keeper.update(func(state *fillState) { state.FinishedAt = at }); err != nil {
			return err
		}
	}
	return s.fill(ctx, at)
}

// fill begins to place what has not faulted.
func (s *server) fill(ctx context.Context, finished time.Time) error {
	s.mu.Lock()
	s.fillFrom = finished
	s.status.FinishedAt, s.status.Finished = finished, true
	families := s.families
	if len(families) > 0 {
		first := slices.MinFunc(families, func(a, b *family) int { return cmp.Compare(a.task.PID, b.task.PID) })
		s.status.InitHostPID = first.task.HostPID
	}
	s.mu.Unlock()
	s.setState(StateFinished, nil)
	if err := failpoint.Hit(ctx, "pages.fill"); err != nil {
		return err
	}
	wake := func() {
		for _, f := range families {
			f.wakeUp()
		}
	}
	close(s.running)
	wake()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	// The clock may have been set since.
	case <-time.After(min(s.cfg.FillAfter, time.Until(finished.Add(s.cfg.FillAfter)))):
	}
	close(s.finished)
	s.setState(StateFilling, nil)
	wake()
	return nil
}

// release gives the families' descriptors and buffers back. The families have
// ended, and no task lacks a page or lives.
func (s *server) release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, f := range s.families {
		for _, sp := range f.spaces {
			if sp.fd >= 0 {
				errs = append(errs, unix.Close(sp.fd))
			}
		}
		f.spaces = nil
		errs = append(errs, f.close())
		if f.task.PIDFD >= 0 { // else it had died before this server began
			errs = append(errs, unix.Close(f.task.PIDFD))
		}
	}
	return errors.Join(errs...)
}

func (s *server) setState(state State, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.State = state
	if err != nil {
		s.status.Error = err.Error()
	}
	if state.Final() && !s.fillFrom.IsZero() {
		s.status.FillMs = milliseconds(time.Since(s.fillFrom))
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// setError tells why the tasks are being killed; StateFailed follows when they are.
func (s *server) setError(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.Error = err.Error()
}

// snapshot returns the status, and a channel that is closed when it has entered
// another state.
func (s *server) snapshot() (Status, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	st.Placed = checkpoint.Pages(s.count.placed.Load())
	st.Zeroes = checkpoint.Pages(s.count.zeroes.Load())
	st.Faults = s.count.faults.Load()
	st.Forks = s.count.forks.Load()
	for _, f := range s.families {
		st.Remaining += checkpoint.Pages(f.pending.Load())
		st.Owed += f.wanted.count()
	}
	if !st.State.Final() && !s.fillFrom.IsZero() {
		st.FillMs = milliseconds(time.Since(s.fillFrom))
	}
	return st, s.changed
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// StatusFile is where a server with that control socket leaves its last status.
// There is none while it lives, or if it was killed.
func StatusFile(control string) string { return control + ".status" }

// writeStatus leaves the last status behind, whole or not at all.
func (s *server) writeStatus() error {
	path := StatusFile(s.cfg.Control)
	st, _ := s.snapshot()
	raw, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("status file: %w", err)
	}
	tmp := path + ".part"
	if err := os.WriteFile(tmp, append(raw, '\n'), 0o600); err != nil {
		return fmt.Errorf("status file: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("status file: %w", err)
	}
	return nil
}

// ReadStatus reads the last status of a server that has ended.
func ReadStatus(control string) (Status, error) {
	raw, err := os.ReadFile(StatusFile(control))
	if err != nil {
		return Status{}, fmt.Errorf("status of a page server: %w", err)
	}
	var st Status
	if err := json.Unmarshal(raw, &st); err != nil {
		return Status{}, fmt.Errorf("status of a page server: %w", err)
	}
	return st, nil
}

// unixEpoch as a deadline ends a blocked call at once.
var unixEpoch = time.Unix(1, 0)
