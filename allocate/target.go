package allocate

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// Pool is where targets are sampled from. Idle hosts, which run nothing, are
// apart, so that a few looks find one in a pool that is mostly busy. What At
// returns is read until the round ends, and not changed.
type Pool interface {
	Busy() int
	BusyAt(i int) *Peer
	Idle() int
	IdleAt(i int) *Peer
}

// idlePeers sampled beside Config.Peers busy ones.
const idlePeers = 2

// sample takes distinct peers, however large the pool is.
func sample(rng *rand.Rand, pool Pool, n int, self HostID, out []*Peer) []*Peer {
	out = out[:0]
	take := func(size, want int, at func(int) *Peer) {
		from := len(out)
		// A few more looks than peers wanted, for the host itself and doubles.
		for look := 0; look < want+4 && len(out)-from < min(want, size); look++ {
			p := at(rng.IntN(size))
			if p.ID != self && p.valid() && !slices.ContainsFunc(out, func(o *Peer) bool { return o.ID == p.ID }) {
				out = append(out, p)
			}
		}
	}
	if b := pool.Busy(); b > 0 {
		take(b, n, pool.BusyAt)
	}
	if i := pool.Idle(); i > 0 {
		take(i, idlePeers, pool.IdleAt)
	}
	return out
}

// exceed is the probability that a load of curve c is beyond room.
func (c *Curve) exceed(room float32) float64 {
	at := [...]float64{0.1, 0.5, 0.9, 0.95, 0.99}
	if room >= c[4] {
		// Half of what P99 leaves, as far again as P95 is.
		if room >= c[4]+(c[4]-c[3]) {
			return 0
		}
		return 0.005
	}
	if room < c[0] {
		return 1
	}
	for i := len(c) - 2; ; i-- {
		if room >= c[i] {
			f := float64(room-c[i]) / float64(c[i+1]-c[i])
			return 1 - (at[i] + f*(at[i+1]-at[i]))
		}
	}
}

// plus estimates the curve of a sum from its parts', whose deviations from the
// median are correlated by rho: all that a source knows of a peer.
func (c *Curve) plus(o *Curve, rho float32) (out Curve) {
	out[1] = c[1] + o[1]
	for i := range out {
		a, b := c[i]-c[1], o[i]-o[1]
		d := float32(math.Sqrt(float64(a*a + b*b + 2*rho*a*b)))
		if i == 0 {
			d = -d
		}
		out[i] = max(0, out[1]+d)
	}
	return out
}

// after is the chance that the peer is overloaded, by span, if s came, and what
// it would run.
func (p *Peer) after(s *Shard, rho float64) (chance [Spans]float64, load Demand) {
	for i := range p.Load {
		for r := range p.Load[i] {
			c := &s.Demand[i][r]
			if Resource(r) == CPU && i == Spans-1 && s.Peak[4] > 0 {
				c = &s.Peak // as if it came when the peer's does
			}
			load[i][r] = p.Load[i][r].plus(c, float32(rho))
			if c := p.Capacity[r]; c > 0 {
				chance[i] = max(chance[i], load[i][r].exceed(float32(c*(1+1e-5))))
			}
		}
	}
	return chance, load
}

// strain of the peer under a load of which no more than its curves is known.
func (p *Peer) strain(load *Demand) (out strain) {
	var at [scenarios]float32
	for i := range load {
		var excess [scenarios]float32 // of the worst resource, in capacities
		for r, c := range p.Capacity {
			if c <= 0 {
				continue
			}
			room := float32(c * (1 + 1e-5))
			load[i][r].table(&at)
			for k, v := range at {
				excess[k] = max(excess[k], (v-room)/room)
			}
		}
		out.count(i, &excess)
	}
	return out
}

// gain are those of the targets at which s adds less loss than it saves here
// beyond its cost: a risk that only moves is not worth a move. A second of
// overload there counts as here.
func (r *turn) gain(s *Shard, net float64, targets []Candidate) []Candidate {
	p, w := r.p, r.weights[s.Priority]
	return slices.DeleteFunc(targets, func(c Candidate) bool {
		i := slices.IndexFunc(p.peers, func(peer *Peer) bool { return peer.ID == c.Host })
		peer := p.peers[i]
		_, load := peer.after(s, p.Correlation())
		return p.cfg.loss(peer.strain(&load).loss, w)-p.cfg.loss(peer.strain(&peer.Load).loss, w) >= net
	})
}

// fill is the fullest resource's usual share, in the middle of the horizon.
func (p *Peer) fill() float64 {
	f := 0.0
	for r, c := range p.Capacity {
		if c > 0 {
			f = max(f, float64(p.Load[1][r][1])/c)
		}
	}
	return f
}

// may says whether rules and plain room let s run on the peer.
func (p *Peer) may(now time.Time, s *Shard, c *Config) bool { return p.Unfit(now, s, c) == "" }

