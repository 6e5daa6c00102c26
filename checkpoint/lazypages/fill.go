package lazypages

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// fill places some pieces at once for the first space that lacks any: the task
// before its children, which rarely live long. Meanwhile it gives back what was
// placed before. It returns 0 when it made progress, else how long to wait.
//
// No event is read until every lane has ended, so the pieces are as good as
// placed one after the other.
func (f *family) fill() (time.Duration, error) {
	if f.mayFill != nil && !f.mayFill() {
		f.reapDead() // filling would notice
		return fillPause, nil
	}
	i := slices.IndexFunc(f.spaces, func(s *space) bool { return s.fd >= 0 && s.ready() })
	if i < 0 {
		if f.owed.count == 0 {
			return forever, nil
		}
		f.reapDead()
		return owedWait, nil
	}
	s := f.spaces[i]
	pieces := f.pieces(s)
	if len(pieces) == 0 {
		// Its mapping is leaving, and that has not been heard yet.
		if len(s.layout.leaving) == 0 {
			return 0, fmt.Errorf("%d pages of %s have no address: %w", s.pending.count, s.name, errUnplaceable)
		}
		return f.quiet(s)
	}
	var lanes sync.WaitGroup
	for i := range pieces {
		lanes.Add(1)
		go func() {
			defer lanes.Done()
			f.transfer(s.fd, &pieces[i])
		}()
	}
	for range pieces {
		if len(f.touched) > releaseLag {
			f.release()
		}
	}
	lanes.Wait()
	f.stride = min(2*f.stride, maxFill)
	wait := time.Duration(0)
	for i := range pieces {
		if s.fd < 0 { // gone
			break
		}
		w, err := f.conclude(s, &pieces[i])
		if err != nil {
			return 0, err
		}
		wait = max(wait, w)
	}
	return wait, nil
}

// loadLatest reads which pages the task wrote last. They are a hint, and without
// it there are faults.
func (f *family) loadLatest() {
	err := f.store.Latest(f.task.PID, func(addr uint64, n checkpoint.Pages) error {
		f.latest = append(f.latest, span{addr, addr + uint64(n.Bytes())})
		return nil
	})
	if err != nil {
		f.log.Warn("which pages were written last", "err", err)
	}
}

// placeLatest places a piece of what the task wrote last before it was frozen: it is
// what it touches first, and each fault would wait for this process to have a
// processor. It returns 0 when it made progress, else how long to wait.
func (f *family) placeLatest() (time.Duration, error) {
	select {
	case <-f.running:
	default:
		return forever, nil
	}
	if len(f.spaces) == 0 || f.spaces[0].id != 0 || f.spaces[0].fd < 0 {
		f.latest = nil // the task is gone, or lacks nothing
	}
	for len(f.latest) > 0 {
		if f.mayFill != nil && !f.mayFill() {
			return fillPause, nil
		}
		s, next := f.spaces[0], &f.latest[0]
		at, image, ok := s.nextHere(next.start, minFill)
		if !ok || at.start >= next.end {
			f.latest = f.latest[1:]
			continue
		}
		image.end -= at.end - min(at.end, next.end)
		p := piece{at: at.start, image: image, buf: f.bufs[0]}
		f.transfer(s.fd, &p)
		w, err := f.conclude(s, &p)
		if w == 0 {
			next.start = at.start + uint64(p.n.Bytes())
		}
		return w, err
	}
	return forever, nil
}

// pieces picks what to fill next, one piece a lane, from the cursor on.
func (f *family) pieces(s *space) []piece {
	var out []piece
	for addr := s.cursor; len(out) < len(f.bufs); {
		at, image, ok := s.nextHere(addr, f.stride)
		if !ok {
			if len(out) > 0 || addr == 0 {
				break
			}
			addr = 0
			continue
		}
		out = append(out, piece{at: at.start, image: image, buf: f.bufs[len(out)]})
		addr = at.end
	}
	if len(out) > 0 {
		s.cursor = out[0].at
	}
	return out
}

// piece is a run of pages on its way: pending, and in one window.
type piece struct {
	at    uint64
	image span
	buf   []byte // at least as long

	n   checkpoint.Pages
	out outcome
	err error
}

// transfer reads a piece from the store and places it. It touches nothing of
// the family, so that several may run at once.
func (f *family) transfer(fd int, p *piece) {
	buf := p.buf[:p.image.end-p.image.start]
	if p.err = f.store.ReadData(f.task.PID, p.image.start, buf); p.err != nil {
		return
	}
	for {
		p.n, p.out, p.err = copyTo(fd, p.at, buf)
		pages := len(buf) / checkpoint.PageSize
		if p.err != nil || p.out != absent || pages == 1 {
			return
		}
		buf = buf[:pages/2*checkpoint.PageSize] // may span two mappings
	}
}

