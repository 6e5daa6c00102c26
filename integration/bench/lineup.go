package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tranship/tranship/integration/leak"
)

// Subjects and metrics of the long row of moves.
const (
	lineupGroup  = "100-moves"
	errorsMetric = "errors"
	leaksMetric  = "leaks"
	movesMetric  = "moves"
	overall      = "overall"
)

// leakPatience is how long a host may clean up after the last move.
const leakPatience = 30 * time.Second

// measureLineup moves one redis back and forth under one client, and looks on
// both hosts for what is left when the shard is gone again.
func measureLineup(ctx context.Context, b *bench, g *group) error {
	w := redisWorkload(lineupGroup, "redis with 64MiB of values, 50 MB/s overwritten", 64<<20)
	if _, _, err := b.image(ctx, w); err != nil {
		return err
	}
	var before []leak.Snapshot
	for _, name := range []string{"host-1", "host-2"} {
		if err := (host{b.tool, name}).measures(ctx); err != nil {
			return err
		}
		s, err := leak.Settled(ctx, host{b.tool, name}, b.self)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		before = append(before, s)
	}
	failed, err := b.lineup(ctx, w, g)
	if err != nil {
		return err
	}
	leaks := 0
	for i, name := range []string{"host-1", "host-2"} {
		patience, cancel := context.WithTimeout(ctx, leakPatience)
		changes, err := leak.Await(patience, host{b.tool, name}, b.self, before[i], leak.Standing)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		leaks += len(changes)
		for _, c := range changes {
			b.say("  leak: %v", c)
		}
	}
	g.Samples = append(g.Samples, sample{Subject: overall, Values: map[string]float64{
		movesMetric: float64(b.opt.moves), errorsMetric: float64(failed), leaksMetric: float64(leaks),
	}})
	return ctx.Err()
}

// lineup makes the moves and counts those that failed, while the shard goes on.
func (b *bench) lineup(ctx context.Context, w workload, g *group) (failed int, err error) {
	image, command, err := b.image(ctx, w)
	if err != nil {
		return 0, err
	}
	s, err := startShard(ctx, b.tool, b.self, "bench-0", image, command...)
	if err != nil {
		return 0, err
	}
	p := &pair{subjects: []subject{s}}
	defer func() { err = errors.Join(err, p.remove(context.WithoutCancel(ctx))) }()
	if err := b.load(ctx, w, s); err != nil {
		return 0, err
	}
	c, err := startClient(ctx, b.tool, b.self, append([]string{w.run, s.address() + ":" + w.port}, w.runN...)...)
	if err != nil {
		return 0, err
	}
	p.clients = []*client{c}
	for i := range b.opt.moves {
		v, err := moveUnder(ctx, s, c)
		if err != nil && ctx.Err() == nil && s.runs(ctx) {
			failed++
			b.say("  move %d: %v", i+1, err)
			continue
		}
		if err != nil {
			return failed, fmt.Errorf("move %d: %w", i+1, err)
		}
		g.Samples = append(g.Samples, v)
		b.say("  move %d: blackout %.0f ms, client's longest gap %.0f ms", i+1, v.Values[blackoutMetric], v.Values[gapMetric])
		if err := s.settle(ctx); err != nil {
			return failed, err
		}
	}
	p.clients = nil
	return failed, c.end(ctx)
}
