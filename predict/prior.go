package predict

import (
	"math"
	"slices"
)

// Prior is what a series can lend to one that has seen nothing: regressions in
// units of the series' own scale, which members to believe, the shape of the
// residuals, and the profile of its day. It holds no samples.
type Prior struct {
	cfg   Config
	lanes []priorLane
	// profile is the usual day over its mean, NaN where unknown; nil for a
	// load that is not positive, whose ratios mean nothing.
	profile []float32
	// deviation and change are the series' scales over its level.
	deviation, change float64
	cells             float64 // behind them
}

type priorLane struct {
	of [2]priorHalf
}

type priorHalf struct {
	evidence float64 // settled forecasts behind it
	stack    []float64
	stackB   []float64
	width    []float64
	widthB   []float64
	loss     [members]float64 // relative to the best member's
	shape    [priorShape]float64
	ways     [len(judged)][ways]float64
}

// priorShape quantiles of the scaled residuals stand for their distribution.
const priorShape = 32

// BorrowedEvidence is how many settled forecasts a prior counts for: a cold
// shard believes its own behaviour more than its siblings' after an hour of
// 5-minute cells, or a tenth of that at 10 s for the short horizons.
const BorrowedEvidence = 48

// Prior returns what f can lend. It allocates.
func (f *Forecaster) Prior() Prior {
	p := Prior{cfg: f.Config(), lanes: make([]priorLane, len(f.lanes))}
	p.profile = f.hist.shape()
	if level := math.Abs(f.hist.ew[ladder-1]); level > 0 && f.hist.cells >= priorShape {
		// A load that hovers about zero deviates by any multiple of its level.
		p.deviation, p.change = min(f.hist.scale/level, 10), min(f.hist.volSlow/level, 10)
		p.cells = float64(f.hist.cells)
	}
	for i, l := range f.lanes {
		for t := range l.of {
			h := &l.of[t]
			q := &p.lanes[i].of[t]
			if h.n < 2*priorShape || l.steps == 1 && Target(t) == Peak {
				continue
			}
			q.evidence = h.n
			q.stack, q.stackB = perSample(&h.stack, stackMemory)
			q.width, q.widthB = perSample(&h.width, widthMemory)
			best := math.Inf(1)
			known := h.members.loss[:h.members.count]
			for _, v := range known {
				best = math.Min(best, v)
			}
			for j, v := range known {
				q.loss[j] = 1
				if best > 0 {
					q.loss[j] = math.Min(v/best, 100)
				}
			}
			for j := range q.shape {
				q.shape[j] = (float64(j) + 0.5) / priorShape
			}
			h.tails.seen[wayScaled].quantiles(q.shape[:], q.shape[:])
			for k := range q.ways {
				best := math.Inf(1)
				for _, v := range h.tails.loss[k] {
					if v > 0 {
						best = math.Min(best, v)
					}
				}
				for j, v := range h.tails.loss[k] {
					q.ways[k][j] = 1
					if v > 0 {
						q.ways[k][j] = math.Min(v/best, 100)
					}
				}
			}
		}
	}
	return p
}

// perSample scales a regression's equations to one sample's weight.
func perSample(r *ridge, memory float64) (a, b []float64) {
	// The bias feature, or the number of samples a fading memory holds.
	n := math.Min(float64(r.seen), memory) * r.unit
	a, b = make([]float64, len(r.a)), make([]float64, len(r.b))
	for i, v := range r.a {
		a[i] = float64(v) / n
	}
	for i, v := range r.b {
		b[i] = float64(v) / n
	}
	return a, b
}

// Pool is the average of priors of one Config, weighted by their evidence;
// those with another Config than the first are left out.
func Pool(ps ...Prior) Prior {
	if len(ps) == 0 {
		return Prior{}
	}
	out := Prior{cfg: ps[0].cfg, lanes: make([]priorLane, len(ps[0].lanes))}
	var profN []float32
	for _, p := range ps {
		if !p.fits(out.cfg) {
			continue
		}
		if p.cells > 0 {
			out.cells += p.cells
			out.deviation += (p.deviation - out.deviation) * p.cells / out.cells
			out.change += (p.change - out.change) * p.cells / out.cells
		}
		if p.profile != nil {
			if out.profile == nil {
				out.profile, profN = make([]float32, len(p.profile)), make([]float32, len(p.profile))
				for i := range out.profile {
					out.profile[i] = nan32
				}
			}
			for i, v := range p.profile {
				if v != v {
					continue
				}
				if profN[i]++; profN[i] == 1 {
					out.profile[i] = 0
				}
				out.profile[i] += (v - out.profile[i]) / profN[i]
			}
		}
		for i := range p.lanes {
			for t := range p.lanes[i].of {
				out.lanes[i].of[t].merge(&p.lanes[i].of[t])
			}
		}
	}
	return out
}

func (p *Prior) fits(c Config) bool {
	return p.cfg.Step == c.Step && slices.Equal(p.cfg.Horizons, c.Horizons)
}

