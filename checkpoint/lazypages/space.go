package lazypages

import (
	"fmt"

	"github.com/tranship/tranship/checkpoint"
)

// space is one address space: that of a restored task, or of a child that a
// restored task forked before it was filled.
type space struct {
	name string
	id   int // 0 is the task, then its children in the order of their forks
	fd   int
	dump dumped

	layout  layout
	pending pageSet // store pages that must still be placed, unless given up
	// owed is the family's: those that the store does not have yet.
	owed   *pageSet
	faults []uint64
	// cursor is the address at which background filling goes on.
	cursor uint64

	// noMemory is when placing first failed for want of memory, in a row.
	noMemory backoff
}

// fork makes the space of a child: what the parent has is shared by the kernel,
// what it lacks the child lacks too, except for what is wiped on fork.
func (s *space) fork(fd int, n int) *space {
	child := &space{
		name:    fmt.Sprintf("%s, child %d", s.name, n),
		id:      n,
		fd:      fd,
		dump:    s.dump,
		layout:  s.layout.clone(),
		pending: s.pending.clone(),
		owed:    s.owed,
	}
	for _, w := range s.dump.wiped {
		child.giveUp(w)
	}
	return child
}

// giveUp takes store addresses out of what must be placed: the process gave
// them up, and finds zero there from now on.
func (s *space) giveUp(image span) checkpoint.Pages {
	return s.pending.clear(image.start/checkpoint.PageSize, image.end/checkpoint.PageSize)
}

// next returns the next run of at most limit pages that lack, at or after addr,
// whether the store has them or they are owed.
func (s *space) next(addr uint64, limit uint64) (at, image span, ok bool) {
	return s.search(addr, func(from, to uint64) (start, end uint64, ok bool) { return s.pending.next(from, to, limit) })
}

// nextHere is next among the pages that the store has.
func (s *space) nextHere(addr uint64, limit uint64) (at, image span, ok bool) {
	return s.search(addr, func(from, to uint64) (start, end uint64, ok bool) {
		return s.pending.nextWithout(from, to, limit, s.owed)
	})
}

func (s *space) search(addr uint64, next func(from, to uint64) (start, end uint64, ok bool)) (at, image span, ok bool) {
	for i := s.layout.search(addr); i < len(s.layout.windows); i++ {
		w := s.layout.windows[i]
		in := w.part(w.overlap(span{addr, ^uint64(0)}))
		from, to := in.image/checkpoint.PageSize, (in.image+in.end-in.start)/checkpoint.PageSize
		start, end, ok := next(from, to)
		if !ok {
			continue
		}
		image := span{start * checkpoint.PageSize, end * checkpoint.PageSize}
		addr := in.start + image.start - in.image
		return span{addr, addr + image.end - image.start}, image, true
	}
	return span{}, span{}, false
}

// lacking returns the parts of in, by windows, from the first page on that lacks.
func (s *space) lacking(in span) (parts []span) {
	for at := in.start; at < in.end; {
		page, _, ok := s.next(at, 1)
		if !ok || page.start >= in.end {
			break
		}
		w, _ := s.layout.at(page.start)
		parts = append(parts, span{page.start, min(w.end, in.end)})
		at = w.end
	}
	return parts
}

// content returns the store addresses of the run of pending pages that begins
// at addr; ok is false where a zero page belongs. The first page of the run may
// be owed, and then nothing is said of the others; if it is not, none is.
func (s *space) content(addr uint64, limit uint64) (image span, ok bool) {
	at, image, ok := s.next(addr, limit)
	if !ok || at.start != addr {
		return image, false
	}
	if owed, _, ok := s.owed.next(image.start/checkpoint.PageSize, image.end/checkpoint.PageSize, 1); ok && !s.isOwed(image.start) {
		image.end = owed * checkpoint.PageSize
	}
	return image, true
}

// isOwed says that a page of the store has not arrived.
func (s *space) isOwed(image uint64) bool { return s.owed.has(image / checkpoint.PageSize) }

// ready reports whether something can be placed.
func (s *space) ready() bool {
	_, _, ok := s.pending.nextWithout(0, ^uint64(0), 1, s.owed)
	return ok
}

// queue adds a fault unless it waits already: many threads may want one page.
// Faults that are read with events may be younger than the events behind them,
// which are the ones that explain them; therefore they are only queued.
func (s *space) queue(addr uint64) {
	for _, a := range s.faults {
		if a == addr {
			return
		}
	}
	s.faults = append(s.faults, addr)
}
