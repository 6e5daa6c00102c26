package transfer

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/wire"
)

// Processes that were forked share pages, and each of them is read: PostgreSQL's
// or a preforking server's children are mostly copies of one another. A page
// whose content another page of the migration has goes as its place, one that
// another shard has (twins.go) as its hash.
//
//  1. Round.Pages finds the other page by its hash and leaves this one out;
//  2. when every stream of the round has been answered, so that all that was sent
//     is there, Round.Close compares again: the other page may have been sent with
//     other content since;
//  3. a stream of Copies names them, and the receiver copies what has the hash;
//  4. what either end misses is read again and sent: Round.ReadAgain.

const (
	// The index is a hint, and what it says is compared with pageMemory's hashes:
	// a place that two pages want is the later one's. 16 bytes a place, so at
	// most 8 MiB, enough for 2 GiB of memory without much loss.
	minPlaces = 1 << 12
	maxPlaces = 1 << 19
	// maxCopies bounds what is left out of a round: a gigabyte, at 24 bytes a page.
	// The pages beyond it are sent.
	maxCopies = 8 * wire.MaxMissing
)

// place is where a page is.
type place struct {
	tag  uint32 // of its hash
	pid  checkpoint.PID
	page uint64
}

// index finds pages by their content.
type index struct {
	places []place
	used   int
}

func (x *index) at(hash xxh3.Uint128) *place {
	if x.used >= len(x.places)/2 && len(x.places) < maxPlaces {
		old := x.places
		x.places = make([]place, max(minPlaces, 2*len(old)))
		for _, p := range old {
			if p.pid != 0 {
				x.places[p.tag&uint32(len(x.places)-1)] = p
			}
		}
	}
	return &x.places[uint32(hash.Lo)&uint32(len(x.places)-1)]
}

func (x *index) enter(p *place, hash xxh3.Uint128, pid checkpoint.PID, page uint64) {
	if p.pid == 0 {
		x.used++
	}
	*p = place{uint32(hash.Lo), pid, page}
}

// copied is a page that has another's content; that of another shard if fromPID
// is 0.
type copied struct {
	pid, fromPID checkpoint.PID
	page, from   uint64
}

// elsewhere looks for other pages with the content of those that sift wants to
// send, changes their verdicts, and appends them to copies, up to limit.
func (m *pageMemory) elsewhere(pid checkpoint.PID, addr uint64, n int, out *sifted, copies []copied, limit int) []copied {
	first := addr / checkpoint.PageSize
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range n {
		if v := out.verdicts[i]; v != send && v != again {
			continue
		}
		page := first + uint64(i)
		p := m.index.at(out.is[i])
		other := p.pid != 0 && p.tag == uint32(out.is[i].Lo) && (p.pid != pid || p.page != page)
		if other && len(copies) < limit && m.holds(p.pid, p.page, out.is[i]) {
			out.verdicts[i] = copyOf
			copies = append(copies, copied{pid, p.pid, page, p.page})
			continue
		}
		if len(copies) < limit && m.isTwin(out.is[i]) {
			out.verdicts[i] = copyOf
			copies = append(copies, copied{pid: pid, page: page})
			continue
		}
		m.index.enter(p, out.is[i], pid, page)
	}
	return copies
}

// holds says whether the peer has this content there, or will when the round has
// been acknowledged. Under mu.
func (m *pageMemory) holds(pid checkpoint.PID, page uint64, hash xxh3.Uint128) bool {
	c := m.chunks[chunkKey{pid, page / chunkPages}]
	at := page % chunkPages
	return c != nil && (c.known|c.pending)&(1<<at) != 0 && c.hash[at] == hash
}

// stillHolds returns the hash of a copied page, and whether the other has it yet.
func (m *pageMemory) stillHolds(c copied) (xxh3.Uint128, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	own := m.chunks[chunkKey{c.pid, c.page / chunkPages}]
	if own == nil {
		return xxh3.Uint128{}, false
	}
	hash := own.hash[c.page%chunkPages]
	return hash, c.fromPID == 0 || m.holds(c.fromPID, c.from, hash)
}

// ReadAgain lets the round name pages by others with the same content. read fills
// dst with what is at addr now, or says that nothing is there any more; it is
// called by Close, for pages that turn out not to be where they were. It must be
// given before the first page.
func (r *Round) ReadAgain(read func(pid checkpoint.PID, addr uint64, dst []byte) (there bool, err error)) {
	r.readAgain = read
}

// leaveOut takes pages out of a round that are elsewhere.
func (r *Round) leaveOut(pid checkpoint.PID, addr uint64, n int, out *sifted) {
	if r.readAgain == nil || pid.Shared() {
		return // shared memory is not read by address
	}
	r.copiesMu.Lock()
	defer r.copiesMu.Unlock()
	r.copies = r.s.memory.elsewhere(pid, addr, n, out, r.copies, maxCopies)
}

