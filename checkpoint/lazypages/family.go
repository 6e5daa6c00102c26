package lazypages

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/pagestore"
)

const (
	// A piece of background filling has minFill pages after a fault, and twice as
	// many each time that none came, up to maxFill. Every lane places one piece
	// at a time, and a fault waits for the slowest: 0.1 ms at least, 1 ms at most.
	minFill = 64
	maxFill = 512
	// maxLanes bounds the pieces placed at once. One lane places about 1 GiB/s.
	maxLanes = 4
	// faultPages is how much is placed at once for a fault: the kernel's own
	// fault-around for files.
	faultPages = 16
	// neighbourhood is how far before the last fault filling goes on.
	neighbourhood = 2 << 20
	// releaseLag is how many touched groups (of 2 MiB) wait before the first is
	// looked through for pages to give back: by then most of it is placed.
	releaseLag = 4
	// eventBatch is how many messages are read at once.
	eventBatch = 64
	// changingWait is how long to wait for a thread between its operation and
	// its event, or between its event and its going on.
	changingWait = 100 * time.Microsecond
	// owedWait is how often a family that only waits for pages to arrive looks
	// whether its spaces are alive: the death of one is announced nowhere.
	owedWait = 100 * time.Millisecond
	// fillPause is how long to wait when filling is held back.
	fillPause = time.Millisecond
	// memoryWait and memoryPatience: how often to try, and how long, when there
	// is no memory for a page. The kernel's OOM killer works meanwhile.
	memoryWait     = 10 * time.Millisecond
	memoryPatience = 10 * time.Second
)

// family is one restored task and the children that it forks before it is
// filled. They share the task's pages in the store, so one goroutine serves
// them all: a page is given back when none of them needs it any more.
//
// The same goroutine reads events and places pages. That is what keeps a page
// from being placed after the process has dropped it: between reading an event
// and forgetting the page there is no placing.
type family struct {
	task    Task
	store   *pagestore.Store
	probe   prober
	count   *counters
	log     *slog.Logger
	running <-chan struct{} // closed when CRIU has finished
	finish  <-chan struct{} // closed when filling may begin
	wakeMu  sync.Mutex      // guards wakeFD's closing
	wakeFD  int             // an eventfd, readable when finish or ctx changed
	// bufs has maxFill pages for each lane, outside of Go's heap: the kernel is
	// told their addresses. To map the store instead saves the copy, and costs as
	// much in page faults.
	bufs [][]byte
	// events is what the family has read and done; it begins anew at logPath.
	events  *eventLog
	logPath string
	start   uint64 // of the task's host process, as in proc
	filling bool
	stride  uint64      // pages in a piece
	mayFill func() bool // nil is always

	spaces   []*space
	children int
	recent   recentEvents
	// latest are addresses of the task, of pages that it wrote last.
	latest []span
	// live are the pages that the store still holds.
	live    pageSet
	touched []int // indexes into live.groups
	isTouch []bool
	// refused is when the store last had no room to note what is given back.
	refused time.Time
	// owed are the pages of live that the store does not have yet. Nothing is
	// placed from there, and a fault on one waits.
	owed pageSet
	// wanted is what of them somebody needs, for those who pull (pull.go);
	// hungry, if not nil, is called when there is news for them.
	wanted wanted
	hungry func()
	// inbox holds what was pulled until this goroutine takes it.
	inbox inbox
	// pending is the sum over spaces, for others to read.
	pending atomic.Int64
}

// load reads what is to be placed under the task: the pages that CRIU left out
// of its images and that the store has. The store may have more (pages that the
// process dropped or unmapped between two rounds) and less (zero pages).
//
// A store that has given pages back has lost a server in the middle of filling:
// that is for TakeOver, not for another restore.
func (f *family) load(images string) error {
	if placing, err := f.store.Placing(f.task.PID); placing || err != nil {
		return errors.Join(errUsed, err)
	}
	dump, err := readDumped(images, f.task.PID)
	if err != nil {
		return err
	}
	if err := f.loadStore(); err != nil {
		return err
	}
	root := f.root(dump)
	f.spaces = []*space{root}
	f.isTouch = make([]bool, len(f.live.groups))
	f.loadLatest()
	f.pending.Store(int64(root.pending.count))
	f.wanted.begin(&f.owed, &root.pending)
	return nil
}

