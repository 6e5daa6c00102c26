package predict

import (
	"math"
	"time"
)

const (
	// pendingMax origins of a lane wait for their outcome at a time. Origins
	// closer together than a 20th of the horizon share nearly all of their
	// outcome's noise and teach little that is new.
	pendingMax = 20
	// pendingFew, where a fifth lane has to fit into MaxState.
	pendingFew = 14
	// guardHorizon: up to here "as now" is the forecast that a plain
	// autoscaler makes, and being worse than it is inexcusable.
	guardHorizon = 5 * time.Minute
	// asideHorizon: up to here members are weighed by the origin's kind as well. An
	// hour ahead the development series gain by it and the others do not, a day
	// ahead those lose: too few outcomes that are independent.
	asideHorizon = 15 * time.Minute
	// shiftHorizon: up to here an interval recovers from a level shift at
	// once, instead of when the residuals of the shift have left the window.
	shiftHorizon = time.Hour
)

// lane forecasts one horizon.
type lane struct {
	h      time.Duration
	steps  int64 // cells
	stride int64 // every stride-th cell is an origin to learn from
	wait   []entry
	now    entry                   // of the newest cell, for Forecast, unless it waits already
	ready  [2][len(levels)]float64 // quantiles of the newest cell
	at     int64                   // that cell
	peaks  rollingMax
	of     [2]half // by Target
}

// half is what a lane has learnt about one target.
type half struct {
	stack   ridge            // z of the outcome from the features
	width   ridge            // its absolute error from the scales
	members blend            // which member to believe
	aside   [kinds - 1]aside // and where the origin is not calm
	sorts   bool             // origins by kind, up to asideHorizon
	start   float64          // forecasts that are made from nothing and prove nothing
	tails   offset           // residuals to quantiles

	doubt float64 // settled forecasts that say as much as one
	kept  kept    // of all these, when a run outside began

	n         float64 // settled forecasts
	borrowed  bool    // members and tails began with a prior's
	errFast   float64 // mean absolute error, over 12 and 300 settled forecasts
	errSlow   float64
	errHour   [24]float32 // by hour of day
	errHourN  [24]uint8
	lossOwn   float64 // long-run absolute error of the forecast median
	lossNaive float64 // and of "as now"
	lateOwn   float64 // the same of late, over guardMemory settled forecasts
	lateNaive float64
	regret    float64 // how much more it has been lately, see regretLeast
	same      float64 // share of outcomes that equalled a resting load
	cover90   float64 // share of outcomes below the quantile, recent
	cover95   float64
}

func newLane(h time.Duration, step int64, lanes int) *lane {
	steps := max(1, (int64(h)+step/2)/step)
	pending := int64(pendingMax)
	if lanes > 4 {
		pending = pendingFew
	}
	l := &lane{h: h, steps: steps, stride: (steps + pending - 1) / pending}
	l.at = -1
	l.wait = make([]entry, steps/l.stride+1)
	l.peaks = newRollingMax(steps, l.stride)
	for k := range l.of {
		n := valueFeatures
		if Target(k) == Peak {
			n = peakFeatures
		}
		l.of[k] = half{stack: newRidge(n), width: newRidge(scales)}
		l.of[k].doubt, l.of[k].start = 1, guardStart
		if l.far(Target(k)) {
			// Windows that overlap mostly have the very same peak.
			l.of[k].doubt = float64(steps) / float64(l.stride)
			l.of[k].start = farStart * l.of[k].doubt
		}
		l.of[k].sorts = h <= asideHorizon
		l.of[k].members.far = l.h > shiftHorizon
		l.of[k].members.count = members
		if Target(k) == Peak {
			l.of[k].members.count = peakMembers
		}
		l.of[k].tails = newOffset(l, Target(k), step, lanes)
	}
	return l
}

// far says that the outcomes are peaks of windows so long that few of them do
// not overlap.
func (l *lane) far(t Target) bool { return t == Peak && l.h > shiftHorizon }

// half is what is known of a target. In a lane of one cell the peak is the
// value, and not learnt twice.
func (l *lane) half(t Target) *half {
	if l.steps == 1 {
		t = Value
	}
	return &l.of[t]
}

