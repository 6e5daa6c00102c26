package sim

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/tranship/tranship/allocate"
)

// none moves nothing. It also holds what the policies with a global view share.
type none struct{ w *world }

func (*none) observe(int) error          { return nil }
func (*none) round(bool) error           { return nil }
func (*none) landed(_, _, _ int, _ bool) {}
func (*none) failed([]int)               {}
func (*none) revived([]int)              {}
func (*none) finish(*Report)             {}
func (n *none) revive(i int) int         { return n.bestFit(n.loads(), i, 1, nil) }

// loads are the hosts' CPU as last sampled, as if moves under way were done.
func (n *none) loads() []float64 {
	w := n.w
	out := make([]float64, len(w.hosts))
	for i := range w.specs {
		if h := w.state[i].target; h >= 0 {
			out[h] += w.sample(i)
		} else if h := w.state[i].host; h >= 0 {
			out[h] += w.sample(i)
		}
	}
	return out
}

// bestFit is the host that i fills most without more than limit of its CPU in
// use; one that runs nothing only if no other will do. -1: none.
func (n *none) bestFit(load []float64, i int, limit float64, skip func(h int) bool) int {
	w := n.w
	best, most := -1, allocate.Fit{Fill: -1}
	need, mem := w.sample(i), w.memoryOf(i)
	for h := range w.hosts {
		x := &w.hosts[h]
		f := (load[h] + need) / x.cpu
		if f > limit || !x.up || x.used+mem > x.mem || h == w.state[i].host || skip != nil && skip(h) {
			continue
		}
		if fit := (allocate.Fit{Fill: f, Runs: len(x.shards)+x.coming > 0}); fit.Better(most) {
			best, most = h, fit
		}
	}
	return best
}

// shift starts a move and keeps the loads up to date.
func (n *none) shift(load []float64, i, to int, reason string) {
	from := n.w.state[i].host
	if !n.w.start(i, to, reason) {
		return
	}
	load[from] -= n.w.sample(i)
	load[to] += n.w.sample(i)
}

// reactive is the static threshold policy of Beloglazov & Buyya 2012 (THR,
// minimum migration time, best fit decreasing), which is also what cluster
// reschedulers do: a host above the threshold in the last sample sheds the
// shards that move fastest until it is below; a target must stay below. Where
// hosts may be spared, the least loaded ones are emptied as long as all their
// shards fit elsewhere.
type reactive struct{ none }

func (p *reactive) round(fresh bool) error {
	if !fresh {
		return nil // nothing new since it last looked
	}
	w := p.w
	load := p.loads()
	var moving []int
	over := map[int]bool{}
	for h := range w.hosts {
		limit := allocate.ReactiveThreshold * w.hosts[h].cpu
		if load[h] <= limit {
			continue
		}
		over[h] = true
		stay := slices.DeleteFunc(slices.Clone(w.hosts[h].shards), func(i int) bool { return w.state[i].target >= 0 })
		moving = append(moving, allocate.Shed(load[h], limit, stay, w.sample, func(i int) float64 { return w.specs[i].mem })...)
	}
	slices.SortStableFunc(moving, func(a, b int) int { return cmp.Compare(w.sample(b), w.sample(a)) })
	for _, i := range moving {
		if to := p.bestFit(load, i, allocate.ReactiveThreshold, func(h int) bool { return over[h] }); to >= 0 {
			p.shift(load, i, to, "overload")
		}
	}
	if w.sc.Consolidate {
		p.empty(load, over)
	}
	return nil
}

// empty frees hosts, the least loaded first.
func (p *reactive) empty(load []float64, over map[int]bool) {
	w := p.w
	var order []int
	for h := range w.hosts {
		if x := &w.hosts[h]; x.up && len(x.shards) > 0 && x.coming == 0 && !over[h] {
			order = append(order, h)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(load[a]/w.hosts[a].cpu, load[b]/w.hosts[b].cpu) })
	gone := map[int]bool{}
	for _, h := range order {
		if w.hosts[h].coming > 0 {
			continue
		}
		if places, ok := p.placeAll(load, h, allocate.ReactiveThreshold, func(t int) bool { return over[t] || gone[t] }); ok {
			gone[h] = true
			for _, m := range places {
				p.shift(load, m[0], m[1], "consolidate")
			}
		}
	}
}

// placeAll finds a host in use for every shard of h, or says that there is none.
func (n *none) placeAll(load []float64, h int, limit float64, skip func(t int) bool) (places [][2]int, ok bool) {
	w := n.w
	all := slices.Clone(w.hosts[h].shards)
	slices.SortStableFunc(all, func(a, b int) int { return cmp.Compare(w.sample(b), w.sample(a)) })
	undo := func() {
		for _, m := range places {
			load[m[1]] -= w.sample(m[0])
			w.hosts[m[1]].used -= w.memoryOf(m[0])
		}
	}
	defer undo()
	for _, i := range all {
		if w.state[i].target >= 0 {
			return places, false
		}
		to := n.bestFit(load, i, limit, func(t int) bool { return skip(t) || len(w.hosts[t].shards)+w.hosts[t].coming == 0 })
		if to < 0 {
			return places, false
		}
		load[to] += w.sample(i)
		w.hosts[to].used += w.memoryOf(i)
		places = append(places, [2]int{i, to})
	}
	return places, true
}