// root is the task's space as it was dumped.
func (f *family) root(dump dumped) *space {
	root := &space{name: fmt.Sprintf("pid %d", f.task.PID), fd: f.task.UFFD, dump: dump, layout: newLayout(dump.mappings), owed: &f.owed}
	root.pending = f.live.empty()
	wanted := f.live.empty()
	for _, l := range dump.lazy {
		wanted.add(l.start/checkpoint.PageSize, l.end/checkpoint.PageSize)
	}
	for _, w := range root.layout.windows {
		root.pending.add(w.start/checkpoint.PageSize, w.end/checkpoint.PageSize)
	}
	root.pending.intersect(&wanted)
	root.pending.intersect(&f.live)
	return root
}

// loadStore finds out what the store has, and what it is owed instead: there it
// may have something older.
func (f *family) loadStore() error {
	var runs, owed []span
	note := func(to *[]span) func(addr uint64, n checkpoint.Pages) error {
		return func(addr uint64, n checkpoint.Pages) error {
			*to = append(*to, span{addr, addr + uint64(n.Bytes())})
			return nil
		}
	}
	if err := f.store.Extents(f.task.PID, 0, pagestore.AddressLimit, note(&runs)); err != nil {
		return err
	}
	if err := f.store.Owed(f.task.PID, note(&owed)); err != nil {
		return err
	}
	all := append(runs, owed...)
	slices.SortFunc(all, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	for i, at := 0, uint64(0); i < len(all); i++ {
		// Both lists are in order, and what is in both counts once.
		if from := max(at, all[i].start); from < all[i].end {
			f.live.appendRun(from/checkpoint.PageSize, all[i].end/checkpoint.PageSize)
			at = all[i].end
		}
	}
	f.owed = f.live.empty()
	for _, o := range owed {
		f.owed.add(o.start/checkpoint.PageSize, o.end/checkpoint.PageSize)
	}
	return nil
}

// run serves the family until every page is placed or the family has died. On
// an error the userfaultfds stay open: the caller stops the tasks first.
//
//  1. store what was pulled
//  2. read events and apply them
//  3. answer faults
//  4. once CRIU has finished: place a piece of what was written last; after
//     Config.FillAfter: of the rest, and give back what nobody needs
//  5. when nothing is left for a space, and the kernel has no event
//     outstanding: close its userfaultfd, which makes the rest zero pages
//  6. wait
func (f *family) run(ctx context.Context) (err error) {
	defer func() {
		if err == nil { // else pages are missing, and for good
			f.wanted.clear()
		}
		f.inbox.close()
		f.hear()
	}()
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		f.noteFinish()
		f.takeDeliveries()
		if err := f.readEvents(); err != nil {
			return err
		}
		wait, err := f.answerFaults()
		if err != nil {
			return err
		}
		ahead, err := f.placeLatest()
		if err != nil {
			return err
		}
		wait = min(wait, ahead)
		if f.filling {
			for _, work := range []func() (time.Duration, error){f.fill, f.retire} {
				w, err := work()
				if err != nil {
					return err
				}
				wait = min(wait, w)
			}
			if wait != 0 && f.release() {
				wait = 0
			}
			if len(f.touched) > 0 {
				wait = min(wait, memoryWait)
			}
		}
		f.reap()
		f.account()
		if len(f.spaces) == 0 && len(f.touched) == 0 {
			return nil
		}
		if wait != 0 && len(f.spaces) > 0 {
			if err := f.wait(wait); err != nil {
				return err
			}
		}
	}
}

// forever is the wait of a family that has nothing to do until it is woken.
const forever = time.Duration(1<<63 - 1)

func (f *family) noteFinish() {
	select {
	case <-f.finish:
		if !f.filling {
			f.filling = true
			f.touchAll()
		}
	default:
	}
}

