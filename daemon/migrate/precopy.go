package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/layer"
	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
	"github.com/tranship/tranship/transfer"
)

// 3. pre-copy

func (o *outgoing) preCopy(ctx context.Context) error {
	o.report.enter(PhasePreCopy)
	if err := failpoint.Hit(ctx, "source.pre-copy"); err != nil {
		return err
	}
	var err error
	if o.cgroup, err = o.m.rt.Cgroup(ctx, o.rec.Namespace, o.rec.Name); err != nil {
		return err
	}
	if o.rootfs, err = o.m.rt.Rootfs(ctx, o.rec.Namespace, o.rec.Name); err != nil {
		return err
	}
	if o.upper, err = o.m.rt.UpperDir(ctx, o.rec.Namespace, o.rec.Name); err != nil {
		return err
	}
	o.entry.home = &home{rec: o.rec, cgroup: o.cgroup, root: o.rootfs.Path, upper: o.upper}
	if o.entry.home.start, err = startTime(int(o.rec.PID)); err != nil {
		return err
	}
	if err := o.openTmpfs(); err != nil {
		return err
	}
	if err := o.m.turns.wayFor(ctx, o); err != nil {
		return err
	}
	if err := o.sendFiles(ctx, false); err != nil {
		return err
	}
	if o.tracker, err = track.New(o.trackerKind(), o.m.log); err != nil {
		return err
	}
	// Closing unregisters, which costs ~20 ms a GiB: never inside the blackout,
	// only at undo, or when the processes are gone.
	o.undo.push("dirty tracking", func(context.Context) error { return o.tracker.Close() })
	o.report.set(func(m *v1.Migration) { m.Tracker = string(o.tracker.Kind()) })
	if o.tracker.Kind() == track.None || o.req.GetMode() == ModeStop {
		return nil
	}
	return o.rounds(ctx)
}

func (o *outgoing) trackerKind() track.Kind {
	if o.req.GetMode() == ModeStop {
		return track.None
	}
	return o.m.trackerKind()
}

// rounds sends written pages until the stop rule ends it.
func (o *outgoing) rounds(ctx context.Context) error {
	limit, said := o.maxBlackout()
	rule := StopRule{MaxBlackout: limit, Fixed: o.m.fixedPart(), MaxRounds: o.maxRounds()}
	// Rounds may be a second lot, after the wait for a turn: a shard that the first
	// has slowed is slow still.
	slowing := &o.slowing
	if !o.req.GetNoThrottle() {
		rule.Levels = len(throttleSteps)
	}
	if rule.Levels > 0 && slowing.level == 0 {
		if err := slowing.look(o.cgroup, time.Now()); err != nil {
			rule.Levels = 0
			o.m.log.Debug("the shard cannot be slowed", "migration", o.entry.ID, "shard", o.entry.Shard, "err", err)
		}
	}
	var done []RoundResult
	// A limit that somebody set is kept, or the shard stays.
	enough := func(why Verdict) error {
		takes := rule.RestTakes(done)
		if said && why != Small && takes > limit && o.req.GetMode() != ModePostCopy {
			return &overLimitError{takes: takes, limit: limit, slowed: slowing.level > 0, forbidden: o.req.GetNoThrottle()}
		}
		return nil
	}
	for {
		n := o.nextRound()
		if err := failpoint.Hit(ctx, "source.round"); err != nil {
			return err
		}
		res, err := o.round(ctx, n, track.Options{})
		if err != nil {
			return fmt.Errorf("round %d: %w", n, err)
		}
		res.Level, res.CPUs = slowing.level, slowing.limit
		done = append(done, res)
		remaining, _ := rule.Remaining(done)
		o.report.round(res, int64(remaining), dirtyRate(done))
		o.m.metrics.round(res)
		verdict := rule.Decide(done)
		o.m.log.Debug("round", "migration", o.entry.ID, "round", n, "pages", res.Pages, "raw", res.BytesRaw,
			"sent", res.BytesSent, "took", res.Duration, "verdict", verdict)
		switch verdict {
		case Continue:
		case Throttle:
			slowed, err := o.throttle(ctx)
			if err != nil {
				return err
			}
			if !slowed {
				rule.Levels = slowing.level
				if verdict = rule.Decide(done); verdict != Continue {
					return enough(verdict)
				}
				continue
			}
		default:
			return enough(verdict)
		}
	}
}

// overLimitError says that a shard writes so fast that it would stand still for
// longer than somebody allowed.
type overLimitError struct {
	takes, limit      time.Duration
	slowed, forbidden bool
}

func (e *overLimitError) Error() string {
	how, advice := "", ""
	switch {
	case e.forbidden:
		advice = "let it be slowed (without --no-throttle), "
	case e.slowed:
		how = ", slowed as far as it may be"
	default:
		how = ", and cannot be slowed"
	}
	return fmt.Sprintf("it writes faster than that can be sent%s: the rest would take %v, and %v of standing still are allowed; %suse --mode postcopy, or allow more with --max-blackout",
		how, e.takes.Round(time.Millisecond), e.limit, advice)
}

