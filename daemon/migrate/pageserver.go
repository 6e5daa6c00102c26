package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tranship/tranship/checkpoint/lazypages"
)

// PageServerCommand is the word with which transhipd starts itself as a page server.
const PageServerCommand = "page-server"

// pageServer is the process that serves one migration's pages, whether this
// daemon started it or an earlier one did, and the ones that follow it if it
// dies.
type pageServer struct {
	client *lazypages.Client
	cfg    lazypages.Config
	daemon string // the program
	log    string
	over   atomic.Bool // nobody serves the pages any more, nor will

	mu sync.Mutex // guards what follows
	// process is nil when an earlier daemon started it.
	process *lazypages.Process
	pid     int
	start   uint64
}

const (
	// A server that died is followed by another, at most takeOverLimit times in
	// takeOverSpan: somebody may kill it, but what dies by itself will again.
	takeOverLimit = 5
	takeOverSpan  = time.Minute
	// takeOverPause doubles with each: what stands in the way may be passing.
	takeOverPause = 50 * time.Millisecond

	// fillAfter is the time in which runc ends, the link comes up and the shard
	// answers what has waited: filling in the background would have them wait for a
	// processor (docs/adr/0007).
	fillAfter = 300 * time.Millisecond
)

// pause returns false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// Names inside a migration's directory at the destination.
const (
	pagesDir      = "pages"
	imagesDir     = "images"
	workDir       = "work"
	lazySocket    = "work/lazy-pages.socket" // CRIU looks for it in its work directory
	controlSocket = "pages.sock"
	serverLog     = "page-server.log"
)

func newPageServer(daemon, dir string) *pageServer {
	s := &pageServer{daemon: daemon, log: filepath.Join(dir, serverLog), cfg: lazypages.Config{
		Store: filepath.Join(dir, pagesDir), Images: filepath.Join(dir, imagesDir), Socket: filepath.Join(dir, lazySocket),
		Control: filepath.Join(dir, controlSocket), FillAfter: fillAfter,
	}}
	s.client = lazypages.At(s.cfg.Control)
	return s
}

func startPageServer(ctx context.Context, daemon, dir string) (*pageServer, error) {
	s := newPageServer(daemon, dir)
	return s, s.spawn(ctx)
}

// adoptPageServer finds the server of an earlier daemon; nil if there is none.
func adoptPageServer(daemon, dir string, pid int, start uint64) *pageServer {
	if pid == 0 {
		return nil
	}
	s := newPageServer(daemon, dir)
	s.pid, s.start = pid, start
	return s
}

// spawn starts a process; with words, one that takes over.
func (s *pageServer) spawn(ctx context.Context, words ...string) error {
	s.reap()
	p, err := lazypages.Spawn(ctx, append([]string{s.daemon, PageServerCommand}, words...), s.cfg, s.log)
	if err != nil {
		return err
	}
	start, err := startTime(p.PID())
	s.mu.Lock()
	s.process, s.pid, s.start = p, p.PID(), start
	s.mu.Unlock()
	if err != nil { // it died at once
		return fmt.Errorf("page server: %w: %w", lazypages.ErrServerGone, err)
	}
	return nil
}

// awaitFinished returns when CRIU has restored the shard. started gives the end
// of the restore command, which, if it is a failure, ends the wait.
func (s *pageServer) awaitFinished(ctx context.Context, started chan error) (lazypages.Status, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case err := <-started:
			started <- err // for the caller, who waits for it too
			if err != nil {
				cancel(err)
			}
		case <-ctx.Done():
		}
	}()
	return s.client.WaitFinished(ctx)
}

// awaitDone returns when every page is placed. A server that dies is followed by
// another; if that cannot be, the shard must be stopped before kill.
func (s *pageServer) awaitDone(ctx context.Context, log *slog.Logger) error {
	defer s.over.Store(true)
	var tries []time.Time
	for {
		_, err := s.client.WaitDone(ctx)
		if err == nil || ctx.Err() != nil || !errors.Is(err, lazypages.ErrServerGone) {
			return err
		}
		switch now := lazypages.Look(s.cfg.Store); {
		case now.Served: // and had no place for this client
			if !pause(ctx, takeOverPause) {
				return context.Cause(ctx)
			}
			continue
		case !now.Held:
			return s.lost(ctx, err)
		}
		now := time.Now()
		if tries = append(tries, now); len(tries) > takeOverLimit {
			if now.Sub(tries[0]) < takeOverSpan {
				return fmt.Errorf("%d page servers died within %v: %w", len(tries), takeOverSpan, err)
			}
			tries = tries[1:]
		}
		if n := len(tries); n > 1 && !pause(ctx, takeOverPause<<n) {
			return context.Cause(ctx)
		}
		log.Warn("the page server has died; another takes over, and the shard waits for its pages until then", "err", err)
		if err := s.spawn(ctx, lazypages.TakeOverFlag); err != nil && ctx.Err() == nil {
			log.Warn("take over the pages", "err", err)
		}
	}
}

// lost is why nobody can take over, unless the server has ended by itself just
// now: its holder ends after its last word.
func (s *pageServer) lost(ctx context.Context, gone error) error {
	if _, err := s.client.WaitDone(ctx); !errors.Is(err, lazypages.ErrServerGone) {
		return err
	}
	return fmt.Errorf("%w, and so is whoever held the memory with it", gone)
}

// state asks the server, or reads its last word, or what it has left.
func (s *pageServer) state(ctx context.Context) (lazypages.Status, error) {
	st, err := s.client.Status(ctx)
	if err != nil {
		if now := lazypages.Look(s.cfg.Store); now.Held && !now.FinishedAt.IsZero() {
			return lazypages.Status{State: lazypages.StateFilling, Finished: true, FinishedAt: now.FinishedAt}, nil
		}
	}
	return st, err
}

// ended says that nobody serves any more, nor will.
func (s *pageServer) ended() bool {
	_, err := lazypages.ReadStatus(s.cfg.Control) // its last
	return err == nil || s.over.Load()
}

// kill ends the server and whoever holds the memory with it. Only after its tasks
// are dead, or lack nothing: their missing pages would become zeros.
func (s *pageServer) kill(ctx context.Context) error {
	s.mu.Lock()
	pid, start := s.pid, s.start
	s.mu.Unlock()
	err := killByStart(pid, start)
	if err == nil {
		s.reap() // or it stays a zombie of this daemon
	}
	return errors.Join(err, lazypages.LetGo(ctx, s.cfg.Store))
}

// reap collects a server that has ended.
func (s *pageServer) reap() {
	s.mu.Lock()
	p := s.process
	s.process = nil
	s.mu.Unlock()
	if p != nil {
		_ = p.Wait() // what it did is in its status
	}
}

// exists says whether a path is there.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