// conclude takes note of what became of a piece. It returns 0 when at least its
// first page is dealt with, else how long to wait.
func (f *family) conclude(s *space, p *piece) (time.Duration, error) {
	if p.err != nil {
		return 0, fmt.Errorf("place pages of %s: %w", s.name, p.err)
	}
	w, err := f.settle(s, p.out)
	if w != 0 || err != nil || s.fd < 0 {
		return w, err
	}
	switch p.out {
	case placed:
		f.count.placed.Add(int64(p.n))
	case present:
		p.n, err = 1, wake(s.fd, p.at)
	case absent:
		p.n, err = 1, errors.Join(f.unregistered(s, p.at), wake(s.fd, p.at))
	}
	done := span{p.image.start, p.image.start + uint64(p.n.Bytes())}
	f.giveUp(s, done)
	return 0, errors.Join(err, f.note(slotGaveUp, s, done.start, done.end))
}

// settle draws from an operation's outcome what it says about the space. It
// returns how long to wait if the operation is to be tried again.
func (f *family) settle(s *space, out outcome) (time.Duration, error) {
	switch out {
	case changing:
		return changingWait, nil
	case gone:
		return 0, f.drop(s)
	case noMemory:
		if s.noMemory.since.IsZero() {
			s.noMemory.since = time.Now()
			f.log.Warn("no memory to place pages", "task", s.name)
		}
		if time.Since(s.noMemory.since) > memoryPatience {
			return 0, fmt.Errorf("place pages of %s: no memory for %v: %w", s.name, memoryPatience, unix.ENOMEM)
		}
		return memoryWait, nil
	}
	s.noMemory = backoff{}
	if s.layout.settled() && !f.recent.about(s) {
		return 0, nil
	}
	f.settleSpace(s)
	return 0, f.note(slotSettle, s)
}

// settleSpace is called when no event of s is outstanding.
func (f *family) settleSpace(s *space) {
	s.layout.settle(func(image span) {
		f.log.Warn("a mapping left without notice", "task", s.name, "addr", fmt.Sprintf("%#x", image.start))
		f.giveUp(s, image)
	})
	f.recent.settle(s)
}

// unregistered judges a page that has content and no registered mapping. For
// the task itself that must mean that nothing is mapped there; were there a
// mapping, the process would read zeros. A child may lack what has
// MADV_DONTFORK.
func (f *family) unregistered(s *space, addr uint64) error {
	if s.id != 0 {
		return nil
	}
	mapped, err := isMapped(f.task.HostPID, addr)
	if err != nil {
		return fmt.Errorf("pages of %s: %w", s.name, err)
	}
	if mapped {
		return fmt.Errorf("pages of %s at %#x: the mapping is not registered: %w", s.name, addr, errUnplaceable)
	}
	f.log.Warn("content for an address where nothing is mapped", "task", s.name, "addr", fmt.Sprintf("%#x", addr))
	return nil
}

var errUsed = errors.New("the store's pages were placed before")

var errUnplaceable = errors.New("its content cannot be placed")

func (f *family) touch(image span) {
	if !f.filling {
		return // noteFinish touches everything
	}
	last := (image.end - 1) / checkpoint.PageSize
	for i := f.live.groupAt(image.start / checkpoint.PageSize); i < len(f.live.groups) && f.live.groups[i].first <= last; i++ {
		if !f.isTouch[i] {
			f.isTouch[i] = true
			f.touched = append(f.touched, i)
		}
	}
}

func (f *family) touchAll() {
	if !f.filling {
		return
	}
	f.touched = f.touched[:0]
	for i := range f.isTouch {
		f.isTouch[i] = true
		f.touched = append(f.touched, i)
	}
}

// release looks through the group that was touched first and gives back the
// pages that no space lacks any more. It reports whether there was one. Nothing
// is touched before CRIU has finished: until then the restore may fail and be
// tried again. A tmpfs that is full has no room to note it; then it is tried again,
// until all is placed and the store goes as a whole.
func (f *family) release() bool {
	over := len(f.spaces) == 0
	if len(f.touched) == 0 || !over && time.Since(f.refused) < memoryWait {
		return false
	}
	i := f.touched[0]
	f.touched = f.touched[1:]
	f.isTouch[i] = false
	free := pageSet{groups: []group{f.live.groups[i]}}
	for _, s := range f.spaces {
		if s.pending.count == 0 {
			continue
		}
		for w := range free.groups[0].words {
			free.groups[0].words[w] &^= s.pending.groups[i].words[w]
		}
	}
	first := free.groups[0].first
	for from := first; ; {
		start, end, ok := free.next(from, first+groupPages, groupPages)
		if !ok {
			break
		}
		if err := f.store.Release(f.task.PID, start*checkpoint.PageSize, checkpoint.Pages(end-start)); err != nil {
			// The pages take room for longer, that is all.
			if f.refused.IsZero() {
				f.log.Warn("keep the placed pages in the store", "task", f.task.PID, "err", err)
			}
			f.refused = time.Now()
			if !over {
				f.isTouch[i] = true
				f.touched = append(f.touched, i)
				return false
			}
		}
		f.live.clear(start, end)
		f.settleOwed(start, end)
		from = end
	}
	return true
}

// settleOwed notes that pages have arrived, or that nobody needs them any more.
func (f *family) settleOwed(from, to uint64) {
	if f.owed.clear(from, to) == 0 {
		return
	}
	if f.wanted.settle(from, to) == 0 {
		f.hear()
	}
}

// hear tells those who pull that there is news.
func (f *family) hear() {
	if f.hungry != nil {
		f.hungry()
	}
}
