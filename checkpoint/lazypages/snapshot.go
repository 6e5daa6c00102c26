package lazypages

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/pagestore"
)

// snapshot is a family as an event log begins with it. What the images and the
// store say is not repeated.
type snapshot struct {
	pid     checkpoint.PID
	hostPID int
	start   uint64 // of the host process, against reuse of its number
	// fresh: the one space is as it was dumped, and lacks what the images and the
	// store say.
	fresh    bool
	children int
	spaces   []savedSpace
	forks    []savedFork
	moves    []savedMove
}

type savedSpace struct {
	id, fd           int // the descriptor's number in the holder
	windows, leaving []window
	echoes           []span
	pending          []span // page numbers
}

// pageNumbers is how many pages an address space can have.
const pageNumbers = pagestore.AddressLimit / checkpoint.PageSize

type savedFork struct{ parent, child int }

type savedMove struct {
	space          int
	from, to, size uint64
}

// encode encodes the snapshot, in unsigned varints.
func (s snapshot) encode() []byte {
	var b []byte
	num := func(v uint64) { b = binary.AppendUvarint(b, v) }
	list := func(n int, each func(i int)) {
		num(uint64(n))
		for i := range n {
			each(i)
		}
	}
	spans := func(all []span) {
		last := uint64(0) // ascending for most, which makes them short
		list(len(all), func(i int) {
			num(all[i].start - last)
			num(all[i].end - all[i].start)
			last = all[i].end
		})
	}
	windows := func(all []window) {
		list(len(all), func(i int) {
			num(all[i].start)
			num(all[i].end - all[i].start)
			num(all[i].image)
		})
	}
	num(uint64(s.pid))
	num(uint64(s.hostPID))
	num(s.start)
	num(map[bool]uint64{true: 1}[s.fresh])
	num(uint64(s.children))
	list(len(s.spaces), func(i int) {
		sp := s.spaces[i]
		num(uint64(sp.id))
		num(uint64(sp.fd))
		windows(sp.windows)
		windows(sp.leaving)
		spans(sp.echoes)
		spans(sp.pending)
	})
	list(len(s.forks), func(i int) {
		num(uint64(s.forks[i].parent))
		num(uint64(s.forks[i].child))
	})
	list(len(s.moves), func(i int) {
		num(uint64(s.moves[i].space))
		num(s.moves[i].from)
		num(s.moves[i].to)
		num(s.moves[i].size)
	})
	return b
}

// parseSnapshot is the inverse of append. Whatever is wrong is errLog.
func parseSnapshot(b []byte) (snapshot, error) {
	ok := true
	num := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			ok, b = false, nil
			return 0
		}
		b = b[n:]
		return v
	}
	small := func() int { // a pid, a descriptor, a space
		v := num()
		if v > 1<<31-1 {
			ok = false
			return 0
		}
		return int(v)
	}
	list := func(each func()) {
		// Each element takes a byte at least.
		for n := num(); n > 0 && ok; n-- {
			if n > uint64(len(b)) {
				ok = false
				return
			}
			each()
		}
	}
	spans := func() (out []span) {
		last := uint64(0)
		list(func() {
			start := last + num()
			last = start + num()
			ok = ok && last > start
			out = append(out, span{start, last})
		})
		return out
	}
	windows := func() (out []window) {
		list(func() {
			w := window{span: span{start: num()}}
			w.end = w.start + num()
			w.image = num()
			ok = ok && w.end > w.start
			out = append(out, w)
		})
		return out
	}
	s := snapshot{pid: checkpoint.PID(small()), hostPID: small(), start: num(), fresh: num() == 1, children: small()}
	list(func() {
		s.spaces = append(s.spaces, savedSpace{id: small(), fd: small(), windows: windows(), leaving: windows(), echoes: spans(), pending: spans()})
	})
	list(func() { s.forks = append(s.forks, savedFork{small(), small()}) })
	list(func() { s.moves = append(s.moves, savedMove{small(), num(), num(), num()}) })
	if !ok || len(b) > 0 {
		return snapshot{}, fmt.Errorf("%w: snapshot", errLog)
	}
	return s, nil
}

// snapshot is the family as it is now: everything that was read is applied.
func (f *family) snapshot() snapshot {
	s := snapshot{pid: f.task.PID, hostPID: f.task.HostPID, start: f.start, children: f.children}
	for _, sp := range f.spaces {
		if sp.fd < 0 {
			continue
		}
		saved := savedSpace{id: sp.id, fd: sp.fd, windows: sp.layout.windows, leaving: sp.layout.leaving, echoes: sp.layout.echoes}
		for at := uint64(0); ; {
			start, end, ok := sp.pending.next(at, ^uint64(0), pageNumbers)
			if !ok {
				break
			}
			saved.pending = append(saved.pending, span{start, end})
			at = end
		}
		s.spaces = append(s.spaces, saved)
	}
	for _, fork := range f.recent.forks {
		if fork.parent.fd >= 0 && fork.child.fd >= 0 {
			s.forks = append(s.forks, savedFork{fork.parent.id, fork.child.id})
		}
	}
	for _, m := range f.recent.moves {
		if m.space.fd >= 0 {
			s.moves = append(s.moves, savedMove{m.space.id, m.from, m.to, m.size})
		}
	}
	return s
}

// noteApplied notes that what was read has been applied, and what was found out
// with it.
func (f *family) noteApplied(s *space) error {
	for _, m := range f.recent.shifted {
		if !f.events.append(slotShift, m.space.id, m.from, m.to, m.size) {
			return f.beginLog()
		}
	}
	f.recent.shifted = f.recent.shifted[:0]
	return f.note(slotApplied, s)
}

// note adds to the log what has become of a space. The family is as if it were
// noted: a log without room begins anew with what it is.
func (f *family) note(kind byte, s *space, args ...uint64) error {
	if f.events.append(kind, s.id, args...) {
		return nil
	}
	return f.beginLog()
}

// beginLog replaces the log by one that begins with the family as it is. If the
// tmpfs is full, maybe of a shard that comes and will not fit, it tries again for a
// while: the faults that wait meanwhile are better off than a shard that is killed.
func (f *family) beginLog() error {
	f.recent.shifted = f.recent.shifted[:0]
	slots := minSlots
	if f.events != nil {
		slots = min(2*f.events.slots(), maxSlots)
	}
	head := f.snapshot().encode()
	next, err := createLog(f.logPath, head, slots)
	if errors.Is(err, unix.ENOSPC) {
		f.log.Warn("no room for an event log", "task", f.task.PID, "err", err)
	}
	for began := time.Now(); errors.Is(err, unix.ENOSPC) && time.Since(began) < memoryPatience; {
		<-time.After(memoryWait)
		next, err = createLog(f.logPath, head, slots)
	}
	if err != nil {
		return err
	}
	err = f.events.close()
	f.events = next
	return err
}