// issue makes the forecasts of origin c and keeps them for settle.
func (l *lane) issue(hist *history, c int64) {
	// An origin inside a gap forecasts from stale levels: nothing to learn.
	e := &l.wait[mod(c/l.stride, len(l.wait))]
	e.ok = false
	if c-hist.lastCell <= max(2, l.steps/4) {
		l.fill(hist, c, e)
	}
}

// settle learns from the forecasts whose target is cell c, observed as v.
func (l *lane) settle(hist *history, c int64, v float64, work []float64) {
	o := c - l.steps
	if o < 0 || o%l.stride != 0 {
		return
	}
	e := &l.wait[mod(o/l.stride, len(l.wait))]
	if !e.ok || e.cell != o {
		return
	}
	e.ok = false
	hour := hist.hourOf(c)
	l.of[Value].learn(e, Value, v, hour, work)
	if l.steps > 1 {
		if top, ok := l.peaks.over(c); ok {
			l.of[Peak].learn(e, Peak, top, hour, work)
		}
	}
}

const (
	// stackMemory settled forecasts, six days at 5 min: between 1,000 and 3,000
	// losses on the development series hardly differ, at 6,000 they are higher
	// (docs/adr/0010).
	stackMemory = 1750
	// widthMemory was not varied.
	widthMemory = 3000
	// youth settled forecasts long, nothing is left out for speed.
	youth = 500
	// sharedFrom cells between origin and outcome, the stack learns from every
	// other settled forecast: neighbours have nearly the same equation.
	sharedFrom = 3
	// shrink is the ridge term of the stack: ten samples' worth of belief
	// that tomorrow is as now, since its features are deviations from now. With
	// thirty, losses at 5 min are higher and those at 24 h lower.
	shrink = 10
	// widthDoubt settled forecasts up to shiftHorizon are the belief that an error
	// is as large as usual. Between 100 and 300, losses hardly differ; a day ahead
	// any of it costs one percent or two.
	widthDoubt = 200
	// widthShrink is weaker: the error's scales are few and all positive.
	widthShrink = 3
	// guardMemory settled forecasts are "of late": where levels are noise, as-now
	// errs by √2 of what a median errs, so that few outcomes tell; where they are
	// not, it comes to the same.
	guardMemory = 60
	// guardStart forecasts are made from nothing and prove nothing.
	guardStart = 30
	// farStart windows that do not overlap are the same of peaks beyond
	// shiftHorizon: members that know one day. With 1.5, errors on the development
	// series are 2 percent higher, with 3 the same.
	farStart = 2
	// farDoubt such windows are the belief that a far peak is as the last one: as if
	// the median had lost farDoubt/n more. Between 1.5 and 4, errors on the
	// development series differ by less than half a percent.
	farDoubt = 2
	// regretLeast of as-now's mean errors, and one for each regretShare forecasts,
	// is how much the median may have lost to it since it was last ahead (Page's
	// cumulative sum, 1954) before as-now is believed, until two thirds of thrice
	// as much at most are won back. It bounds what a load that took to stepping
	// costs: a fortieth is a quarter of what may be lost at all. With a limit of 10,
	// a day's load can lose more; with 4 and 6, losses at 5 min are .7 and .2 percent
	// higher.
	regretLeast = 7
	regretShare = 40
	// topWeight bounds what one small residual weighs in least absolute
	// deviations by reweighting (Schlossmacher 1973).
	topWeight = 4
)

