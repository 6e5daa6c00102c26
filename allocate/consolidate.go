package allocate

import (
	"cmp"
	"slices"
	"time"
)

const (
	// leaveFor: a host that is not empty by then stays.
	leaveFor = 30 * time.Minute
	// leaveAgain after an attempt that came to nothing, with jitter.
	leaveAgain = 30 * time.Minute
	// leaveOne in so many rounds tries: neighbours do not all leave at once.
	leaveOne = 3
	// leaveMost shards are looked at; a host with more is not spared.
	leaveMost = 64
)

// consolidate empties a host that can be spared: calm for some rounds and for
// the horizon, nothing promised to it, and room for all its shards on busier
// peers that are not dearer.
func (r *turn) consolidate() {
	p := r.p
	if p.Leaving() && (len(r.v.Shards) == 0 || !r.now.Before(p.leaving) || p.calm == 0) {
		p.leaving = time.Time{}
		p.waits = r.now.Add(leaveAgain)
	}
	n := len(r.v.Shards)
	if n == 0 || n > leaveMost || len(r.plan.Moves) > 0 {
		return
	}
	if !p.Leaving() {
		if p.calm < p.cfg.CalmRounds || r.now.Before(p.waits) || len(r.v.Held) > 0 || len(p.out) > 0 || p.rng.IntN(leaveOne) != 0 || r.spiking() {
			return
		}
	}
	r.sample()
	stay, ok := r.fits()
	if !ok {
		if p.Leaving() {
			return // other peers next round, until leaveFor
		}
		p.waits = r.now.Add(time.Duration(p.rng.Int64N(int64(leaveAgain / leaveOne))))
		return
	}
	if !p.Leaving() {
		p.leaving = r.now.Add(leaveFor)
	}
	for _, s := range stay {
		if len(p.out)+len(r.plan.Moves) >= p.cfg.OutMax {
			return
		}
		p.cands = p.targets(r.now, r.v, s, Consolidate, p.cands)
		if len(p.cands) > 0 {
			r.move(s, Consolidate, p.cfg.HostHour*r.v.Host.Cost/float64(n), r.v.Host.cost(s))
		}
	}
}

// spiking: load is above what was forecast for it, so that forecasts are not to
// be believed right now.
func (r *turn) spiking() bool {
	use, bound := 0.0, 0.0
	for i := range r.v.Shards {
		use += r.v.Shards[i].Usage[CPU]
		bound += float64(r.v.Shards[i].Demand[0][CPU][2])
	}
	return use > bound
}

// fits says whether everything that is still here finds a place among busier
// peers, for less than the host is worth in an hour; the shards come largest
// first.
func (r *turn) fits() (stay []*Shard, ok bool) {
	p := r.p
	own := Peer{Host: r.v.Host, Load: p.load}
	fill := own.fill()
	price := 0.0
	for i := range r.v.Shards {
		s := &r.v.Shards[i]
		if _, flying := p.out[s.ID]; flying {
			continue
		}
		if !p.movable(r.now, s) {
			return nil, false
		}
		price += p.cfg.price(r.v.Host.cost(s), s.Priority)
		stay = append(stay, s)
	}
	if len(stay) == 0 || !p.Leaving() && p.cfg.SpareHours*p.cfg.HostHour*r.v.Host.Cost <= p.cfg.Margin*price {
		return nil, false
	}
	slices.SortStableFunc(stay, func(a, b *Shard) int {
		return cmp.Compare(r.size(b), r.size(a))
	})
	p.peers = slices.DeleteFunc(p.peers, func(peer *Peer) bool {
		return peer.Shards == 0 || peer.Cost > r.v.Host.Cost || peer.Cost == r.v.Host.Cost && peer.fill() < fill
	})
	room := make([]Peer, len(p.peers))
	for i, peer := range p.peers {
		room[i] = *peer
	}
	for _, s := range stay {
		best, most := -1, -1.0
		for i := range room {
			if !room[i].may(r.now, s, &p.cfg) {
				continue
			}
			chance, load := room[i].after(s, p.Correlation())
			with := Peer{Host: room[i].Host, Load: load}
			if f := with.fill(); slices.Max(chance[:]) <= p.cfg.Calm && f > most {
				best, most = i, f
			}
		}
		if best < 0 {
			return nil, false
		}
		_, room[best].Load = room[best].after(s, p.Correlation())
		for res := range s.Usage {
			room[best].Usage[res] += s.Usage[res]
		}
	}
	return stay, true
}

// size is the largest share of the host that s usually takes.
func (r *turn) size(s *Shard) float64 {
	f := 0.0
	for res, c := range r.v.Host.Capacity {
		if c > 0 {
			f = max(f, float64(s.Demand[1][res][1])/c)
		}
	}
	return f
}
