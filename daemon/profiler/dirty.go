package profiler

import (
	"context"
	"errors"
	"fmt"
	"time"
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
		s.dirty, s.dirtyKnown, s.dirtyFresh = rate, true, true
	}
	return rate, nil
}
