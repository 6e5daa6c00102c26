package predict

import (
	"math"
	"slices"
)

const (
	day = int64(86400e9)

	// ladder exponential averages span three cells to a day in equal ratios:
	// a stack of them can stand for any smoothing in between.
	ladder = 5
	// finest bin of the day's profile: the interval of most monitoring
	// systems, and 288 of them make a day's profile 1 KiB.
	finestBin = int64(300e9)
	// shortCells have a median of their own: too few to lag far behind, enough
	// to be sure of the middle of a noisy load.
	shortCells = 64
	// weekBin is coarser, because a week is remembered for its shape alone.
	weekBin = int64(1800e9)
	// profileMemory days: a profile follows a new habit within a working week.
	profileMemory = 5
	// shiftRun cells in a row outside everything remembered are a new level,
	// not a spike. Six keep a false alarm rare and are a minute at 10 s and
	// half an hour at 5 min, inside the hour that recovery may take.
	shiftRun = 6
	// margin around a range, in its width, that a new level lies beyond.
	margin = 0.25
	// farWidths of all that was seen away, a new level says nothing of how much the
	// load will vary there, and the old one is no less likely than before. Between 3
	// and 30, losses on the development series differ by less than a tenth of a percent.
	farWidths = 10
)

// history is what the members see of the past: levels, recent cells, two days
// in bins, a week in coarse bins, and the profile of a day.
type history struct {
	step   int64 // ns
	origin int64 // ns, start of cell 0
	bin    int64 // ns
	perDay int
	alpha  [ladder]float64

	cells    int64 // observed
	lastCell int64
	last     float64
	prev     float64
	ew       [ladder]float64
	recent   [5]float64
	median   float64 // of recent
	short    window
	q50      float64 // slow median
	volFast  float64 // mean absolute change, over the second and last rung
	volSlow  float64
	scale    float64 // mean absolute deviation from the slowest average
	least    float64

	// Level shifts: extremes that fade over a week, and the run outside them.
	lo, hi    float64
	run       int
	runUp     bool
	runSum    float64
	shiftCell int64
	// The same extremes, but of levels that were left as well, see unseen.
	seenLo, seenHi float64
	levelCell      int64                                                // when the latest level began
	before         struct{ slow, q50, volFast, volSlow, scale float64 } // when the run began

	cur    int64 // bin being filled, counted from the epoch
	curSum float64
	curN   float64
	curMax float64
	mean   []float32 // two days and the open bin; NaN: gap
	top    []float32
	prof   []float32 // by time of day, decaying over profileMemory days
	ptop   []float32
	profN  []uint8
	usual  float64 // largest of ptop: the peak of a usual day

	shared     [features]float32 // common's, of sharedCell
	sharedCell int64
	unit       float64
	inverse    float64

	// Borrowed: the day until useLent, and how much a load of level one
	// deviates and changes, which counts for lentN cells.
	lent               []float32
	lentScale, lentVol float64
	lentN              float64

	week    []float32 // eight days of weekBin
	weekCur int64
	weekSum float64
	weekN   float64
}

var nan32 = float32(math.NaN())

func (h *history) init(step int64) {
	h.step = step
	h.perDay = int(day / min(max(step, finestBin), day/2))
	h.bin = day / int64(h.perDay)
	h.mean = make([]float32, 2*h.perDay+1)
	h.top = make([]float32, 2*h.perDay+1)
	h.prof = make([]float32, h.perDay)
	h.ptop = make([]float32, h.perDay)
	h.profN = make([]uint8, h.perDay)
	h.short = newWindow(shortCells)
	h.week = make([]float32, 8*day/weekBin)
	h.forgetDays()
	tau := 3 * float64(step)
	ratio := math.Pow(max(float64(day)/tau, 1.5), 1.0/(ladder-1))
	for i := range h.alpha {
		h.alpha[i] = 1 - math.Exp(-float64(step)/tau)
		tau *= ratio
	}
	h.least = math.MaxFloat64
	h.levelCell = -day / step
	h.sharedCell = -1
	h.usual = math.Inf(-1)
}

