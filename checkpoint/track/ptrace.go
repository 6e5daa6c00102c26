package track

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/osthread"
)

// stopTimeout is how long one thread may take to stop: tens of microseconds, and
// on a busy host until it gets a processor. One that waits for a disk or for a
// vfork child does not stop before that is over, and another thread is tried
// instead. Until it stops, nothing happens to the thread.
const stopTimeout = 100 * time.Millisecond

// stopAttempts bounds how many threads are tried, so that a process whose
// threads all wait for a disk costs no more than this many timeouts.
const stopAttempts = 4

// kernelSigset is the size of the kernel's signal set in bytes.
const kernelSigset = 8

// onTracer runs f on a thread of its own that ends afterwards: ptrace ties a
// tracee to one thread, and the end of that thread detaches what is still
// attached, which is the only way to let go of a thread that never stopped.
func onTracer(f func() error) error {
	var tid int
	err := osthread.Do(func() error {
		tid = unix.Gettid()
		return f()
	})
	if errors.Is(err, errBusy) {
		// Something may still be attached, and cannot be attached to again before
		// the thread has really ended.
		for unix.Tgkill(os.Getpid(), tid, 0) == nil {
			runtime.Gosched()
		}
	}
	return err
}

// tracee is one stopped thread.
type tracee struct {
	tid int
	// stopped is when the thread still ran for the last time.
	stopped time.Time
	// saved is what the thread resumes with.
	saved registers
}

// seize attaches to a thread and stops it. The thread is in the kernel's signal
// delivery then, before any signal was taken out of its queue: if it was inside
// a system call, the kernel decides about restarting that call only after the
// thread is let go, from the registers it finds at that time.
func seize(tid int) (*tracee, error) {
	// Without PTRACE_O_EXITKILL: the shard outlives the daemon. With seccomp
	// suspended, because a filter may kill for the calls that are injected.
	const options = unix.PTRACE_O_SUSPEND_SECCOMP | unix.PTRACE_O_TRACESYSGOOD
	err := ptrace(unix.PTRACE_SEIZE, tid, options)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
		// A kernel without CONFIG_CHECKPOINT_RESTORE, or a daemon under seccomp
		// itself, cannot suspend filters; most threads have none.
		// One that has ended refuses as well.
		raw, readErr := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
		if readErr != nil {
			return nil, procError(readErr)
		}
		tracer, _ := statusField(raw, "TracerPid")
		mode, _ := statusField(raw, "Seccomp")
		state, ok := statusField(raw, "State")
		switch {
		case !ok || state == "" || state[0] == 'Z' || state[0] == 'X':
			return nil, errGone
		case tracer != "0":
			return nil, ErrTraced
		case mode == "0":
			err = ptrace(unix.PTRACE_SEIZE, tid, unix.PTRACE_O_TRACESYSGOOD)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("attach to thread %d: %w", tid, procError(err))
	}
	t := &tracee{tid: tid}
	deadline := time.Now().Add(stopTimeout)
	if err := ptrace(unix.PTRACE_INTERRUPT, tid, 0); err != nil {
		return nil, fmt.Errorf("interrupt thread %d: %w", tid, procError(err))
	}
	for {
		status, err := t.waitUntil(deadline)
		if err != nil {
			return nil, err
		}
		if trapped(status) {
			break
		}
		// A signal was about to be delivered before the interrupt was seen.
		if err := ptrace(unix.PTRACE_CONT, tid, uintptr(status.StopSignal())); err != nil {
			return nil, fmt.Errorf("pass a signal to thread %d: %w", tid, procError(err))
		}
	}
	if err := t.getRegisters(&t.saved); err != nil {
		return nil, errors.Join(err, t.detach())
	}
	// epoll_wait and a few others return EINTR when they are interrupted, even by
	// a stop that no signal handler sees. The kernel is told to restart them
	// unless a handler really runs: what it does itself for poll and select.
	if t.saved.restartInterrupted() {
		if err := t.setRegisters(&t.saved); err != nil {
			return nil, errors.Join(err, t.detach())
		}
	}
	return t, nil
}

// trapped says whether a stop is PTRACE_EVENT_STOP, which an interrupt causes,
// and a group stop as well.
func trapped(status unix.WaitStatus) bool {
	return status.Stopped() && int(status)>>16 == unix.PTRACE_EVENT_STOP
}

// detach lets the thread go. If its process is in a group stop, the kernel
// stops it again (kernel/ptrace.c, __ptrace_unlink).
func (t *tracee) detach() error {
	if err := ptrace(unix.PTRACE_DETACH, t.tid, 0); err != nil {
		return fmt.Errorf("detach from thread %d: %w", t.tid, procError(err))
	}
	return nil
}

