package transfer

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// Round is one pass over a shard's memory. Pages and Zero may be called by
// several goroutines at once; an extent may be given to a round only once. The
// first error breaks the round: later calls and Close return it as well. Close
// must be called in any case; to give a round up, end its context first.
type Round struct {
	s     *Session
	n     int
	began time.Time

	outer context.Context // ends with the caller's, or by abort
	abort context.CancelCauseFunc
	ctx   context.Context // of the lanes, inside outer: ends with the first error
	lanes *errgroup.Group
	work  chan *batch

	// A batch is in one of: free, partial, the hands of a caller, work, the hands
	// of a lane. There are as many as free has room for, and no more.
	free    chan *batch
	partial chan *batch

	claims *claims

	epoch     uint64
	links     []*link
	readAgain func(pid checkpoint.PID, addr uint64, dst []byte) (there bool, err error)
	asking    *asking // nil: no question was asked
	copiesMu  sync.Mutex
	copies    []copied // pages that were left out

	gate   sync.RWMutex // held for reading by Pages and Zero
	closed bool

	pages, read, zeros, unchanged, sent, deltas atomic.Int64                    // pages
	encoded                                     [encoding.Zstd + 1]atomic.Int64 // whole pages of sent, by encoding
	copiesSent, twinsSent                       atomic.Int64                    // beside sent
	bytes                                       atomic.Int64
}

// RoundStats are the counts of a round.
type RoundStats struct {
	N int
	// Pages came, as pages or as zero; of those Zeros were sent as zero, Unchanged
	// not at all, and Sent with their content.
	Pages, Zeros, Unchanged, Sent checkpoint.Pages
	// Of those sent, Copies went as the place of a page with the same content, Twins
	// as the hash of another shard's page, Deltas as what changed in them, the others
	// whole, in batches of these encodings.
	Copies, Twins, Deltas, Raw, S2, Zstd checkpoint.Pages
	// BytesRaw is what came as pages, BytesSent what went into the streams.
	BytesRaw, BytesSent checkpoint.Bytes
	Duration            time.Duration
}

// batch collects pages for one frame.
type batch struct {
	segments []wire.Segment
	raw      []byte
}

// batches are reused between rounds and sessions.
var batches = sync.Pool{New: func() any {
	return &batch{segments: make([]wire.Segment, 0, wire.MaxSegments), raw: make([]byte, 0, wire.MaxRaw)}
}}

// add appends a run of pages, or melts it into the run before.
func (b *batch) add(s wire.Segment) {
	if len(b.segments) > 0 {
		last := &b.segments[len(b.segments)-1]
		if last.PID == s.PID && last.Zero == s.Zero && (last.Delta > 0) == (s.Delta > 0) && last.End() == s.Addr {
			last.Pages += s.Pages
			last.Delta += s.Delta
			return
		}
	}
	b.segments = append(b.segments, s)
}

// full says whether there is no room for a page.
func (b *batch) full() bool {
	return len(b.raw) > wire.MaxRaw-checkpoint.PageSize || len(b.segments) == wire.MaxSegments
}

// Round begins round n. ctx is the round's: when it ends, the round breaks.
func (s *Session) Round(ctx context.Context, n int) (*Round, error) {
	if n < 0 || n > 1<<31 {
		return nil, fmt.Errorf("round %d: not a round's number", n)
	}
	links, err := s.usable()
	if err != nil {
		return nil, fmt.Errorf("round %d to %s: %w", n, s.node, err)
	}
	s.mu.Lock()
	if s.busy {
		s.mu.Unlock()
		return nil, fmt.Errorf("round %d to %s: another round is open", n, s.node)
	}
	s.busy = true
	s.epoch++
	epoch := s.epoch
	s.mu.Unlock()

	r := &Round{
		s: s, n: n, began: time.Now(), epoch: epoch, links: links,
		// One batch in the hands of each lane, one waiting for it, one being filled.
		free:    make(chan *batch, 3*s.opt.Streams),
		partial: make(chan *batch, 3*s.opt.Streams),
		work:    make(chan *batch, s.opt.Streams),
		claims:  newClaims(),
	}
	s.versions.nextRound()
	for range cap(r.free) {
		r.free <- nil // made when it is first needed: the last round has few pages
	}
	r.outer, r.abort = context.WithCancelCause(ctx)
	r.lanes, r.ctx = errgroup.WithContext(r.outer)
	for i := range s.opt.Streams {
		l := &lane{r: r, link: links[i%len(links)], encoder: &s.encoders[i], answered: make(chan struct{})}
		r.lanes.Go(func() error { return l.run(epoch, l.carry) })
	}
	return r, nil
}

