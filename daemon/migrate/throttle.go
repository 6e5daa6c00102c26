package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
)

// A shard that writes memory faster than the link carries it would be frozen for
// as long as what it writes takes to send. It is slowed instead, in steps, by the
// CPU limit of its cgroup:
//
//  1. journal   the limit that it had, and every limit that it gets
//  2. limit     a share of the CPU time that it used before
//  3. lift      right before the freeze: a task that waits for its quota does not
//               freeze, and CRIU's parasite would have to share it
//
// Whatever ends the migration before that gives the old limit back: the undo
// list, or the daemon that comes back and finds it in the journal.

// throttleSteps are shares of the CPU time that the shard used before. The last
// is what a link of a fifteenth of the shard's dirty rate can bear.
var throttleSteps = []float64{0.5, 0.25, 0.12, 0.06}

const (
	// throttlePeriod is shorter than the kernel's 100 ms: a client should wait for
	// one request rather than notice a hole.
	throttlePeriod = 20 * time.Millisecond
	// leastQuota is the kernel's (kernel/sched/core.c, min_cfs_quota_period).
	leastQuota = time.Millisecond
)

// Throttling is what the journal keeps of a slowed shard.
type Throttling struct {
	Before runtime.CPULimit `json:"before"`
	// Set are all limits that it was given. Another is somebody else's, and stays.
	Set []runtime.CPULimit `json:"set"`
}

// busy measures the shard's CPU use between two calls.
type busy struct {
	at   time.Time
	used time.Duration
	cpus float64 // of the last interval
}

func (b *busy) look(cg runtime.Cgroup, now time.Time) error {
	used, err := cg.CPUUsed()
	if err != nil {
		return err
	}
	if took := now.Sub(b.at); !b.at.IsZero() && took > 0 {
		b.cpus = float64(used-b.used) / float64(took)
	}
	b.at, b.used = now, used
	return nil
}

// slowing is how far a shard has been slowed.
type slowing struct {
	busy          // before the first step
	level int     // steps taken
	limit float64 // CPUs, 0 at level 0
}

// quotaOf is the quota of a step for a shard that used so many CPUs.
func quotaOf(cpus, share float64) runtime.CPULimit {
	quota := time.Duration(cpus * share * float64(throttlePeriod)).Truncate(time.Microsecond)
	return runtime.CPULimit{Quota: max(quota, leastQuota), Period: throttlePeriod}
}

// slow holds the shard to a share of what it used. It returns false when there is
// nothing to be gained that way.
func (o *outgoing) slow(ctx context.Context, level int, cpus float64) (bool, error) {
	limit := quotaOf(cpus, throttleSteps[level])
	now, err := o.cgroup.CPULimit()
	if err != nil {
		return false, err
	}
	if now.Quota > 0 && now.CPUs() <= limit.CPUs() {
		return false, nil // it has that little already
	}
	if o.entry.Throttle == nil {
		o.entry.Throttle = &Throttling{Before: now}
		o.undo.push("throttling", o.giveBack)
	}
	o.entry.Throttle.Set = append(o.entry.Throttle.Set, limit)
	if err := o.m.journal.Put(o.entry); err != nil {
		return false, err
	}
	if err := o.cgroup.SetCPULimit(limit); err != nil {
		// Under v1 a refused write may have come after one that was not.
		return false, errors.Join(err, unthrottle(o.cgroup, o.entry.Throttle))
	}
	if err := failpoint.Hit(ctx, "source.throttled"); err != nil {
		return false, err
	}
	o.m.log.Info("the shard writes faster than the link carries: slowed", "migration", o.entry.ID, "shard", o.entry.Shard,
		"cpus", limit.CPUs(), "before", cpus)
	return true, nil
}

// unthrottle gives the limit back that the shard had. It may run twice, and on a
// shard that was never slowed or is gone.
func unthrottle(cg runtime.Cgroup, t *Throttling) error {
	if t == nil {
		return nil
	}
	now, err := cg.CPULimit()
	if errors.Is(err, runtime.ErrNoCPULimit) {
		return nil // gone with the shard
	}
	if err == nil && (slices.Contains(t.Set, now) || half(t, now)) {
		err = cg.SetCPULimit(t.Before)
	}
	if err != nil {
		return fmt.Errorf("give the CPU limit back: %w", err)
	}
	return nil
}

// half says that a limit is one that was cut short between the two files of v1.
func half(t *Throttling, now runtime.CPULimit) bool {
	return now.Quota <= 0 && (now.Period == throttlePeriod || t.Before.Quota > 0 && now.Period == t.Before.Period)
}
