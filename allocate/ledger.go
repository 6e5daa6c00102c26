package allocate

import (
	"slices"
	"time"
)

// Own is what a target knows of itself when it is asked.
type Own struct {
	Host        *Host
	Shards      []Shard
	Leaving     bool    // Planner.Leaving
	Correlation float64 // Planner.Correlation
}

// Ledger keeps a host's promises. Its word, not the source's estimate, is what
// counts: it adds up its own forecasts with every promise outstanding, so that
// however many hosts ask at once, none is told yes beyond the room there is.
type Ledger struct {
	cfg  Config
	held []Reservation
	sum  joint
}

// NewLedger makes an empty one. cfg has its Defaults filled in.
func NewLedger(cfg Config) *Ledger { return &Ledger{cfg: cfg} }

// Held are the reservations outstanding at now. The slice is the ledger's.
func (l *Ledger) Held(now time.Time) []Reservation {
	l.held = slices.DeleteFunc(l.held, func(r Reservation) bool { return !r.Expires.After(now) })
	return l.held
}

// Release ends a reservation: the shard has arrived, or will not come.
func (l *Ledger) Release(id ShardID) {
	l.held = slices.DeleteFunc(l.held, func(r Reservation) bool { return r.Shard.ID == id })
}

// Reserve keeps room for a shard, or says why not. A second request for a shard
// replaces the first. The room ends by itself, Config.Hold after the move should have.
func (l *Ledger) Reserve(now time.Time, own Own, req Request) (Reservation, *Veto) {
	l.Held(now)
	l.Release(req.Shard.ID)
	if v := l.refuse(own, &req); v != nil {
		return Reservation{}, v
	}
	r := Reservation{Request: req, Expires: now.Add(min(req.Takes, maxHold) + l.cfg.Hold)}
	l.held = append(l.held, r)
	return r, nil
}

// maxHold bounds what a source that lies about a move's time can block.
const maxHold = time.Hour

func (l *Ledger) refuse(own Own, req *Request) *Veto {
	s, h := &req.Shard, own.Host
	veto := func(c VetoCode, v float64) *Veto { return &Veto{Host: h.ID, Code: c, Value: v} }
	switch {
	case checkShard(s) != nil || req.Takes < 0:
		return veto(VetoInvalid, 0)
	case h.Cordoned:
		return veto(VetoCordoned, 0)
	case own.Leaving:
		return veto(VetoLeaving, 0)
	case len(l.held) >= l.cfg.InMax:
		return veto(VetoInFlight, 0)
	}
	here := func(id ShardID) bool {
		return slices.ContainsFunc(own.Shards, func(o Shard) bool { return o.ID == id })
	}
	mates := 0
	usage := s.Usage
	l.sum.reset(own.Correlation)
	take := func(o *Shard) bool {
		if o.Workload == s.Workload {
			mates++
		}
		for r := range usage {
			usage[r] += o.Usage[r]
		}
		l.sum.add(o, 1)
		return !slices.Contains(s.Avoid, o.Workload) && !slices.Contains(o.Avoid, s.Workload)
	}
	ok := true
	for i := range own.Shards {
		ok = take(&own.Shards[i]) && ok
	}
	for i := range l.held {
		// One that has just arrived may be in both.
		if !here(l.held[i].Shard.ID) {
			ok = take(&l.held[i].Shard) && ok
		}
	}
	if !ok || s.Spread.PerHost > 0 && mates >= s.Spread.PerHost {
		return veto(VetoSpread, float64(mates))
	}
	for r := range usage {
		// As measured, whatever forecasts say.
		if c := h.Capacity[r]; c > 0 && usage[r] > c {
			return veto(VetoUsage, usage[r]-c)
		}
	}
	l.sum.add(s, 1)
	for i := range horizon {
		// Memory has no overload to recover from.
		if c := h.Capacity[Memory]; c > 0 && l.sum.top(i, Memory) > c*(1+1e-5) {
			return veto(VetoMemory, l.sum.top(i, Memory)-c)
		}
	}
	if p := l.cfg.worst(l.sum.strain(&h.Capacity).chance, req.Reason); p > l.cfg.limit(req.Reason) {
		return veto(VetoOverload, p)
	}
	return nil
}
