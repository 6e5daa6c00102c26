package migrate

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/tranship/tranship/checkpoint/track"
)

// turns lets this host's shards stand still one after the other. A blackout is
// processor time and link of both hosts: two at once take twice as long each,
// and pre-copy beside one stretches it as well. So a migration takes a turn for
// its blackout, and what the others still copy gives way meanwhile.
type turns struct {
	leaving *semaphore.Weighted // those on their way

	mu     sync.Mutex
	holder *outgoing
	// changed is closed when there is another holder, or none.
	changed chan struct{}
}

// giveWay is the longest that another migration waits for a blackout. One that takes
// longer is in trouble, and the others are not to share it.
const giveWay = time.Second

// maxLeaving migrations of a host are on their way at once: one copies while the
// other stands still. More share the same link and processors, all take longer,
// and what their shards write meanwhile is sent as well.
const maxLeaving = 2

func newTurns() *turns {
	return &turns{leaving: semaphore.NewWeighted(maxLeaving), changed: make(chan struct{})}
}

// awaitStart waits, in the order of arrival, until this migration may begin.
// Nothing is held for it until then.
func (o *outgoing) awaitStart(ctx context.Context) error {
	leaving := o.m.turns.leaving
	if !leaving.TryAcquire(1) {
		o.report.enter(PhaseWait)
		if err := leaving.Acquire(ctx, 1); err != nil {
			return context.Cause(ctx)
		}
	}
	o.left = sync.OnceFunc(func() { leaving.Release(1) })
	return nil
}

// take waits for o's turn. waited says that it had to.
func (t *turns) take(ctx context.Context, o *outgoing) (waited bool, err error) {
	for {
		t.mu.Lock()
		if t.holder == nil || t.holder == o {
			t.set(o)
			t.mu.Unlock()
			return waited, nil
		}
		changed := t.changed
		t.mu.Unlock()
		waited = true
		select {
		case <-changed:
		case <-ctx.Done():
			return waited, context.Cause(ctx)
		}
	}
}

// leave ends o's turn, if it has one.
func (t *turns) leave(o *outgoing) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holder == o {
		t.set(nil)
	}
}

func (t *turns) set(o *outgoing) {
	t.holder = o
	close(t.changed)
	t.changed = make(chan struct{})
}

// wayFor returns when no other migration has its turn, or has had it for too long.
func (t *turns) wayFor(ctx context.Context, o *outgoing) error {
	var patience <-chan time.Time
	for {
		t.mu.Lock()
		free, changed := t.holder == nil || t.holder == o, t.changed
		t.mu.Unlock()
		if free {
			return nil
		}
		if patience == nil {
			timer := time.NewTimer(giveWay)
			defer timer.Stop()
			patience = timer.C
		}
		select {
		case <-changed:
		case <-patience:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// takeTurn waits until no other shard of this host stands still. What this one
// wrote while it waited is copied before it stands still itself.
func (o *outgoing) takeTurn(ctx context.Context) error {
	waited, err := o.m.turns.take(ctx, o)
	if err != nil || !waited || o.tracker.Kind() == track.None {
		return err
	}
	return o.rounds(ctx)
}
