package predict

import "math"

// Features of an origin, each a candidate forecast, as deviation from the last
// value in units of the series' scale: the regression over them is a stack of
// the candidates (Wolpert 1992), the same for bytes and for cores, and a level
// shift moves all of them at once. The order lets value and peak take
// overlapping slices.
const (
	fPrev      = iota // value only: the cell before the last
	fYesterday        // around the target's time a day ago
	fExactProfile
	fExactYesterday
	fShort // median of the latest cells

	fBias // shared
	fLevel0
	fLevel1
	fLevel2
	fLevel3
	fLevel4
	fMedian5
	fMedianSlow
	fYesterdayNow
	fProfile
	fProfileNow
	fExactProfileNow
	fWeek

	fPastPeak // peak only: over the last h
	fYesterdayPeak
	fProfilePeak
	fVolatility
	fMedianPeak
	features

	valueFeatures = fWeek + 1
	peakFeatures  = features - fBias
)

// scales that the error's width is regressed on.
const (
	sFast = iota // the forecast's own recent errors
	sSlow
	sHour // at the target's hour of day
	sVolFast
	sVolSlow
	sLevel
	sAway // from the slow level
	scales
)

// members are the forecasts that blend weighs. The first is "as now" (for
// peaks "as over the last h"), the last is known of values alone.
const (
	members     = 16
	peakMembers = members - 1
)

// zMax bounds a feature and an outcome, in mean deviations: what is further
// away is a different regime, from which a linear model cannot be learnt.
const zMax = 15

// entry is an origin with its features and the forecasts made from it.
type entry struct {
	cell   int64
	ok     bool
	anchor float64 // last value
	scale  float64 // z = (y - anchor) / scale
	x      [features]float32
	s      [2][scales]float32
	stack  [2]float32 // z forecast by the regression
	mid    [2]float32 // z forecast by the members
	spread [2]float32 // its expected absolute error, z
	mid50  [2]float32 // quantiles as issued, z
	up90   [2]float32
	up95   [2]float32
}

func (e *entry) featuresOf(t Target) []float32 {
	if t == Peak {
		return e.x[fBias:]
	}
	return e.x[:valueFeatures]
}

func (e *entry) scalesOf(t Target) []float32 { return e.s[t][:] }

// middle and spread in the unit of the samples.
func (e *entry) middle(t Target) (mid, spread float64) {
	return e.anchor + e.scale*float64(e.mid[t]), e.scale * float64(e.spread[t])
}

// level of the load, in the unit of the samples: a mean over some ten cells of
// 5 min. What a bound has to hold rises with each spike, as a mean does and the
// members' median does not.
func (e *entry) level() float64 { return e.anchor + e.scale*float64(e.x[fLevel1]) }

// rests says that the load did not change in the last cell.
func (e *entry) rests() bool { return e.x[fPrev] == 0 }

// feature is candidate v in z; an unknown one says "as now".
func feature(v, anchor, inv float64) float32 {
	return float32(bounded((v - anchor) * inv))
}

// bounded by zMax; nothing known is nothing.
func bounded(z float64) float64 {
	switch {
	case z > zMax:
		return zMax
	case z < -zMax:
		return -zMax
	case z != z:
		return 0
	}
	return z
}

// common computes the features of cell c that all lanes share.
func (h *history) common(c int64) *[features]float32 {
	x := &h.shared
	if h.sharedCell == c {
		return x
	}
	h.sharedCell = c
	a := h.last
	// A constant series has no scale: any small unit will do.
	h.unit = max(h.scale+h.volSlow, 1e-9*math.Abs(a)+1e-12)
	h.inverse = 1 / h.unit
	inv := h.inverse
	pd, now := int64(h.perDay), h.binOf(c)
	x[fPrev] = feature(h.prev, a, inv)
	x[fShort] = feature(h.short.quantile(0.5), a, inv)
	x[fBias] = 1
	for i, v := range h.ew {
		x[fLevel0+i] = feature(v, a, inv)
	}
	x[fMedian5] = feature(h.median, a, inv)
	x[fMedianSlow] = feature(h.q50, a, inv)
	x[fYesterdayNow] = feature(h.around(now-pd), a, inv)
	x[fProfileNow] = feature(h.profileAround(now), a, inv)
	x[fExactProfileNow] = feature(h.profileAt(now), a, inv)
	x[fVolatility] = float32(h.volFast * inv)
	return x
}

