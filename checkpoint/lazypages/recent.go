package lazypages

import (
	"fmt"
	"slices"
)

// recentEvents are the forks and moves that were read since a space last had no
// event outstanding. A thread that forks and a thread that moves a mapping at
// the same time may be heard in the wrong order, and then the child's mapping
// is not where its layout, a copy of the parent's, has it. The child's own
// userfaultfd knows: it answers differently where nothing is registered.
//
// It knows only until the child moves it. A server that takes over has no answers
// from back then, and goes by the shifts in the log (replayed); what was read
// last and not yet applied it asks about, and refuses an answer that is none
// (strict).
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
		if f.parent == s && f.child.fd >= 0 && r.isAt(probe, f.child, m.to, m.from) {
			r.shift(f.child, m.from, m.to, m.size)
		}
	}
	r.moves = append(r.moves, recentMove{s, m})
}

// forked notes a fork, and moves back in the child what was heard to have moved
// before but moved after.
func (r *recentEvents) forked(probe asker, parent, child *space) {
	for _, m := range slices.Backward(r.moves) {
		if m.space == parent && r.isAt(probe, child, m.from, m.to) {
			r.shift(child, m.to, m.from, m.size)
		}
	}
	r.forks = append(r.forks, recentFork{parent, child})
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

// isAt reports whether s has a registered mapping at here and none at there.
func (r *recentEvents) isAt(probe asker, s *space, here, there uint64) bool {
	if r.replayed {
		return false
	}
	a, errA := probe.ask(s.fd, here)
	b, errB := probe.ask(s.fd, there)
	if errA == nil && errB == nil && a == present && b == absent {
		return true
	}
	died := errA == nil && a == gone
	if r.strict && !died && (errA != nil || errB != nil || a != absent || b != present) {
		r.err = fmt.Errorf("%s may have a mapping at %#x or at %#x: %w", s.name, here, there, errAmbiguous)
	}
	return false
}
