package profiler

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/tranship/tranship/ebpf/profile"
)

// A shard's history follows it: the destination asks the source for it once the
// migration is over, and again until it has it. The source keeps what it has of
// shards that left for as long as of those that stayed, so nothing is lost by
// asking late, and nothing of it happens while a shard is frozen.

const (
	// settleBefore lets the source file the minute in which the shard left.
	settleBefore = 5 * time.Second
	fetchTimeout = 30 * time.Second
	// retryFetch and tries: a shard begins before its migration is over, which
	// may take as long as it takes to place its memory; beyond a few minutes the
	// reconcile of every minute asks anew.
	retryFetch = 5 * time.Second
	tries      = 24
)

// wantHistory queues a shard for pull; a full queue is tried again by the next
// reconcile.
func (p *Profiler) wantHistory(key string) {
	if p.cfg.CameFrom == nil || p.cfg.Fetch == nil {
		return
	}
	select {
	case p.pulls <- key:
	default:
	}
}

func (p *Profiler) pull(ctx context.Context) error {
	tick := time.NewTicker(retryFetch)
	defer tick.Stop()
	waiting := map[string]int{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case key := <-p.pulls:
			waiting[key] = tries
		case <-tick.C:
			for key := range waiting {
				done, err := p.fetch(ctx, key)
				if err != nil && ctx.Err() == nil {
					p.log.Warn("profiles: history has not come yet", "shard", key, "err", err)
				}
				if waiting[key]--; done || waiting[key] <= 0 {
					delete(waiting, key)
				}
			}
		}
	}
}

// fetch gets what the node that a shard came from knows of it, unless that was
// done. A shard that did not come, or is still on its way, is not done.
func (p *Profiler) fetch(ctx context.Context, key string) (done bool, err error) {
	namespace, name, _ := strings.Cut(key, "/")
	migration, node, ok := p.cfg.CameFrom(namespace, name)
	if !ok {
		return false, nil
	}
	if have, err := p.store.Imported(migration); err != nil || have {
		return have, err
	}
	wait(ctx, settleBefore)
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	came, err := p.cfg.Fetch(ctx, node, namespace, name)
	if err != nil {
		return false, fmt.Errorf("history of %s from %s: %w", key, node, err)
	}
	if p.cfg.Forecasts != nil && len(came.Forecasts) > 0 {
		// Before the history, whose arrival says that all is done. A state that is
		// refused (another version's) is no reason to ask again and again.
		if err := p.cfg.Forecasts.Adopt(ctx, key, came.Forecasts); err != nil {
			if ctx.Err() != nil {
				return false, err
			}
			p.log.Warn("profiles: a shard is forecast from what was seen of it here", "shard", key, "err", err)
		}
	}
	return true, p.store.Import(key, migration, came.Blocks, time.Now())
}

// Travelling is what a host knows of a shard as it follows it: blocks of an hour
// of its history, and the state of its forecasters, if there are any.
type Travelling struct {
	Blocks    [][]byte
	Forecasts []byte
}

// Travelling is what this host knows of a shard.
func (p *Profiler) Travelling(namespace, name string) (Travelling, error) {
	var t Travelling
	var err error
	if t.Blocks, err = p.store.Blocks(namespace + "/" + name); err != nil || p.cfg.Forecasts == nil {
		return t, err
	}
	t.Forecasts, err = p.cfg.Forecasts.State(namespace + "/" + name)
	return t, err
}

// Points returns what is known of a shard, or with namespace and name "" of the
// host, in steps of a second (two minutes back), ten seconds (an hour) or a
// minute (the store's retention, without the minute under way), from a time on.
func (p *Profiler) Points(namespace, name string, step time.Duration, from time.Time) ([]profile.Point, error) {
	key := namespace + "/" + name
	if key == "/" {
		key = hostKey
	}
	if step == profile.Minute {
		return p.store.Minutes(key, from)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	pr := p.host.profile
	if key != hostKey {
		s := p.subjects[key]
		if s == nil {
			return nil, nil
		}
		pr = s.profile
	}
	points := pr.Seconds()
	if step == profile.DecaSecond {
		points = pr.Tens()
	}
	for len(points) > 0 && points[0].Start.Before(from) {
		points = points[1:]
	}
	return points, nil
}