// forgetDays drops what is remembered by date.
func (h *history) forgetDays() {
	for i := range h.mean {
		h.mean[i], h.top[i] = nan32, nan32
	}
	for i := range h.week {
		h.week[i] = nan32
	}
	h.curSum, h.curN, h.curMax = 0, 0, math.Inf(-1)
	h.weekSum, h.weekN = 0, 0
	t := h.timeOf(h.lastCell)
	h.cur, h.weekCur = floorDiv(t, h.bin), floorDiv(t, weekBin)
}

func (h *history) timeOf(cell int64) int64 { return h.origin + cell*h.step + h.step/2 }
func (h *history) cellOf(at int64) int64   { return floorDiv(at-h.origin, h.step) }
func (h *history) binOf(cell int64) int64  { return floorDiv(h.timeOf(cell), h.bin) }
func (h *history) hourOf(cell int64) int {
	return mod(floorDiv(h.timeOf(cell), int64(3600e9)), 24)
}

// push takes the value of cell c; the cells since the last one were gaps. It
// reports whether the series has just been found on a level unlike all it was on.
func (h *history) push(c int64, v float64) (unseen bool) {
	if h.cells == 0 {
		h.last, h.q50, h.lo, h.hi, h.seenLo, h.seenHi = v, v, v, v, v, v
		for i := range h.ew {
			h.ew[i] = v
		}
		h.lastCell = c
		h.forgetDays()
		h.scale, h.volSlow, h.volFast = h.lentScale*math.Abs(v), h.lentVol*math.Abs(v), h.lentVol*math.Abs(v)
	}
	h.cells++
	h.advance(c)
	h.remember(v)

	n := float64(h.cells)
	missed := float64(c - h.lastCell)
	h.prev, h.last, h.lastCell = h.last, v, c
	h.least = min(h.least, v)
	for i := range h.ew {
		a := h.alpha[i]
		if missed > 1 {
			a = 1 - math.Pow(1-a, missed)
		}
		// 1/n makes the first averages plain means.
		h.ew[i] += max(a, 1/n) * (v - h.ew[i])
	}
	h.recent[h.cells%5] = v
	h.median = h.middle()
	h.short.add(float32(v))
	n += h.lentN
	d := math.Abs(v - h.prev)
	h.volFast += max(h.alpha[1], 1/n) * (d - h.volFast)
	h.volSlow += max(h.alpha[ladder-1], 1/n) * (d - h.volSlow)
	h.scale += max(h.alpha[ladder-1]/3, 1/n) * (math.Abs(v-h.ew[ladder-1]) - h.scale)
	// The slow median moves by fixed steps, so that a spike counts once
	// however high it is.
	step := max(h.alpha[ladder-2]/2, 1/n) * (h.scale + h.volSlow) * 1.5
	if v > h.q50 {
		h.q50 = min(v, h.q50+step)
	} else {
		h.q50 = max(v, h.q50-step)
	}
	h.useLent()
	return h.detect(c, v)
}

// outside says whether v lies beyond everything of the last week, by a quarter
// of its range.
func (h *history) outside(v float64) (up, down bool) {
	// The first day's range is still growing: a rise there is no news.
	if float64(h.cells)*float64(h.step) <= float64(day)/4 || h.cells <= 48 {
		return false, false
	}
	room := margin*(h.hi-h.lo) + h.rounding()
	return v > h.hi+room, v < h.lo-room
}

// rounding is what two cells of the same load may differ by.
func (h *history) rounding() float64 { return 1e-9 * math.Abs(h.hi) }

// opens says whether v would begin a run that may turn out to be a new level.
// It keeps what that run is going to distort.
func (h *history) opens(v float64) bool {
	up, down := h.outside(v)
	if !up && !down || h.run > 0 {
		return false
	}
	b := &h.before
	b.slow, b.q50, b.volFast, b.volSlow, b.scale = h.ew[ladder-1], h.q50, h.volFast, h.volSlow, h.scale
	return true
}

