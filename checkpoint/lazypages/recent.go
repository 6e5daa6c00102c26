package lazypages

import "slices"

// recentEvents are the forks and moves that were read since a space last had no
// event outstanding. A thread that forks and a thread that moves a mapping at
// the same time may be heard in the wrong order, and then the child's mapping
// is not where its layout, a copy of the parent's, has it. The child's own
// userfaultfd knows: it answers differently where nothing is registered.
type recentEvents struct {
	forks []recentFork
	moves []recentMove
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
		if f.parent == s && f.child.fd >= 0 && isAt(probe, f.child, m.to, m.from) {
			f.child.layout.shift(m.from, m.to, m.size)
		}
	}
	r.moves = append(r.moves, recentMove{s, m})
}

// forked notes a fork, and moves back in the child what was heard to have moved
// before but moved after.
func (r *recentEvents) forked(probe asker, parent, child *space) {
	for _, m := range slices.Backward(r.moves) {
		if m.space == parent && isAt(probe, child, m.from, m.to) {
			child.layout.shift(m.to, m.from, m.size)
		}
	}
	r.forks = append(r.forks, recentFork{parent, child})
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

// isAt reports whether s has a registered mapping at here and none at there.
func isAt(probe asker, s *space, here, there uint64) bool {
	a, errA := probe.ask(s.fd, here)
	b, errB := probe.ask(s.fd, there)
	return errA == nil && errB == nil && a == present && b == absent
}
