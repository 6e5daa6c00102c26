package lazypages

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

var (
	// ErrLost says that nobody holds the userfaultfds any more: tasks that run would
	// find zeros where pages were missing. Those that could be found were killed.
	ErrLost = errors.New("nobody holds the userfaultfds")
	// errAmbiguous says that a server died where its log and the kernel leave open
	// what is where.
	errAmbiguous = errors.New("it cannot be known what an event that was read last has changed")
	// errUnfinished says that CRIU's restore had not finished, and has failed.
	errUnfinished = errors.New("the restore had not finished")
)

// TakeOver goes on where a server that has died stopped filling: with the
// userfaultfds that its holder has, the pages that the store has, and what its
// log says of where they belong. Until it does, faults wait. An error before it
// has begun to serve leaves everything to the next attempt, once this process
// has ended; ErrLost says that there is none. From then on it is as Serve.
//
//  1. wait for the dead to be dead: a thread of theirs may still be placing
//  2. take the userfaultfds out of the holder
//  3. follow the logs
//  4. have a holder and logs of its own; that they count is one rename
//  5. end the holder from before, so that closing closes
//  6. serve; threads whose faults were read before fault again
func TakeOver(ctx context.Context, cfg Config) error {
	cfg.Hold = true
	s, err := newServer(ctx, cfg)
	if err != nil {
		return err
	}
	control, err := s.takeOver(ctx)
	if err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	for _, f := range s.families {
		for _, sp := range f.spaces {
			wakeAll(sp.fd)
		}
	}
	return s.serve(control, func() error {
		return s.serveTasks(ctx, func(ctx context.Context, g *errgroup.Group) error {
			for _, f := range s.families {
				s.start(ctx, g, f)
			}
			return s.fill(ctx, s.status.FinishedAt)
		})
	})
}

func (s *server) takeOver(ctx context.Context) (*net.UnixListener, error) {
	dir := s.cfg.Store
	state, err := readFillState(dir)
	if err != nil {
		return nil, err
	}
	if state.FinishedAt.IsZero() {
		return nil, errUnfinished
	}
	if last, err := ReadStatus(s.cfg.Control); err == nil {
		return nil, fmt.Errorf("the server before has ended as %s", last.State)
	}
	for _, p := range state.Strays {
		if err := p.kill(ctx); err != nil {
			return nil, err
		}
	}
	state.Strays = nil
	logs, err := logsOf(dir, state.Epoch)
	if err != nil {
		return nil, err
	}
	former := state.heldBy()
	state.Holder, state.Heir = former, proc{}
	if err := s.takeFrom(former, logs); err != nil {
		if !former.alive() {
			err = errors.Join(fmt.Errorf("%w: %w", ErrLost, err), strike(logs))
		}
		return nil, err
	}
	control, err := listen(s.cfg.Control)
	if err != nil {
		return nil, err
	}
	if err = s.succeed(ctx, state); err == nil {
		err = former.kill(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, control.Close())
	}
	err = s.keeper.update(func(state *fillState) { state.Strays = nil })
	if err == nil {
		err = removeLogs(dir, func(epoch int) bool { return epoch != s.epoch })
	}
	if err != nil { // it is as good as it was
		s.cfg.Log.Warn("after a takeover", "err", err)
	}
	// Nobody is to hear that it had not finished.
	s.status.State, s.status.Finished = StateFinished, true
	s.status.FinishedAt, s.status.Takeovers = state.FinishedAt, s.epoch
	return control, nil
}

// readLog reads the log of a pid.
func readLog(path string, pid checkpoint.PID) (snapshot, []record, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return snapshot{}, nil, err
	}
	head, records, err := parseLog(raw)
	if err != nil {
		return snapshot{}, nil, fmt.Errorf("%s: %w", path, err)
	}
	snap, err := parseSnapshot(head)
	if err == nil && snap.pid != pid {
		err = fmt.Errorf("%w: it is of pid %d", errLog, snap.pid)
	}
	if err != nil {
		return snapshot{}, nil, fmt.Errorf("%s: %w", path, err)
	}
	return snap, records, nil
}

// strike kills the tasks that logs tell of, at once: their pages are zeros now.
// The daemon sees to it that none is left.
func strike(logs map[checkpoint.PID]string) error {
	var tasks []Task
	var errs []error
	for pid, path := range logs {
		snap, _, err := readLog(path, pid)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		pidfd, err := (proc{snap.hostPID, snap.start}).open()
		if err != nil {
			continue // dead
		}
		defer unix.Close(pidfd)
		tasks = append(tasks, Task{PID: pid, HostPID: snap.hostPID, PIDFD: pidfd})
	}
	hunt, err := newHunt(tasks)
	return errors.Join(append(errs, err, hunt.kill())...)
}