func (f *family) readEvents() error {
	for i := 0; i < len(f.spaces); i++ { // grows by forks
		s := f.spaces[i]
		if s.fd < 0 {
			continue
		}
		if f.events.room() < 2+eventBatch {
			if err := f.beginLog(); err != nil {
				return err
			}
		}
		events, err := f.events.read(s.fd, s.id, s.queue)
		for _, m := range events {
			f.apply(s, m, int(m.child))
		}
		if err != nil {
			return fmt.Errorf("events of %s: %w", s.name, err)
		}
		if len(events) == 0 {
			continue
		}
		if err := f.noteApplied(s); err != nil {
			return err
		}
		if slices.ContainsFunc(events, func(m message) bool { return m.event == eventFork }) {
			f.reapDead()
		}
	}
	return nil
}

// apply follows an event. A fork's child has the userfaultfd fd.
func (f *family) apply(s *space, m message, fd int) {
	switch m.event {
	case eventRemap:
		s.layout.remap(m.from, m.to, m.size)
		f.recent.moved(f.probe, s, m)
	case eventUnmap:
		s.layout.unmap(m.span, func(image span) { f.giveUp(s, image) })
	case eventRemove:
		// MADV_DONTNEED, MADV_FREE: the mapping stays registered and faults
		// again, and gets zero pages, as nothing is pending there any more. A child
		// whose fork is heard later lacks them as well, and the other way round: both
		// calls were under way at once, and had either returned, it was heard before.
		//
		// MADV_GUARD_INSTALL (Linux 6.13) drops pages without an event, and
		// UFFDIO_COPY replaces the guards. Guards from before the dump are safe:
		// CRIU lists no page there. One that is installed over a page which is
		// still missing is lost; nothing in the kernel's interface helps.
		s.layout.images(m.span, func(image span) { f.giveUp(s, image) })
	case eventFork:
		f.children++
		child := s.fork(fd, f.children)
		f.spaces = append(f.spaces, child)
		f.recent.forked(f.probe, s, child)
		f.count.forks.Add(1)
	}
}

func (f *family) giveUp(s *space, image span) {
	if s.giveUp(image) > 0 {
		f.touch(image)
	}
}

// answerFaults returns how long to wait before trying again, forever when no
// fault is left.
func (f *family) answerFaults() (time.Duration, error) {
	wait := forever
	for _, s := range f.spaces {
		queued := s.faults
		s.faults = s.faults[:0]
		for i, addr := range queued {
			if image, ok := s.content(addr, 1); ok && s.isOwed(image.start) {
				// It waits, and the others do not wait for it.
				s.cursor = addr - addr%neighbourhood
				s.faults = append(s.faults, addr)
				if f.wanted.want(image.start / checkpoint.PageSize) {
					f.hear()
				}
				wait = min(wait, owedWait)
				continue
			}
			w, err := f.answer(s, addr)
			if err != nil {
				return 0, err
			}
			if s.fd < 0 {
				break
			}
			if w != 0 {
				// Whatever delays this fault delays the others of the space.
				s.faults = append(s.faults, queued[i:]...)
				wait = min(wait, w)
				break
			}
		}
	}
	return wait, nil
}

// answer places the page at addr and some that follow it. It returns 0 when the
// fault needs nothing more.
func (f *family) answer(s *space, addr uint64) (time.Duration, error) {
	s.cursor = addr - addr%neighbourhood
	f.stride = minFill
	if image, ok := s.content(addr, faultPages); ok {
		p := piece{at: addr, image: image, buf: f.bufs[0]}
		f.transfer(s.fd, &p)
		w, err := f.conclude(s, &p)
		if w == 0 {
			f.count.faults.Add(1)
		}
		return w, err
	}
	n := uint64(faultPages)
	if w, ok := s.layout.at(addr); !ok || w.start > addr {
		n = 1 // grown since it was registered
	} else {
		n = min(n, (w.end-addr)/checkpoint.PageSize)
		if at, _, ok := s.next(addr, 1); ok {
			n = min(n, (at.start-addr)/checkpoint.PageSize)
		}
	}
	for {
		done, out, err := zeroAt(s.fd, addr, checkpoint.Pages(n))
		if err != nil {
			return 0, fmt.Errorf("fault of %s: %w", s.name, err)
		}
		if out == absent && n > 1 {
			n = 1 // the run spans two mappings
			continue
		}
		f.count.zeroes.Add(int64(done))
		w, err := f.settle(s, out)
		if w != 0 || err != nil || s.fd < 0 {
			return w, err
		}
		f.count.faults.Add(1)
		if out == placed {
			return 0, nil
		}
		// Another thread had it placed, or the mapping is gone: let this one look.
		return 0, wake(s.fd, addr)
	}
}

