package allocate

import (
	"math/bits"
	"time"
)

// signal is which of the last rounds saw a loss worth a move.
type signal uint64

func (s *signal) push(seen bool) {
	*s <<= 1
	if seen {
		*s |= 1
	}
}

// sustained: k of the last n.
func (s signal) sustained(k, n int) bool {
	return bits.OnesCount64(uint64(s)<<(64-n)) >= k
}

// flight is a move under way from this host.
type flight struct {
	target HostID
	since  time.Time
}

// noted is what a planner remembers of a shard between rounds.
type noted struct {
	sampled time.Time
	median  float64   // of CPU in the nearest span, as forecast after that sample
	after   time.Time // no move before, because the last try failed
	round   uint64
}

// failedPause of a shard whose move failed, with jitter up to twice that: what
// made it fail seldom passes sooner.
const failedPause = 5 * time.Minute

// movable says whether hysteresis and rules let a shard move at all.
func (p *Planner) movable(now time.Time, s *Shard) bool {
	if s.Pinned != "" || !s.MovedAt.IsZero() && now.Sub(s.MovedAt) < p.cfg.CoolDown {
		return false
	}
	if _, flying := p.out[s.ID]; flying {
		return false
	}
	return !now.Before(p.notes[s.ID].after)
}

// learn compares the samples that came since the last round with what was
// forecast for them, and forgets shards that are gone.
func (p *Planner) learn(shards []Shard) {
	p.round++
	clear(p.errors)
	for i := range shards {
		s := &shards[i]
		n := p.notes[s.ID]
		if !n.sampled.IsZero() && s.SampledAt.After(n.sampled) && s.SampledAt.Sub(n.sampled) <= horizon[0].until {
			p.errors[s.Workload] += s.Usage[CPU] - n.median
		}
		if !s.SampledAt.Equal(n.sampled) {
			n.sampled, n.median = s.SampledAt, float64(s.Demand[0][CPU][1])
		}
		n.round = p.round
		p.notes[s.ID] = n
	}
	if len(p.notes) > len(shards) {
		for id, n := range p.notes {
			if n.round != p.round {
				delete(p.notes, id)
			}
		}
	}
	p.byWorkload = p.byWorkload[:0]
	for i := range shards { // in the order of the shards: sums must not depend on a map's
		w := shards[i].Workload
		if e, ok := p.errors[w]; ok {
			p.byWorkload = append(p.byWorkload, e)
			delete(p.errors, w)
		}
	}
	p.corr.learn(p.byWorkload)
}
