package lazypages

import (
	"cmp"
	"slices"
)

// span is a range of addresses.
type span struct{ start, end uint64 }

func (a span) overlap(b span) span {
	return span{max(a.start, b.start), min(a.end, b.end)}
}

func (a span) empty() bool { return a.start >= a.end }

// window is a part of a process's address space and where its content lies in
// the store: at the address it had when it was dumped.
type window struct {
	span
	image uint64 // store address of start
}

// imageOf returns the store addresses of the part s of the window.
func (w window) imageOf(s span) span {
	return span{w.image + s.start - w.start, w.image + s.end - w.start}
}

// part returns the window cut down to s, which lies inside it.
func (w window) part(s span) window {
	return window{s, w.image + s.start - w.start}
}

// layout follows where the mappings that were registered at restore have gone
// since. It is driven by userfaultfd's events.
//
// The kernel sends an event after it dropped the lock under which it changed
// the mappings, so two threads that change them at once may be heard in the
// wrong order. That matters in one case: a mapping leaves A (munmap, or mremap
// to B), the kernel gives A to another mapping (mremap from C), and the arrival
// is heard first. It shows as an arrival at an address that is taken. The
// older window is then kept aside in leaving, where the departure, when it is
// heard, finds it first.
//
// It does not show where a mapping has grown since the restore, of which there is no
// event: B seems to be free, and the departure, when it is heard, takes the arrival
// with it, whose missing pages read as zeros. For that one thread has to move a
// mapping there between the moment in which another's munmap lets go of the lock
// and the one in which the kernel queues its event.
//
// No event is outstanding when an operation on the userfaultfd does not answer
// EAGAIN; settle is called then.
type layout struct {
	windows []window // ascending, disjoint
	leaving []window
	// echoes are the old places of moved mappings. The kernel reports the
	// unmapping of the old place as well (unless MREMAP_DONTUNMAP), after the
	// move, and maybe after something else has moved there.
	echoes []span
}

// newLayout begins with every mapping where it was dumped. The mappings may be
// in any order and must not overlap.
func newLayout(mappings []span) layout {
	var l layout
	for _, m := range mappings {
		l.windows = append(l.windows, window{m, m.start})
	}
	slices.SortFunc(l.windows, func(a, b window) int { return cmp.Compare(a.start, b.start) })
	return l
}

func (l *layout) clone() layout {
	return layout{slices.Clone(l.windows), slices.Clone(l.leaving), slices.Clone(l.echoes)}
}

// at returns the window at or after addr.
func (l *layout) at(addr uint64) (window, bool) {
	i := l.search(addr)
	if i == len(l.windows) {
		return window{}, false
	}
	return l.windows[i], true
}

// search returns the index of the first window that ends after addr.
func (l *layout) search(addr uint64) int {
	i, _ := slices.BinarySearchFunc(l.windows, addr, func(w window, addr uint64) int {
		switch {
		case w.end <= addr:
			return -1
		case w.start > addr:
			return 1
		}
		return 0
	})
	return i
}

// images visits the store addresses of every part of s.
func (l *layout) images(s span, visit func(span)) {
	for i := l.search(s.start); i < len(l.windows) && l.windows[i].start < s.end; i++ {
		w := l.windows[i]
		visit(w.imageOf(w.overlap(s)))
	}
}

// remap moves [from, from+length) to the address to, as an event says.
func (l *layout) remap(from, to, length uint64) {
	l.shift(from, to, length)
	l.echoes = append(l.echoes, span{from, from + length})
}

// shift is remap without the echo.
func (l *layout) shift(from, to, length uint64) {
	moved := l.take(span{from, from + length})
	l.leaving = append(l.leaving, cut(&l.windows, span{to, to + length})...)
	for _, w := range moved {
		w.start, w.end = w.start-from+to, w.end-from+to
		l.windows = slices.Insert(l.windows, l.search(w.start), w)
	}
}

// unmap takes s away; gone is told the store addresses of what it was.
func (l *layout) unmap(s span, gone func(span)) {
	if i := slices.Index(l.echoes, s); i >= 0 {
		l.echoes = slices.Delete(l.echoes, i, i+1)
		return
	}
	for _, w := range l.take(s) {
		gone(w.imageOf(w.span))
	}
}

// settled reports whether settle would change nothing.
func (l *layout) settled() bool { return len(l.leaving) == 0 && len(l.echoes) == 0 }

// settle is called when no event is outstanding: what still seems to be leaving
// was not announced and is gone.
func (l *layout) settle(gone func(span)) {
	for _, w := range l.leaving {
		gone(w.imageOf(w.span))
	}
	l.leaving, l.echoes = l.leaving[:0], l.echoes[:0]
}

// take removes and returns the windows of s, older ones first: what an arrival
// has pushed aside shields what arrived.
func (l *layout) take(s span) []window {
	out := cut(&l.leaving, s)
	rest := []span{s}
	for _, w := range out {
		var next []span
		for _, r := range rest {
			for _, piece := range []span{{r.start, min(r.end, w.start)}, {max(r.start, w.end), r.end}} {
				if !piece.empty() {
					next = append(next, piece)
				}
			}
		}
		rest = next
	}
	for _, r := range rest {
		out = append(out, cut(&l.windows, r)...)
	}
	return out
}

// cut removes from ws what lies in s and returns it.
func cut(ws *[]window, s span) []window {
	var out []window
	touched := false
	for _, w := range *ws {
		if !w.overlap(s).empty() {
			touched = true
			break
		}
	}
	if !touched {
		return nil
	}
	kept := make([]window, 0, len(*ws)+1)
	for _, w := range *ws {
		in := w.overlap(s)
		if in.empty() {
			kept = append(kept, w)
			continue
		}
		out = append(out, w.part(in))
		for _, piece := range []span{{w.start, in.start}, {in.end, w.end}} {
			if !piece.empty() {
				kept = append(kept, w.part(piece))
			}
		}
	}
	*ws = kept
	return out
}
