package predict

import "slices"

// window is the latest values: in order of arrival, and an order by size.
// At most 256 fit, so that the order takes one byte each.
type window struct {
	ring  []float32
	order []uint8 // indices into ring, ascending by value
	next  int     // the oldest, once full
}

func newWindow(size int) window {
	return window{ring: make([]float32, 0, size), order: make([]uint8, 0, size)}
}

func (w *window) full() bool { return len(w.ring) == cap(w.ring) }

func (w *window) add(v float32) {
	if !w.full() {
		i := len(w.ring)
		at := w.find(v)
		w.ring = append(w.ring, v)
		w.order = append(w.order, 0)
		copy(w.order[at+1:], w.order[at:])
		w.order[at] = uint8(i)
		return
	}
	slot := w.next
	if w.next++; w.next == len(w.ring) {
		w.next = 0
	}
	from := w.find(w.ring[slot])
	for w.order[from] != uint8(slot) { // among equals
		from++
	}
	to := w.find(v)
	if to > from {
		to--
		copy(w.order[from:to], w.order[from+1:to+1])
	} else {
		copy(w.order[to+1:from+1], w.order[to:from])
	}
	w.order[to] = uint8(slot)
	w.ring[slot] = v
}

// find is the first place in the order whose value is not below v.
func (w *window) find(v float32) int {
	// One conditional move a step: the outcome of a comparison is a coin toss,
	// and a mispredicted branch costs more than the rest of the step.
	lo, n := 0, len(w.order)
	for n > 1 {
		half := n >> 1
		at := lo + half
		if w.ring[w.order[at-1]] < v {
			lo = at
		}
		n -= half
	}
	if n == 1 && w.ring[w.order[lo]] < v {
		lo++
	}
	return lo
}

// quantile is the conformal one (Vovk et al. 2005): of n exchangeable
// residuals the ⌈(n+1)q⌉-th smallest bounds the next with probability q.
// Between two of them it interpolates.
func (w *window) quantile(q float64) float64 {
	n := len(w.order)
	if n == 0 {
		return 0
	}
	p := q*float64(n+1) - 1
	if p <= 0 {
		return float64(w.ring[w.order[0]])
	}
	if p >= float64(n-1) {
		return float64(w.ring[w.order[n-1]])
	}
	i := int(p)
	f := p - float64(i)
	return float64(w.ring[w.order[i]])*(1-f) + float64(w.ring[w.order[i+1]])*f
}

// latest forgets all but the latest k values.
func (w *window) latest(k int) {
	oldest := 0
	if w.full() {
		oldest = w.next
	}
	slices.Reverse(w.ring[:oldest])
	slices.Reverse(w.ring[oldest:])
	slices.Reverse(w.ring)
	w.ring = w.ring[:copy(w.ring, w.ring[max(0, len(w.ring)-k):])]
	w.next = 0
	w.sort()
}

// sort restores the order after the ring was filled from outside.
func (w *window) sort() {
	ring := w.ring
	w.ring, w.order = w.ring[:0], w.order[:0]
	for _, v := range ring {
		at := w.find(v)
		w.ring = append(w.ring, v)
		w.order = append(w.order, 0)
		copy(w.order[at+1:], w.order[at:])
		w.order[at] = uint8(len(w.ring) - 1)
	}
}