// throttle slows the shard by one step, as a share of what it used before the
// first. A kernel that refuses is no reason to give up: the rest is sent frozen.
func (o *outgoing) throttle(ctx context.Context) (bool, error) {
	if o.slowing.level == 0 {
		if err := o.slowing.look(o.cgroup, time.Now()); err != nil {
			o.m.log.Warn("the shard cannot be slowed", "migration", o.entry.ID, "shard", o.entry.Shard, "err", err)
			return false, nil
		}
	}
	slowed, err := o.slow(ctx, o.slowing.level, o.slowing.cpus)
	if slowed {
		o.slowing.level++
		o.slowing.limit = o.entry.Throttle.Set[len(o.entry.Throttle.Set)-1].CPUs()
	}
	if errors.Is(err, unix.EINVAL) || errors.Is(err, runtime.ErrNoCPULimit) {
		o.m.log.Warn("the shard cannot be slowed", "migration", o.entry.ID, "shard", o.entry.Shard, "err", err)
		return false, nil
	}
	return slowed, err
}

// dirtyRate is in pages per second, from the last two rounds.
func dirtyRate(done []RoundResult) float64 {
	if len(done) < 2 {
		return 0
	}
	before, last := done[len(done)-2], done[len(done)-1]
	if before.Duration <= 0 {
		return 0
	}
	return float64(last.Pages) / before.Duration.Seconds()
}

// readChunk is how much memory is read before it is sent: large enough for
// process_vm_readv to run at memory speed, small enough for the caches.
const readChunk = 1 << 20

// round sends everything written since the last one. The tracker re-arms a page
// before the page is read: what is written in between is the next round's.
func (o *outgoing) round(ctx context.Context, n int, opt track.Options) (RoundResult, error) {
	began := time.Now()
	procs, err := o.processes()
	if err != nil {
		return RoundResult{}, err
	}
	if opt.Frozen {
		o.stood = procs
	}
	// The tracker must not wait for the link while it walks a process, so the
	// extents are collected first: 32 bytes an extent.
	var extents []checkpoint.Extent
	_, err = o.tracker.Collect(ctx, procs, opt, func(e checkpoint.Extent) error {
		extents = append(extents, e)
		return nil
	})
	if err != nil {
		return RoundResult{}, err
	}
	return o.send(ctx, n, procs, extents, o.sendShared, began)
}

// send carries extents as one round, and what more gives, if anything: it
// returns how many pages of that were not there yet.
func (o *outgoing) send(ctx context.Context, n int, procs []checkpoint.Process, extents []checkpoint.Extent, more givePages, began time.Time) (RoundResult, error) {
	host := make(map[checkpoint.PID]int, len(procs))
	for _, p := range procs {
		host[p.PID] = p.HostPID
	}
	var raw, total checkpoint.Bytes
	for _, e := range extents {
		if !e.Hole {
			total += e.Bytes()
		}
	}
	ctx, breakOff := context.WithCancelCause(ctx)
	defer breakOff(nil)
	r, err := o.session.Round(ctx, n)
	if err != nil {
		return RoundResult{}, err
	}
	// What forked processes share comes in the first round. Later, when the shard
	// may stand still, a round trip more is worth more than the few pages that
	// happen to be alike.
	if n == 1 {
		r.ReadAgain(func(pid checkpoint.PID, addr uint64, dst []byte) (there bool, err error) {
			there = true
			err = track.ReadMemory(host[pid], addr, dst, func(uint64, checkpoint.Pages) { there = false })
			if err == nil && !there {
				err = o.mayBeGone(checkpoint.Extent{PID: pid, Addr: addr, Pages: 1})
			}
			return there, err
		})
		if o.tracker.Kind() != track.None {
			r.AskTwins(o.pages(), o.toldOfTwins)
		}
	}
	buf := make([]byte, readChunk)
	for _, e := range extents {
		switch {
		case e.Hole:
			err = r.Zero(e.PID, e.Addr, e.Pages)
		case host[e.PID] == 0:
			err = fmt.Errorf("%v: no such process in the shard's cgroup", e)
		default:
			err = o.sendExtent(ctx, r, host[e.PID], e, buf)
			raw += e.Bytes()
			o.report.transferring(n, int64(raw), int64(o.session.Stats().BytesSent), int64(total-raw))
		}
		if err != nil {
			breakOff(err)
			_, _ = r.Close() // fails with the same error
			return RoundResult{}, err
		}
		o.told.add(e)
	}
	if more != nil {
		pages, err := more(ctx, r, procs)
		if err != nil {
			breakOff(err)
			_, _ = r.Close() // fails with the same error
			return RoundResult{}, err
		}
		raw += pages.Bytes()
	}
	stats, err := r.Close()
	if err != nil {
		return RoundResult{}, err
	}
	o.m.metrics.went(stats)
	return RoundResult{
		N: n, Pages: checkpoint.Pages(raw / checkpoint.PageSize),
		BytesRaw: raw, BytesSent: stats.BytesSent, Duration: time.Since(began), Sent: &stats,
	}, nil
}

