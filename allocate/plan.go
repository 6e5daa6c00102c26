package allocate

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// View is what a host knows when it plans. A shard's Demand changes only with
// its SampledAt.
type View struct {
	Host     Host
	Shards   []Shard       // that run here, those on their way out included
	Held     []Reservation // of the host's own Ledger
	Peers    Pool
	Dominant map[Tenant]float64 // a tenant's dominant share over its weight (Ghodsi et al., NSDI 2011)
}

// Planner is one host's. It is not safe for concurrent use. Its work in a round
// grows with the shards of the host alone.
type Planner struct {
	cfg Config
	id  HostID
	rng *rand.Rand

	sum    joint
	sumOf  uint64 // what sum was made of, see mark
	load   Demand // its curves
	corr   correlation
	signal signal
	notes  map[ShardID]noted
	out    map[ShardID]flight
	round  uint64

	calm    int       // rounds in a row without a chance of overload
	leaving time.Time // the host is being emptied until then; zero: it is not
	waits   time.Time // no emptying before

	peers      []*Peer // scratch
	errors     map[Workload]float64
	byWorkload []float64
	cands      []Candidate
}

// NewPlanner makes the planner of a host. Equal seeds and views give equal plans.
func NewPlanner(id HostID, cfg Config, seed uint64) (*Planner, error) {
	cfg = cfg.Defaults()
	if err := cfg.Check(); err != nil {
		return nil, fmt.Errorf("planner of %s: %w", id, err)
	}
	return &Planner{
		cfg: cfg, id: id, rng: rand.New(rand.NewPCG(seed, hash(string(id)))),
		notes: map[ShardID]noted{}, out: map[ShardID]flight{}, errors: map[Workload]float64{},
	}, nil
}

