// Package sim runs allocate's planners and ledgers, and policies to compare
// them with, on a simulated pool. It owns scenarios, the pool's accounts and the
// reports; it refuses to decide anything that allocate decides.
//
// A step's way: the load of the step before becomes a sample (policy.observe,
// where forecasters learn), the world enters the step's own load, and in each
// of its rounds moves that are done land (world.advance) and the policy plans
// (policy.round). Equal scenarios and seeds give equal reports.
package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// Policies.
const (
	None     = "none"
	Reactive = "reactive" // threshold on the last sample, best-fit
	DRS      = "drs"      // periodic imbalance with cost-benefit
	Tranship = "tranship"
	Oracle   = "oracle" // tranship's planner, told the future instead of a forecast
)

// Policies in the order of tables.
func Policies() []string { return []string{None, Reactive, DRS, Tranship, Oracle} }

// policy decides. It sees samples and the world as it is, and acts by
// world.start alone. Only oracle may look at a load before it is a sample.
type policy interface {
	// observe takes the samples of step c, which has just ended; c counts from
	// the start of the warm-up, in which nothing else is called.
	observe(c int) error
	// round plans; fresh says that samples came since the last one.
	round(fresh bool) error
	// landed tells that a move ended.
	landed(shard, from, to int, moved bool)
	// failed tells that hosts are gone; revived, that they are back.
	failed(hosts []int)
	revived(hosts []int)
	// revive finds a place for a shard whose host failed; -1: none.
	revive(shard int) int
	// finish adds what it counted to the report.
	finish(r *Report)
}

// Options of a run.
type Options struct {
	Seed uint64 // instead of the scenario's; 0: the scenario's
	// Clock, if set, measures planning. Without it a report is a function of
	// scenario, policy and seed.
	Clock func() time.Duration
	// CPU, if set beside Clock, says how much of a processor the calling thread
	// has had: what a round takes longer than that, it waits for one.
	CPU func() time.Duration
}

// detect is how long a dead host goes unnoticed, as long as membership takes.
const detect = 15.0

// Run simulates one policy. Errors: ErrTraces, what the scenario asks for and
// cannot be, and ctx's.
func Run(ctx context.Context, sc *Scenario, name string, o Options) (*Report, error) {
	s := *sc
	if o.Seed != 0 {
		s.Seed = o.Seed
	}
	specs, err := s.loads(rand.New(rand.NewPCG(s.Seed, 1)))
	if err != nil {
		return nil, fmt.Errorf("loads of %s: %w", s.Name, err)
	}
	w, err := newWorld(&s, specs, name)
	if err != nil {
		return nil, fmt.Errorf("first placement of %s: %w", s.Name, err)
	}
	p, err := newPolicy(w, name, o)
	if err != nil {
		return nil, err
	}
	w.landed = p.landed
	r := &runner{w: w, p: p, rng: rand.New(rand.NewPCG(s.Seed, 2))}
	if err := r.run(ctx); err != nil {
		return nil, fmt.Errorf("%s under %s: %w", s.Name, name, err)
	}
	report := w.finish()
	p.finish(report)
	return report, nil
}

func newPolicy(w *world, name string, o Options) (policy, error) {
	switch name {
	case None:
		return &none{w}, nil
	case Reactive:
		return &reactive{none: none{w}}, nil
	case DRS:
		return &drs{none: none{w}}, nil
	case Tranship, Oracle:
		return newPlanned(w, name == Oracle, o)
	}
	return nil, fmt.Errorf("policy %q: use one of %v", name, Policies())
}

type runner struct {
	w       *world
	p       policy
	rng     *rand.Rand
	orphans []int
	found   float64 // when the last failure is noticed
	back    []comeback
}

type comeback struct {
	at    float64
	hosts []int
}

func (r *runner) run(ctx context.Context) error {
	sc, w := r.w.sc, r.w
	step, round := time.Duration(sc.Step).Seconds(), time.Duration(sc.Round).Seconds()
	rounds := int(sc.Step / sc.Round)
	for c := range sc.steps() {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		begins := c - sc.warm()
		if begins >= 0 {
			w.advance(float64(begins) * step)
			w.step(c)
		}
		if c > 0 {
			if err := r.p.observe(c - 1); err != nil {
				return err
			}
		}
		if begins < 0 {
			continue
		}
		for k := range rounds {
			w.advance(float64(begins)*step + float64(k)*round)
			r.failures(round)
			if err := r.p.round(k == 0); err != nil {
				return err
			}
		}
		w.mark()
	}
	w.advance(float64(sc.steps()-sc.warm()) * step)
	return nil
}

// failures of hosts that fall into this round, and what follows from earlier ones.
func (r *runner) failures(round float64) {
	w := r.w
	for _, f := range w.sc.Failures {
		at := time.Duration(f.At).Seconds()
		if at < w.now || at >= w.now+round {
			continue
		}
		down, orphans := w.fail(f.Hosts, r.rng)
		r.orphans = append(r.orphans, orphans...)
		r.found = w.now + detect
		if f.For > 0 {
			r.back = append(r.back, comeback{w.now + time.Duration(f.For).Seconds(), down})
		}
		r.p.failed(down)
	}
	r.back = slices.DeleteFunc(r.back, func(b comeback) bool {
		if b.at > w.now {
			return false
		}
		for _, h := range b.hosts {
			w.hosts[h].up, w.hosts[h].since = true, w.now
		}
		r.p.revived(b.hosts)
		return true
	})
	if w.now < r.found {
		return
	}
	r.orphans = slices.DeleteFunc(r.orphans, func(i int) bool {
		h := r.p.revive(i)
		return h >= 0 && w.revive(i, h)
	})
}
