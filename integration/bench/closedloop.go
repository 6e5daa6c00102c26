package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/tranship/tranship/integration/bench/closedloop"
	"github.com/tranship/tranship/integration/lab"
)

// closedLoopGroup is the autopilot at work, measured by a package of its own.
const (
	closedLoopGroup = "closed-loop"
	closedLoopImage = "bench.tranship.io/work:latest"

	lateMetric, requestsMetric = "late_requests", "requests"
	thrashMetric, allBlackouts = "moved_again", "blackouts_ms"
	firstMoveMetric, client99  = "first_move_after_rise_s", "client_p99_ms"
	unansweredMetric, client50 = "unanswered", "client_p50_ms"
	planMetric                 = "planning_round_ms"
	leastDays                  = 3
)

// measureClosedLoop runs the day under both policies in turns until there are as
// many runs of each as were asked for.
func measureClosedLoop(ctx context.Context, b *bench, g *group) (err error) {
	l, err := lab.Open()
	if err != nil {
		return err
	}
	checker := filepath.Join(b.scratch, "checker")
	if err := buildChecker(ctx, checker); err != nil {
		return err
	}
	if err := l.Image(ctx, "default", lab.ImageSpec{Name: closedLoopImage, Bins: []string{checker}}); err != nil {
		return err
	}
	loop, err := closedloop.New(l, closedLoopImage, checker, b.say)
	if err != nil {
		return err
	}
	defer func() {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), downLimit)
		defer cancel()
		err = errors.Join(err, loop.Close(undo))
	}()
	if g.Recording == nil {
		rec, err := loop.Record(ctx)
		if err != nil {
			return fmt.Errorf("record the load: %w", err)
		}
		g.Recording = &rec
	}
	for {
		policy, ok := nextPolicy(g, b.opt.runs)
		if !ok || b.opt.limit > 0 && time.Since(b.begun) > b.opt.limit {
			return nil
		}
		r, err := loop.Measure(ctx, policy, *g.Recording)
		if err != nil {
			return fmt.Errorf("%s: %w", policy, err)
		}
		b.say("  %v", &r)
		g.Samples = append(g.Samples, sampleOf(&r))
	}
}

// nextPolicy is the one of those that are compared with the fewer runs; A B, B A,
// …: what comes second is not always the same one. That nothing moves is the
// background: it is run once, at the end.
func nextPolicy(g *group, runs int) (closedloop.Policy, bool) {
	ran := func(p closedloop.Policy) int { return len(g.of(string(p), lateMetric)) }
	turns := [2]closedloop.Policy{closedloop.Tranship, closedloop.Reactive}
	round := min(ran(turns[0]), ran(turns[1]))
	if round >= runs {
		return closedloop.None, ran(closedloop.None) == 0
	}
	for i := range turns {
		if p := turns[(round+i)%len(turns)]; ran(p) == round {
			return p, true
		}
	}
	return "", false
}

func sampleOf(r *closedloop.Result) sample {
	v := map[string]float64{
		lateMetric: float64(r.Counts.Late), requestsMetric: float64(r.Counts.Requests), unansweredMetric: float64(r.Counts.Unanswered),
		movesMetric: float64(len(r.Moves)), thrashMetric: float64(r.Thrash()), allBlackouts: float64(r.Blackout()) / float64(time.Millisecond),
		planMetric: float64(r.Plan) / float64(time.Millisecond), client50: r.Counts.P50MS, client99: r.Counts.P99MS,
	}
	if len(r.Moves) > 0 {
		v[firstMoveMetric] = r.Moves[0].At.Seconds()
	}
	return sample{Subject: string(r.Policy), Values: v}
}

// closedLoopRows are the lines of the table.
func closedLoopRows(r *results) []row {
	g, ok := r.group(closedLoopGroup)
	if !ok {
		return nil
	}
	of := func(p closedloop.Policy, metric string) float64 { return median(g.of(string(p), metric)) }
	own, other := of(closedloop.Tranship, lateMetric), of(closedloop.Reactive, lateMetric)
	n := min(len(g.of(string(closedloop.Tranship), lateMetric)), len(g.of(string(closedloop.Reactive), lateMetric)))
	note := spread("%.0f late", own) + spread(" of %.0f under reactive", other) + spread(", %.0f with the autopilot off", of(closedloop.None, lateMetric)) +
		spread("; moves %.0f", of(closedloop.Tranship, movesMetric)) + spread(" of %.0f", of(closedloop.Reactive, movesMetric)) +
		spread(", the first %+.0f s", of(closedloop.Tranship, firstMoveMetric)) + spread(" and %+.0f s from the rise", of(closedloop.Reactive, firstMoveMetric)) +
		spread(", blackouts %.0f ms", of(closedloop.Tranship, allBlackouts)) + spread(" and %.0f ms", of(closedloop.Reactive, allBlackouts))
	return []row{
		atMost("closed loop: requests over the latency limit, of reactive's", own/other, "×", 0.5, note).restsOn(n, leastDays),
		atMost("a round of planning in the daemon, mean", of(closedloop.Tranship, planMetric), "ms", 5, "six shards, two peers, a round a second, on the host where most; median of the runs"),
	}
}