// drs balances like VMware's Distributed Resource Scheduler (Gulati et al.,
// VMware Technical Journal 2012): every five minutes, while the standard
// deviation of the hosts' loads is above its target, the move that lowers it
// most, if the gain is worth the cost; and spares hosts like its power
// management, to keep them between 45 and 81 percent.
type drs struct {
	none
	last float64
	run  bool
	mean []float64 // of each shard over some samples
}

const (
	drsPeriod = 300.0 // its default interval, s
	drsTarget = 0.2   // imbalance at its default aggressiveness
	// drsSamples: it works on averages of the last minutes, 15 at 5 min.
	drsSamples = 3
	// drsLow, drsHigh: its power management's target of 63 ± 18 percent.
	drsLow, drsHigh = 0.45, 0.81
	// drsGain: a move must lower the two hosts' squared loads by so much for
	// each second of link time that it takes. Its own formula is not published.
	drsGain = 1e-4
)

func (p *drs) observe(c int) error {
	if p.mean == nil {
		p.mean = make([]float64, len(p.w.specs))
	}
	for i := range p.mean {
		v := p.w.specs[i].at(c)
		if !p.run {
			p.mean[i] = v
		}
		p.mean[i] += (v - p.mean[i]) / drsSamples
	}
	p.run = true
	return nil
}

func (p *drs) round(fresh bool) error {
	w := p.w
	if !fresh || !p.run || w.now-p.last < drsPeriod && w.now > 0 {
		return nil
	}
	p.last = w.now
	load := make([]float64, len(w.hosts))
	for i := range w.specs {
		if h := max(w.state[i].target, -1); h >= 0 {
			load[h] += p.mean[i]
		} else if h := w.state[i].host; h >= 0 {
			load[h] += p.mean[i]
		}
	}
	if w.sc.Consolidate {
		p.spare(load)
	}
	for range max(1, len(w.hosts)/10) {
		if !p.improve(load) {
			return nil
		}
	}
	return nil
}

func (p *drs) on(h int) bool {
	x := &p.w.hosts[h]
	return x.up && (!p.w.sc.Consolidate || len(x.shards)+x.coming > 0)
}

// improve makes the best move from the most loaded host to the least loaded one
// that has room.
func (p *drs) improve(load []float64) bool {
	w := p.w
	high, mean, sq, n := -1, 0.0, 0.0, 0.0
	for h := range w.hosts {
		if !p.on(h) {
			continue
		}
		f := load[h] / w.hosts[h].cpu
		mean += f
		sq += f * f
		n++
		if high < 0 || f > load[high]/w.hosts[high].cpu {
			high = h
		}
	}
	if high < 0 {
		return false
	}
	mean /= n
	over := load[high] > drsHigh*w.hosts[high].cpu
	if math.Sqrt(max(0, sq/n-mean*mean)) <= drsTarget && !over {
		return false
	}
	best, to, gain := -1, -1, 0.0
	for _, i := range w.hosts[high].shards {
		if w.state[i].target >= 0 || p.mean[i] <= 0 {
			continue
		}
		low := -1
		for h := range w.hosts {
			x := &w.hosts[h]
			if h == high || !x.up || !p.on(h) && !over || x.used+w.memoryOf(i) > x.mem {
				continue
			}
			if low < 0 || load[h]/x.cpu < load[low]/w.hosts[low].cpu {
				low = h
			}
		}
		if low < 0 {
			continue
		}
		a, b := w.hosts[high].cpu, w.hosts[low].cpu
		before := square(load[high]/a) + square(load[low]/b)
		after := square((load[high]-p.mean[i])/a) + square((load[low]+p.mean[i])/b)
		g := before - after - drsGain*w.cost(i, high, low).Takes.Seconds()
		if g > gain {
			best, to, gain = i, low, g
		}
	}
	if best < 0 || !w.start(best, to, "imbalance") {
		return false
	}
	load[high] -= p.mean[best]
	load[to] += p.mean[best]
	return true
}

// spare empties hosts below drsLow while the others stay below drsHigh.
func (p *drs) spare(load []float64) {
	w := p.w
	for h := range w.hosts {
		x := &w.hosts[h]
		if !x.up || len(x.shards) == 0 || x.coming > 0 || load[h] >= drsLow*x.cpu {
			continue
		}
		if places, ok := p.placeAll(load, h, drsHigh, func(int) bool { return false }); ok {
			for _, m := range places {
				if w.start(m[0], m[1], "consolidate") {
					load[h] -= p.mean[m[0]]
					load[m[1]] += p.mean[m[0]]
				}
			}
		}
	}
}

// date is the simulated time.
func (w *world) date() time.Time {
	return origin.Add(time.Duration(w.sc.Warmup)).Add(time.Duration(w.now * 1e9))
}

func square(x float64) float64 { return x * x }
