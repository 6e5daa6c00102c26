package backtest

import (
	"math"
	"sort"
)

// baseline is a standard method, fed one cell after the other. point is its
// forecast h cells ahead, of the value or of the maximum over (0, h].
type baseline interface {
	push(v float64) // NaN: a gap
	point(h int, peak bool) float64
}

// quantiler is a baseline with quantiles of its own; the others get those of
// their matured residuals.
type quantiler interface {
	quantile(h int, peak bool, q float64) float64
}

// past keeps the whole series; a backtest has it in memory anyway.
type past struct {
	v    []float64
	last float64
}

func (p *past) push(v float64) {
	p.v = append(p.v, v)
	if v == v {
		p.last = v
	}
}

// naive: tomorrow is today. Its peak is that of the last h cells.
type naive struct {
	past
	roll map[int]*rollingMax
}

func newNaive(hs []int) *naive {
	n := &naive{roll: map[int]*rollingMax{}}
	for _, h := range hs {
		n.roll[h] = &rollingMax{n: h}
	}
	return n
}

func (m *naive) push(v float64) {
	m.past.push(v)
	for _, r := range m.roll {
		r.push(v)
	}
}

func (m *naive) point(h int, peak bool) float64 {
	if peak {
		if top := m.roll[h].max(); top == top {
			return top
		}
	}
	return m.last
}

// seasonalNaive: tomorrow's hour is today's. Without a value a day ago it is naive.
type seasonalNaive struct {
	past
	day  int
	roll map[int]*rollingMax
	tops map[int][]float64
}

func newSeasonalNaive(day int, hs []int) *seasonalNaive {
	s := &seasonalNaive{day: day, roll: map[int]*rollingMax{}, tops: map[int][]float64{}}
	for _, h := range hs {
		s.roll[h] = &rollingMax{n: h}
	}
	return s
}

func (m *seasonalNaive) push(v float64) {
	m.past.push(v)
	for h, r := range m.roll {
		r.push(v)
		m.tops[h] = append(m.tops[h], r.max())
	}
}

func (m *seasonalNaive) point(h int, peak bool) float64 {
	// The youngest cell that is a whole number of days before the target and known.
	at := len(m.v) - 1 + h
	for at -= m.day; at >= len(m.v); at -= m.day {
	}
	if peak {
		if t := m.tops[h]; at >= h && at < len(t) && t[at] == t[at] {
			return t[at]
		}
		return m.last
	}
	for ; at >= 0; at -= m.day {
		if m.v[at] == m.v[at] {
			return m.v[at]
		}
	}
	return m.last
}

// movingAverage of the last n cells.
type movingAverage struct {
	past
	n   int
	sum float64
	k   float64
}

func (m *movingAverage) push(v float64) {
	m.past.push(v)
	if v == v {
		m.sum += v
		m.k++
	}
	if i := len(m.v) - 1 - m.n; i >= 0 && m.v[i] == m.v[i] {
		m.sum -= m.v[i]
		m.k--
	}
}

func (m *movingAverage) point(int, bool) float64 {
	if m.k == 0 {
		return m.last
	}
	return m.sum / m.k
}

// ses is simple exponential smoothing (Brown 1956).
type ses struct {
	alpha float64
	level float64
	begun bool
}

func (m *ses) push(v float64) {
	switch {
	case v != v:
	case !m.begun:
		m.level, m.begun = v, true
	default:
		m.level += m.alpha * (v - m.level)
	}
}

func (m *ses) point(int, bool) float64 { return m.level }

// holtWinters is the additive seasonal method with a damped trend (Holt 1957,
// Winters 1960, Gardner & McKenzie 1985), its season one day.
type holtWinters struct {
	alpha, beta, phi, gamma float64

	day          int
	level, trend float64
	season       []float64
	first        []float64
	t            int
}

func (m *holtWinters) push(v float64) {
	if m.season == nil {
		m.first = append(m.first, v)
		if v == v {
			if m.t == 0 {
				m.level = v
			}
			m.level += m.alpha * (v - m.level)
			m.t++
		}
		if len(m.first) == m.day {
			mean, k := 0.0, 0.0
			for _, x := range m.first {
				if x == x {
					mean += x
					k++
				}
			}
			mean /= math.Max(k, 1)
			m.season = make([]float64, m.day)
			for i, x := range m.first {
				if x == x {
					m.season[i] = x - mean
				}
			}
			m.level -= m.season[m.day-1]
			m.t = m.day
		}
		return
	}
	s := &m.season[m.t%m.day]
	m.t++
	ahead := m.level + m.phi*m.trend
	if v != v {
		m.level, m.trend = ahead, m.phi*m.trend
		return
	}
	e := v - ahead - *s
	m.level = ahead + m.alpha*e
	m.trend = m.phi*m.trend + m.alpha*m.beta*e
	*s += m.gamma * (1 - m.alpha) * e
}

func (m *holtWinters) point(h int, peak bool) float64 {
	if m.season == nil {
		return m.level
	}
	if !peak {
		return m.ahead(h)
	}
	top := math.Inf(-1)
	for k := h; k > 0; k -= 1 + h/96 {
		top = math.Max(top, m.ahead(k))
	}
	return top
}

func (m *holtWinters) ahead(h int) float64 {
	damped := m.phi * (1 - math.Pow(m.phi, float64(h))) / (1 - m.phi)
	return m.level + damped*m.trend + m.season[(m.t+h-1)%m.day]
}