// What Unfit answers besides the name of a resource.
const (
	UnfitCordoned = "cordoned" // or being emptied
	UnfitZone     = "zone"     // not one of Shard.Zones
	UnfitSpread   = "spread"   // too many of its workload in the zone
	UnfitLabel    = "label"    // one of Shard.Labels is missing or another
	UnfitLeft     = "left"     // the shard has just left it
	UnfitData     = "data"     // it has not what cannot be sent
)

// Unfit says which rule or resource keeps s from the peer, "" when none does.
// The ledger there checks what only it knows.
func (p *Peer) Unfit(now time.Time, s *Shard, c *Config) string {
	switch {
	case p.Cordoned, p.Leaving:
		return UnfitCordoned
	case len(s.Zones) > 0 && !slices.Contains(s.Zones, p.Zone):
		return UnfitZone
	case s.Spread.PerZone > 0 && s.ZoneMates[p.Zone] >= s.Spread.PerZone:
		return UnfitSpread
	case p.ID == s.LastHost && now.Sub(s.MovedAt) < c.NoReturn:
		return UnfitLeft
	}
	for k, v := range s.Labels {
		if p.Labels[k] != v {
			return UnfitLabel
		}
	}
	for _, d := range s.Data {
		if has, asked := p.Data[d.Name]; d.Needed && asked && !has {
			return UnfitData
		}
	}
	for r, limit := range p.Capacity {
		if limit > 0 && p.Usage[r]+s.Usage[r] > limit {
			return Resource(r).String()
		}
	}
	if m := p.Capacity[Memory]; m > 0 {
		for i := range p.Load {
			if float64(p.Load[i][Memory][4]+s.Demand[i][Memory][4]) > m*(1+1e-5) {
				return Memory.String()
			}
		}
	}
	return ""
}

// Refusal is why a peer may not take a shard, in words that follow its name.
type Refusal struct {
	Host HostID
	Why  string
}

var unfitWords = map[string]string{
	UnfitCordoned: "takes no shards now", UnfitZone: "is in another zone", UnfitSpread: "is in a zone that has enough of the workload",
	UnfitLabel: "lacks a label that it needs", UnfitLeft: "is where it came from",
	UnfitData: "has not a volume that it shares with its host",
}

// Refusals are of those of the peers that the last round sampled that may not
// take s, as far as its own host can tell.
func (p *Planner) Refusals(now time.Time, s *Shard, reason Reason) (out []Refusal) {
	for _, peer := range p.peers {
		why, unfit := "", peer.Unfit(now, s, &p.cfg)
		if unfit != "" {
			if why = unfitWords[unfit]; why == "" {
				why = "has no " + unfit + " to spare"
			}
		} else if c := peer.Capacity[CPU]; p.cfg.Threshold > 0 {
			if peer.Usage[CPU]+s.Usage[CPU] > p.cfg.Threshold*c {
				why = fmt.Sprintf("would use more than %.0f %% of its CPU", 100*p.cfg.Threshold)
			}
		} else {
			chance, _ := peer.after(s, p.Correlation())
			if worst := p.cfg.worst(chance, reason); worst > p.cfg.limit(reason) {
				why = fmt.Sprintf("would be overloaded with probability %.2f", worst)
			}
		}
		if why != "" {
			out = append(out, Refusal{peer.ID, why})
		}
	}
	return out
}

// targets are the sampled peers that may take s, best first.
func (p *Planner) targets(now time.Time, v *View, s *Shard, reason Reason, out []Candidate) []Candidate {
	out = out[:0]
	own := v.Host
	for _, peer := range p.peers {
		if !peer.may(now, s, &p.cfg) {
			continue
		}
		idle := peer.Shards == 0
		if reason == Consolidate && (idle || peer.Cost > own.Cost) {
			continue
		}
		chance, load := peer.after(s, p.Correlation())
		if p.cfg.worst(chance, reason) > p.cfg.limit(reason) {
			continue
		}
		with := Peer{Host: peer.Host, Load: load}
		score := p.cfg.loss(chance, weight(s.Priority))
		score += p.missing(s, peer) * p.cfg.Interference * weight(s.Priority)
		// An hour of one host more, and within an hour of the same, the fuller
		// one where hosts are to be spared, else the emptier.
		if p.cfg.Consolidate {
			if idle {
				score += peer.Cost * p.cfg.HostHour
			}
			score += (1 - with.fill()) * tilt
		} else {
			score += with.fill() * tilt
		}
		score += max(0, peer.Cost-own.Cost) * tilt
		out = append(out, Candidate{peer.ID, score})
	}
	slices.SortStableFunc(out, func(a, b Candidate) int { return cmp.Compare(a.Score, b.Score) })
	return out[:min(len(out), p.cfg.Ask)]
}

// tilt between targets that are equally safe, weighted seconds: less than any
// move is worth.
const tilt = 20

// missing is how many seconds the link needs for layers and volumes that the
// peer has not.
func (p *Planner) missing(s *Shard, peer *Peer) float64 {
	bytes := 0.0
	for _, d := range s.Data {
		if !peer.Data[d.Name] {
			bytes += d.Bytes
		}
	}
	return bytes / peer.Link
}
