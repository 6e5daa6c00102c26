package allocate

import (
	"cmp"
	"slices"
)

// ReactiveThreshold of a CPU is that of Beloglazov & Buyya 2012, and the
// customary one.
const ReactiveThreshold = 0.8

// Shed is whom the static threshold policy of Beloglazov & Buyya 2012 (THR,
// minimum migration time) moves away from a host whose shards used so much in the
// last sample: those that move fastest, until it is at limit. usage and bytes are
// of a shard; those that use nothing stay.
func Shed[T any](used, limit float64, shards []T, usage, bytes func(T) float64) (out []T) {
	shards = slices.Clone(shards)
	slices.SortStableFunc(shards, func(a, b T) int { return cmp.Compare(bytes(a), bytes(b)) })
	for _, s := range shards {
		if used <= limit {
			break
		}
		if u := usage(s); u > 0 {
			used -= u
			out = append(out, s)
		}
	}
	return out
}

// Fit of a shard on a host: the share of its CPU in use then, and whether
// anything runs there without it.
type Fit struct {
	Fill float64
	Runs bool
}

// Better by best fit: the fuller one, and one that runs nothing after all others.
func (f Fit) Better(than Fit) bool {
	return f.Runs && !than.Runs || f.Runs == than.Runs && f.Fill > than.Fill
}

// react is that policy with best fit decreasing, to compare with: a host above
// the threshold sheds; a target must stay below. It forecasts nothing and weighs
// nothing, so neither is there a cool-down. Rules, room and moves at a time hold
// all the same.
func (r *turn) react() {
	p, v := r.p, r.v
	limit := p.cfg.Threshold * v.Host.Capacity[CPU]
	left := 0.0
	var stay []*Shard
	for i := range v.Shards {
		s := &v.Shards[i]
		if _, flying := p.out[s.ID]; flying {
			continue
		}
		left += s.Usage[CPU]
		if s.Pinned == "" && s.Usage[CPU] > 0 && !r.now.Before(p.notes[s.ID].after) {
			stay = append(stay, s)
		}
	}
	if v.Host.Capacity[CPU] <= 0 || left <= limit {
		return
	}
	moving := Shed(left, limit, stay, func(s *Shard) float64 { return s.Usage[CPU] }, func(s *Shard) float64 { return s.Bytes })
	slices.SortStableFunc(moving, func(a, b *Shard) int { return cmp.Compare(b.Usage[CPU], a.Usage[CPU]) })
	r.sample()
	comes := map[HostID]float64{} // in this plan
	for _, s := range moving {
		if len(p.out)+len(r.plan.Moves) >= p.cfg.OutMax {
			r.not("", InFlight)
			return
		}
		p.cands = r.bestFit(s, comes, p.cands)
		if len(p.cands) == 0 {
			r.not(s.ID, NoTarget)
			continue
		}
		comes[p.cands[0].Host] += s.Usage[CPU]
		r.move(s, Threshold, 0, v.Host.cost(s))
	}
}

// bestFit are the sampled peers that s leaves below the threshold, the fullest
// first; one that runs nothing only if no other will do.
func (r *turn) bestFit(s *Shard, comes map[HostID]float64, out []Candidate) []Candidate {
	cfg := r.p.cfg
	cfg.NoReturn = 0
	var fits []Fit // of out
	out = out[:0]
	for _, peer := range r.p.peers {
		c := peer.Capacity[CPU]
		with := peer.Usage[CPU] + comes[peer.ID] + s.Usage[CPU]
		if c <= 0 || with > cfg.Threshold*c || !peer.may(r.now, s, &cfg) {
			continue
		}
		fit := Fit{with / c, peer.Shards > 0 || comes[peer.ID] > 0}
		at := 0
		for at < len(fits) && !fit.Better(fits[at]) {
			at++
		}
		fits, out = slices.Insert(fits, at, fit), slices.Insert(out, at, Candidate{peer.ID, 1 - fit.Fill})
	}
	for n := range fits {
		if !fits[n].Runs && fits[0].Runs {
			out = out[:n] // the others will do
			break
		}
	}
	return out[:min(len(out), cfg.Ask)]
}
