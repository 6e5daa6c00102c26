package lazypages

import (
	"errors"
	"fmt"
	"slices"
)

// recentEvents are the forks and moves that were read since a space last had no
// event outstanding. A thread that forks and a thread that moves a mapping at
// the same time may be heard in the wrong order, and then the child's mapping
// is not where its layout, a copy of the parent's, has it. The child's own
// userfaultfd knows: it answers differently where nothing is registered. It is
// asked about pages that the child lacks; where the others are is no matter.
//
// It knows only until the child moves it. A server that takes over has no answers
// from back then, and goes by the shifts in the log (replayed); what was read
// last and not yet applied it asks about, and refuses to go on where the child
// has changed its mappings since (strict).
type recentEvents struct {
	forks []recentFork
	moves []recentMove
	// shifted are the layouts that were changed, for the log.
	shifted []recentMove

	replayed, strict bool
	err              error
}

type recentFork struct{ parent, child *space }

type recentMove struct {
	space *space
	message
}

// asker is the part of prober that recentEvents needs.
type asker interface {
	ask(fd int, addr uint64) (outcome, error)
}

// moved notes that s has moved a mapping, and moves it in children whose fork
// was heard before but happened after.
func (r *recentEvents) moved(probe asker, s *space, m message) {
	for _, f := range r.forks {
		if f.parent != s || f.child.fd < 0 || r.replayed {
			continue
		}
		for _, part := range f.child.lacking(span{m.from, m.from + m.size}) {
			to := part.start - m.from + m.to
			// The old place may be registered still (MREMAP_DONTUNMAP), so the new one
			// tells, unless the child had something else there.
			w, known := f.child.layout.at(to)
			known = known && w.start <= to
			if r.isAt(probe, f.child, to) && (!known || !r.isAt(probe, f.child, part.start)) {
				r.shift(f.child, part.start, to, part.end-part.start)
			}
		}
	}
	r.moves = append(r.moves, recentMove{s, m})
}

// forked notes a fork, and moves back in the child what was heard to have moved
// before but moved after.
func (r *recentEvents) forked(probe asker, parent, child *space) {
	for i, m := range slices.Backward(r.moves) {
		if m.space != parent || r.replayed {
			continue
		}
		for _, part := range child.lacking(span{m.to, m.to + m.size}) {
			for part.start < part.end && !r.isAt(probe, child, part.start) {
				from, size := r.origin(probe, child, r.moves[:i+1], part)
				if size == 0 {
					break // in no place: the child did not inherit it
				}
				r.shift(child, part.start, from, size)
				part.start += size
			}
		}
	}
	r.forks = append(r.forks, recentFork{parent, child})
}

// origin follows part back through moves, the last of which has brought it where
// the child does not have it, to where the child has it. Size is 0 if there is
// no such place, and else how much of part came all the way from there.
func (r *recentEvents) origin(probe asker, child *space, moves []recentMove, part span) (from, size uint64) {
	by := moves[len(moves)-1].space
	from, size = part.start, part.end-part.start
	for _, m := range slices.Backward(moves) {
		if m.space != by || from < m.to || from >= m.to+m.size {
			continue
		}
		size = min(size, m.to+m.size-from)
		from = from - m.to + m.from
		if r.isAt(probe, child, from) {
			return from, size
		}
	}
	return 0, 0
}

func (r *recentEvents) shift(s *space, from, to, size uint64) {
	s.layout.shift(from, to, size)
	r.shifted = append(r.shifted, recentMove{s, message{event: eventRemap, from: from, to: to, size: size}})
}

// about reports whether settle would forget anything.
func (r *recentEvents) about(s *space) bool {
	return slices.ContainsFunc(r.forks, func(f recentFork) bool { return f.parent == s }) ||
		slices.ContainsFunc(r.moves, func(m recentMove) bool { return m.space == s })
}

// settle forgets the events of s: none is outstanding.
func (r *recentEvents) settle(s *space) {
	if len(r.forks) > 0 {
		r.forks = slices.DeleteFunc(r.forks, func(f recentFork) bool { return f.parent == s })
	}
	if len(r.moves) > 0 {
		r.moves = slices.DeleteFunc(r.moves, func(m recentMove) bool { return m.space == s })
	}
}

// forget drops what is about a space that is gone.
func (r *recentEvents) forget(s *space) {
	r.settle(s)
	r.forks = slices.DeleteFunc(r.forks, func(f recentFork) bool { return f.child == s })
}

// isAt reports whether s has a registered mapping at addr.
func (r *recentEvents) isAt(probe asker, s *space, addr uint64) bool {
	out, err := probe.ask(s.fd, addr)
	if r.strict && (err != nil || out == changing) {
		r.err = errors.Join(fmt.Errorf("%s at %#x: %w", s.name, addr, errAmbiguous), err)
	}
	return err == nil && out == present
}