// refer names the pages that were left out, once the others are there.
func (r *Round) refer() error {
	frames, missing := r.frames()
	if len(frames) > 0 {
		answer, err := r.oneLane(func(l *lane, _ context.Context) error {
			for _, f := range frames {
				if err := l.write(f.Append(l.head[:0])); err != nil {
					return err
				}
				l.tally.Copies += uint64(len(f.Sums) / 16)
			}
			return nil
		})
		if err != nil {
			return err
		}
		missing = append(missing, r.made(frames, answer.Missing)...)
	}
	if len(missing) == 0 {
		return nil
	}
	_, err := r.oneLane(func(l *lane, ctx context.Context) error { return r.resend(ctx, l, missing) })
	return err
}

// made counts the copies that the receiver has made, and returns the others. The
// bits of missed are in the order of the frames.
func (r *Round) made(frames []wire.Copies, missed []byte) (missing []checkpoint.Extent) {
	at := 0
	for _, f := range frames {
		for _, run := range f.Runs {
			for i := range run.Pages {
				if at/8 < len(missed) && missed[at/8]&(1<<(at%8)) != 0 {
					missing = append(missing, checkpoint.Extent{PID: run.PID, Addr: run.Addr + uint64(i.Bytes()), Pages: 1})
				} else if run.Twin() {
					r.twinsSent.Add(1)
				} else {
					r.copiesSent.Add(1)
				}
				at++
			}
		}
	}
	return missing
}

// frames makes frames of the copies, and returns those that have lost their other.
func (r *Round) frames() (frames []wire.Copies, missing []checkpoint.Extent) {
	for _, c := range r.copies {
		hash, ok := r.s.memory.stillHolds(c)
		if !ok {
			missing = append(missing, checkpoint.Extent{PID: c.pid, Addr: c.page * checkpoint.PageSize, Pages: 1})
			continue
		}
		if n := len(frames); n == 0 || len(frames[n-1].Sums) == 16*wire.MaxCopies {
			frames = append(frames, wire.Copies{Seed: r.s.memory.seed})
		}
		f := &frames[len(frames)-1]
		f.Sums = binary.BigEndian.AppendUint64(f.Sums, hash.Hi)
		f.Sums = binary.BigEndian.AppendUint64(f.Sums, hash.Lo)
		run := wire.Copy{PID: c.pid, Addr: c.page * checkpoint.PageSize, FromPID: c.fromPID, From: c.from * checkpoint.PageSize, Pages: 1}
		if n := len(f.Runs); n > 0 {
			last := &f.Runs[n-1]
			size := uint64(last.Pages.Bytes())
			if last.PID == run.PID && last.FromPID == run.FromPID && last.Addr+size == run.Addr && (run.Twin() || last.From+size == run.From) {
				last.Pages++
				continue
			}
		}
		f.Runs = append(f.Runs, run)
	}
	return frames, missing
}

// resend sends pages as they are now.
func (r *Round) resend(ctx context.Context, l *lane, missing []checkpoint.Extent) error {
	b := &batch{segments: make([]wire.Segment, 0, wire.MaxSegments), raw: make([]byte, 0, wire.MaxRaw)}
	flush := func() error {
		if len(b.segments) == 0 {
			return nil
		}
		err := l.send(b)
		b.segments, b.raw = b.segments[:0], b.raw[:0]
		return err
	}
	var out sifted
	page := make([]byte, checkpoint.PageSize)
	for _, e := range missing {
		for addr := e.Addr; addr < e.End(); addr += checkpoint.PageSize {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			there, err := r.readAgain(e.PID, addr, page)
			if err != nil {
				return fmt.Errorf("pid %d %#x again: %w", e.PID, addr, err)
			}
			if !there {
				// What came in its place is a later round's. The peer has not got it.
				r.s.memory.doubt(e.PID, addr)
				continue
			}
			r.s.memory.sift(e.PID, addr, page, &out)
			s := wire.Segment{PID: e.PID, Addr: addr, Pages: 1, Zero: out.verdicts[0] == zero}
			if !s.Zero {
				b.raw = append(b.raw, page...)
				r.sent.Add(1)
			} else {
				r.zeros.Add(1)
			}
			b.add(s)
			if b.full() {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

// doubt forgets a page that is pending.
func (m *pageMemory) doubt(pid checkpoint.PID, addr uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	page := addr / checkpoint.PageSize
	if c := m.chunks[chunkKey{pid, page / chunkPages}]; c != nil {
		c.pending &^= 1 << (page % chunkPages)
	}
}

// oneLane runs a stream of the round after its lanes have ended.
func (r *Round) oneLane(carry func(*lane, context.Context) error) (wire.Answer, error) {
	r.lanes, r.ctx = errgroup.WithContext(r.outer)
	l := &lane{r: r, link: r.links[0], encoder: &r.s.encoders[0], answered: make(chan struct{})}
	r.lanes.Go(func() error {
		return l.run(r.epoch, func(ctx context.Context) error { return carry(l, ctx) })
	})
	err := r.lanes.Wait()
	return l.answer, err
}
