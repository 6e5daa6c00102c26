package profiler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tranship/tranship/daemon/runtime"
)

// Bounds of the window of a measurement: shorter, and the time that arming takes
// matters; longer, and a shard is write-protected for nothing.
const (
	minWindow = 200 * time.Millisecond
	maxWindow = 10 * time.Second
)

// ErrNoTracker: this host cannot track written pages.
var ErrNoTracker = errors.New("written pages cannot be tracked on this host")

// DirtyRate measures how many different pages a shard writes in a second, over a
// window, with the tracker that migrations use. It never runs beside a migration
// of the shard: one that begins ends it.
func (p *Profiler) DirtyRate(ctx context.Context, namespace, name string, window time.Duration) (float64, error) {
	if p.cfg.Dirty == nil || p.cfg.TrackerWhy != "" {
		return 0, ErrNoTracker
	}
	if window == 0 {
		window = time.Second
	}
	window = min(max(window, minWindow), maxWindow)
	rate, err := p.cfg.Dirty(ctx, namespace, name, window)
	if err != nil {
		return 0, fmt.Errorf("dirty rate of %s: %w", name, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.subjects[namespace+"/"+name]; s != nil {
		s.dirty, s.dirtyKnown, s.dirtyFresh, s.dirtyTried = rate, true, true, time.Now()
	}
	return rate, nil
}

const (
	// scheduledWindow is what a planned measurement lasts: a rate is per second.
	scheduledWindow = time.Second
	// dirtyDuty: arming and scanning may take a hundredth of the time at most,
	// however many shards there are and however large; then the schedule slips.
	dirtyDuty = 100
	// dirtyLook is how often it is looked for a shard whose turn it is.
	dirtyLook = 5 * time.Second
)

// measureDirty measures every shard's dirty rate now and then, one at a time. A
// shard that is migrating is left out, and one that begins to is let go.
func (p *Profiler) measureDirty(ctx context.Context) {
	if p.cfg.DirtyEvery <= 0 || p.cfg.Dirty == nil || p.cfg.TrackerWhy != "" {
		return
	}
	for pause := dirtyLook; ctx.Err() == nil; {
		wait(ctx, pause)
		pause = dirtyLook
		namespace, name, ok := p.dueDirty(time.Now())
		if !ok || ctx.Err() != nil {
			continue
		}
		begun := time.Now()
		if _, err := p.DirtyRate(ctx, namespace, name, scheduledWindow); err != nil && ctx.Err() == nil {
			p.log.Debug("profiles: dirty rate", "shard", namespace+"/"+name, "err", err)
		}
		pause = max(pause, dirtyDuty*(time.Since(begun)-scheduledWindow))
	}
}

// dueDirty picks the shard whose turn came first, if any did, and notes that it
// was tried: one that cannot be measured waits for its next turn as well. Shards
// of other orchestrators are not stopped, not for a moment, without being asked.
func (p *Profiler) dueDirty(at time.Time) (namespace, name string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var first *subject
	for _, s := range p.subjects {
		if s.dirtyTried.IsZero() {
			s.dirtyTried = s.since
		}
		if runtime.ForeignNamespace(s.namespace) || at.Sub(s.dirtyTried) < p.cfg.DirtyEvery {
			continue
		}
		if first == nil || s.dirtyTried.Before(first.dirtyTried) {
			first = s
		}
	}
	if first == nil {
		return "", "", false
	}
	first.dirtyTried = at
	return first.namespace, first.name, true
}
