package predict

import "math"

// levels are the quantiles kept at hand.
var levels = [...]float64{0.1, 0.5, 0.9, 0.95, 0.99}

// judged are the levels whose ways compete; the outer two borrow the weights
// of their neighbours, because what is seen once in a hundred settles nothing.
var (
	judged  = [...]int{1, 2, 3}
	judgeOf = [len(levels)]int{1, 0, 1, 2, 2}
)

// Ways from settled forecasts to a quantile.
const (
	wayRaw     = iota // residuals as they are
	wayScaled         // residuals in units of the expected error
	wayOutcome        // outcomes, whatever was forecast
	wayLevel          // distances from the load's level, up to shiftHorizon
	ways
)

// offset turns a median and an expected error into quantiles, by the residuals
// of settled forecasts alone. Several ways to do so compete by their recent
// pinball loss.
type offset struct {
	seen   [ways]digest
	q      [len(levels)][ways]float64
	loss   [len(judged)][ways]float64
	weight [len(judged)][ways]float32
	sum    [len(levels)]sum
	n      float64
	took   int // residuals, modulo tookCycle
	due    int
	bend   [len(judged)]float64 // added to the rank of each level's bound, see held

	daily    bool    // peaks of which a day has one or fewer
	thin     uint64  // once it knows the series, takes one residual in so many
	overlap  float64 // settled forecasts whose outcomes overlap
	dof      float64 // digests hold so many times fewer independent outcomes
	bends    bool    // outcomes come soon enough to correct bounds by them
	bendRate float64 // of independent outcomes, see held
	doubt    float64 // in ways that need much to be known, see wayDoubt
}

// sum is a quantile as a function of the median and the expected error.
type sum struct{ fixed, spread, share, outcome, level float64 }

const (
	// spanDays that the digests remember: a week, the longest rhythm that most
	// loads have.
	spanDays = 7
	// And so many horizons: fewer outcomes that do not overlap say nothing
	// about a 95 % quantile. A day's peak has one outcome a day.
	spanValues = 10
	spanPeaks  = 30
	// offsetMemory settled forecasts decide between the ways. With 2,000, losses
	// on the development series are up to three percent higher.
	offsetMemory = 500
	// medianDoubt independent residuals are the belief in the members' median.
	// It and tailShare are guesses, and were not varied.
	medianDoubt = 10
	// tailShare of an exponential tail: loads have a ceiling, but nobody knows
	// whether it was seen.
	tailShare = 0.5
	// thinFrom cells between origin and outcome, neighbours have nearly the same
	// outcome, and half of the residuals tell as much as all. Up to shiftHorizon a
	// week has so many that half of them do too.
	thinFrom = 6
	// thinAfter settled forecasts: of fewer, none is left out.
	thinAfter = 1000
	// tookCycle is far more than a run can take.
	tookCycle = 1 << 20
	// bendRate is a compromise: a bound of .95 that always holds takes 170 settled
	// forecasts to come down to bendRoom. At .005 coverage is closer still, and
	// the pinball loss of noisy loads a percent higher.
	bendRate = 0.003
	// bendRoom: at most by half of what lies beyond the bound, so that a long
	// calm does not take away the warning of what is rare.
	bendRoom = 0.5
	// bendStart: of fewer outcomes the share that a bound of .95 held is off by
	// more than .01 by chance alone.
	bendStart = 300
	// offsetStart residuals are the fewest to take quantiles of.
	offsetStart = 5
	// wayDoubt: residuals in units of the expected error take a good estimate of
	// it, and outcomes alone a level that stays. As if their losses were wayDoubt/n
	// higher: 144 samples let them win seldom, a week's always if they are better.
	// Between 10 and 100, losses differ by less than half a percent.
	wayDoubt = 30
	// nearOverlap times what √overlap exceeds one are as many peaks up to
	// shiftHorizon as say nothing new, until held has enough outcomes. Half of it
	// leaves the bound of an hour's peak below .93 after 150 forecasts.
	nearOverlap = 1.25
	// outcomeStart outcomes are the fewest of which one may lie beyond a 95 %
	// bound. Outcomes alone, unlike residuals, begin anew after a level shift.
	outcomeStart = 19
)

// The first forecasts are the worst, and some loads begin unlike what they then
// are or meet one great fault: what was seen early fades in favour of what was
// seen late, which costs a quarter (1) to two thirds (2) of what counts. Of the
// two ways that stand on plain differences, one therefore never fades and the
// other fades fast: whichever a load rewards. Which of them does which, was
// measured: the other way round, an hour's peak is held too seldom.
var (
	valueAgeing = [ways]float64{wayRaw: 0, wayScaled: 1, wayOutcome: 1, wayLevel: 2}
	peakAgeing  = [ways]float64{wayRaw: 2, wayScaled: 0.5, wayOutcome: 0.5, wayLevel: 0}
)