// histogram is the decaying histogram of Kubernetes' Vertical Pod Autoscaler:
// buckets that grow by 5 %, weights that halve every half-life, and the upper
// edge of the bucket that holds the quantile. The VPA measures cores and bytes
// and starts its buckets at 1 % of a core; here the unit is a thousandth of
// the training half's largest value.
type histogram struct {
	halfLife float64
	unit     float64
	weights  [300]float64
	w        float64
	total    float64
}

func (h *histogram) add(v float64) {
	if h.w == 0 {
		h.w = 1
	}
	i := 0
	if x := v / h.unit; x > 1 {
		i = min(1+int(math.Log(1+(x-1)*0.05)/math.Log(1.05)), len(h.weights)-1)
	}
	h.weights[i] += h.w
	h.total += h.w
	h.w *= math.Exp2(1 / h.halfLife)
	if h.w > 1e9 {
		for i := range h.weights {
			h.weights[i] /= h.w
		}
		h.total /= h.w
		h.w = 1
	}
}

func (h *histogram) quantile(q float64) float64 {
	left := q * h.total
	for i, w := range h.weights {
		left -= w
		if left <= 0 {
			if i == 0 {
				return h.unit
			}
			return h.unit * (1 + (math.Pow(1.05, float64(i))-1)/0.05)
		}
	}
	return h.unit * (1 + (math.Pow(1.05, float64(len(h.weights)))-1)/0.05)
}

// vpa recommends quantiles of the decaying histogram, whatever the horizon; for
// peaks, of the histogram of past peaks, as the VPA does for memory.
type vpa struct {
	past
	values histogram
	peaks  map[int]*histogram
	roll   map[int]*rollingMax
}

func newVPA(halfLife, unit float64, hs []int) *vpa {
	m := &vpa{values: histogram{halfLife: halfLife, unit: unit}, peaks: map[int]*histogram{}, roll: map[int]*rollingMax{}}
	for _, h := range hs {
		m.peaks[h] = &histogram{halfLife: halfLife, unit: unit}
		m.roll[h] = &rollingMax{n: h}
	}
	return m
}

func (m *vpa) push(v float64) {
	m.past.push(v)
	if v == v {
		m.values.add(v)
	}
	for h, r := range m.roll {
		r.push(v)
		if top := r.max(); top == top && len(m.v) >= h {
			m.peaks[h].add(top)
		}
	}
}

func (m *vpa) point(h int, peak bool) float64 { return m.quantile(h, peak, 0.5) }

func (m *vpa) quantile(h int, peak bool, q float64) float64 {
	from := &m.values
	if peak && m.peaks[h].total > 0 {
		from = m.peaks[h]
	}
	return from.quantile(q)
}

// nSigma is mean + n·σ of a window, n chosen per quantile, horizon and target
// on the training half.
type nSigma struct {
	movingAverage
	sq float64
	n  map[sigmaKey]float64
}

type sigmaKey struct {
	h    int
	peak bool
	q    float64
}

func (m *nSigma) push(v float64) {
	m.movingAverage.push(v)
	if v == v {
		m.sq += v * v
	}
	if i := len(m.v) - 1 - m.movingAverage.n; i >= 0 && m.v[i] == m.v[i] {
		m.sq -= m.v[i] * m.v[i]
	}
}

func (m *nSigma) sigma() float64 {
	if m.k < 2 {
		return 0
	}
	mean := m.sum / m.k
	return math.Sqrt(math.Max(m.sq/m.k-mean*mean, 0))
}

func (m *nSigma) quantile(h int, peak bool, q float64) float64 {
	return m.movingAverage.point(h, peak) + m.n[sigmaKey{h, peak, q}]*m.sigma()
}

func (m *nSigma) point(h int, peak bool) float64 { return m.quantile(h, peak, 0.5) }

// rollingMax is the maximum of the last n cells, NaN if all were gaps.
type rollingMax struct {
	n     int
	t     int
	queue []topCell
}

type topCell struct {
	at int
	v  float64
}

func (r *rollingMax) push(v float64) {
	if v == v {
		for len(r.queue) > 0 && r.queue[len(r.queue)-1].v <= v {
			r.queue = r.queue[:len(r.queue)-1]
		}
		r.queue = append(r.queue, topCell{r.t, v})
	}
	for len(r.queue) > 0 && r.queue[0].at <= r.t-r.n {
		r.queue = r.queue[1:]
	}
	r.t++
}

func (r *rollingMax) max() float64 {
	if len(r.queue) == 0 {
		return math.NaN()
	}
	return r.queue[0].v
}

// sample is the last residuals of a method, sorted: its conformal quantiles.
type sample struct {
	ring   []float64
	next   int
	sorted []float64
}

// keptResiduals: a week of 5-minute cells.
const keptResiduals = 2016

func (s *sample) add(v float64) {
	if len(s.ring) < keptResiduals {
		s.ring = append(s.ring, v)
	} else {
		old := s.ring[s.next]
		s.ring[s.next] = v
		s.next = (s.next + 1) % keptResiduals
		i := sort.SearchFloat64s(s.sorted, old)
		s.sorted = append(s.sorted[:i], s.sorted[i+1:]...)
	}
	i := sort.SearchFloat64s(s.sorted, v)
	s.sorted = append(s.sorted, 0)
	copy(s.sorted[i+1:], s.sorted[i:])
	s.sorted[i] = v
}

func (s *sample) quantile(q float64) float64 {
	n := len(s.sorted)
	if n == 0 {
		return 0
	}
	p := min(max(q*float64(n+1)-1, 0), float64(n-1))
	i := int(p)
	if i == n-1 {
		return s.sorted[i]
	}
	f := p - float64(i)
	return s.sorted[i]*(1-f) + s.sorted[i+1]*f
}