// detect finds a level shift: shiftRun cells in a row, all on one side outside.
// A daily batch job is inside the range and is left to the profile. It reports
// whether the level is unseen.
func (h *history) detect(c int64, v float64) bool {
	up, down := h.outside(v)
	if !up && !down || h.run > 0 && up != h.runUp {
		h.run, h.runSum = 0, 0
	}
	if up || down {
		if h.run == 0 {
			h.shiftCell = c
		}
		h.run++
		h.runUp = up
		h.runSum += v
		if h.run < shiftRun {
			return false
		}
		level := h.runSum / shiftRun
		delta := level - h.before.slow
		for i := range h.ew {
			h.ew[i] = level
		}
		h.lift(float32(delta))
		h.short.latest(shiftRun)
		h.q50 = h.before.q50 + delta
		h.volFast, h.volSlow, h.scale = h.before.volFast, h.before.volSlow, h.before.scale
		h.run, h.runSum = 0, 0
		if width := h.hi - h.lo; width > h.rounding() {
			h.lo, h.hi = level-width/2, level+width/2
		} else {
			// What never changed has no range to take along, and with none every
			// six cells on one side would be a level again: it has been what it
			// was and what it now is.
			h.lo, h.hi = min(h.lo, slices.Min(h.recent[:])), max(h.hi, slices.Max(h.recent[:]))
		}
		return h.unseen()
	}
	fade, slow := h.alpha[ladder-1]/7, h.ew[ladder-1]
	h.lo = min(v, h.lo+fade*(slow-h.lo))
	h.hi = max(v, h.hi+fade*(slow-h.hi))
	h.seenLo = min(v, h.seenLo+fade*(slow-h.seenLo))
	h.seenHi = max(v, h.seenHi+fade*(slow-h.seenHi))
	return false
}

// unseen says whether the level just found lies beyond all that was seen. What
// was seen moves along with the load, as its range does. But a level that is far
// away, or that comes within a day of the last one, adds to it instead: a load
// that varies far more than it did is found on a new level again and again, and
// would have learnt nothing when the next one comes.
func (h *history) unseen() bool {
	// The middle of the run: its mean and its ends may be a spike's.
	at, width := h.median, h.seenHi-h.seenLo
	off := max(at-h.seenHi, h.seenLo-at)
	is := off > margin*width+h.rounding()
	if is && off <= farWidths*width && h.shiftCell-h.levelCell >= day/h.step {
		h.seenLo, h.seenHi = at-width/2, at+width/2
	}
	h.seenLo, h.seenHi = min(h.seenLo, at), max(h.seenHi, at)
	h.levelCell = h.shiftCell
	return is
}

// lift moves everything remembered to the new level; the shape stays.
func (h *history) lift(delta float32) {
	for _, days := range [][]float32{h.mean, h.top, h.week, h.prof, h.ptop} {
		for i := range days {
			days[i] += delta // a gap, NaN, stays one
		}
	}
	// The bins since the shift are on the new level already.
	for b := max(h.binOf(h.shiftCell), h.cur-int64(len(h.mean))+1); b <= h.cur; b++ {
		i := mod(b, len(h.mean))
		h.mean[i] -= delta
		h.top[i] -= delta
	}
	h.usual += float64(delta)
}

// middle is the median of the last five cells, of the last three while there
// are fewer.
func (h *history) middle() float64 {
	r := &h.recent
	if h.cells < 5 {
		if h.cells < 3 {
			return h.last
		}
		a, b, c := r[h.cells%5], r[(h.cells-1)%5], r[(h.cells-2)%5]
		return max(min(a, b), min(max(a, b), c))
	}
	a, b, c, d := r[0], r[1], r[2], r[3]
	lo := max(min(a, b), min(c, d))
	hi := min(max(a, b), max(c, d))
	return max(min(lo, hi), min(max(lo, hi), r[4]))
}

// advance closes the bins before that of cell c.
func (h *history) advance(c int64) {
	b := h.binOf(c)
	for h.cur < b {
		h.closeBin()
		h.cur = max(h.cur+1, b-int64(len(h.mean)))
		i := mod(h.cur, len(h.mean))
		h.mean[i], h.top[i] = nan32, nan32
	}
	w := floorDiv(h.timeOf(c), weekBin)
	for h.weekCur < w {
		h.weekCur = max(h.weekCur+1, w-int64(len(h.week)))
		h.week[mod(h.weekCur, len(h.week))] = nan32
		h.weekSum, h.weekN = 0, 0
	}
}