func newOffset(l *lane, t Target, step int64, lanes int) offset {
	o := offset{doubt: wayDoubt}
	horizons := spanValues
	overlap := float64(l.steps) / float64(l.stride)
	if t == Peak {
		horizons = spanPeaks
		if l.h > shiftHorizon {
			// Peaks of overlapping windows are often the same cell. √overlap lies
			// between counting all of them and counting one a horizon.
			o.dof = math.Sqrt(overlap)
		} else {
			o.dof = nearOverlap * (math.Sqrt(overlap) - 1)
		}
	}
	span := max(spanDays*day, int64(horizons)*int64(l.h))
	o.thin = 1
	if l.h <= shiftHorizon || l.stride == 1 && overlap >= thinFrom {
		o.thin = 2
	}
	memory := float64(span) / (float64(step*l.stride) * float64(o.thin))
	var ageing [ways]float64
	switch {
	case l.h > shiftHorizon:
	case t == Peak:
		ageing = peakAgeing
	default:
		ageing = valueAgeing
	}
	size := digestSize
	if lanes > 4 {
		size = digestFew
	}
	for j := range o.seen {
		if j == wayLevel && l.h > shiftHorizon {
			continue // never filled
		}
		o.seen[j] = newDigest(size, memory, ageing[j])
	}
	o.overlap = overlap
	o.bendRate = bendRate / math.Sqrt(max(1, overlap))
	o.daily = l.far(t)
	o.bends = l.h <= shiftHorizon
	return o
}

// known says whether way j has seen enough to speak.
func (o *offset) known(j int) bool {
	if j == wayOutcome {
		return o.seen[j].size() >= outcomeStart
	}
	return o.seen[j].size() >= offsetStart
}

// held tells whether the bound of the i-th judged level, for quantile q, held
// the outcome: a bound that holds too often is asked for a lower rank, one that
// fails too often for a higher (adaptive conformal inference, Gibbs & Candès
// 2021).
func (o *offset) held(i int, q, held float64) {
	room := (1 - q) * bendRoom
	b := o.bend[i] + o.bendRate*(q-held)
	if b > room {
		b = room
	} else if b < -room {
		b = -room
	}
	o.bend[i] = b
}

// competes says whether way j may speak for level k. The median is the
// members' business: outcomes alone are among them already.
func (o *offset) competes(j, k int) bool {
	return o.known(j) && (levels[k] != 0.5 || j != wayOutcome && j != wayLevel)
}

// by is where the residuals of way j start from and what their unit is.
func by(j int, mid, spread, level float64) (from, unit float64) {
	switch j {
	case wayScaled:
		return mid, spread
	case wayOutcome:
		return 0, 1
	case wayLevel:
		return level, 1
	}
	return mid, 1
}

func (o *offset) learn(cell int64, mid, spread, level, y float64) {
	if o.n >= offsetStart {
		rate := max(1/(o.n-offsetStart+3), 1.0/offsetMemory)
		for j := range ways {
			if !o.known(j) {
				continue
			}
			from, unit := by(j, mid, spread, level)
			for i, k := range judged {
				// Whether it competes or not: a median of outcomes harms nobody.
				miss := y - (from + unit*o.q[k][j])
				o.loss[i][j] += rate * (pinball(levels[k], miss) - o.loss[i][j])
			}
		}
	}
	o.n++
	if o.n <= thinAfter || dice(cell, o.thin) {
		o.take(mid, spread, level, y)
	}
	if o.due--; o.due <= 0 {
		o.refresh()
		// A thirtieth more residuals hardly move the quantiles of many.
		o.due = min(1+int(o.seen[wayOutcome].size())/32, freshSize-freshKept)
	}
}

func (o *offset) take(mid, spread, level, y float64) {
	o.took = (o.took + 1) % tookCycle
	o.seen[wayRaw].add(float32(y - mid))
	o.seen[wayScaled].add(float32(max(-30, min(30, (y-mid)/spread))))
	o.seen[wayOutcome].add(float32(y))
	if o.bends {
		o.seen[wayLevel].add(float32(y - level))
	}
}

// pinball takes the slope by the sign's bit: nobody foretells which side an
// outcome lies on, a processor neither.
func pinball(q, miss float64) float64 {
	slopes := [2]float64{q, q - 1}
	return slopes[math.Float64bits(miss)>>63] * miss
}

