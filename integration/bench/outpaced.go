package main

import (
	"context"
	"errors"
	"fmt"
)

// A shard that rewrites its memory faster than the link carries it: 2 GiB at
// 200 MiB/s over 1 Gbit/s, of which at most 119 MiB/s are payload.
const (
	outpacedGroup = "faster-than-link"
	outpacedLink  = "1gbit"
	outpacedSize  = "2GiB"
	outpacedBytes = 2 << 30
	outpacedRate  = "200MiB/s"
	// pauseMetric is what the shard itself saw: the longest time in which one of
	// its threads did not run, by the clock of the day. Its monotonic clock goes on
	// where it was when CRIU looked at it, so it does not count all of a blackout.
	pauseMetric = "shard_pause_ms"
)

// outpacedWays are the ways in which such a shard can be moved.
var outpacedWays = []struct {
	subject string
	flags   []string
}{
	{tranship, nil},
	{"tranship, not slowed", []string{"--no-throttle"}},
	{"tranship, postcopy", []string{"--mode", "postcopy"}},
	{"tranship, stop", []string{"--mode", "stop"}},
}

// measureOutpaced moves one shard in each way in turn, and has it look at all of
// its memory after every move.
func measureOutpaced(ctx context.Context, b *bench, g *group) (err error) {
	if why := tooLarge(outpacedBytes); why != "" {
		for _, w := range outpacedWays {
			g.Absent = append(g.Absent, absent{Subject: w.subject, Why: why})
		}
		return nil
	}
	b.say("  filling %s", outpacedSize)
	s, err := b.startChecked(ctx, "bench-0", outpacedSize, outpacedRate)
	defer func() { err = errors.Join(err, removeChecked(ctx, s)) }()
	if err != nil {
		return err
	}
	row, err := s.row(ctx)
	if err != nil {
		return err
	}
	g.MemoryMiB = float64(row.Memory) / (1 << 20)
	for i := range b.opt.runs {
		for j := range outpacedWays {
			w := outpacedWays[(i+j)%len(outpacedWays)]
			v, err := s.moveChecked(ctx, w.flags...)
			if err != nil {
				return fmt.Errorf("%s: %w", w.subject, err)
			}
			v.Subject = w.subject
			g.Samples = append(g.Samples, v)
			b.say("  %-22s blackout %6.0f ms, total %6.0f ms, it saw %6.0f ms", v.Subject, v.Values[blackoutMetric], v.Values[totalMetric], v.Values[pauseMetric])
		}
	}
	return nil
}

// moveChecked moves it, asks for the longest pause that it saw, and has it look
// at all of its memory.
func (c *checked) moveChecked(ctx context.Context, flags ...string) (sample, error) {
	if _, err := c.ask(ctx, "reset"); err != nil {
		return sample{}, err
	}
	v, err := c.moveBy(ctx, flags...)
	if err != nil {
		return v, err
	}
	if err := c.settle(ctx); err != nil {
		return v, err
	}
	stat, err := c.ask(ctx, "stat")
	if err != nil {
		return v, err
	}
	v.Values[pauseMetric] = stat.LongestPauseRealtimeMS
	_, err = c.ask(ctx, "verify")
	return v, err
}