// Pages gives content to the round: whole pages that begin at addr. It blocks
// while the link takes no more; data may be reused when it returns.
func (r *Round) Pages(pid checkpoint.PID, addr uint64, data []byte) error {
	n := checkpoint.Pages(len(data) / checkpoint.PageSize)
	if len(data)%checkpoint.PageSize != 0 {
		return r.fail(fmt.Errorf("pid %d %#x: %d bytes are not whole pages", pid, addr, len(data)))
	}
	return r.give(pid, addr, n, func(b *batch) (*batch, error) {
		r.read.Add(int64(n))
		var out sifted
		for len(data) > 0 {
			// No further than the end of a chunk of the memory.
			room := chunkPages - int(addr/checkpoint.PageSize%chunkPages)
			piece := data[:min(len(data), room*checkpoint.PageSize)]
			count := r.s.memory.sift(pid, addr, piece, &out)
			r.leaveOut(pid, addr, count, &out)
			for i := 0; i < count; {
				end := i + 1
				for end < count && out.verdicts[end] == out.verdicts[i] {
					end++
				}
				run := wire.Segment{PID: pid, Addr: addr + uint64(i)*checkpoint.PageSize, Pages: checkpoint.Pages(end - i)}
				content := piece[i*checkpoint.PageSize : end*checkpoint.PageSize]
				var err error
				if out.verdicts[i] == again {
					b, err = r.putAgain(b, run, out.was[i:end], out.is[i:end], content)
				} else {
					b, err = r.put(b, run, out.verdicts[i], content)
				}
				if err != nil {
					return b, err
				}
				i = end
			}
			data, addr = data[len(piece):], addr+uint64(len(piece))
		}
		return b, nil
	})
}

// put puts a run of pages with one verdict into b, and into the batches after
// it when b becomes full.
func (r *Round) put(b *batch, run wire.Segment, v verdict, content []byte) (*batch, error) {
	switch v {
	case copyOf:
		return b, nil // its turn comes in Close
	case same:
		r.unchanged.Add(int64(run.Pages))
		return b, nil
	case zero:
		run.Zero = true
		b.add(run)
		r.zeros.Add(int64(run.Pages))
		return r.next(b)
	}
	for len(content) > 0 {
		n := min(len(content), (cap(b.raw)-len(b.raw))/checkpoint.PageSize*checkpoint.PageSize)
		run.Pages = checkpoint.Pages(n / checkpoint.PageSize)
		b.add(run)
		b.raw = append(b.raw, content[:n]...)
		r.sent.Add(int64(run.Pages))
		content, run.Addr = content[n:], run.End()
		var err error
		if b, err = r.next(b); err != nil {
			return b, err
		}
	}
	return b, nil
}

// putAgain puts pages of which the peer has other versions, each as a delta if
// that is short.
func (r *Round) putAgain(b *batch, run wire.Segment, was, is []xxh3.Uint128, content []byte) (*batch, error) {
	known := r.s.memory.pages()
	for i := range was {
		page := content[i*checkpoint.PageSize : (i+1)*checkpoint.PageSize]
		one := wire.Segment{PID: run.PID, Addr: run.Addr + uint64(i)*checkpoint.PageSize, Pages: 1}
		var err error
		if !r.s.opt.NoDeltas {
			before := len(b.raw)
			var short bool
			if b.raw, short = r.s.versions.delta(b.raw, one.PID, one.Addr, was[i], is[i], page, known); short {
				one.Delta = len(b.raw) - before
				b.add(one)
				r.sent.Add(1)
				r.deltas.Add(1)
				if b, err = r.next(b); err != nil {
					return b, err
				}
				continue
			}
		}
		if b, err = r.put(b, one, send, page); err != nil {
			return b, err
		}
	}
	return b, nil
}

// next returns b, or when that is full hands it to a lane and returns another.
func (r *Round) next(b *batch) (*batch, error) {
	if !b.full() {
		return b, nil
	}
	if err := r.submit(b); err != nil {
		return nil, err
	}
	return r.take()
}

// Zero says that n pages at addr read as zero: a hole. n may span terabytes.
func (r *Round) Zero(pid checkpoint.PID, addr uint64, n checkpoint.Pages) error {
	return r.give(pid, addr, n, func(b *batch) (*batch, error) {
		r.s.memory.forget(pid, addr, n)
		b.add(wire.Segment{PID: pid, Addr: addr, Pages: n, Zero: true})
		r.zeros.Add(int64(n))
		return r.next(b)
	})
}

// give claims an extent and has it put into batches.
func (r *Round) give(pid checkpoint.PID, addr uint64, n checkpoint.Pages, put func(*batch) (*batch, error)) error {
	r.gate.RLock()
	defer r.gate.RUnlock()
	if r.closed {
		return fmt.Errorf("round %d to %s is closed", r.n, r.s.node)
	}
	if pid <= 0 || addr%checkpoint.PageSize != 0 || n <= 0 || n > wire.MaxAddr/checkpoint.PageSize || addr > wire.MaxAddr || addr+uint64(n.Bytes()) > wire.MaxAddr {
		return r.fail(fmt.Errorf("pid %d %#x+%d: not an extent of a process", pid, addr, n))
	}
	if err := r.claims.add(pid, addr, addr+uint64(n.Bytes())); err != nil {
		return r.fail(err)
	}
	b, err := r.take()
	if err != nil {
		return r.fail(err)
	}
	r.pages.Add(int64(n))
	b, err = put(b)
	if err != nil {
		return r.fail(err)
	}
	r.partial <- b // has room for every batch
	return nil
}

