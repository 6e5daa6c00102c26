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
// and whatever else a migration does beside one stretches it as well. So a
// migration takes a turn for its blackout. The others go on until they next ask
// whether they may, and the turn begins when all have.
type turns struct {
	leaving *semaphore.Weighted // those on their way

	mu     sync.Mutex
	holder *outgoing
	// working has those on their way: whether they are at work, or wait here.
	working map[*outgoing]bool
	// changed is closed when the holder or who is at work is another.
	changed chan struct{}
}

// giveWay is the longest that another migration waits for a blackout, and a blackout
// for the others to wait. What takes longer is in trouble, or sends a whole image,
// and the others are not to share it.
const giveWay = time.Second

// maxLeaving migrations of a host are on their way at once: one copies while the
// other stands still. More share the same link and processors, all take longer,
// and what their shards write meanwhile is sent as well.
const maxLeaving = 2

func newTurns() *turns {
	return &turns{leaving: semaphore.NewWeighted(maxLeaving), working: map[*outgoing]bool{}, changed: make(chan struct{})}
}

// awaitStart waits, in the order of arrival, until this migration may begin.
// Nothing is held for it until then.
func (o *outgoing) awaitStart(ctx context.Context) error {
	t := o.m.turns
	if !t.leaving.TryAcquire(1) {
		o.report.enter(PhaseWait)
		if err := t.leaving.Acquire(ctx, 1); err != nil {
			return context.Cause(ctx)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.working[o] = true
	o.left = sync.OnceFunc(func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.working, o)
		t.tell()
		t.leaving.Release(1)
	})
	return nil
}

// take waits for o's turn. waited says that it had to.
func (t *turns) take(ctx context.Context, o *outgoing) (waited bool, err error) {
	waited, err = t.await(ctx, o, 0, func() bool {
		if t.holder != nil && t.holder != o {
			return false
		}
		t.holder = o
		return true
	})
	if err != nil {
		return waited, err
	}
	forOthers, err := t.await(ctx, o, giveWay, func() bool {
		for other, works := range t.working {
			if works && other != o {
				return false
			}
		}
		return true
	})
	return waited || forOthers, err
}

// leave ends o's turn, if it has one.
func (t *turns) leave(o *outgoing) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holder == o {
		t.holder = nil
		t.tell()
	}
}

// wayFor returns when no other migration has its turn, or has had it for too long.
func (t *turns) wayFor(ctx context.Context, o *outgoing) error {
	_, err := t.await(ctx, o, giveWay, func() bool { return t.holder == nil || t.holder == o })
	return err
}

// await lets o wait until something is so, which is asked with the lock held, but
// for no longer than patience; 0 is for ever.
func (t *turns) await(ctx context.Context, o *outgoing, patience time.Duration, is func() bool) (waited bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if is() {
		return false, nil
	}
	if t.working[o] {
		t.working[o] = false
		t.tell()
		defer func() { t.working[o] = true }()
	}
	var over <-chan time.Time
	if patience > 0 {
		timer := time.NewTimer(patience)
		defer timer.Stop()
		over = timer.C
	}
	for late := false; !late && ctx.Err() == nil && !is(); {
		changed := t.changed
		t.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
		case <-over:
			late = true
		}
		t.mu.Lock()
	}
	return true, context.Cause(ctx)
}

// tell wakes who waits.
func (t *turns) tell() {
	close(t.changed)
	t.changed = make(chan struct{})
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