func (o *offset) refresh() {
	var at [len(levels)]float64
	var rank [len(levels)]float64
	for j := range ways {
		if !o.known(j) {
			continue
		}
		n := o.seen[j].size()
		// With few independent outcomes the sample's quantile lies too low:
		// the conformal rank is (n+1)q, in outcomes that count.
		up, from, known := 1.0, 0.5, n
		if o.bends {
			// What was settled counts, not what is remembered of it: a memory
			// that fades fast shall not ask for its largest.
			from, known = 0.9, o.n
		}
		if o.dof > 0 {
			up += o.dof / (o.dof + known)
		}
		for k, q := range levels {
			rank[k] = q
			if q > 0.5 {
				// In proportion to what lies beyond: P99 goes with P95.
				b := o.bend[judgeOf[k]] * (1 - q) / (1 - levels[judged[judgeOf[k]]])
				rank[k] = q + b
				if q > from {
					rank[k] *= up
				}
			}
		}
		o.seen[j].quantiles(rank[:], at[:])
		if o.daily {
			for k, q := range levels {
				if q >= 0.95 {
					at[k] += o.beyond(j, n, q)
				}
			}
		}
		// Few independent residuals do not say that the median forecast is
		// off: its correction starts from none.
		if j < wayOutcome {
			at[1] *= n / (n + medianDoubt*o.overlap)
		}
		for k := range at {
			o.q[k][j] = at[k]
		}
	}
	for i, k := range judged {
		var loss [ways]float64
		for j := range loss {
			loss[j] = o.loss[i][j]
			if o.bends && (j == wayScaled || j == wayOutcome) {
				loss[j] *= 1 + o.doubt/(1+o.n)
			}
			if !o.competes(j, k) {
				loss[j] = math.Inf(1)
			}
		}
		var w [tiers][ways]float32
		weigh(loss[:], w[0][:], w[1][:], w[2][:])
		// Far ahead, few outcomes are independent of each other, and what was
		// best is hardly better than what was not.
		o.weight[i] = w[1]
		if !o.bends {
			o.weight[i] = w[0]
		}
	}
	o.total()
}

// total adds up what the ways say, once for all forecasts until the next
// refresh.
func (o *offset) total() {
	for k := range levels {
		w, q := &o.weight[judgeOf[k]], &o.q[k]
		o.sum[k] = sum{
			fixed: float64(w[wayRaw])*q[wayRaw] + float64(w[wayLevel])*q[wayLevel], level: float64(w[wayLevel]), spread: float64(w[wayScaled]) * q[wayScaled],
			share: float64(w[wayOutcome]), outcome: q[wayOutcome],
		}
	}
}

// beyond is how far the q-quantile lies above everything that way j has
// seen. Of d independent outcomes the largest is exceeded by the next with
// probability 1/(d+1); each e-fold rarer excess lies one mean excess further
// up, if the tail is exponential, and the mean excess follows from the distance
// of the largest to the middle.
func (o *offset) beyond(j int, n, q float64) float64 {
	d := 1 + n/o.overlap
	rarer := 1 / (d * (1 - q))
	if rarer <= 1 {
		return 0
	}
	ends := [2]float64{0.5, 1}
	o.seen[j].quantiles(ends[:], ends[:])
	return tailShare * (ends[1] - ends[0]) / math.Log(2*d) * math.Log(rarer)
}

// quantiles of levels around mid, which is expected to err by spread.
func (o *offset) quantiles(mid, spread, level float64) (f [len(levels)]float64) {
	if o.n < offsetStart {
		// Nothing known: a usual error is exceeded two to three times over.
		for k, q := range levels {
			f[k] = mid + spread*(q-0.5)*5
		}
		return f
	}
	for k := range levels {
		// As deviations from mid, so that weights which sum to almost one
		// leave a constant what it is.
		s := &o.sum[k]
		f[k] = mid + (s.fixed + s.spread*spread + s.share*(s.outcome-mid) + s.level*(level-mid))
	}
	return f
}

// median of the outcomes.
func (o *offset) median(d float64) float64 {
	if !o.known(wayOutcome) {
		return d
	}
	return o.q[1][wayOutcome]
}

// relevel drops outcomes on a level that is gone, and the latest k residuals,
// of forecasts that missed the shift.
func (o *offset) relevel(k int) {
	o.seen[wayOutcome].clear()
	o.due = 1
	o.seen[wayRaw].drop(k)
	o.seen[wayScaled].drop(k)
	o.seen[wayLevel].drop(k)
	o.refresh()
}
