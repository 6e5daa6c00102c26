package track

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/tranship/tranship/checkpoint"
)

// method is what one Kind does differently. All else, above all the bookkeeping
// of what the destination holds, is the tracker's.
type method interface {
	kind() Kind
	// prepare lists the regions of a process and arms, if the process is not
	// frozen, those that are not armed. It may return errGone.
	prepare(c *collection) ([]region, error)
	// judge marks the pages of c.window written since they were armed, and arms
	// them again. The whole window holds one region's pages.
	judge(c *collection, r region) (verdict, error)
	// release forgets a process without looking after its memory: it is gone, or
	// has another memory now.
	release(p *process) error
	// disarm removes every trace from a process that lives on.
	disarm(p *process) error
}

// region is a mapping to report.
type region struct {
	start, end uint64
	// full says that all of it counts as written.
	full bool
	// protect says that it was registered just now and is protected as it is
	// reported.
	protect bool
}

type verdict int

const (
	// untouched: nothing was written and nothing went away.
	untouched verdict = iota
	// touched: look at what is marked as written, and for what went away.
	touched
	// unknown: everything counts as written.
	unknown
)

// process is what the tracker knows of one PID of the shard.
type process struct {
	checkpoint.Process
	// start tells a process from a later one with the same host pid.
	start uint64
	// sent are the pages at which the destination may hold something other than
	// zeros. It belongs to the PID, not to the process or its memory: when another
	// program is executed, or the PID is used again, the destination's content is
	// still there and has to be overwritten.
	sent pageSet
	// recent are the pages that the last Collect reported, where direct I/O could
	// have changed them after they were armed.
	recent pageSet
	// unfinished says that a Collect broke off after it may have armed pages that
	// it did not report: nothing may be left out the next time.
	unfinished bool

	// Of uffdMethod: the descriptor, and since when children of the process may
	// have a copy of it, in ticks, 0 for not at all.
	uffd        *userfault
	forkedSince uint64

	soft softState // of softDirtyMethod
}

type tracker struct {
	method method
	shards map[checkpoint.PID]*process
	buf    buffers
}

func (t *tracker) Kind() Kind { return t.method.kind() }

// collection is one process's part of one Collect.
type collection struct {
	ctx    context.Context
	t      *tracker
	p      *process
	frozen bool
	visit  func(checkpoint.Extent) error
	stats  *Stats

	// files is what the process had open before it was looked at; nothing for a
	// frozen one.
	files openFiles
	// pages is opened by the method's prepare, after whatever may replace the
	// process's memory has been ruled out.
	pages  *pagemap
	window *window
	// reported are the pages visited so far.
	reported pageSet
	// bases are the chunks of p.sent, in order.
	bases []uint64
}

func (t *tracker) Collect(ctx context.Context, procs []checkpoint.Process, opt Options, visit func(checkpoint.Extent) error) (Stats, error) {
	var stats Stats
	if err := t.recognize(procs); err != nil {
		return stats, err
	}
	for _, proc := range procs {
		if err := ctx.Err(); err != nil {
			return stats, context.Cause(ctx)
		}
		p := t.shards[proc.PID]
		err := errGone
		if p != nil && p.HostPID != 0 {
			c := collection{ctx: ctx, t: t, p: p, frozen: opt.Frozen, visit: visit, stats: &stats, window: &t.buf.window}
			if err = c.run(); errors.Is(err, errGone) {
				if err := t.forget(p); err != nil {
					return stats, err
				}
			}
		}
		switch {
		case errors.Is(err, errGone) && opt.Frozen:
			return stats, &ProcessError{Process: proc, Op: "look at its memory", Err: ErrDied}
		case errors.Is(err, errGone): // it ended by itself
		case err != nil:
			return stats, err
		}
	}
	return stats, nil
}

// recognize brings the known processes in line with those that exist now.
func (t *tracker) recognize(procs []checkpoint.Process) error {
	now := make(map[checkpoint.PID]checkpoint.Process, len(procs))
	for _, proc := range procs {
		now[proc.PID] = proc
	}
	// First those that are gone: their registrations may be in the way of others
	// that share their memory.
	started := make(map[checkpoint.PID]uint64, len(procs))
	for pid, proc := range now {
		st, err := readStat(fmt.Sprintf("/proc/%d/stat", proc.HostPID))
		switch {
		case errors.Is(err, errGone):
			delete(now, pid)
			continue
		case err != nil:
			return err
		case st.state == 'Z' && st.threads > 1:
			return &ProcessError{Process: proc, Op: "look at its memory", Err: ErrMainThreadExited}
		case st.state == 'Z', st.state == 'X':
			delete(now, pid)
			continue
		}
		started[pid] = st.start
	}
	for pid, p := range t.shards {
		if proc, ok := now[pid]; !ok || proc.HostPID != p.HostPID || started[pid] != p.start {
			if err := t.forget(p); err != nil {
				return err
			}
		}
	}
	for pid, proc := range now {
		p := t.shards[pid]
		if p == nil {
			p = &process{sent: pageSet{}}
			t.shards[pid] = p
		}
		p.Process, p.start = proc, started[pid]
	}
	return nil
}