// waitUntil waits for the next stop until a deadline. wait4 knows no timeout and
// a thread that does not stop cannot be detached from, so it is polled: without
// a pause at first, since most stop at once.
func (t *tracee) waitUntil(deadline time.Time) (unix.WaitStatus, error) {
	const spins = 200
	t.stopped = time.Now()
	for i := 0; ; i++ {
		now := time.Now()
		status, err := t.wait(unix.WNOHANG)
		if err != nil || status != stillRunning {
			return status, err
		}
		t.stopped = now
		if now.After(deadline) {
			return 0, errBusy
		}
		if i < spins {
			_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
			continue
		}
		pause := unix.NsecToTimespec(int64(100 * time.Microsecond))
		_ = unix.Nanosleep(&pause, nil) // woken early, it only looks sooner
	}
}

const stillRunning unix.WaitStatus = 0x7fffffff

// wait returns the next stop. The end of the thread is errGone.
func (t *tracee) wait(flags int) (unix.WaitStatus, error) {
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(t.tid, &status, flags|unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ECHILD):
			return 0, errGone
		case err != nil:
			return 0, fmt.Errorf("wait for thread %d: %w", t.tid, err)
		case got == 0:
			return stillRunning, nil
		case status.Exited(), status.Signaled():
			return 0, errGone
		}
		return status, nil
	}
}

func (t *tracee) getRegisters(r *registers) error {
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(r))}
	iov.SetLen(int(unsafe.Sizeof(*r)))
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GETREGSET, uintptr(t.tid), ntPRStatus, uintptr(unsafe.Pointer(&iov)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("read the registers of thread %d: %w", t.tid, procError(errno))
	}
	// A 32-bit thread has another, smaller set.
	if iov.Len != uint64(unsafe.Sizeof(*r)) || r.foreignABI() {
		return ErrForeignABI
	}
	return nil
}

func (t *tracee) setRegisters(r *registers) error {
	iov := unix.Iovec{Base: (*byte)(unsafe.Pointer(r))}
	iov.SetLen(int(unsafe.Sizeof(*r)))
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SETREGSET, uintptr(t.tid), ntPRStatus, uintptr(unsafe.Pointer(&iov)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("write the registers of thread %d: %w", t.tid, procError(errno))
	}
	return nil
}

const ntPRStatus = 1 // NT_PRSTATUS, include/uapi/linux/elf.h

func ptrace(request, tid int, data uintptr) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), 0, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// ptraceData is ptrace with data to read or write. The pointer becomes a number
// in the call itself, because a stack that grows before it moves.
func ptraceData(request, tid int, addr uintptr, data unsafe.Pointer) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, uintptr(data), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// threads lists the threads of a process, those that stop soonest first.
func threads(pid int) ([]int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, procError(err)
	}
	type candidate struct{ tid, rank int }
	var all []candidate
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		st, err := readStat(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
		if err != nil {
			continue // it ended meanwhile
		}
		var rank int
		switch st.state {
		case 'S', 'R', 'I':
			rank = 0
		case 'T', 't':
			rank = 1
		case 'D':
			rank = 2
		default: // dead
			continue
		}
		all = append(all, candidate{tid, rank})
	}
	if len(all) == 0 {
		return nil, errGone
	}
	slices.SortStableFunc(all, func(a, b candidate) int { return a.rank - b.rank })
	tids := make([]int, len(all))
	for i, c := range all {
		tids[i] = c.tid
	}
	return tids, nil
}

// stat is what is needed of /proc/PID/stat (proc_pid_stat(5)).
type stat struct {
	state   byte
	ppid    int
	threads int
	// start is in clock ticks since boot: with the pid it names one process.
	start uint64
}

func readStat(path string) (stat, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return stat{}, procError(err)
	}
	st, err := parseStat(raw)
	if err != nil {
		return stat{}, fmt.Errorf("%s: %w", path, err)
	}
	return st, nil
}

func parseStat(raw []byte) (stat, error) {
	// The name, in parentheses, may hold anything, parentheses and spaces
	// included. What follows starts with the third field.
	end := bytes.LastIndexByte(raw, ')')
	fields := bytes.Fields(raw[end+1:])
	if end < 0 || len(fields) < 20 || len(fields[0]) != 1 {
		return stat{}, fmt.Errorf("malformed: %q", raw)
	}
	st := stat{state: fields[0][0]}
	var err error
	if st.ppid, err = strconv.Atoi(string(fields[4-3])); err != nil {
		return stat{}, fmt.Errorf("parent: %w", err)
	}
	if st.threads, err = strconv.Atoi(string(fields[20-3])); err != nil {
		return stat{}, fmt.Errorf("threads: %w", err)
	}
	if st.start, err = strconv.ParseUint(string(fields[22-3]), 10, 64); err != nil {
		return stat{}, fmt.Errorf("start time: %w", err)
	}
	return st, nil
}
