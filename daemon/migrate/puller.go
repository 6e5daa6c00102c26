package migrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/s2"
	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/lazypages"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/internal/failpoint"
)

// Post-copy at the destination: lanes ask the page server what it wants, fetch
// that from the source and deliver it, until nothing is owed. A link that breaks
// costs what was on its way, and the server wants that again. Whoever pulls
// remembers nothing, so a daemon that comes back begins the same way.

const (
	// urgentLanes fetch only what a thread waits for, in small requests, so that
	// a fault never stands behind the others.
	urgentLanes = 2
	urgentPages = 16
	// otherLanes take whatever is next. Three of half a megabyte fill a link of
	// 1 Gbit/s at a round trip of 12 ms.
	otherLanes = 3
	otherPages = 128

	// fetchTimeout bounds one request: otherPages at 1 Mbit/s, with the others.
	// A link that is dead shows much earlier.
	fetchTimeout = time.Minute
	// pullBackoff is how long the first attempt after a failure waits; it doubles
	// up to pullPatience.
	pullBackoff  = 100 * time.Millisecond
	pullPatience = 2 * time.Second
)

// pulling is the puller of an incoming migration.
type pulling struct {
	once  sync.Once
	end   context.CancelFunc
	done  chan struct{}
	whole atomic.Bool // every page has arrived
	told  sync.Once
}

// startPull begins to fetch what the shard lacks. May run twice. It begins before
// the restore does, because CRIU's restorer may touch what is owed.
func (in *incoming) startPull() {
	if in.entry.Mode != ModePostCopy || in.pages == nil || in.entry.Placed {
		return
	}
	in.pull.once.Do(func() {
		ctx, end := context.WithCancel(in.m.life)
		done := make(chan struct{})
		in.pullMu.Lock()
		in.pull.end, in.pull.done = end, done
		in.pullMu.Unlock()
		in.m.work.Go(func() {
			defer close(done)
			in.pullAll(ctx)
		})
	})
}

// endPull ends the puller and waits for it.
func (in *incoming) endPull() {
	in.pullMu.Lock()
	end, done := in.pull.end, in.pull.done
	in.pullMu.Unlock()
	if end == nil {
		return
	}
	end()
	<-done
}

func (in *incoming) pullAll(ctx context.Context) {
	log := in.m.log.With("migration", in.entry.ID, "shard", in.entry.Shard, "peer", in.entry.Peer)
	for wait := pullBackoff; ; wait = min(2*wait, pullPatience) {
		before := in.arrived.Load()
		err := in.pullOnce(ctx)
		switch {
		case err == nil:
			log.Info("every page has arrived", "bytes", in.arrived.Load())
			in.isWhole()
			return
		case ctx.Err() != nil:
			return
		case errors.Is(err, lazypages.ErrServerGone) && in.pages.ended():
			return // fill knows what that means
		}
		if in.arrived.Load() > before {
			wait = pullBackoff
		}
		log.Warn("pages of a running shard cannot be fetched; it is tried again", "err", err, "after", wait)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// isWhole notes that every page has arrived, and tells the source for as long as
// that may help: if it never hears, it asks.
func (in *incoming) isWhole() {
	in.pull.whole.Store(true)
	in.pull.told.Do(func() {
		in.m.work.Go(func() {
			ctx, cancel := context.WithTimeout(in.m.life, tellFor)
			defer cancel()
			for in.tellWhole(ctx) != nil {
				select {
				case <-ctx.Done():
					return
				case <-time.After(commitRetry):
				}
			}
		})
	})
}

func (in *incoming) tellWhole(ctx context.Context) error {
	if err := failpoint.Hit(ctx, "destination.release"); err != nil {
		return err
	}
	peer, err := in.m.peers.Client(in.entry.Peer)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, undoTimeout)
	defer cancel()
	_, err = peer.Release(ctx, connect.NewRequest(&v1.ReleaseRequest{Id: in.entry.ID}))
	switch connect.CodeOf(err) {
	case connect.CodeNotFound, connect.CodeFailedPrecondition: // it has ended there
		return nil
	}
	return err
}

// pullOnce pulls until nothing is owed, or something fails.
func (in *incoming) pullOnce(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	for i := range urgentLanes + otherLanes {
		g.Go(func() error {
			if i < urgentLanes {
				return in.lane(gctx, true, urgentPages)
			}
			return in.lane(gctx, false, otherPages)
		})
	}
	return g.Wait()
}

func (in *incoming) lane(ctx context.Context, urgent bool, limit checkpoint.Pages) error {
	p, err := in.pages.client.Pull(ctx)
	if err != nil {
		return err
	}
	defer p.Close()
	defer context.AfterFunc(ctx, func() { _ = p.Close() })()
	for {
		want, whole, err := p.Want(urgent, limit)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if whole || err != nil {
			return err
		}
		if !urgent {
			if err := failpoint.Hit(ctx, "destination.post-copy"); err != nil {
				return err
			}
		}
		data, err := in.fetch(ctx, want, urgent)
		if err != nil {
			return err
		}
		if err := p.Deliver(data); err != nil {
			return err
		}
		in.arrived.Add(int64(len(data)))
	}
}

// fetch reads pages at the source.
func (in *incoming) fetch(ctx context.Context, want lazypages.Want, urgent bool) ([]byte, error) {
	fail := func(err error) ([]byte, error) {
		return nil, fmt.Errorf("fetch %d pages from %s: %w", want.Pages(), in.entry.Peer, err)
	}
	peer, err := in.m.peers.Client(in.entry.Peer)
	if err != nil {
		return fail(err)
	}
	req := &v1.FetchRequest{Id: in.entry.ID, Pid: int32(want.PID), Urgent: urgent}
	for _, e := range want.Extents {
		req.Runs = append(req.Runs, &v1.PageRun{Address: e.Addr, Pages: int64(e.Pages)})
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	resp, err := peer.Fetch(ctx, connect.NewRequest(req))
	if err != nil {
		return fail(peerError(err))
	}
	data, err := unpack(resp.Msg, int(want.Bytes()))
	if err != nil {
		return fail(err)
	}
	return data, nil
}

// unpack checks that an answer is what was asked for, unchanged.
func unpack(resp *v1.FetchResponse, size int) ([]byte, error) {
	data := resp.GetContent()
	if resp.GetS2() {
		if n, err := s2.DecodedLen(data); err != nil || n != size {
			return nil, fmt.Errorf("%d bytes instead of %d: %w", n, size, errors.Join(err, errBadAnswer))
		}
		var err error
		if data, err = s2.Decode(nil, data); err != nil {
			return nil, fmt.Errorf("%w: %w", errBadAnswer, err)
		}
	}
	if len(data) != size {
		return nil, fmt.Errorf("%d bytes instead of %d: %w", len(data), size, errBadAnswer)
	}
	if xxh3.Hash(data) != resp.GetDigest() {
		return nil, fmt.Errorf("%w: its digest differs", errBadAnswer)
	}
	return data, nil
}

var errBadAnswer = errors.New("not what was asked for")