// fill makes the forecasts of origin c.
func (l *lane) fill(hist *history, c int64, e *entry) {
	e.cell, e.ok = c, true
	e.x = *hist.common(c)
	e.anchor, e.scale = hist.last, hist.unit
	x, a, inv := &e.x, e.anchor, hist.inverse

	pd := int64(hist.perDay)
	now, at := hist.binOf(c), hist.timeOf(c+l.steps)
	target := floorDiv(at, hist.bin)
	// The youngest whole number of days before the target that is past.
	back := pd * max(1, (target-now+pd-1)/pd)

	x[fYesterday] = feature(hist.around(target-back), a, inv)
	x[fExactYesterday] = feature(hist.at(target-back), a, inv)
	x[fProfile] = feature(hist.profileAround(target), a, inv)
	x[fExactProfile] = feature(hist.profileAt(target), a, inv)
	x[fWeek] = feature(hist.weekAt(at-7*day), a, inv)
	if l.steps > 1 {
		// The bin of the origin may have cells to come, and the peak among them.
		first := hist.binOf(c + 1)
		past, _ := l.peaks.over(c)
		usual := l.of[Peak].tails.median(past)
		yesterday := past
		if target < now+pd {
			yesterday = hist.topOver(first-pd, target-pd)
		}
		x[fPastPeak] = feature(past, a, inv)
		x[fYesterdayPeak] = feature(yesterday, a, inv)
		x[fProfilePeak] = feature(hist.profileTop(first-1, target), a, inv)
		x[fMedianPeak] = feature(usual, a, inv)
	}

	hour := hist.hourOf(c + l.steps)
	for t := Value; t <= Peak; t++ {
		if t == Peak && l.steps == 1 {
			break
		}
		h := &l.of[t]
		s := &e.s[t]
		s[sFast] = small(h.errFast * inv)
		s[sSlow] = small(h.errSlow * inv)
		s[sHour] = small(float64(h.errHour[hour]) * inv)
		s[sVolFast] = small(hist.volFast * inv)
		s[sVolSlow] = small(hist.volSlow * inv)
		s[sLevel] = small(math.Abs(hist.last) * inv)
		s[sAway] = small(math.Abs(hist.last-hist.ew[3]) * inv)

		e.stack[t] = float32(bounded(h.stack.predict(e.featuresOf(t))))
		var m [members]float64
		e.membersOf(t, &m)
		e.mid[t] = float32(h.middle(e, t, &m))
		e.spread[t] = float32(h.spread(s[:], hist.volSlow*inv))
		mid, spread := e.middle(t)
		q := h.tails.quantiles(mid, spread, e.level())
		e.mid50[t] = float32((q[1] - e.anchor) * inv)
		e.up90[t] = float32((q[2] - e.anchor) * inv)
		e.up95[t] = float32((q[3] - e.anchor) * inv)
		l.publish(e, t, hist.least, &q)
	}
}

// Kinds of origins. Which member is right while a load rests says little of
// which one is when it has just moved, or is about to.
const (
	calm    = iota
	moved   // away from where it lately was
	turning // the day's profile expects a change
	kinds
)

// stir is the distance, in the series' scale (its mean deviation and mean
// change together), from which an origin is not calm. Noise seldom goes so far.
// Between 1 and 2.5, losses on the development series differ by half a percent.
const stir = 1.5

// kind of origin that e is for target t.
func (e *entry) kind(t Target) int {
	x := &e.x
	if short := x[fShort]; short > stir || short < -stir {
		return moved
	}
	swing := x[fProfile] - x[fProfileNow]
	if t == Peak {
		swing = x[fProfilePeak] - x[fProfileNow]
		if swing < 0 {
			return calm // a peak is what is above the level
		}
	}
	if swing > stir || swing < -stir {
		return turning
	}
	return calm
}

// small bounds a scale like zMax a feature; errors are rarely above 30 deviations.
func small(z float64) float32 {
	if z > 30 {
		return 30
	}
	return float32(z)
}

// spread is the expected absolute error in z.
func (h *half) spread(s []float32, volatility float64) float64 {
	sp := 0.0
	if enough := 30.0; h.n < enough && !h.borrowed || h.n < enough/4 {
		// Three samples' worth of belief that a forecast errs by a usual
		// change, and by a fifth of a mean deviation at least.
		sp = (float64(s[sSlow])*h.n + 3*max(volatility, 0.2)) / (h.n + 3)
	} else {
		// The regression may run negative; a tenth of the usual error is as
		// sure as a series that is not constant can be.
		sp = max(h.width.predict(s), 0.1*float64(s[sSlow]))
		if h.tails.bends {
			sp += (float64(s[sSlow]) - sp) * widthDoubt / (h.n + widthDoubt)
		}
	}
	return max(sp, 1e-6)
}

// membersOf computes the members' forecasts, in z, from the features.
func (e *entry) membersOf(t Target, m *[members]float64) {
	x := &e.x
	level := float64(x[fLevel1])
	for i := range ladder {
		m[1+i] = float64(x[fLevel0+i])
	}
	if t == Value {
		swing := float64(x[fProfile] - x[fProfileNow])
		m[0] = 0
		m[6] = float64(x[fMedianSlow])
		m[7] = float64(x[fYesterday])
		m[8] = swing + level
		m[9] = float64(e.stack[t])
		m[10] = float64(x[fProfile])
		m[11] = swing
		m[12] = float64(x[fExactProfile] - x[fExactProfileNow])
		m[13] = float64(x[fExactProfile]-x[fProfileNow]) + level
		m[14] = float64(x[fShort])
		m[15] = float64(x[fWeek])
		if x[fWeek] == 0 {
			// Until a week is known it is a usual day: as-now would be believed
			// for what it is, and last week then instead of it.
			m[15] = m[10]
		}
		return
	}
	m[0] = float64(x[fPastPeak])
	m[6] = float64(x[fMedianPeak])
	m[7] = float64(x[fYesterdayPeak])
	m[8] = 0
	m[9] = float64(e.stack[t])
	m[10] = float64(x[fProfilePeak])
	m[11] = float64(x[fProfilePeak] - x[fProfileNow])
	m[12] = float64(x[fProfilePeak] - x[fExactProfileNow])
	m[13] = float64(x[fProfilePeak]-x[fProfileNow]) + level
	m[14] = float64(x[fMedian5])
}

// memberNames are for Explain.
var memberNames = [2][members]string{
	{"as-now", "level-1", "level-2", "level-3", "level-4", "level-5", "median", "yesterday", "profile-swing-level", "stack", "profile", "profile-swing", "exact-profile-swing", "exact-profile-swing-level", "short-median", "last-week"},
	{"as-past", "level-1", "level-2", "level-3", "level-4", "level-5", "median-peak", "yesterday", "as-now", "stack", "profile", "profile-swing", "exact-profile-swing", "profile-swing-level", "recent-median"},
}