func (h *half) learn(e *entry, t Target, y float64, hour int, work []float64) {
	mid, spread := e.middle(t)
	if h.borrowed && h.n == 0 {
		h.settleUnit(spread)
	}
	h.n++
	h.tails.learn(e.cell, mid, spread, e.level(), y)

	// The error's size, for the width of the next forecasts. One beyond six
	// times the expected is counted as six times: it comes from another
	// distribution, and the scaled residuals keep it in full.
	x := e.scalesOf(t)
	r := math.Abs(y - mid)
	sz := float64(e.spread[t])
	h.width.add(x, min(r/e.scale, 6*sz), 1/(sz*sz+0.01), 1-1.0/widthMemory, widthShrink, work)
	one := 1 / h.n // of all
	some := max(1.0/300, one)
	h.errFast += max(1.0/12, one) * (r - h.errFast)
	h.errSlow += some * (r - h.errSlow)
	h.errHourN[hour] = min(h.errHourN[hour]+1, 50)
	h.errHour[hour] += (float32(r) - h.errHour[hour]) / float32(h.errHourN[hour])

	// The members and the final forecast against the outcome.
	var m [members]float64
	e.membersOf(t, &m)
	z := (y - e.anchor) / e.scale
	if e.rests() {
		h.same += some * (equal(y, e.anchor) - h.same)
	}
	kind := calm
	if h.sorts {
		kind = e.kind(t)
	}
	if kind == calm || h.n <= youth {
		h.members.learn(e.cell, &m, z, e.scale)
	}
	if kind != calm {
		h.aside[kind-1].learn(&h.members, &m, z, e.scale)
	}
	naive := e.anchor + e.scale*m[0]
	long := max(1.0/5000, 1/max(h.n-h.start, 1))
	own, asNow := math.Abs(y-e.anchor-e.scale*float64(e.mid50[t])), math.Abs(y-naive)
	h.lossOwn += long * (own - h.lossOwn)
	h.lossNaive += long * (asNow - h.lossNaive)
	if h.n > guardStart {
		h.regret = max(0, min(h.regret+own-asNow, 3*h.regretLimit()))
	}
	late := max(1.0/guardMemory, long)
	h.lateOwn += late * (own - h.lateOwn)
	h.lateNaive += late * (asNow - h.lateNaive)
	held90, held95 := below(z, e.up90[t]), below(z, e.up95[t])
	h.cover90 += some * (held90 - h.cover90)
	h.cover95 += some * (held95 - h.cover95)
	if h.n > bendStart && h.tails.bends {
		h.tails.held(1, 0.9, held90)
		h.tails.held(2, 0.95, held95)
	}
	gap := 1.0
	if h.n > youth && h.tails.overlap >= sharedFrom {
		if gap = 2; !dice(e.cell, 2) {
			return
		}
	}
	// The stack, by least absolute deviations: its forecast is a median.
	x = e.featuresOf(t)
	z = max(-zMax, min(zMax, z))
	miss := math.Abs(z - h.stack.predict(x))
	w := 1.0
	if h.errSlow > 0 {
		w = min(topWeight, h.errSlow/e.scale/max(miss, 1e-9))
	}
	h.stack.add(x, z, w, 1-gap/stackMemory, shrink*h.doubt, work)
}

// middle is what the members say from e.
func (h *half) middle(e *entry, t Target, m *[members]float64) float64 {
	if h.sorts {
		if kind := e.kind(t); kind != calm && h.aside[kind-1].n > 0 {
			return dot(&h.aside[kind-1].mix, m)
		}
	}
	return h.members.forecast(m)
}

// dice says yes for one in n of all cells, in no rhythm: every other one would
// meet loads that alternate always on the same foot.
func dice(cell int64, n uint64) bool { return uint64(cell)*0x9E3779B97F4A7C15>>40%n == 0 }

func below(z float64, bound float32) float64 {
	// float32 rounding of the bound must not count as a miss.
	if z <= float64(bound)+1e-6*math.Abs(z) {
		return 1
	}
	return 0
}

func equal(a, b float64) float64 {
	if math.Abs(a-b) <= 1e-9*math.Abs(b) {
		return 1
	}
	return 0
}

// median corrects a forecast median. If a load at rest is found unchanged more
// often than not, its median is exactly what it is now, however members differ
// by traces of old spikes.
func (h *half) median(m float64, e *entry, near time.Duration, t Target) float64 {
	// One over √n is twice the error of a share found from n outcomes.
	if h.guarded(near, t) || t == Value && h.same > 0.5+1/math.Sqrt(min(h.n, 300)) && e.rests() {
		return e.anchor
	}
	return m
}

// guarded says that the forecast median has been worse than "as now" in the
// long run, of late, or by much at once: near horizons then say "as now".
func (h *half) guarded(near time.Duration, t Target) bool {
	return t == Value && near <= guardHorizon && h.n > guardStart &&
		(h.lossOwn > h.lossNaive || h.lateOwn > h.lateNaive || h.regret > h.regretLimit())
}

