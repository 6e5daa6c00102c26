package lazypages

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// Beside the pages of a store:
//
//	fill.lock           locked by the server that lives
//	fill.state          a fillState, replaced as a whole
//	PID.events.EPOCH    the event log of a family
const (
	fillLock  = "fill.lock"
	fillFile  = "fill.state"
	logSuffix = ".events."
)

const (
	// lockPatience is how long a server waits for the one before it to be gone: its
	// holder lets go of the lock once it has died.
	lockPatience = 2 * time.Second
	lockPoll     = time.Millisecond
	// killPatience is how long a process that was killed may take to be dead.
	killPatience = 10 * time.Second
)

// proc is a process, and no other with its number.
type proc struct {
	PID int `json:"pid"`
	// Start is in clock ticks since boot (proc_pid_stat(5), field 22).
	Start uint64 `json:"start"`
}

// fillState is what whoever takes over has to know.
type fillState struct {
	SchemaVersion int `json:"schema_version"`
	// Epoch counts servers. The logs that count end in it; the descriptors in them
	// are those of Holder.
	Epoch  int  `json:"epoch"`
	Server proc `json:"server"`
	Holder proc `json:"holder"`
	// Heir is about to be Holder, with the same table, and does not outlive the
	// server until it is told to: then Holder says so.
	Heir proc `json:"heir,omitzero"`
	// Strays hold the same, and must be gone before anything is served: a
	// userfaultfd that is open somewhere is not closed.
	Strays []proc `json:"strays,omitempty"`
	// FinishedAt is zero as long as CRIU has not restored everything.
	FinishedAt time.Time `json:"finished_at,omitzero"`
	// next: the server takes over, and holders that it starts are strays until
	// nextEpoch.
	next bool
}

// holderStarts notes a holder that was started.
func (s *fillState) holderStarts(h proc) {
	if s.next {
		s.Strays = append(s.Strays, h)
		return
	}
	s.Heir = h
}

// heldBy is the holder, or the heir that was not yet noted as such.
func (s *fillState) heldBy() proc {
	if !s.Holder.alive() && s.Heir.alive() {
		return s.Heir
	}
	return s.Holder
}

// nextEpoch makes the last stray the holder, and the holder a stray.
func (s *fillState) nextEpoch() {
	last := len(s.Strays) - 1
	s.Strays[last], s.Holder = s.Holder, s.Strays[last]
	s.Epoch, s.next = s.Epoch+1, false
}

func (s *fillState) write(dir string) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("state of filling: %w", err)
	}
	path := filepath.Join(dir, fillFile)
	if err := os.WriteFile(path+".part", raw, 0o600); err != nil {
		return fmt.Errorf("state of filling: %w", err)
	}
	if err := os.Rename(path+".part", path); err != nil {
		return fmt.Errorf("state of filling: %w", err)
	}
	return nil
}

func readFillState(dir string) (fillState, error) {
	var s fillState
	raw, err := os.ReadFile(filepath.Join(dir, fillFile))
	if err == nil {
		err = json.Unmarshal(raw, &s)
	}
	if err != nil {
		return fillState{}, fmt.Errorf("state of filling: %w", err)
	}
	return s, nil
}

func logPath(dir string, pid checkpoint.PID, epoch int) string {
	return filepath.Join(dir, fmt.Sprint(int32(pid), logSuffix, epoch))
}

// Holding is who has the userfaultfds of a restore.
type Holding struct {
	// FinishedAt is when CRIU had restored everything; zero if it has not.
	FinishedAt time.Time
	// Served: the server lives. Held: another process has them beside it, so that a
	// server can take over if not. If neither, no task may run.
	Served, Held bool
}

// Look tells who has the userfaultfds of the restore whose pages are in a store.
func Look(store string) Holding {
	s, err := readFillState(store)
	if err != nil {
		return Holding{}
	}
	return Holding{s.FinishedAt, s.Server.alive(), s.heldBy().alive()}
}

// LetGo ends the server of a store, if it lives, and all that hold its
// userfaultfds: pages that are missing read as zeros from then on. Therefore only
// when the tasks are dead, or lack none. It may run twice, and does nothing to a
// directory without a store.
func LetGo(ctx context.Context, store string) error {
	s, err := readFillState(store)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.Server.kill(ctx); err != nil { // else it starts another holder
		return err
	}
	if s, err = readFillState(store); err != nil {
		return err
	}
	for _, p := range append(s.Strays, s.Holder, s.Heir) {
		err = errors.Join(err, p.kill(ctx))
	}
	return err
}

// lock waits for the server before this one to be dead, every thread of it, and
// returns what keeps the next one waiting: a descriptor that only the server and
// its holder have.
func lock(ctx context.Context, store string) (*os.File, error) {
	file, err := os.OpenFile(filepath.Join(store, fillLock), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("serve pages: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lockPatience, errServed)
	defer cancel()
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("serve pages: lock: %w", err), file.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("serve pages: %w", context.Cause(ctx)), file.Close())
		case <-time.After(lockPoll):
		}
	}
}

var errServed = errors.New("another server serves them")

// procOf identifies a process that cannot end meanwhile.
func procOf(pid int) (proc, error) {
	stat, _ := statOf(pid)
	const start = 22 - 3 // the first of these fields is the third
	if len(stat) <= start {
		return proc{}, fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	}
	ticks, err := strconv.ParseUint(stat[start], 10, 64)
	if err != nil {
		return proc{}, fmt.Errorf("process %d: %w", pid, err)
	}
	return proc{pid, ticks}, nil
}

// open returns a pidfd; unix.ESRCH if the process is dead.
func (p proc) open() (int, error) {
	if p.PID <= 0 {
		return -1, unix.ESRCH
	}
	pidfd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		err = unix.ESRCH // the number is that of a thread now
	}
	if err != nil {
		return -1, fmt.Errorf("process %d: %w", p.PID, err)
	}
	// Looked at after: it is the descriptor's process, or that one is dead.
	now, err := procOf(p.PID)
	if err == nil && now != p {
		err = unix.ESRCH
	}
	if err == nil {
		err = unix.PidfdSendSignal(pidfd, 0, nil, 0)
	}
	if err == nil && hasEnded(pidfd, 0) {
		err = unix.ESRCH
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("process %d: %w", p.PID, err), unix.Close(pidfd))
	}
	return pidfd, nil
}

func (p proc) alive() bool {
	pidfd, err := p.open()
	if err != nil {
		return false
	}
	_ = unix.Close(pidfd)
	return true
}

// kill ends the process and waits until every thread of it is dead.
func (p proc) kill(ctx context.Context) error {
	pidfd, err := p.open()
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", p.PID, err)
	}
	for deadline := time.Now().Add(killPatience); !hasEnded(pidfd, 100); {
		if ctx.Err() != nil {
			return fmt.Errorf("kill process %d: %w", p.PID, context.Cause(ctx))
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("process %d does not die", p.PID)
		}
	}
	return nil
}

// hasEnded waits for the end of a process, for so many milliseconds.
func hasEnded(pidfd, ms int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, ms)
	return err == nil && n > 0
}