func hash(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

// Config with its defaults.
func (p *Planner) Config() Config { return p.cfg }

// Leaving says that the host is being emptied: its ledger takes nothing.
func (p *Planner) Leaving() bool { return !p.leaving.IsZero() }

// Correlation between workloads, as measured here.
func (p *Planner) Correlation() float64 { return p.corr.value() }

// Started tells that a target granted a move and it is under way.
func (p *Planner) Started(now time.Time, id ShardID, target HostID) {
	p.out[id] = flight{target, now}
}

// Ended tells how it ended.
func (p *Planner) Ended(now time.Time, id ShardID, moved bool) {
	delete(p.out, id)
	if !moved {
		n := p.notes[id]
		n.after = now.Add(failedPause + time.Duration(p.rng.Int64N(int64(failedPause))))
		p.notes[id] = n
	}
}

// Self is what the host tells its peers, as of the last round.
func (p *Planner) Self(v *View) Peer {
	self := Peer{Host: v.Host, Load: p.load, Shards: len(v.Shards) + len(v.Held), Leaving: p.Leaving()}
	for i := range v.Shards {
		for r := range self.Usage {
			self.Usage[r] += v.Shards[i].Usage[r]
		}
	}
	for i := range v.Held {
		for r := range self.Usage {
			self.Usage[r] += v.Held[i].Shard.Usage[r]
		}
	}
	return self
}

// Round plans. Shards that cannot be computed with are an error, and nothing
// is planned.
func (p *Planner) Round(now time.Time, v *View) (Plan, error) {
	for i := range v.Shards {
		if err := checkShard(&v.Shards[i]); err != nil {
			return Plan{}, fmt.Errorf("plan for %s: %w", p.id, err)
		}
	}
	p.learn(v.Shards)
	p.addUp(v)
	r := turn{p: p, now: now, v: v, plan: Plan{At: now, Host: p.id}}
	r.weigh()
	r.strain = p.sum.strain(&v.Host.Capacity)
	r.plan.Overload = r.chance
	r.plan.Loss = p.cfg.loss(r.loss, r.weights[0])
	if r.chance == ([Spans]float64{}) {
		p.calm++
	} else {
		p.calm = 0
	}
	if p.cfg.Threshold > 0 {
		r.react()
		return r.plan, nil
	}
	r.grow()
	r.relieve()
	if p.cfg.Consolidate {
		r.consolidate()
	}
	return r.plan, nil
}

// addUp makes the joint demand: of what stays and what has been promised room.
// Between samples and moves it is what it was.
func (p *Planner) addUp(v *View) {
	of := p.mark(v)
	if of == p.sumOf {
		return
	}
	p.sumOf = of
	defer func() { p.load = p.sum.curves() }()
	p.sum.reset(p.Correlation())
	for i := range v.Shards {
		s := &v.Shards[i]
		if _, flying := p.out[s.ID]; !flying {
			p.sum.add(s, 1)
		}
	}
	for i := range v.Held {
		p.sum.add(&v.Held[i].Shard, 1)
	}
}

// mark stands for everything that the joint demand depends on.
func (p *Planner) mark(v *View) uint64 {
	const prime = 1099511628211
	m := uint64(mixOf(p.Correlation())) + 1
	for i := range v.Shards {
		s := &v.Shards[i]
		m = (m ^ hash(string(s.ID))) * prime
		m = (m ^ uint64(s.SampledAt.UnixNano())) * prime
		if _, flying := p.out[s.ID]; flying {
			m = (m ^ 1) * prime
		}
	}
	for i := range v.Held {
		m = (m ^ hash(string(v.Held[i].Shard.ID)) ^ uint64(v.Held[i].Expires.UnixNano())) * prime
	}
	return m
}

// turn is one round under way.
type turn struct {
	p    *Planner
	now  time.Time
	v    *View
	plan Plan
	strain
	weights [MaxPriority + 1]float64 // what a second of overload counts for shards of a priority and above
	sampled bool
	gone    map[ShardID]bool // in this plan, or tried in vain
}

func (r *turn) weigh() {
	total := 0.0
	for i := range r.v.Shards {
		s := &r.v.Shards[i]
		share := float64(s.Demand[0][CPU][1]) + 1e-9
		total += share
		for q := 0; q <= s.Priority; q++ {
			r.weights[q] += share * weight(s.Priority)
		}
	}
	for q := range r.weights {
		r.weights[q] /= max(total, 1e-9)
	}
}

func (r *turn) sample() {
	if !r.sampled {
		r.p.peers = sample(r.p.rng, r.v.Peers, r.p.cfg.Peers, r.p.id, r.p.peers)
		r.sampled = true
	}
}

func (r *turn) not(id ShardID, why Reason) { r.plan.Not = append(r.plan.Not, Decision{id, why}) }

// grow raises limits that demand will exceed, where the host has the room: the
// forecasts are of demand, so the joint chance has the room in it already.
func (r *turn) grow() {
	for i := range r.v.Shards {
		s := &r.v.Shards[i]
		need := float64(s.Demand[0][CPU][3])
		if s.Limit[CPU] > 0 && need > s.Limit[CPU] && r.chance[0] <= r.p.cfg.Accept {
			// A tenth more, so that the next step of demand is no next resize.
			r.plan.Resizes = append(r.plan.Resizes, Resize{s.ID, s.Limit[CPU], need * 1.1, Grow})
		}
	}
}

// relieve finds the fewest moves that are worth it: one at a time, the best of
// the lowest priority that has one, until nothing is left to save.
func (r *turn) relieve() {
	p := r.p
	var s *Shard
	var benefit float64
	var cost MoveCost
	if r.plan.Loss > 0 {
		s, benefit, cost = r.best()
	}
	p.signal.push(s != nil)
	switch {
	case r.plan.Loss == 0:
		return
	case s == nil:
		r.not("", NotWorth)
		return
	case r.chance[0] < p.cfg.Urgent && !p.signal.sustained(p.cfg.SustainK, p.cfg.SustainN):
		r.not(s.ID, NotSustained)
		return
	}
	r.sample()
	// Twice as many looks as moves allowed bound a round's work.
	for look := 0; s != nil && look < 2*p.cfg.OutMax; look++ {
		if len(p.out)+len(r.plan.Moves) >= p.cfg.OutMax {
			r.not("", InFlight)
			return
		}
		r.leave(s.ID)
		if p.cands = p.targets(r.now, r.v, s, Overload, p.cands); len(p.cands) == 0 {
			r.not(s.ID, NoTarget)
		} else if p.cands = r.gain(s, benefit-p.cfg.Margin*p.cfg.price(cost, s.Priority), p.cands); len(p.cands) == 0 {
			r.not(s.ID, NotWorth)
		} else {
			r.move(s, Overload, benefit, cost)
		}
		s, benefit, cost = r.best()
	}
	if len(r.plan.Moves) == 0 && r.chance[0] >= p.cfg.Urgent {
		r.yield()
	}
}

func (r *turn) leave(id ShardID) {
	if r.gone == nil {
		r.gone = map[ShardID]bool{}
	}
	r.gone[id] = true
}

// move puts s into the plan and its demand out of the host's.
func (r *turn) move(s *Shard, why Reason, benefit float64, cost MoveCost) {
	p := r.p
	r.plan.Moves = append(r.plan.Moves, Move{
		Shard: s.ID, Priority: s.Priority, From: p.id, Targets: append([]Candidate(nil), p.cands...),
		Reason: why, Benefit: benefit, Price: p.cfg.price(cost, s.Priority), Bytes: cost.Bytes, Takes: cost.Takes, Blackout: cost.Blackout,
	})
	p.sum.add(s, -1)
	p.sumOf = 0 // it may be refused
	r.strain = p.sum.strain(&r.v.Host.Capacity)
}

// best is the shard to move next: of the lowest priority that has one worth its
// cost, the one that saves most beyond it. What a move saves for lower
// priorities than the shard's own does not count.
func (r *turn) best() (best *Shard, benefit float64, cost MoveCost) {
	net := 0.0
	for i := range r.v.Shards {
		s := &r.v.Shards[i]
		if best != nil && s.Priority > best.Priority || r.gone[s.ID] || !r.p.movable(r.now, s) {
			continue
		}
		b, n, c := r.worth(s)
		if n <= 0 {
			continue
		}
		switch {
		case best == nil || s.Priority < best.Priority:
		case n > net*tie:
		case n*tie > net && r.v.Dominant[s.Tenant] > r.v.Dominant[best.Tenant]:
		default:
			continue
		}
		best, benefit, cost, net = s, b, c, n
	}
	return best, benefit, cost
}

// tie: nets closer than a tenth are the same, and the tenant with the larger
// dominant share moves.
const tie = 1.1

// worth of moving s: what it saves, and that less its cost with the margin.
func (r *turn) worth(s *Shard) (benefit, net float64, cost MoveCost) {
	p := r.p
	cost = r.v.Host.cost(s)
	without := p.sum.strainWith(s, -1, &r.v.Host.Capacity)
	// What happens before the move ends is not saved.
	late := min(1, cost.Takes.Seconds()/horizon[0].until.Seconds())
	w := r.weights[s.Priority]
	saved := [Spans]float64{}
	for i := range saved {
		saved[i] = max(0, r.loss[i]-without.loss[i])
	}
	saved[0] *= 1 - late
	benefit = p.cfg.loss(saved, w)
	return benefit, benefit - p.cfg.Margin*p.cfg.price(cost, s.Priority), cost
}

// yield takes CPU from lower priorities than the highest, down to what they
// may count on, where nothing can move.
func (r *turn) yield() {
	top := 0
	for i := range r.v.Shards {
		top = max(top, r.v.Shards[i].Priority)
	}
	short := float64(r.p.sum.curves()[0][CPU][3]) - r.v.Host.Capacity[CPU]
	for q := 0; q < top && short > 0; q++ {
		for i := range r.v.Shards {
			s := &r.v.Shards[i]
			use := float64(s.Demand[0][CPU][1])
			give := min(short, use-s.Request[CPU])
			if s.Priority != q || give <= 0 || s.Request[CPU] <= 0 {
				continue
			}
			r.plan.Resizes = append(r.plan.Resizes, Resize{s.ID, s.Limit[CPU], use - give, Yield})
			short -= give
		}
	}
}