// takeFrom makes the families of an epoch's logs, with what the holder has.
func (s *server) takeFrom(former proc, logs map[checkpoint.PID]string) error {
	holder, err := former.open()
	if err != nil {
		return err
	}
	defer unix.Close(holder)
	for pid, path := range logs {
		snap, records, err := readLog(path, pid)
		if err != nil {
			return err
		}
		task := Task{PID: pid, HostPID: snap.hostPID, PIDFD: -1, UFFD: -1}
		if task.PIDFD, err = (proc{snap.hostPID, snap.start}).open(); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
		f, err := s.newFamily(task)
		if err != nil {
			return fmt.Errorf("pid %d: %w", pid, err)
		}
		f.start = snap.start
		take := func(fd int) (int, error) { return unix.PidfdGetfd(holder, fd, 0) }
		if err := f.follow(s.cfg.Images, snap, records, take); err != nil {
			return fmt.Errorf("pid %d: %w", pid, err)
		}
	}
	return nil
}

// succeed makes this server's descriptors and logs those that count.
func (s *server) succeed(ctx context.Context, state fillState) error {
	s.epoch = state.Epoch + 1
	state.next = true
	if err := s.hold(state); err != nil {
		return err
	}
	for _, f := range s.families {
		f.logPath = logPath(s.cfg.Store, f.task.PID, s.epoch)
		if err := f.beginLog(); err != nil {
			return err
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.keeper.update((*fillState).nextEpoch)
}

// follow brings the family to where its log ends. take gets a descriptor out of
// the holder.
func (f *family) follow(images string, snap snapshot, records []record, take func(fd int) (int, error)) error {
	dump, err := readDumped(images, f.task.PID)
	if err != nil {
		return err
	}
	if err := errors.Join(f.store.Finish(f.task.PID), f.loadStore()); err != nil {
		return err
	}
	f.isTouch = make([]bool, len(f.live.groups))
	fds, err := f.takeAll(snap, records, take)
	if err != nil {
		return err
	}
	spaces, err := f.resume(snap, dump, fds)
	if err != nil {
		return err
	}
	if err := f.replay(spaces, records, fds); err != nil {
		return err
	}
	for id, sp := range spaces {
		if sp.fd < 0 {
			return fmt.Errorf("%w: space %d", errLog, id)
		}
	}
	needed := f.live.empty()
	for _, sp := range f.spaces {
		needed.union(&sp.pending)
	}
	f.wanted.begin(&f.owed, &needed)
	f.account()
	return nil
}

// takeAll gets the userfaultfds of the spaces that are left at the end of the
// log. They are closed with the family, whatever fails.
func (f *family) takeAll(snap snapshot, records []record, take func(fd int) (int, error)) (map[int]int, error) {
	theirs := map[int]int{}
	for _, sp := range snap.spaces {
		theirs[sp.id] = sp.fd
	}
	children := snap.children
	for _, r := range records {
		switch {
		case r.event == eventFork:
			children++
			theirs[children] = int(r.child)
		case r.kind == slotDrop:
			delete(theirs, r.space)
		}
	}
	ours := map[int]int{}
	for id, fd := range theirs {
		got, err := take(fd)
		if err == nil {
			ours[id] = got
			f.spaces = append(f.spaces, &space{id: id, fd: got}) // until resume, for release
			continue
		}
		return nil, fmt.Errorf("userfaultfd %d of the holder: %w", fd, err)
	}
	return ours, nil
}

// resume makes the spaces that a snapshot tells of, by their ids.
func (f *family) resume(snap snapshot, dump dumped, fds map[int]int) (map[int]*space, error) {
	fdOf := func(id int) int {
		if fd, ok := fds[id]; ok {
			return fd
		}
		return -1 // dropped in the meantime
	}
	root := f.root(dump)
	spaces := map[int]*space{}
	f.children = snap.children
	for _, saved := range snap.spaces {
		sp := root
		if !snap.fresh {
			sp = &space{
				name: root.name, id: saved.id, dump: dump, owed: &f.owed, pending: f.live.empty(),
				layout: layout{saved.windows, saved.leaving, saved.echoes},
			}
			if saved.id != 0 {
				sp.name = fmt.Sprintf("%s, child %d", root.name, saved.id)
			}
			for _, p := range saved.pending {
				sp.pending.add(p.start, p.end)
			}
			sp.pending.intersect(&f.live) // without what was given back since
		}
		sp.fd = fdOf(saved.id)
		spaces[saved.id] = sp
	}
	for _, fork := range snap.forks {
		parent, child := spaces[fork.parent], spaces[fork.child]
		if parent == nil || child == nil {
			return nil, fmt.Errorf("%w: fork", errLog)
		}
		f.recent.forks = append(f.recent.forks, recentFork{parent, child})
	}
	for _, m := range snap.moves {
		if spaces[m.space] == nil {
			return nil, fmt.Errorf("%w: move", errLog)
		}
		f.recent.moves = append(f.recent.moves, recentMove{spaces[m.space], message{event: eventRemap, from: m.from, to: m.to, size: m.size}})
	}
	return spaces, nil
}

// batch is what was read at once of one space.
type batch struct {
	space  *space
	events []message
	shifts []record
}

// replay does what the records say was done. Placing needs no record to be
// right: a page that was placed and is not noted is found to be there.
func (f *family) replay(spaces map[int]*space, records []record, fds map[int]int) error {
	f.recent.replayed = true
	var b batch
	apply := func() {
		for _, m := range b.events {
			fd := -1
			if got, ok := fds[f.children+1]; ok {
				fd = got
			}
			f.apply(b.space, m, fd)
			if m.event == eventFork {
				spaces[f.children] = f.recent.forks[len(f.recent.forks)-1].child
			}
		}
	}
	for _, r := range records {
		sp := spaces[r.space]
		inBatch := r.kind == 0 || r.kind == slotShift || r.kind == slotApplied
		switch {
		case inBatch && b.space == nil, !inBatch && (sp == nil || len(b.events) > 0):
			return fmt.Errorf("%w: slot %#x of space %d", errLog, r.kind, r.space)
		}
		switch r.kind {
		case slotRead:
			b = batch{space: sp}
		case 0:
			b.events = append(b.events, r.message)
		case slotShift:
			b.shifts = append(b.shifts, r)
		case slotApplied:
			apply()
			for _, shift := range b.shifts {
				child := spaces[shift.space]
				if child == nil {
					return fmt.Errorf("%w: shift of space %d", errLog, shift.space)
				}
				child.layout.shift(shift.args[0], shift.args[1], shift.args[2])
			}
			b = batch{}
		case slotSettle:
			f.settleSpace(sp)
		case slotGaveUp:
			f.giveUp(sp, span{r.args[0], r.args[1]})
		case slotDrop:
			delete(spaces, r.space)
			f.recent.forget(sp)
		}
	}
	// The spaces that are left, in their order; a batch that was not applied may
	// add children.
	f.recent.replayed, f.recent.strict = false, true
	apply()
	f.recent.strict, f.recent.shifted = false, nil
	f.spaces = f.spaces[:0]
	for _, id := range slices.Sorted(maps.Keys(spaces)) {
		f.spaces = append(f.spaces, spaces[id])
	}
	return f.recent.err
}

// logsOf finds the logs of an epoch.
func logsOf(store string, epoch int) (map[checkpoint.PID]string, error) {
	entries, err := os.ReadDir(store)
	if err != nil {
		return nil, err
	}
	logs := map[checkpoint.PID]string{}
	for _, e := range entries {
		name, of, isLog := strings.Cut(e.Name(), logSuffix)
		if !isLog || of != strconv.Itoa(epoch) {
			continue
		}
		pid, err := strconv.ParseInt(name, 10, 32)
		if err != nil || pid <= 0 {
			return nil, fmt.Errorf("%w: %s", errLog, e.Name())
		}
		logs[checkpoint.PID(pid)] = filepath.Join(store, e.Name())
	}
	return logs, nil
}

// removeLogs removes the logs of epochs, and what was not made whole.
func removeLogs(store string, old func(epoch int) bool) error {
	entries, err := os.ReadDir(store)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		_, of, isLog := strings.Cut(e.Name(), logSuffix)
		if !isLog {
			continue
		}
		if epoch, err := strconv.Atoi(of); err != nil || old(epoch) {
			errs = append(errs, os.Remove(filepath.Join(store, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// wakeAll makes every thread that waits for a page of an address space fault
// again: whoever read its fault may be dead.
func wakeAll(fd int) {
	const first = 64 << 10 // vm.mmap_min_addr; nothing is mapped below
	// The kernel wants a range within the process's own limit, which depends on
	// the architecture and its page tables.
	for bits := 57; bits >= 36; bits-- {
		arg := uffdRange{first, 1<<bits - checkpoint.PageSize - first}
		if ioctl(fd, uffdioWake, unsafe.Pointer(&arg)) == 0 {
			return
		}
	}
}