// merge averages o into h.
func (h *priorHalf) merge(o *priorHalf) {
	if o.evidence == 0 {
		return
	}
	if h.evidence == 0 {
		*h = *o
		h.stack, h.stackB = slices.Clone(o.stack), slices.Clone(o.stackB)
		h.width, h.widthB = slices.Clone(o.width), slices.Clone(o.widthB)
		return
	}
	w := o.evidence / (h.evidence + o.evidence)
	blendInto := func(a, b []float64) {
		for i := range a {
			a[i] += w * (b[i] - a[i])
		}
	}
	blendInto(h.stack, o.stack)
	blendInto(h.stackB, o.stackB)
	blendInto(h.width, o.width)
	blendInto(h.widthB, o.widthB)
	blendInto(h.loss[:], o.loss[:])
	blendInto(h.shape[:], o.shape[:])
	for k := range h.ways {
		blendInto(h.ways[k][:], o.ways[k][:])
	}
	h.evidence += o.evidence
}

// Borrow gives a forecaster that has seen little what others have seen:
// priors nearest first (its workload's shards, its tenant's, the pool's). The
// nearest counts for up to BorrowedEvidence settled forecasts, the next for
// what that leaves; f's own experience adds to it and outweighs it in time.
// Priors of another Config are ignored. A forecaster that has settled
// BorrowedEvidence forecasts of a horizon borrows nothing for it.
func (f *Forecaster) Borrow(nearestFirst ...Prior) {
	for i, l := range f.lanes {
		l.at = -1 // what was forecast before is out of date
		for t := range l.of {
			h := &l.of[t]
			left := BorrowedEvidence - h.n
			var sum priorHalf
			for _, p := range nearestFirst {
				if !p.fits(f.cfg) || left <= 0 {
					continue
				}
				q := p.lanes[i].of[t]
				q.evidence = math.Min(q.evidence, left)
				left -= q.evidence
				sum.merge(&q)
			}
			if sum.evidence > 0 {
				h.borrow(&sum, f.work)
			}
		}
	}
	for i := range nearestFirst {
		if p := &nearestFirst[i]; p.fits(f.cfg) && p.cells > 0 && f.hist.cells == 0 {
			f.hist.lentScale, f.hist.lentVol, f.hist.lentN = p.deviation, p.change, lentCells
			break
		}
	}
	for i := range nearestFirst {
		if p := &nearestFirst[i]; p.fits(f.cfg) && p.profile != nil {
			f.hist.lent = p.profile
			f.hist.useLent()
			return
		}
	}
}

func (h *half) borrow(q *priorHalf, work []float64) {
	lend := func(r *ridge, a, b []float64, shrink float64) {
		for i, v := range a {
			r.a[i] += float32(v * q.evidence * r.unit)
		}
		for i, v := range b {
			r.b[i] += float32(v * q.evidence * r.unit)
		}
		r.solve(shrink, work)
	}
	lend(&h.stack, q.stack, q.stackB, shrink*h.doubt)
	lend(&h.width, q.width, q.widthB, widthShrink)
	if h.n > 0 {
		return // residuals and losses of its own say more than borrowed ones
	}
	h.borrowed = true
	h.members.n = math.Floor(q.evidence)
	h.members.loss = q.loss
	h.members.weigh()
	for _, v := range q.shape {
		h.tails.seen[wayScaled].add(float32(v))
	}
	h.tails.n = offsetStart
	h.tails.doubt = 0 // others have shown what the expected error is worth
	h.tails.loss = q.ways
	h.tails.refresh()
}

// settleUnit turns borrowed losses, which are relative, into the unit of the
// series: that of the error which the first forecast expected of itself.
func (h *half) settleUnit(unit float64) {
	for i := range h.members.loss {
		h.members.loss[i] *= unit
	}
	for i := range h.tails.loss {
		for j := range h.tails.loss[i] {
			h.tails.loss[i][j] *= unit * levelLoss[i]
		}
	}
}

// levelLoss is what the pinball loss at the judged levels usually is of the
// mean absolute error, from a Laplace distribution's: a unit, not a quantile.
var levelLoss = [len(judged)]float64{0.5, 0.26, 0.16}

// shape is the usual day over its mean.
func (h *history) shape() []float32 {
	sum, n := 0.0, 0.0
	for i, v := range h.prof {
		if h.profN[i] > 0 {
			if v < 0 {
				return nil
			}
			sum += float64(v)
			n++
		}
	}
	if !(sum > 0) {
		return nil
	}
	out := make([]float32, len(h.prof))
	for i, v := range h.prof {
		out[i] = nan32
		if h.profN[i] > 0 {
			out[i] = float32(float64(v) * n / sum)
		}
	}
	return out
}

// lentCells of its own tell a series' level well enough to scale a borrowed
// day to it.
const lentCells = 12

// useLent fills the unknown part of the day from a borrowed shape, once the
// series' level is known. It counts like one day seen.
func (h *history) useLent() {
	if h.lent == nil || h.cells < lentCells {
		return
	}
	lent := h.lent
	h.lent = nil
	now := float64(lent[mod(h.cur, h.perDay)])
	if len(lent) != h.perDay || !(now > 0.05) || h.least < 0 {
		return // at the foot of a day nothing can be scaled
	}
	for i, v := range lent {
		if v == v && h.profN[i] == 0 {
			h.prof[i] = float32(h.ew[2] * float64(v) / now)
			h.ptop[i] = h.prof[i]
			h.profN[i] = 1
		}
	}
	h.usual = h.findUsual()
}