// forget drops a process but not what the destination holds under its PID.
func (t *tracker) forget(p *process) error {
	err := t.method.release(p)
	p.HostPID, p.start, p.recent, p.unfinished = 0, 0, nil, false
	return err
}

func (t *tracker) Close() error {
	var errs []error
	for _, p := range t.shards {
		errs = append(errs, t.method.disarm(p))
	}
	clear(t.shards)
	return errors.Join(errs...)
}

// run reports one process.
func (c *collection) run() (err error) {
	if !c.frozen {
		c.files = surveyFiles(c.p.HostPID)
	}
	regions, err := c.t.method.prepare(c)
	if c.pages != nil {
		defer func() { err = errors.Join(err, c.pages.Close()) }()
	}
	if err != nil || regions == nil {
		return err
	}
	c.stats.Processes++
	c.stats.Regions += len(regions)
	for i := range regions {
		regions[i].full = regions[i].full || c.p.unfinished
	}
	if !c.frozen {
		c.p.unfinished = true
	}
	c.reported, c.bases = pageSet{}, c.p.sent.bases()
	for _, r := range regions {
		if err := c.region(r); err != nil {
			return err
		}
	}
	if !c.frozen {
		c.p.unfinished, c.p.recent = false, nil
		// Asked again, because a file may have been opened since.
		if c.files.pinning || surveyFiles(c.p.HostPID).pinning {
			c.p.recent = c.reported
		}
	}
	return nil
}

// region reports one mapping: what is populated window by window, and as holes
// what is not any more.
func (c *collection) region(r region) error {
	at := r.start
	err := c.pages.chunks(r.start, r.end, func(start, end uint64) error {
		if err := c.gap(at, start); err != nil {
			return err
		}
		at = end
		return c.populated(r, start, end)
	})
	if err != nil {
		return err
	}
	return c.gap(at, r.end)
}

// gap reports as holes what the destination holds in a range without any
// populated page.
func (c *collection) gap(start, end uint64) error {
	i, _ := slices.BinarySearch(c.bases, chunkFloor(start))
	for ; i < len(c.bases) && c.bases[i] < end; i++ {
		c.window.reset(max(start, c.bases[i]), min(end, c.bases[i]+chunkSize))
		if err := c.holes(); err != nil {
			return err
		}
	}
	return nil
}

// populated reports a range with populated pages, at most maxWindow.
//
// The order matters. What was written is taken, and armed again, first; which
// pages are populated is found out afterwards. A page that comes in between is
// either marked as written and reported now, or it is not armed and reported the
// next time; one that goes in between is a hole now.
func (c *collection) populated(r region, start, end uint64) error {
	if err := c.ctx.Err(); err != nil {
		return context.Cause(c.ctx)
	}
	w := c.window
	w.reset(start, end)
	v, err := c.t.method.judge(c, r)
	if err != nil {
		return err
	}
	if v == unknown {
		copy(w.written, w.inside)
	}
	w.markSet(w.written, c.p.recent)
	if v == untouched && !anySet(w.written) {
		return nil
	}
	if err := c.pages.populated(w); err != nil {
		return err
	}
	for from, to := range w.content() {
		c.p.sent.add(from, to)
		if !c.frozen {
			c.reported.add(from, to)
		}
		for from < to {
			next := min(to, from+uint64(MaxExtent))
			e := c.extent(from, next)
			if err := c.visit(e); err != nil {
				return err
			}
			c.stats.Written += e.Pages
			from = next
		}
	}
	return c.holes()
}

// holes reports the pages of the window that the destination holds and that are
// not populated.
func (c *collection) holes() error {
	for from, to := range c.window.holes(c.p.sent) {
		e := c.extent(from, to)
		e.Hole = true
		if err := c.visit(e); err != nil {
			return err
		}
		c.stats.Holes += e.Pages
		c.p.sent.remove(from, to)
	}
	return nil
}

func (c *collection) extent(from, to uint64) checkpoint.Extent {
	return checkpoint.Extent{PID: c.p.PID, Addr: from, Pages: checkpoint.Pages((to - from) / checkpoint.PageSize)}
}

// open opens the page tables as they are now.
func (c *collection) open() error {
	var err error
	c.pages, err = openPagemap(c.p.HostPID, &c.t.buf, &c.stats.Scan)
	return err
}

// fullMethod tracks nothing.
type fullMethod struct{}

func (fullMethod) kind() Kind { return None }

func (fullMethod) prepare(c *collection) ([]region, error) {
	if err := c.open(); err != nil {
		return nil, err
	}
	return c.untracked()
}

func (fullMethod) judge(*collection, region) (verdict, error) { return unknown, nil }
func (fullMethod) release(*process) error                     { return nil }
func (fullMethod) disarm(*process) error                      { return nil }

// untracked lists the process's regions to be reported in full.
func (c *collection) untracked() ([]region, error) {
	mappings, err := eligibleMappings(c.p.HostPID, !c.pages.scan)
	if err != nil {
		return nil, err
	}
	regions := make([]region, 0, len(mappings))
	for _, m := range mappings {
		regions = append(regions, region{start: m.start, end: m.end, full: true})
	}
	return regions, nil
}
