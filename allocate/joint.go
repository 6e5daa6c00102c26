package allocate

import (
	"hash/fnv"
	"math"
	"math/rand/v2"
	"slices"
)

// scenarios are equally likely futures of a host. Chances come in steps of
// 1/128, finer than forecasts are right; a shard costs 400 multiplications.
const scenarios = 128

// mixes are how often a workload's rank is the common one.
var mixes = [...]float64{0, 0.25, 0.5, 0.75, 1}

// shuffles: a workload's order is one of so many. Two workloads that share one
// are taken to peak together, which errs on the safe side.
const shuffles = 256

// rank says which of its quantiles a workload has in each scenario.
type rank [scenarios]uint8

// ranks are, by mix, the orders of all workloads: in a share mix of the
// scenarios the workload has the scenario's own rank, as all others that do,
// in the rest a shuffled one. Each order is a permutation, so that every
// workload has its own distribution whatever the mix.
var ranks = func() (out [len(mixes)][shuffles]rank) {
	rng := rand.New(rand.NewPCG(0x7472616e, 0x73686970)) // fixed: hosts agree
	for m, mix := range mixes {
		for i := range out[m] {
			order := rng.Perm(scenarios)
			shared := int(math.Round(mix * scenarios))
			alone := order[shared:]
			for _, k := range order[:shared] {
				out[m][i][k] = uint8(k)
			}
			to := rng.Perm(len(alone))
			for j, k := range alone {
				out[m][i][k] = uint8(alone[to[j]])
			}
		}
	}
	return out
}()

// segment is where in a Curve a rank lies: between quantiles i and i+1, as a
// weighted sum of both.
type segment struct {
	i    int
	a, b float32
}

// segments interpolate on the scale of an exponential tail, -ln(1-u), above the
// median and on that of u below. The first and last reach beyond P10 and P99.
var segments = func() (out [scenarios]segment) {
	at := [...]float64{0.1, 0.5, 0.9, 0.95, 0.99}
	for k := range out {
		u := (float64(k) + 0.5) / scenarios
		i := 0
		for i < len(at)-2 && u > at[i+1] {
			i++
		}
		scale := func(u float64) float64 { return -math.Log1p(-u) }
		if i == 0 {
			scale = func(u float64) float64 { return u }
		}
		f := (scale(u) - scale(at[i])) / (scale(at[i+1]) - scale(at[i]))
		out[k] = segment{i, float32(1 - f), float32(f)}
	}
	return out
}()

// table is the curve at every rank.
func (c *Curve) table(out *[scenarios]float32) {
	for k := range out {
		s := &segments[k]
		out[k] = max(0, c[s.i]*s.a+c[s.i+1]*s.b)
	}
}

// joint is the demand of several shards, by scenario. Shards of one workload
// have the same rank in each: they peak together. Workloads have a common rank
// as often as the measured correlation asks for.
//
// In the last span CPU is what is asked for at the peak, which may come at any
// time of the horizon: what a workload then wants beyond its load there (surge).
// Shards of a workload surge at the same moment. Of different workloads no more
// do than are correlated, and the sum of all peaks is not the peak of the sum:
// surges add up as deviations do.
type joint struct {
	mix    int // index into mixes
	rho    float32
	load   [Spans][Resources][scenarios]float32
	surges []surge
	all    surgeSum // of surges, unless stale
	stale  bool
}

// surgeSum of several workloads by scenario: of their surges, and of the squares.
type surgeSum struct{ sum, squares [scenarios]float32 }

// surge of a workload, by scenario.
type surge struct {
	of   Workload
	more [scenarios]float32
}

func (j *joint) reset(correlation float64) {
	*j = joint{mix: mixOf(correlation), rho: float32(correlation), surges: j.surges[:0]}
}

// mixOf: two workloads have both the common rank with probability mix², which
// is then their rank correlation; rounded up.
func mixOf(correlation float64) int {
	want := math.Sqrt(max(0, min(1, correlation)))
	for i, m := range mixes {
		if m >= want-1e-9 {
			return i
		}
	}
	return len(mixes) - 1
}

func (j *joint) rankOf(w Workload) *rank {
	h := fnv.New32a()
	h.Write([]byte(w))
	s := h.Sum32()
	return &ranks[j.mix][(s^s>>8^s>>16)%shuffles]
}

// add puts the demand of s in (sign 1) or takes it out (-1).
func (j *joint) add(s *Shard, sign float32) {
	r, d := j.rankOf(s.Workload), &s.Demand
	if s.surges() {
		i := slices.IndexFunc(j.surges, func(o surge) bool { return o.of == s.Workload })
		if i < 0 {
			i = len(j.surges)
			j.surges = append(j.surges, surge{of: s.Workload})
		}
		s.surge(r, sign, &j.surges[i].more)
		j.stale = true
	}
	var at [scenarios]float32
	for i := range d {
		for res := range d[i] {
			c, load := &d[i][res], &j.load[i][res]
			if c[4] == 0 {
				continue
			}
			if c.flat() {
				v := sign * c[0]
				for k := range load {
					load[k] += v
				}
				continue
			}
			c.table(&at)
			for k := range load {
				load[k] += sign * at[r[k]]
			}
		}
	}
}

func (s *Shard) surges() bool { return s.Peak[4] > 0 }

// surge adds to more what s wants at its peak beyond its load in the last span.
func (s *Shard) surge(r *rank, sign float32, more *[scenarios]float32) {
	var load, peak [scenarios]float32
	s.Demand[Spans-1][CPU].table(&load)
	s.Peak.table(&peak)
	for k := range more {
		more[k] += sign * max(0, peak[r[k]]-load[r[k]])
	}
}