// earned is how far a peak beyond shiftHorizon goes from "as over the last h" to
// the members' median: all the way if that has been better by more than few
// outcomes can tell, half of it if it has been better at all.
func (h *half) earned() float64 {
	switch {
	case h.n <= h.start || h.lossOwn >= h.lossNaive:
		return 0
	case h.lossOwn*(1+farDoubt*h.doubt/(h.doubt+h.n)) >= h.lossNaive:
		return 0.5
	}
	return 1
}

// regretLimit is the most that regret may be, in the unit of the samples.
func (h *half) regretLimit() float64 { return max(regretLeast, h.n/regretShare) * h.lateNaive }

// kept is what a few outcomes on a new level distort before they are
// recognised as one.
type kept struct {
	members [members]float32
	tails   [len(judged)][ways]float32
	took    int

	errFast, errSlow, lossOwn, lossNaive, lateOwn, lateNaive, regret float64
}

// keep remembers it as it is now.
func (l *lane) keep() {
	for k := range l.of {
		h := &l.of[k]
		for i, v := range h.members.loss {
			h.kept.members[i] = float32(v)
		}
		for i := range h.tails.loss {
			for j, v := range h.tails.loss[i] {
				h.kept.tails[i][j] = float32(v)
			}
		}
		h.kept = kept{h.kept.members, h.kept.tails, h.tails.took, h.errFast, h.errSlow, h.lossOwn, h.lossNaive, h.lateOwn, h.lateNaive, h.regret}
	}
}

// shifted forgets what an unseen level made meaningless: forecasts from before it
// was recognised, and outcomes on the old level. Beyond shiftHorizon a shift
// is an outcome like others, which the bounds of a day ahead must allow for.
func (l *lane) shifted() {
	if l.h > shiftHorizon {
		return
	}
	for i := range l.wait {
		l.wait[i].ok = false
	}
	for k := range l.of {
		h := &l.of[k]
		// The errors of the run belong to the shift, not to the new level.
		b := &h.kept
		for i, v := range b.members {
			h.members.loss[i] = float64(v)
		}
		for i := range b.tails {
			for j, v := range b.tails[i] {
				h.tails.loss[i][j] = float64(v)
			}
		}
		h.errFast, h.errSlow, h.lossOwn, h.lossNaive, h.lateOwn, h.lateNaive, h.regret = b.errFast, b.errSlow, b.lossOwn, b.lossNaive, b.lateOwn, b.lateNaive, b.regret
		h.members.weigh()
		h.tails.relevel(mod(int64(h.tails.took-b.took), tookCycle))
		for i, e := range h.errHour {
			h.errHour[i] = min(e, 2*float32(h.errSlow))
		}
	}
}

// quantiles of levels from cell c, the newest one, in the unit of the samples.
func (l *lane) quantiles(hist *history, c int64, t Target) *[len(levels)]float64 {
	if l.at != c {
		l.fill(hist, c, &l.now)
	}
	if l.steps == 1 {
		t = Value
	}
	return &l.ready[t]
}

// publish makes the quantiles of e those of its cell.
func (l *lane) publish(e *entry, t Target, least float64, q *[len(levels)]float64) {
	q[1] = l.of[t].median(q[1], e, l.h, t)
	// Branches that are nearly always foretold; min and max would also ask for
	// NaN, which a forecast never is.
	if q[0] > q[1] {
		q[0] = q[1]
	}
	for i := 2; i < len(q); i++ {
		if q[i] < q[i-1] {
			q[i] = q[i-1]
		}
	}
	if l.far(t) {
		// The bounds stand on the members, and hold the median.
		past := e.anchor + e.scale*float64(e.x[fPastPeak])
		q[1] = max(q[0], min(past+l.of[t].earned()*(q[1]-past), q[2]))
	}
	// What was never negative will not be.
	if least >= 0 && q[0] <= 0 {
		for i, v := range q {
			q[i] = max(v, 0)
		}
	}
	l.ready[t], l.at = *q, e.cell
}
