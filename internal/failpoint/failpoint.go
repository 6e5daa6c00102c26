// Package failpoint lets tests stop, fail or kill a daemon at a named point.
// It is off unless the environment variable TRANSHIP_FAILPOINTS names a
// directory when the process starts; then Hit looks for a file with the point's
// name in it, whose first word says what happens:
//
//	pause        NAME.hit appears; Hit returns when the file NAME is removed
//	error TEXT   NAME.hit appears; Hit returns an error with TEXT, once
//	kill         NAME.hit appears; the process kills itself with SIGKILL
//
// Tests await NAME.hit, so that no test has to sleep.
package failpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// EnvDir is the variable that switches failpoints on.
const EnvDir = "TRANSHIP_FAILPOINTS"

// pausePoll is how often a paused point looks whether it was released; only
// ever used in tests.
const pausePoll = 2 * time.Millisecond

var dir = os.Getenv(EnvDir)

// Hit is a named point. Without failpoints switched on it costs one comparison.
func Hit(ctx context.Context, name string) error {
	if dir == "" {
		return nil
	}
	return hit(ctx, filepath.Join(dir, name), name)
}

func hit(ctx context.Context, path, name string) error {
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("failpoint %s: %w", name, err)
	}
	action, text, _ := strings.Cut(strings.TrimSpace(string(raw)), " ")
	mark := func() error { return os.WriteFile(path+".hit", nil, 0o600) }
	switch action {
	case "pause":
		if err := mark(); err != nil {
			return fmt.Errorf("failpoint %s: %w", name, err)
		}
		tick := time.NewTicker(pausePoll)
		defer tick.Stop()
		for {
			if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
				return nil
			}
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-tick.C:
			}
		}
	case "error":
		if err := errors.Join(os.Remove(path), mark()); err != nil {
			return fmt.Errorf("failpoint %s: %w", name, err)
		}
		return fmt.Errorf("failpoint %s: %s", name, text)
	case "kill":
		if err := errors.Join(os.Remove(path), mark()); err != nil {
			return fmt.Errorf("failpoint %s: %w", name, err)
		}
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // the signal ends the process
	}
	return fmt.Errorf("failpoint %s: unknown action %q", name, action)
}