// atPeak is the CPU of the last span at its peak, s put in or taken out of the
// surges but not of the load.
func (j *joint) atPeak(s *Shard, r *rank, sign float32, out *[scenarios]float32) {
	if j.stale {
		j.all, j.stale = surgeSum{}, false
		for i := range j.surges {
			j.all.add(&j.surges[i].more, 1)
		}
	}
	t := j.all
	if s != nil && s.surges() {
		var more [scenarios]float32
		if i := slices.IndexFunc(j.surges, func(o surge) bool { return o.of == s.Workload }); i >= 0 {
			more = j.surges[i].more
			t.add(&more, -1)
		}
		s.surge(r, sign, &more)
		t.add(&more, 1)
	}
	for k, v := range j.load[Spans-1][CPU] {
		sum, squares := max(0, t.sum[k]), max(0, t.squares[k]) // below by rounding
		out[k] = v + float32(math.Sqrt(float64((1-j.rho)*squares+j.rho*sum*sum)))
	}
}

func (t *surgeSum) add(more *[scenarios]float32, sign float32) {
	for k, v := range more {
		v = max(0, v) // below by rounding
		t.sum[k] += sign * v
		t.squares[k] += sign * v * v
	}
}

// strain of a host by span: the probability that any resource is beyond
// capacity, and the expected loss a second, in which an overload counts once and
// the more the further it goes: a move that only makes it less is worth
// something too.
type strain struct{ chance, loss [Spans]float64 }

// excessLoss is what a host counts that is asked for twice its capacity, beside
// being overloaded: all its shards get half.
const excessLoss = 2

// strain of what is in the sum.
func (j *joint) strain(capacity *Amount) strain { return j.strainWith(nil, 0, capacity) }

// strainWith is the same with s put in or taken out.
func (j *joint) strainWith(s *Shard, sign float32, capacity *Amount) (out strain) {
	var r *rank
	var d *Demand
	if s != nil {
		r, d = j.rankOf(s.Workload), &s.Demand
	}
	var at, peak [scenarios]float32
	for i := range horizon {
		var excess [scenarios]float32 // of the worst resource, in capacities
		for res := range capacity {
			if capacity[res] <= 0 {
				continue
			}
			// Rounding must not count as overload.
			room := float32(capacity[res] * (1 + 1e-5))
			inv := 1 / room
			load := &j.load[i][res]
			if Resource(res) == CPU && i == Spans-1 && (len(j.surges) > 0 || s != nil && s.surges()) {
				j.atPeak(s, r, sign, &peak)
				load = &peak
			}
			switch {
			case d == nil || d[i][res][4] == 0:
				for k, v := range load {
					excess[k] = max(excess[k], (v-room)*inv)
				}
			case d[i][res].flat():
				room -= sign * d[i][res][0]
				for k, v := range load {
					excess[k] = max(excess[k], (v-room)*inv)
				}
			default:
				d[i][res].table(&at)
				for k, v := range load {
					excess[k] = max(excess[k], (v+sign*at[r[k]]-room)*inv)
				}
			}
		}
		out.count(i, &excess)
	}
	return out
}

// count makes the i-th span of the excess in each scenario.
func (s *strain) count(i int, excess *[scenarios]float32) {
	n, sum := 0, float32(0)
	for _, e := range excess {
		if e > 0 {
			n++
			sum += e
		}
	}
	s.chance[i] = float64(n) / scenarios
	s.loss[i] = (float64(n) + excessLoss*float64(sum)) / scenarios
}

// top is the largest load of a resource in any scenario.
func (j *joint) top(i int, res Resource) float64 {
	m := float32(0)
	for _, v := range j.load[i][res] {
		m = max(m, v)
	}
	return float64(m)
}

// curves are the quantiles of the sum, in the last span at the peak.
func (j *joint) curves() (d Demand) {
	var sorted, peak [scenarios]float32
	for i := range d {
		for res := range d[i] {
			load := &j.load[i][res]
			if Resource(res) == CPU && i == Spans-1 && len(j.surges) > 0 {
				j.atPeak(nil, nil, 0, &peak)
				load = &peak
			}
			lo, hi := load[0], load[0]
			for _, v := range load {
				lo, hi = min(lo, v), max(hi, v)
			}
			if hi-lo <= 1e-6*hi {
				d[i][res] = Certain(float64(hi))
				continue
			}
			sorted = *load
			slices.Sort(sorted[:])
			for q, u := range [...]float64{0.1, 0.5, 0.9, 0.95, 0.99} {
				d[i][res][q] = max(0, sorted[min(scenarios-1, int(u*scenarios))])
			}
		}
	}
	return d
}

// correlation between the workloads of a host, as their forecasts' errors show
// it: the share of the products of different workloads' errors that is left
// when they are added with their signs. 0: independent, 1: as one.
type correlation struct{ with, without float64 }

const (
	// priorCorrelation counts as much as priorRounds rounds: the daily rhythm
	// is in the forecasts already, what is left is shared in part.
	priorCorrelation = 0.1
	priorRounds      = 20
	// correlationMemory rounds with new samples: a day at 5 min.
	correlationMemory = 288
)

// learn takes the errors of one moment, summed by workload.
func (c *correlation) learn(errors []float64) {
	sum, abs, squares := 0.0, 0.0, 0.0
	for _, e := range errors {
		sum += e
		abs += math.Abs(e)
		squares += e * e
	}
	if abs == 0 || abs*abs <= squares*(1+1e-9) {
		return
	}
	keep := 1 - 1.0/correlationMemory
	// Relative, so that no single moment decides.
	c.with = keep*c.with + (sum*sum-squares)/(abs*abs-squares)
	c.without = keep*c.without + 1
}

func (c *correlation) value() float64 {
	return max(0, min(1, (c.with+priorRounds*priorCorrelation)/(c.without+priorRounds)))
}