// fail breaks the round with its first error and returns that.
func (r *Round) fail(err error) error {
	r.abort(err)
	return fmt.Errorf("round %d to %s: %w", r.n, r.s.node, context.Cause(r.ctx))
}

// take returns a batch with room, begun ones first. It waits for the lanes when
// all are full: this is where a slow link stops its callers.
func (r *Round) take() (*batch, error) {
	select {
	case b := <-r.partial:
		return b, nil
	default:
	}
	select {
	case b := <-r.partial:
		return b, nil
	case b := <-r.free:
		if b == nil {
			b = batches.Get().(*batch)
			b.segments, b.raw = b.segments[:0], b.raw[:0]
		}
		return b, nil
	case <-r.ctx.Done():
		return nil, context.Cause(r.ctx)
	}
}

func (r *Round) submit(b *batch) error {
	select {
	case r.work <- b:
		return nil
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	}
}

// Unchanged is how many of the pages that came so far the peer had already.
func (r *Round) Unchanged() checkpoint.Pages { return checkpoint.Pages(r.unchanged.Load()) }

// Close ends the round: it sends what is left and returns when the receiver has
// applied every page, or the error that broke the round. Only after a Close
// without an error may the next round begin with less than everything.
func (r *Round) Close() (RoundStats, error) {
	r.gate.Lock()
	if r.closed {
		r.gate.Unlock()
		return r.stats(), fmt.Errorf("round %d to %s is closed", r.n, r.s.node)
	}
	r.closed = true
	r.gate.Unlock()
	r.endAsking()

	err := r.flush()
	close(r.work)
	if lanesErr := r.lanes.Wait(); lanesErr != nil {
		err = lanesErr
	}
	// The lanes' context has ended with them; what counts is whether anything
	// ended it before: a round that was cancelled is never a success, not even
	// when every answer was in.
	if err == nil {
		err = context.Cause(r.outer)
	}
	if err == nil && len(r.copies) > 0 {
		if err = r.refer(); err == nil {
			err = context.Cause(r.outer)
		}
	}
	if err == nil {
		r.s.memory.acknowledge()
	} else {
		r.s.memory.distrust()
	}
	r.s.memory.forgetTwins()
	r.abort(nil)
	r.recycle()

	stats := r.stats()
	r.s.mu.Lock()
	r.s.busy = false
	if err == nil {
		r.s.stats.Rounds++
		r.s.stats.Pages += stats.Pages
		r.s.stats.Zeros += stats.Zeros
		r.s.stats.Unchanged += stats.Unchanged
		r.s.stats.BytesRaw += stats.BytesRaw
	}
	r.s.mu.Unlock()
	if err != nil {
		return stats, fmt.Errorf("round %d to %s: %w", r.n, r.s.node, err)
	}
	return stats, nil
}

// flush hands the batches that are not full to the lanes.
func (r *Round) flush() error {
	for {
		select {
		case b := <-r.partial:
			if len(b.segments) == 0 {
				batches.Put(b)
				continue
			}
			if err := r.submit(b); err != nil {
				return err
			}
		default:
			return nil
		}
	}
}

// recycle keeps the batches' memory for the next round. The lanes are gone.
func (r *Round) recycle() {
	close(r.free)
	close(r.partial)
	for _, from := range []chan *batch{r.free, r.partial, r.work} {
		for b := range from {
			if b != nil {
				batches.Put(b)
			}
		}
	}
}

func (r *Round) stats() RoundStats {
	return RoundStats{
		N:         r.n,
		Pages:     checkpoint.Pages(r.pages.Load()),
		Zeros:     checkpoint.Pages(r.zeros.Load()),
		Unchanged: checkpoint.Pages(r.unchanged.Load()),
		Sent:      checkpoint.Pages(r.sent.Load() + r.copiesSent.Load() + r.twinsSent.Load()),
		Copies:    checkpoint.Pages(r.copiesSent.Load()),
		Twins:     checkpoint.Pages(r.twinsSent.Load()),
		Deltas:    checkpoint.Pages(r.deltas.Load()),
		Raw:       checkpoint.Pages(r.encoded[encoding.Raw].Load()),
		S2:        checkpoint.Pages(r.encoded[encoding.S2].Load()),
		Zstd:      checkpoint.Pages(r.encoded[encoding.Zstd].Load()),
		BytesRaw:  checkpoint.Pages(r.read.Load()).Bytes(),
		BytesSent: checkpoint.Bytes(r.bytes.Load()),
		Duration:  time.Since(r.began),
	}
}
