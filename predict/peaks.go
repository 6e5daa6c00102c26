package predict

import "math"

// rollingMax is the maximum over the last steps cells. Cells are kept in
// blocks of stride, block b holding cells (b·stride, (b+1)·stride]: from an
// origin on a block's border it is exact, elsewhere it looks back up to
// stride-1 cells too far.
type rollingMax struct {
	steps, stride int64
	top           []float32 // ring of whole blocks and the open one
	seen          []int32   // observed cells of each
	cur           int64     // open block

	// over's answer at cell at, until the next push.
	at   int64
	high float64
	half bool
}

func newRollingMax(steps, stride int64) rollingMax {
	n := steps/stride + 1
	r := rollingMax{steps: steps, stride: stride, top: make([]float32, n), seen: make([]int32, n), cur: -1, at: -1}
	r.clear()
	return r
}

func (r *rollingMax) clear() {
	for i := range r.top {
		r.top[i], r.seen[i] = float32(math.Inf(-1)), 0
	}
}

func (r *rollingMax) push(c int64, v float64) {
	r.advance(c)
	r.at = -1
	i := mod(r.cur, len(r.top))
	r.top[i] = max(r.top[i], float32(v))
	r.seen[i]++
}

// advance opens the block of cell c.
func (r *rollingMax) advance(c int64) {
	b := floorDiv(c-1, r.stride)
	if b-r.cur >= int64(len(r.top)) {
		r.clear()
		r.cur = b
		return
	}
	for r.cur < b {
		r.cur++
		i := mod(r.cur, len(r.top))
		r.top[i], r.seen[i] = float32(math.Inf(-1)), 0
	}
}

// over is the maximum up to cell c, NaN if all were gaps; ok says that at least half of the cells
// were observed.
func (r *rollingMax) over(c int64) (top float64, ok bool) {
	if r.at != c {
		r.high, r.half = r.find(c)
		r.at = c
	}
	return r.high, r.half
}

func (r *rollingMax) find(c int64) (top float64, ok bool) {
	r.advance(c)
	// On a block's last cell the block in front of the ring is beyond steps.
	whole := c%r.stride == 0 && r.steps%r.stride == 0
	skip := -1
	if whole {
		skip = mod(r.cur+1, len(r.top))
	}
	m, n := float32(math.Inf(-1)), int32(0)
	for i, v := range r.top {
		if i != skip {
			m = max(m, v)
			n += r.seen[i]
		}
	}
	if n == 0 {
		return math.NaN(), false
	}
	return float64(m), 2*int64(n) >= r.steps
}