// backoff is the state of waiting for memory.
type backoff struct{ since time.Time }

// quiet asks whether no event of s is outstanding, and returns 0 if so.
func (f *family) quiet(s *space) (time.Duration, error) {
	out, err := f.probe.ask(s.fd, neighbourhood)
	if err != nil {
		return 0, fmt.Errorf("probe %s: %w", s.name, err)
	}
	return f.settle(s, out)
}

// retire closes the spaces that lack nothing any more. What else is registered
// has no content in the store, and closing makes it zero pages. No event may be
// outstanding: a fork that was not heard has made a child without pages. It
// returns how long to wait before asking again.
func (f *family) retire() (time.Duration, error) {
	wait := forever
	for _, s := range f.spaces {
		if s.fd < 0 || s.pending.count > 0 || len(s.faults) > 0 {
			continue
		}
		w, err := f.quiet(s)
		switch {
		case err != nil:
			return 0, err
		case w != 0:
			wait = min(wait, w)
		case s.fd >= 0:
			if err := f.drop(s); err != nil {
				return 0, err
			}
		}
	}
	return wait, nil
}

// drop closes the space's userfaultfd: it lacks nothing, or has died.
func (f *family) drop(s *space) error {
	fd := s.fd
	s.fd = -1
	if s.pending.count > 0 {
		s.pending = pageSet{}
		f.touchAll()
	}
	// Noted first: the number may be another's as soon as it is closed.
	if err := f.note(slotDrop, s); err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close the userfaultfd of %s: %w", s.name, err)
	}
	return nil
}

// reap forgets closed spaces.
func (f *family) reap() {
	f.spaces = slices.DeleteFunc(f.spaces, func(s *space) bool { return s.fd < 0 })
}

// reapDead closes the children that have died or executed another program. They
// are only noticed by asking, and each holds a descriptor and pages.
func (f *family) reapDead() {
	for _, s := range f.spaces {
		if s.fd < 0 {
			continue
		}
		if out, err := f.probe.ask(s.fd, neighbourhood); err == nil && out == gone {
			if err := f.drop(s); err != nil {
				f.log.Warn("a dead child", "err", err)
			}
		}
	}
}

func (f *family) account() {
	var sum checkpoint.Pages
	for _, s := range f.spaces {
		sum += s.pending.count
	}
	f.pending.Store(int64(sum))
}

// wakeUp ends the wait of another goroutine. Without effect after close.
func (f *family) wakeUp() {
	f.wakeMu.Lock()
	defer f.wakeMu.Unlock()
	if f.wakeFD >= 0 {
		// The counter cannot overflow, so the write cannot fail.
		_, _ = unix.Write(f.wakeFD, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}

// close gives back what the family has but its task and spaces.
func (f *family) close() error {
	f.wakeMu.Lock()
	defer f.wakeMu.Unlock()
	var errs []error
	if f.wakeFD >= 0 {
		errs = append(errs, unix.Close(f.wakeFD))
		f.wakeFD = -1
	}
	for _, buf := range f.bufs {
		errs = append(errs, unix.Munmap(buf))
	}
	f.bufs = nil
	return errors.Join(append(errs, f.events.close())...)
}

// wait returns when a userfaultfd has something to say, when the family is
// woken, or after d.
func (f *family) wait(d time.Duration) error {
	fds := []unix.PollFd{{Fd: int32(f.wakeFD), Events: unix.POLLIN}}
	for _, s := range f.spaces {
		fds = append(fds, unix.PollFd{Fd: int32(s.fd), Events: unix.POLLIN})
	}
	var timeout *unix.Timespec
	if d != forever {
		ts := unix.NsecToTimespec(int64(d))
		timeout = &ts
	}
	if _, err := unix.Ppoll(fds, timeout, nil); err != nil && err != unix.EINTR {
		return fmt.Errorf("wait for faults: %w", err)
	}
	if fds[0].Revents != 0 {
		var buf [8]byte
		if _, err := unix.Read(f.wakeFD, buf[:]); err != nil && err != unix.EAGAIN && err != unix.EINTR {
			return fmt.Errorf("wait for faults: %w", err)
		}
	}
	return nil
}
