package memcheck

import (
	"context"
	"fmt"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
)

// Watch asks the program at addr, over one connection and every interval, until
// ctx is done. It leaves growing marks and expects the last one back, and
// expects counters to grow: a shard that was rolled back as a whole, or that runs
// twice behind one address, is consistent in itself and can only be seen so.
//
// Watch returns nil when ctx is done; every error before that ends it, for a
// connection that broke is what it exists to notice.
func Watch(ctx context.Context, addr string, interval time.Duration, rec *check.Recorder) error {
	c, err := Dial(ctx, addr)
	if err != nil {
		return err
	}
	defer c.Close()
	// The last request still completes after ctx is done, within its own timeout.
	ask := context.WithoutCancel(ctx)
	first, err := c.Stat(ask)
	if err != nil {
		return err
	}
	// Somebody may have watched before: marks go on from there.
	mark, err := c.Mark(ask, 0)
	if err != nil {
		return err
	}
	if _, err := c.Mark(ask, mark); err != nil {
		return err
	}
	rec.Begin()
	last := first
	pace := check.NewPacer(float64(time.Second) / float64(interval))
	for n := 0; pace.Wait(ctx); n++ {
		previous, err := c.Mark(ask, mark+1)
		if err != nil {
			return err
		}
		if previous != mark {
			return fmt.Errorf("the program holds mark %d, but the last one was %d: it went back", previous, mark)
		}
		mark++
		rec.Done(0)
		if n%10 != 0 {
			continue
		}
		s, err := c.Stat(ask)
		if err != nil {
			return err
		}
		if err := advanced(last, s); err != nil {
			return err
		}
		last = s
		rec.Done(0)
		rec.Fact("verified_pages", s.VerifiedPages)
		rec.Fact("writes", s.Writes)
		rec.Fact("forks", s.Forks)
		rec.Fact("watch_pause_ms", s.WatchPauseMS)
		rec.Fact("longest_pause_ms", s.LongestPauseMS)
	}
	s, err := c.Verify(ask)
	if err != nil {
		return err
	}
	rec.Done(0)
	rec.Fact("verify_ms", s.VerifyMS)
	return s.Err()
}

// advanced compares two answers of the same program.
func advanced(before, after Stat) error {
	if err := after.Err(); err != nil {
		return err
	}
	if before.PID != after.PID {
		return fmt.Errorf("pid %d answers instead of %d", after.PID, before.PID)
	}
	for _, c := range []struct {
		name          string
		before, after uint64
	}{
		{"verified_pages", before.VerifiedPages, after.VerifiedPages},
		{"writes", before.Writes, after.Writes},
		{"forks", before.Forks, after.Forks},
		{"records", before.Records, after.Records},
		{"messages", before.Messages, after.Messages},
		{"accepted connections", before.Connections.Accepted, after.Connections.Accepted},
	} {
		if c.after < c.before {
			return fmt.Errorf("%s went back from %d to %d", c.name, c.before, c.after)
		}
	}
	return nil
}
