package predict

import "math"

// levels are the quantiles kept at hand.
var levels = [...]float64{0.1, 0.5, 0.9, 0.95, 0.99}

// judged are the levels whose ways compete; the outer two borrow the weights
// of their neighbours, because what is seen once in a hundred settles nothing.
var judged = [...]int{1, 2, 3}
var judgeOf = [len(levels)]int{1, 0, 1, 2, 2}

// Ways from settled forecasts to a quantile.
const (
	wayRaw     = iota // residuals as they are
	wayScaled         // residuals in units of the expected error
	wayOutcome        // outcomes, whatever was forecast
	wayShortRaw
	wayShortOutcome
	ways
)

// offset turns a median and an expected error into quantiles, by the residuals
// of settled forecasts alone. Several ways to do so compete by their recent
// pinball loss.
type offset struct {
	win    [ways]window
	q      [len(levels)][ways]float64
	loss   [len(judged)][ways]float64
	weight [len(judged)][ways]float32
	n      float64
	due    int

	every   int     // once full, the long windows take every so many-th
	skip    int     // until the next
	daily   bool    // peaks of which a day has one or fewer
	overlap float64 // settled forecasts whose outcomes overlap
	dof     float64 // windows hold so many times fewer independent outcomes
	nearby  bool    // the short ways take part
}

const (
	// spanDays that the long windows cover: the residuals of every hour of
	// the day, more than twice.
	spanDays = 3
	// And so many horizons: fewer outcomes that do not overlap say nothing
	// about a 95 % quantile. A day's peak has one outcome a day.
	spanValues = 10
	spanPeaks  = 30
	// nearOverlap: with more cells than this between origin and outcome, the
	// few outcomes of a short window are all the same one.
	nearOverlap = 3
	// offsetMemory settled forecasts decide between the ways: their losses
	// differ in the tail, which is seen ten times more rarely than the middle.
	offsetMemory = 500
	// medianDoubt independent residuals are the belief in the members' median.
	medianDoubt = 10
	// tailShare of an exponential tail: loads have a ceiling, but nobody knows
	// whether it was seen.
	tailShare = 0.5
	// offsetStart residuals are the fewest to take quantiles of.
	offsetStart = 5
)

// windowSizes leave the state of four lanes below MaxState; with a fifth they
// halve.
var windowSizes = [ways]int{160, 256, 128, 64, 64}

func newOffset(l *lane, t Target, step int64, lanes int) offset {
	o := offset{}
	for i := range o.win {
		n := windowSizes[i]
		if lanes > 4 {
			n /= 2
		}
		o.win[i] = newWindow(n)
	}
	horizons := spanValues
	overlap := float64(l.steps) / float64(l.stride)
	if t == Peak {
		horizons = spanPeaks
		// Peaks of overlapping windows are often the same cell. √overlap lies
		// between counting all of them and counting one a horizon.
		o.dof = math.Sqrt(overlap)
	}
	span := max(spanDays*day, int64(horizons)*int64(l.h))
	o.overlap = overlap
	o.daily = t == Peak && l.h > shiftHorizon
	o.every = max(1, int(math.Round(float64(span)/float64(cap(o.win[wayScaled].ring))/(float64(step*l.stride)*l.of[t].pace))))
	o.nearby = overlap <= nearOverlap
	return o
}

// competes says whether way j may speak for level k. The median is the
// members' business: outcomes alone are among them already.
func (o *offset) competes(j, k int) bool {
	if j >= wayShortRaw && !o.nearby || len(o.win[j].ring) < offsetStart {
		return false
	}
	return levels[k] != 0.5 || j != wayOutcome && j != wayShortOutcome
}

func (o *offset) learn(mid, spread, y, pace float64) {
	if o.n >= offsetStart {
		rate := max(1/(o.n-offsetStart+3), pace/offsetMemory)
		known := len(o.win[wayOutcome].ring) >= offsetStart
		for i, k := range judged {
			q, at, loss := levels[k], &o.q[k], &o.loss[i]
			charge := func(j int, forecast float64) {
				loss[j] += rate * (pinball(q, y-forecast) - loss[j])
			}
			// A borrowed start has scaled residuals alone, see competes.
			if len(o.win[wayRaw].ring) >= offsetStart {
				charge(wayRaw, mid+at[wayRaw])
			}
			charge(wayScaled, mid+spread*at[wayScaled])
			if known && q != 0.5 {
				charge(wayOutcome, at[wayOutcome])
			}
			if !o.nearby {
				continue
			}
			if len(o.win[wayShortRaw].ring) >= offsetStart {
				charge(wayShortRaw, mid+at[wayShortRaw])
			}
			if len(o.win[wayShortOutcome].ring) >= offsetStart && q != 0.5 {
				charge(wayShortOutcome, at[wayShortOutcome])
			}
		}
	}
	o.n++
	if o.nearby {
		o.win[wayShortRaw].add(float32(y - mid))
		o.win[wayShortOutcome].add(float32(y))
	}
	if o.skip--; o.skip <= 0 || !o.win[wayScaled].full() {
		o.skip = o.every
		o.win[wayRaw].add(float32(y - mid))
		o.win[wayScaled].add(float32(max(-30, min(30, (y-mid)/spread))))
		o.win[wayOutcome].add(float32(y))
	}
	if o.due--; o.due <= 0 {
		o.refresh()
		o.due = min(1+int(o.n)/32, 6)
	}
}

