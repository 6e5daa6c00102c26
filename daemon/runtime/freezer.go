package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// FreezerState is what the kernel says about a cgroup.
type FreezerState string

const (
	Thawed   FreezerState = "thawed"
	Freezing FreezerState = "freezing"
	Frozen   FreezerState = "frozen"
)

// Freezer stops and continues all processes of a shard, those in nested
// cgroups included: both versions freeze whole subtrees. Every method may run
// twice; the state is the kernel's, so a restarted daemon finds it as it is.
type Freezer struct {
	dir string
	v2  bool
}

// Freezer gives the cgroup's freezer.
func (c Cgroup) Freezer() *Freezer { return &Freezer{dir: c.Dir, v2: c.V2} }

const (
	// A running process freezes within a scheduling tick; the blackout pays for
	// every interval between two looks.
	freezePoll = 200 * time.Microsecond
	// A process in uninterruptible sleep (on a dead NFS server) never freezes.
	freezeTimeout = 10 * time.Second
	// v1 can stay in FREEZING when a task forks at the wrong moment, until it is
	// thawed and frozen again (runc issues 2316 and 2661).
	refreezeAfter = 50 * time.Millisecond
)

// Freeze returns when no process of the shard runs any more. When it returns an
// error, it has thawed the shard.
func (f *Freezer) Freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, freezeTimeout,
		fmt.Errorf("still running after %v: a process is stuck in the kernel", freezeTimeout))
	defer cancel()
	err := f.await(ctx, Frozen)
	if err == nil {
		return nil
	}
	undo, cancelUndo := detached(ctx)
	defer cancelUndo()
	return errors.Join(fmt.Errorf("freeze %s: %w", f.dir, err), f.Thaw(undo))
}

// Thaw lets the shard run. A cgroup that is gone counts as thawed.
func (f *Freezer) Thaw(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, freezeTimeout,
		fmt.Errorf("still frozen after %v: an ancestor cgroup is frozen", freezeTimeout))
	defer cancel()
	err := f.await(ctx, Thawed)
	if err == nil || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("thaw %s: %w", f.dir, err)
}

func (f *Freezer) await(ctx context.Context, want FreezerState) error {
	if err := f.set(want); err != nil {
		return err
	}
	tick := time.NewTicker(freezePoll)
	defer tick.Stop()
	last := time.Now()
	for {
		state, err := f.State()
		if err != nil {
			return err
		}
		if state == want {
			return nil
		}
		if want == Frozen && !f.v2 && time.Since(last) > refreezeAfter {
			last = time.Now()
			if err := errors.Join(f.set(Thawed), f.set(Frozen)); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

func (f *Freezer) set(want FreezerState) error {
	file, value := "freezer.state", strings.ToUpper(string(want))
	if f.v2 {
		file, value = "cgroup.freeze", map[FreezerState]string{Thawed: "0", Frozen: "1"}[want]
	}
	// Not os.WriteFile: it would create a plain file if dir were not a cgroup.
	w, err := os.OpenFile(filepath.Join(f.dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = w.WriteString(value)
	return errors.Join(err, w.Close())
}

// State asks the kernel.
func (f *Freezer) State() (FreezerState, error) {
	if !f.v2 {
		raw, err := os.ReadFile(filepath.Join(f.dir, "freezer.state"))
		if err != nil {
			return "", err
		}
		return FreezerState(strings.ToLower(strings.TrimSpace(string(raw)))), nil
	}
	wanted, err := os.ReadFile(filepath.Join(f.dir, "cgroup.freeze"))
	if err != nil {
		return "", err
	}
	events, err := os.ReadFile(filepath.Join(f.dir, "cgroup.events"))
	if err != nil {
		return "", err
	}
	frozen := strings.Contains("\n"+string(events), "\nfrozen 1\n")
	switch {
	case frozen:
		return Frozen, nil // or an ancestor is, which is none of ours to thaw
	case strings.TrimSpace(string(wanted)) == "1":
		return Freezing, nil
	}
	return Thawed, nil
}
