package allocate

import (
	"cmp"
	"slices"
)

// ReactiveThreshold of a CPU is that of Beloglazov & Buyya 2012, and the
// customary one.
const ReactiveThreshold = 0.8

// react is the static threshold policy of Beloglazov & Buyya 2012 (THR, minimum
// migration time, best fit decreasing), to compare with: a host above the
// threshold in the last sample sheds the shards that move fastest until it is
// below; a target must stay below. It forecasts nothing and weighs nothing, so
// neither is there a cool-down. Rules, room and moves at a time hold all the same.
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
	slices.SortStableFunc(stay, func(a, b *Shard) int { return cmp.Compare(a.Bytes, b.Bytes) })
	var moving []*Shard
	for _, s := range stay {
		if left <= limit {
			break
		}
		left -= s.Usage[CPU]
		moving = append(moving, s)
	}
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
	busy := false
	out = out[:0]
	for _, peer := range r.p.peers {
		c := peer.Capacity[CPU]
		with := peer.Usage[CPU] + comes[peer.ID] + s.Usage[CPU]
		if c <= 0 || with > cfg.Threshold*c || !peer.may(r.now, s, &cfg) {
			continue
		}
		runs := peer.Shards > 0 || comes[peer.ID] > 0
		if busy && !runs {
			continue
		}
		if runs && !busy {
			busy, out = true, out[:0]
		}
		out = append(out, Candidate{peer.ID, 1 - with/c})
	}
	slices.SortStableFunc(out, func(a, b Candidate) int { return cmp.Compare(a.Score, b.Score) })
	return out[:min(len(out), cfg.Ask)]
}