func pinball(q, miss float64) float64 {
	if miss < 0 {
		return (q - 1) * miss
	}
	return q * miss
}

func (o *offset) refresh() {
	for j := range ways {
		if j >= wayShortRaw && !o.nearby {
			continue
		}
		w := &o.win[j]
		// With few independent outcomes the sample's quantile lies too low:
		// the conformal rank is (n+1)q, in outcomes that count.
		up := 1 + o.dof/(o.dof+float64(len(w.ring)))
		if o.dof == 0 {
			up = 1
		}
		for k, q := range levels {
			rank := q
			if q > 0.5 {
				rank *= up
			}
			o.q[k][j] = w.quantile(rank)
			if o.daily && q >= 0.95 {
				o.q[k][j] += o.beyond(w, q)
			}
		}
		// Few independent residuals do not say that the median forecast is
		// off: its correction starts from none.
		if j != wayOutcome && j != wayShortOutcome {
			n := float64(len(w.ring))
			o.q[1][j] *= n / (n + medianDoubt*o.overlap)
		}
	}
	for i, k := range judged {
		var loss [ways]float64
		for j := range loss {
			loss[j] = o.loss[i][j]
			if !o.competes(j, k) {
				loss[j] = math.Inf(1)
			}
		}
		weigh(loss[:], o.weight[i][:])
	}
}

// beyond is how far the q-quantile lies above everything in w. Of d
// independent outcomes the largest is exceeded by the next with probability
// 1/(d+1); each e-fold rarer excess lies one mean excess further up, if the
// tail is exponential, and the mean excess follows from the distance of the
// largest to the middle.
func (o *offset) beyond(w *window, q float64) float64 {
	d := 1 + float64(len(w.ring))/o.overlap
	rarer := 1 / (d * (1 - q))
	if rarer <= 1 || len(w.ring) == 0 {
		return 0
	}
	return tailShare * (w.quantile(1) - w.quantile(0.5)) / math.Log(2*d) * math.Log(rarer)
}

// quantiles of levels around mid, which is expected to err by spread.
func (o *offset) quantiles(mid, spread float64) (f [len(levels)]float64) {
	if o.n < offsetStart {
		// Nothing known: a usual error is exceeded two to three times over.
		for k, q := range levels {
			f[k] = mid + spread*(q-0.5)*5
		}
		return f
	}
	for k := range levels {
		w, q := &o.weight[judgeOf[k]], &o.q[k]
		// As deviations from mid, so that weights which sum to almost one
		// leave a constant what it is.
		f[k] = mid + float64(w[wayRaw])*q[wayRaw] + float64(w[wayScaled])*spread*q[wayScaled] +
			float64(w[wayShortRaw])*q[wayShortRaw] + float64(w[wayOutcome])*(q[wayOutcome]-mid) + float64(w[wayShortOutcome])*(q[wayShortOutcome]-mid)
	}
	return f
}

// short is the median of the latest outcomes, or d where they are all one.
func (o *offset) short(d float64) float64 {
	if !o.nearby || len(o.win[wayShortOutcome].ring) == 0 {
		return d
	}
	return o.q[1][wayShortOutcome]
}

// median of the outcomes.
func (o *offset) median(d float64) float64 {
	if len(o.win[wayOutcome].ring) == 0 {
		return d
	}
	return o.q[1][wayOutcome]
}

// relevel drops outcomes on a level that is gone, and the residuals of the
// latest k forecasts, which missed the shift.
func (o *offset) relevel(k int) {
	for _, j := range []int{wayOutcome, wayShortOutcome} {
		o.win[j].ring, o.win[j].order, o.win[j].next = o.win[j].ring[:0], o.win[j].order[:0], 0
	}
	o.win[wayShortRaw].neutralise(k)
	if o.win[wayScaled].full() {
		k = (k + o.every - 1) / o.every
	}
	o.win[wayRaw].neutralise(k)
	o.win[wayScaled].neutralise(k)
	o.refresh()
}