func (h *history) remember(v float64) {
	h.curSum += v
	h.curN++
	h.curMax = max(h.curMax, v)
	i := mod(h.cur, len(h.mean))
	h.mean[i], h.top[i] = float32(h.curSum/h.curN), float32(h.curMax)
	h.weekSum += v
	h.weekN++
	h.week[mod(h.weekCur, len(h.week))] = float32(h.weekSum / h.weekN)
}

func (h *history) closeBin() {
	if h.curN > 0 {
		i := mod(h.cur, h.perDay)
		a := float32(max(1/(float64(h.profN[i])+1), 1.0/profileMemory))
		h.prof[i] += a * (float32(h.curSum/h.curN) - h.prof[i])
		was := float64(h.ptop[i])
		h.ptop[i] += a * (float32(h.curMax) - h.ptop[i])
		h.profN[i] = min(h.profN[i]+1, 100)
		if is := float64(h.ptop[i]); is >= h.usual {
			h.usual = is
		} else if was >= h.usual {
			h.usual = h.findUsual()
		}
	}
	h.curSum, h.curN, h.curMax = 0, 0, math.Inf(-1)
}

func (h *history) findUsual() float64 {
	top := math.Inf(-1)
	for i, v := range h.ptop {
		if h.profN[i] > 0 {
			top = max(top, float64(v))
		}
	}
	return top
}

// around weighs bin b and two neighbours to each side 1 2 3 2 1; NaN where
// nothing is known.
func (h *history) around(b int64) float64 {
	sum, w := 0.0, 0.0
	old := h.cur - (b - 2) // bins before the open one
	i := mod(b-2, len(h.mean))
	for _, wt := range triangle {
		if v := float64(h.mean[i]); v == v && old >= 0 && old < int64(len(h.mean)) {
			sum += wt * v
			w += wt
		}
		old--
		if i++; i == len(h.mean) {
			i = 0
		}
	}
	return sum / w // 0/0 is NaN
}

var triangle = [...]float64{1, 2, 3, 2, 1}

func (h *history) at(b int64) float64 {
	if b > h.cur || b <= h.cur-int64(len(h.mean)) {
		return math.NaN()
	}
	return float64(h.mean[mod(b, len(h.mean))])
}

// profileAround is around for the profile.
func (h *history) profileAround(b int64) float64 {
	sum, w := 0.0, 0.0
	i := mod(b-2, h.perDay)
	for _, wt := range triangle {
		if h.profN[i] > 0 {
			sum += wt * float64(h.prof[i])
			w += wt
		}
		if i++; i == h.perDay {
			i = 0
		}
	}
	return sum / w
}

func (h *history) profileAt(b int64) float64 {
	i := mod(b, h.perDay)
	if h.profN[i] == 0 {
		return math.NaN()
	}
	return float64(h.prof[i])
}

// weekAt is the mean of the coarse bin that holds time t.
func (h *history) weekAt(t int64) float64 {
	b := floorDiv(t, weekBin)
	if b > h.weekCur || b <= h.weekCur-int64(len(h.week)) {
		return math.NaN()
	}
	return float64(h.week[mod(b, len(h.week))])
}

// topOver is the largest cell in bins [from, to], NaN if unknown.
func (h *history) topOver(from, to int64) float64 {
	top := math.NaN()
	from, to = max(from, h.cur-int64(len(h.top))+1), min(to, h.cur)
	i := mod(to, len(h.top))
	for range max(0, to-from+1) {
		if v := float64(h.top[i]); !(v <= top) && v == v {
			top = v
		}
		if i--; i < 0 {
			i = len(h.top) - 1
		}
	}
	return top
}

// profileTop is the largest usual maximum in bins (from, to].
func (h *history) profileTop(from, to int64) float64 {
	if to-from >= int64(h.perDay) {
		if math.IsInf(h.usual, 0) {
			return math.NaN()
		}
		return h.usual
	}
	top := math.NaN()
	i := mod(to, h.perDay)
	for range max(0, to-from) {
		if h.profN[i] > 0 {
			if v := float64(h.ptop[i]); !(v <= top) {
				top = v
			}
		}
		if i--; i < 0 {
			i = h.perDay - 1
		}
	}
	return top
}

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}

func mod(a int64, n int) int {
	m := int(a % int64(n))
	if m < 0 {
		m += n
	}
	return m
}
