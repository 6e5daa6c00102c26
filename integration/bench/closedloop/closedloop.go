// Package closedloop measures what the autopilot is for: six shards of a service
// whose load comes at the same time every day, all on one host of three that
// carries their night but not their day, and clients that wait. The same day is
// run with the autopilot off, with the reactive policy and with forecasts.
//
//	record the load once, uncontended → give each shard the week in which that
//	load came daily (history.go) → daemons with a policy, shards, load → what the
//	clients waited for, and what the daemons say they moved (hosts.go)
//
// The days of the past are recorded seconds under other dates; the day that is
// measured, its forecasts, plans, moves and requests are real and in real time.
package closedloop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/daemon/control"
	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/integration/workload/workcheck"
)

// Policy is one of those that are compared.
type Policy string

// The policies.
const (
	None     Policy = "none"
	Reactive Policy = "reactive"
	Tranship Policy = "tranship"
)

const (
	shards   = 6
	workload = "work"
	port     = 7000

	// cpus is what shards may have of a host, and what the kernel lets them have:
	// three of them, the daemons and the client fit into two processors.
	cpus = 0.3
	// Of requests of 5 ms, and what it takes to receive and answer them, six shards
	// need half of a host at night and three fifths of all three by day: the night
	// fits into one, the day does not.
	cost       = 5 * time.Millisecond
	night, day = 4.0, 15.0

	// lead is for daemons to see their shards, and for a policy that knows what
	// comes to wait until it is sure: 42 s with a round a second.
	lead = 70 * time.Second
	// ramp of the load from night to day: a minute, six samples.
	ramp = time.Minute
	// hold of the day's load while it is measured. It goes on for dayLasts in the past.
	hold     = 60 * time.Second
	dayLasts = time.Hour
	// grid of the profiler, which the load's day begins on, as loads of a time of day do.
	grid = 10 * time.Second
	// setUp is what daemons and shards have to be there.
	setUp = 45 * time.Second

	// Limit of a request's time: a quarter of a second is fifty times its CPU, more
	// than a host that has room ever makes it wait and than a move freezes a small
	// shard, and less than the queue of any host that is asked for more than it has.
	Limit = 250 * time.Millisecond
)

// Result of one run.
type Result struct {
	Policy Policy
	Counts workcheck.Counts
	Moves  []Move
	// Plan is what a round of planning took on the average, on the host where most.
	Plan time.Duration
}

// Move is one that was made.
type Move struct {
	Shard, From, To string
	// At is when it was decided, after the load began to rise; negative: before.
	At       time.Duration
	Blackout time.Duration
}

// Thrash is how many of the moves moved a shard again.
func (r *Result) Thrash() (n int) {
	seen := map[string]bool{}
	for _, m := range r.Moves {
		if seen[m.Shard] {
			n++
		}
		seen[m.Shard] = true
	}
	return n
}

// Blackout of all moves together.
func (r *Result) Blackout() (sum time.Duration) {
	for _, m := range r.Moves {
		sum += m.Blackout
	}
	return sum
}

// Bench runs in a lab of three hosts that is up.
type Bench struct {
	// Image is a static checker, imported; Checker its path on every host.
	Image, Checker string
	Say            func(format string, args ...any)

	lab   *lab.Lab
	hosts []*host
	runs  int
}

// New takes the lab over until Close.
func New(l *lab.Lab, image, checker string, say func(string, ...any)) (*Bench, error) {
	b := &Bench{Image: image, Checker: checker, Say: say, lab: l}
	for _, h := range l.Hosts() {
		if h.Name() == l.Client().Name() {
			continue
		}
		one, err := openHost(l, h)
		if err != nil {
			return nil, err
		}
		b.hosts = append(b.hosts, one)
	}
	if len(b.hosts) != 3 {
		return nil, fmt.Errorf("a lab of %d hosts, and three are wanted", len(b.hosts))
	}
	return b, nil
}

// Close gives the hosts their configuration back.
func (b *Bench) Close(ctx context.Context) error {
	var errs []error
	for _, h := range b.hosts {
		errs = append(errs, h.reset(ctx))
	}
	return errors.Join(errs...)
}

// Record runs the load once, two shards a host and nothing moving, and returns
// what they used.
func (b *Bench) Record(ctx context.Context) (rec Recording, err error) {
	place := func(i int) *host { return b.hosts[i%len(b.hosts)] }
	begin := time.Now().Add(setUp + recordNight).Truncate(grid).Add(grid)
	day := pattern(begin, recordNight, recordDay)
	run, err := b.begin(ctx, None, nil, place)
	if err != nil {
		return rec, err
	}
	defer func() { err = errors.Join(err, run.remove(context.WithoutCancel(ctx))) }()
	counts, err := b.load(ctx, run, day)
	if err != nil {
		return rec, err
	}
	b.Say("  recorded: %d requests, %d of them late, 99 %% within %.0f ms", counts.Requests, counts.Late, counts.P99MS)
	return run.recording(ctx, &day)
}

func pattern(begin time.Time, before, after time.Duration) workcheck.Pattern {
	return workcheck.Pattern{Start: begin.Add(-before), Begin: begin, Ramp: ramp, End: begin.Add(ramp + after), Night: night, Day: day}
}

// Measure runs the day under a policy.
func (b *Bench) Measure(ctx context.Context, policy Policy, rec Recording) (r Result, err error) {
	begin := time.Now().Add(setUp + lead).Truncate(grid).Add(grid)
	day := pattern(begin, lead, hold)
	run, err := b.begin(ctx, policy, func(path, key string, seed uint64) error {
		return rec.teach(path, key, begin, time.Now(), seed)
	}, func(int) *host { return b.hosts[0] })
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, run.remove(context.WithoutCancel(ctx))) }()
	r.Policy = policy
	if r.Counts, err = b.load(ctx, run, day); err != nil {
		return r, err
	}
	if r.Moves, err = b.moves(ctx, &day); err != nil {
		return r, err
	}
	for _, h := range b.hosts {
		plan, err := h.planning(ctx)
		if err != nil {
			return r, err
		}
		r.Plan = max(r.Plan, plan)
	}
	return r, nil
}

