package main

import (
	"context"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sync/errgroup"
)

// Ten shards that leave a host at once, as when it is drained.
const (
	crowdGroup = "ten-at-once"
	crowdSize  = 10
	together   = "tranship, ten at once"
)

// measureCrowd moves ten shards one after the other and all at once, in turns.
func measureCrowd(ctx context.Context, b *bench, g *group) (err error) {
	var all []*checked
	defer func() { err = errors.Join(err, removeChecked(ctx, all...)) }()
	for i := range crowdSize {
		c, err := b.startChecked(ctx, fmt.Sprintf("bench-%d", i), "32MiB", "4MiB/s")
		if c != nil {
			all = append(all, c)
		}
		if err != nil {
			return err
		}
	}
	for i := range b.opt.runs {
		// T A, A T, …, as with the other pairs.
		for j := range 2 {
			move, subject := alone, tranship
			if (i+j)%2 == 1 {
				move, subject = atOnce, together
			}
			samples, err := move(ctx, all)
			if err != nil {
				return fmt.Errorf("%s: %w", subject, err)
			}
			var blackouts []float64
			for _, v := range samples {
				v.Subject = subject
				g.Samples = append(g.Samples, v)
				blackouts = append(blackouts, v.Values[blackoutMetric])
			}
			b.say("  %-22s blackouts %.0f ms, the longest %.0f ms", subject, median(blackouts), worst99(blackouts))
		}
	}
	return nil
}

func alone(ctx context.Context, all []*checked) (samples []sample, err error) {
	for _, c := range all {
		v, err := c.moveChecked(ctx)
		if err != nil {
			return nil, err
		}
		samples = append(samples, v)
	}
	return samples, nil
}

func atOnce(ctx context.Context, all []*checked) ([]sample, error) {
	samples := make([]sample, len(all))
	g, gctx := errgroup.WithContext(ctx)
	for i, c := range all {
		g.Go(func() (err error) {
			samples[i], err = c.moveBy(gctx)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, c := range all {
		if err := c.settle(ctx); err != nil {
			return nil, err
		}
		if _, err := c.ask(ctx, "verify"); err != nil {
			return nil, err
		}
	}
	return samples, nil
}

// crowdRow compares the medians. Those that leave at once may not stand still
// longer; a tenth is within what two medians of this machine differ by.
func crowdRow(r *results) row {
	own, single := medianOf(r, crowdGroup, together, blackoutMetric), medianOf(r, crowdGroup, tranship, blackoutMetric)
	g, _ := r.group(crowdGroup)
	note := ""
	if !math.IsNaN(own) {
		note = fmt.Sprintf("%.0f ms of %.0f ms", own, single)
	}
	return atMost("ten shards at once: blackout, of one alone", own/single, "×", 1.1, note).restsOn(len(g.of(together, blackoutMetric)), leastSamples*crowdSize)
}