// mayBeGone is an error if pages went away that nobody may have given up. What
// came instead of those of a running shard is seen by the next round, or by the
// frozen one. Those of a frozen shard go only with a process that is killed, and
// CRIU may have dumped that already: it would be restored without them.
func (o *outgoing) mayBeGone(e checkpoint.Extent) error {
	if o.frozenAt.IsZero() {
		return nil
	}
	return fmt.Errorf("%v: %w", e, track.ErrDied)
}

// sendExtent reads and sends one run of pages. Pages whose mapping went away
// since the scan are left out, if they may.
func (o *outgoing) sendExtent(ctx context.Context, r *transfer.Round, hostPID int, e checkpoint.Extent, buf []byte) error {
	for at := e.Addr; at < e.End(); {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := o.m.turns.wayFor(ctx, o); err != nil {
			return err
		}
		chunk := buf[:min(uint64(len(buf)), e.End()-at)]
		var gone []span
		err := track.ReadMemory(hostPID, at, chunk, func(addr uint64, n checkpoint.Pages) {
			gone = append(gone, span{addr, addr + uint64(n.Bytes())})
		})
		if err == nil && len(gone) > 0 {
			err = o.mayBeGone(e)
		}
		if err != nil {
			return err
		}
		if err := sendPresent(r, e.PID, at, chunk, gone); err != nil {
			return err
		}
		at += uint64(len(chunk))
	}
	return nil
}

// sendPresent sends what lies between the gaps, which are in order.
func sendPresent(r *transfer.Round, pid checkpoint.PID, at uint64, chunk []byte, gone []span) error {
	from, end := at, at+uint64(len(chunk))
	send := func(to uint64) error {
		if to <= from {
			return nil
		}
		return r.Pages(pid, from, chunk[from-at:to-at])
	}
	for _, g := range gone {
		if err := send(g.from); err != nil {
			return err
		}
		from = g.to
	}
	return send(end)
}

func (o *outgoing) processes() ([]checkpoint.Process, error) {
	pids, err := o.cgroup.Processes()
	if err != nil {
		return nil, err
	}
	return track.ProcessesOf(pids, int(o.rec.PID))
}

// sendFiles sends everything but memory and CRIU's images.
func (o *outgoing) sendFiles(ctx context.Context, frozen bool) error {
	if err := o.sendLayer(ctx, frozen); err != nil {
		return err
	}
	if err := o.sendMounts(ctx, frozen); err != nil {
		return err
	}
	if err := o.sendTmpfs(ctx, frozen); err != nil {
		return err
	}
	return o.sendLog(ctx)
}

// sendLayer sends what changed in the writable layer since the last time.
func (o *outgoing) sendLayer(ctx context.Context, frozen bool) error {
	if o.upper == "" {
		return nil
	}
	opt := layer.Options{Frozen: frozen, ListedAt: time.Now()}
	pids, err := o.cgroup.Processes()
	if err != nil {
		return err
	}
	opt.AlwaysCompare = sharedWritable(pids)
	if err := o.sendTree(ctx, blobLayer, "", o.upper, &o.index, opt); err != nil {
		return fmt.Errorf("writable layer: %w", err)
	}
	return nil
}

// sendLog sends what the shard's log grew by.
func (o *outgoing) sendLog(ctx context.Context) error {
	f, err := os.Open(o.m.rt.LogPath(o.rec.Namespace, o.rec.Name))
	if errors.Is(err, os.ErrNotExist) {
		return nil // not made by tranship run
	}
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	size := fi.Size() - o.logSent
	if size <= 0 {
		return nil
	}
	sent, err := o.session.Blob(ctx, blobLog, strconv.FormatInt(o.logSent, 10), size, io.NewSectionReader(f, o.logSent, size))
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	o.logSent += size
	o.report.count(sent)
	return nil
}

// stream sends what write produces as one blob.
func (o *outgoing) stream(ctx context.Context, kind, name string, write func(io.Writer) error) (int64, error) {
	pr, pw := io.Pipe()
	var g errgroup.Group
	g.Go(func() error {
		err := write(pw)
		return errors.Join(err, pw.CloseWithError(err))
	})
	sent, err := o.session.Blob(ctx, kind, name, -1, pr)
	_ = pr.CloseWithError(err) // lets a writer end whose reader is gone; nil reads as closed pipe
	return sent, errors.Join(err, g.Wait())
}