// begun is six shards that run.
type begun struct {
	names  []string
	hosts  []*host // where each was started
	addrs  []string
	policy Policy
}

// begin starts shards that have never been before (what an earlier run taught
// about others of that name is not theirs) with nobody acting, and once they have
// settled the daemons anew with a policy: that shards start is no load to react to.
func (b *Bench) begin(ctx context.Context, policy Policy, teach func(path, key string, seed uint64) error, place func(int) *host) (*begun, error) {
	b.runs++
	run := &begun{policy: policy}
	for i := range shards {
		run.names = append(run.names, fmt.Sprintf("work-%d-%d", b.runs, i))
		run.hosts = append(run.hosts, place(i))
	}
	err := b.restart(ctx, None, nil)
	for i := 0; i < shards && err == nil; i++ {
		var addr string
		if addr, err = run.hosts[i].run(ctx, run.names[i], b.Image); err == nil {
			run.addrs = append(run.addrs, addr)
		}
	}
	if err == nil && policy != None {
		err = b.hosts[0].awaitCalm(ctx)
	}
	if err == nil && policy != None {
		err = b.restart(ctx, policy, func() error {
			for i, name := range run.names {
				if err := teach(run.hosts[i].path("/var/lib/tranship/forecasts.db"), "default/"+name, uint64(i)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		return nil, errors.Join(err, run.remove(context.WithoutCancel(ctx)))
	}
	return run, nil
}

// restart ends the daemons and begins them with a policy; between is done while
// none runs.
func (b *Bench) restart(ctx context.Context, policy Policy, between func() error) error {
	for _, h := range b.hosts {
		if err := errors.Join(h.stop(ctx), h.quota(ctx, cpus)); err != nil {
			return err
		}
	}
	if between != nil {
		if err := between(); err != nil {
			return err
		}
	}
	var all errgroup.Group
	for _, h := range b.hosts {
		all.Go(func() error { return h.start(ctx, policy) })
	}
	if err := all.Wait(); err != nil {
		return err
	}
	for _, h := range b.hosts {
		if err := h.awaitPool(ctx, len(b.hosts)); err != nil {
			return err
		}
	}
	return nil
}

// load puts the load on, from the client's host.
func (b *Bench) load(ctx context.Context, run *begun, day workcheck.Pattern) (c workcheck.Counts, err error) {
	if left := time.Until(day.Start); left < 0 {
		return c, fmt.Errorf("the shards were there %v late", -left)
	}
	raw, err := json.Marshal(workcheck.LoadOptions{Pattern: day, Addrs: run.addrs, Limit: Limit, Seed: 1})
	if err != nil {
		return c, err
	}
	out, err := b.lab.Client().Exec(ctx, b.Checker, "work", "load", string(raw))
	if err != nil {
		return c, fmt.Errorf("load under %s: %w", run.policy, err)
	}
	if err := json.Unmarshal(out, &c); err != nil {
		return c, fmt.Errorf("load under %s: %.300q: %w", run.policy, out, err)
	}
	return c, nil
}

// moves are those that the hosts decided on since the load began, and made.
func (b *Bench) moves(ctx context.Context, day *workcheck.Pattern) (out []Move, err error) {
	for _, h := range b.hosts {
		list, err := h.decisions(ctx, day.Start.Add(-setUp))
		if err != nil {
			return nil, err
		}
		for _, d := range list {
			if d.Kind == "stay" {
				continue
			}
			b.Say("    %s %+.0f s: %s: %s %s", h.Name(), d.At.Sub(day.Begin).Seconds(), d.Outcome, d.Words, d.Detail)
			if d.Kind == "move" && d.Outcome == "done" && d.Real != nil {
				out = append(out, moveOf(&d, h.Name(), day.Begin))
			}
		}
	}
	slices.SortFunc(out, func(x, y Move) int { return int(x.At - y.At) })
	return out, nil
}

func moveOf(d *control.Decision, from string, begin time.Time) Move {
	return Move{Shard: d.Shard, From: from, To: d.To, At: d.At.Sub(begin), Blackout: time.Duration(d.Real.BlackoutMs * float64(time.Millisecond))}
}

// remove ends the shards, wherever they are now.
func (r *begun) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var errs []error
	for i := range r.addrs {
		errs = append(errs, r.hosts[i].remove(ctx, r.names[i]))
	}
	return errors.Join(errs...)
}

// recording collects what the shards' hosts have seen.
func (r *begun) recording(ctx context.Context, day *workcheck.Pattern) (rec Recording, err error) {
	for i, name := range r.names {
		points, err := r.hosts[i].tens(ctx, name, day.Start)
		if err != nil {
			return rec, err
		}
		rec.add(points, day)
	}
	return rec, rec.check()
}

// String says what was waited for and moved.
func (r *Result) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-9s %5d of %d requests late (by shard %v), 50 %% within %.0f ms, 99 %% within %.0f ms, %d unanswered; %d moves, %d again, blackouts %v", r.Policy,
		r.Counts.Late, r.Counts.Requests, r.Counts.ByServer, r.Counts.P50MS, r.Counts.P99MS, r.Counts.Unanswered, len(r.Moves), r.Thrash(), r.Blackout().Round(time.Millisecond))
	if len(r.Moves) > 0 {
		fmt.Fprintf(&b, ", the first %+.0f s from the rise", r.Moves[0].At.Seconds())
	}
	return b.String()
}
