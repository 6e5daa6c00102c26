package migrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/tranship/tranship/checkpoint/lazypages"
)

// PageServerCommand is the word with which transhipd starts itself as a page server.
const PageServerCommand = "page-server"

// pageServer is the process that serves one migration's pages, whether this
// daemon started it or an earlier one did.
type pageServer struct {
	client *lazypages.Client
	// process is nil when an earlier daemon started it.
	process *lazypages.Process
	pid     int
	start   uint64
	control string // its socket; its last status is beside it
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

func startPageServer(ctx context.Context, daemon, dir string) (*pageServer, error) {
	cfg := lazypages.Config{
		Store: filepath.Join(dir, pagesDir), Images: filepath.Join(dir, imagesDir), Socket: filepath.Join(dir, lazySocket),
		Control: filepath.Join(dir, controlSocket),
	}
	p, err := lazypages.Spawn(ctx, []string{daemon, PageServerCommand}, cfg, filepath.Join(dir, serverLog))
	if err != nil {
		return nil, err
	}
	s := &pageServer{client: p.Client, process: p, pid: p.PID(), control: cfg.Control}
	if s.start, err = startTime(s.pid); err != nil {
		return nil, errors.Join(fmt.Errorf("page server: %w", err), s.kill())
	}
	return s, nil
}

// adoptPageServer finds the server of an earlier daemon; nil if there is none.
func adoptPageServer(dir string, pid int, start uint64) *pageServer {
	if pid == 0 {
		return nil
	}
	s := &pageServer{pid: pid, start: start, control: filepath.Join(dir, controlSocket)}
	// One that has ended left its last status.
	s.client, _ = lazypages.Dial(s.control)
	return s
}

// awaitFinished returns when CRIU has restored the shard. started gives the end
// of the restore command, which, if it is a failure, ends the wait.
func (s *pageServer) awaitFinished(ctx context.Context, started chan error) (time.Time, error) {
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
	st, err := s.client.WaitFinished(ctx)
	if err != nil {
		return time.Time{}, err
	}
	return st.FinishedAt, nil
}

// awaitDone returns when every page is placed.
func (s *pageServer) awaitDone(ctx context.Context) error {
	if s.client != nil {
		_, err := s.client.WaitDone(ctx)
		if err == nil || ctx.Err() != nil || !errors.Is(err, lazypages.ErrServerGone) {
			return err
		}
	}
	// It may have ended well before it was asked.
	st, err := lazypages.ReadStatus(s.control)
	if err != nil {
		return fmt.Errorf("the page server is gone without a last word: %w", err)
	}
	if st.State != lazypages.StateDone {
		return fmt.Errorf("the page server ended %s: %s", st.State, st.Error)
	}
	return nil
}

// state asks the server, or reads its last word.
func (s *pageServer) state(ctx context.Context) (lazypages.Status, error) {
	if s.client != nil {
		if st, err := s.client.Status(ctx); err == nil {
			return st, nil
		}
	}
	return lazypages.ReadStatus(s.control)
}

// ended says that nobody answers any more.
func (s *pageServer) ended(ctx context.Context) bool {
	if s.client == nil {
		return true
	}
	_, err := s.client.Status(ctx)
	if err != nil {
		return errors.Is(err, lazypages.ErrServerGone)
	}
	_, err = lazypages.ReadStatus(s.control) // its last
	return err == nil
}

// kill ends the server. Only after its tasks are dead: their missing pages would
// become zeros.
func (s *pageServer) kill() error {
	if s.process != nil {
		// Reap it as well, or it stays a zombie of this daemon.
		err := killByStart(s.pid, s.start)
		_ = s.process.Wait() // a killed process has no exit code worth telling
		return err
	}
	return killByStart(s.pid, s.start)
}

// reap collects a server that has ended by itself.
func (s *pageServer) reap() {
	if s.process != nil {
		_ = s.process.Wait() // what it did is in its status
	}
}

// exists says whether a path is there.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
