package track

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// A userfaultfd serves the memory of the process that created it, so the shard's
// process has to make that one system call itself. One of its threads is
// stopped, executes it, and goes on from where it was; the descriptor is taken
// out with pidfd_getfd and closed inside. Nothing is written into the process:
// the call is made with an instruction that its vdso has anyway.
//
// The other threads run on meanwhile. They can fork a child that inherits the
// descriptor (closeInherited takes it away again), or close it, which shows.
//
// Between the first changed register and the last restored one, some 200 µs,
// the daemon must not die: the kernel would let the thread go with the registers
// of the call.

// uffdUserModeOnly is UFFD_USER_MODE_ONLY: allowed to everyone, and enough,
// because asynchronous write-protection is resolved inside the kernel.
const uffdUserModeOnly = 1

// injectUserfaultfd has the process create a userfaultfd and returns it, with
// the time for which one of its threads was stopped. It is errBusy if no thread
// stopped soon enough, and errGone if the process ended.
func injectUserfaultfd(hostPID int) (fd int, pause time.Duration, err error) {
	fd = -1
	pause, err = onSomeThread(hostPID, func(t *tracee, pc uint64) error {
		const flags = unix.O_CLOEXEC | unix.O_NONBLOCK | uffdUserModeOnly
		inside, err := t.call(pc, unix.SYS_USERFAULTFD, flags, 0, 0)
		if err != nil {
			return err
		}
		if inside < 0 {
			return fmt.Errorf("userfaultfd in it: %w", unix.Errno(-inside))
		}
		fd, err = takeFile(hostPID, t.tid, int(inside))
		if err != nil {
			return err
		}
		// Another thread may have closed every descriptor and opened others: only
		// what is the userfaultfd for certain may be closed.
		if same, err := sameFile(fd, hostPID, int(inside)); err != nil || !same {
			return err
		}
		return t.close(pc, int(inside))
	})
	if err != nil && fd >= 0 {
		err = errors.Join(err, unix.Close(fd))
		fd = -1
	}
	return fd, pause, err
}

// closeInherited closes, inside a process, each descriptor that is one of ours,
// and returns how many there were: a child forked by another thread between the
// creation of the userfaultfd and its closing has a copy.
func closeInherited(hostPID int, ours []int) (int, error) {
	closed := 0
	for _, inside := range userfaultfds(hostPID) {
		for _, fd := range ours {
			same, err := sameFile(fd, hostPID, inside)
			if err != nil {
				return closed, err
			}
			if !same {
				continue
			}
			if _, err := onSomeThread(hostPID, func(t *tracee, pc uint64) error {
				return t.close(pc, inside)
			}); err != nil {
				return closed, err
			}
			closed++
		}
	}
	return closed, nil
}

// HandlesFaults says whether a process answers page faults of its own with a
// userfaultfd. To read memory of it that is not populated may take as long as it
// likes. False if the process has ended.
func HandlesFaults(hostPID int) bool { return len(userfaultfds(hostPID)) > 0 }

// userfaultfds lists the descriptors of a process that are userfaultfds.
func userfaultfds(hostPID int) []int {
	dir := fmt.Sprintf("/proc/%d/fd", hostPID)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // the process ended
	}
	var fds []int
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || link != userfaultfdLink {
			continue
		}
		if fd, err := strconv.Atoi(e.Name()); err == nil {
			fds = append(fds, fd)
		}
	}
	return fds
}

const userfaultfdLink = "anon_inode:[userfaultfd]"

// closeForked closes our descriptor in all processes started since a time: those
// that another thread of the process forked while it was open inside, and theirs
// in turn.
func closeForked(fd int, since uint64) error {
	for {
		// Not by /proc/PID/task/TID/children, which may leave out some while others
		// end. A process that was there all the time is in this list.
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return err
		}
		closed := 0
		for _, e := range entries {
			pid, err := strconv.Atoi(e.Name())
			if err != nil || pid == os.Getpid() {
				continue
			}
			st, err := readStat(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil || st.start < since || st.state == 'Z' {
				continue
			}
			n, err := closeInherited(pid, []int{fd})
			// One that does not stop is found when it is tracked itself.
			if err != nil && !errors.Is(err, errGone) && !errors.Is(err, errBusy) {
				return fmt.Errorf("process %d: %w", pid, err)
			}
			closed += n
		}
		if closed == 0 {
			return nil
		}
	}
}

// bootTicks is the time in the unit of a process's start, rounded down.
func bootTicks() uint64 {
	var now unix.Timespec
	// It cannot fail with a clock that exists and an address that is valid.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &now)
	const userHZ = 100 // on every platform that tranship supports
	return uint64(now.Nano()) / uint64(time.Second/userHZ)
}

// onSomeThread stops one thread of the process and runs f with it and with the
// address of a system call instruction. Whatever f returns, the thread goes on
// as it was, and the time for which it was stopped is returned.
func onSomeThread(hostPID int, f func(t *tracee, pc uint64) error) (time.Duration, error) {
	pc, err := findSyscallInstruction(hostPID)
	if err != nil {
		return 0, err
	}
	tids, err := threads(hostPID)
	if err != nil {
		return 0, err
	}
	tids = tids[:min(len(tids), stopAttempts)]
	err = errBusy
	var pause time.Duration
	for _, tid := range tids {
		err = onTracer(func() error {
			t, err := seize(tid)
			if err != nil {
				return err
			}
			err = t.borrowed(pc, f)
			pause = time.Since(t.stopped)
			return err
		})
		// A thread may end on its own without its process: try the next.
		if !errors.Is(err, errBusy) && !errors.Is(err, errGone) {
			break
		}
	}
	return pause, err
}

// borrowed lets f make system calls with a stopped thread, puts everything back
// and lets the thread go.
func (t *tracee) borrowed(pc uint64, f func(t *tracee, pc uint64) error) (err error) {
	// The memory may have changed since the instruction was looked up.
	var word uint64
	if err := ptraceData(unix.PTRACE_PEEKTEXT, t.tid, uintptr(pc), unsafe.Pointer(&word)); err != nil ||
		!bytes.Equal(instructionAt(word), syscallInstruction) {
		return errors.Join(errBusy, t.detach())
	}
	if err := t.refusesCalls(); err != nil {
		return errors.Join(err, t.detach())
	}
	resume := t.saved
	if err := t.abortRestartableSequence(&resume); err != nil {
		return errors.Join(err, t.detach())
	}
	// Blocked, signals wait until the thread is itself again. If it sleeps in a
	// call with a temporary mask, such as ppoll, this is the permanent one, which
	// is right: the call is entered again and sets its mask again.
	mask, err := t.signalMask()
	if err != nil {
		return errors.Join(err, t.detach())
	}
	defer func() {
		err = errors.Join(err, t.restore(&resume, mask))
	}()
	if err := t.setSignalMask(^uint64(0)); err != nil {
		return err
	}
	return f(t, pc)
}

// call makes one system call and returns its result. It does not give up: a
// thread with borrowed registers cannot be left alone.
func (t *tracee) call(pc uint64, nr, a0, a1, a2 uint64) (int64, error) {
	regs := t.saved.call(pc, nr, a0, a1, a2)
	if err := t.setRegisters(&regs); err != nil {
		return 0, err
	}
	var signal unix.Signal
	for stops := 0; stops < 2; { // at its entry and at its exit
		status, err := t.resume(unix.PTRACE_SYSCALL, signal)
		if err != nil {
			return 0, err
		}
		signal = 0
		switch {
		case trapped(status):
			// A group stop began. It is resumed after the detachment.
		case status.StopSignal() == unix.SIGTRAP|0x80:
			stops++
		case status.StopSignal() == unix.SIGSTOP:
			signal = unix.SIGSTOP // it cannot be blocked: let it begin the group stop
		default:
			return 0, fmt.Errorf("thread %d was hit by %v in a borrowed system call", t.tid, status.StopSignal())
		}
	}
	if err := t.getRegisters(&regs); err != nil {
		return 0, err
	}
	return regs.result(), nil
}

// close closes a descriptor of the thread's process.
func (t *tracee) close(pc uint64, fd int) error {
	result, err := t.call(pc, unix.SYS_CLOSE, uint64(fd), 0, 0)
	if err != nil {
		return err
	}
	if result < 0 && unix.Errno(-result) != unix.EBADF {
		return fmt.Errorf("close of descriptor %d in thread %d: %w", fd, t.tid, unix.Errno(-result))
	}
	return nil
}

// restore brings the thread to the place where it was found, the kernel's signal
// delivery, and gives it back its registers and mask there. So it is the kernel
// that restarts an interrupted call, with the time it had left, or returns EINTR
// because a handler runs.
func (t *tracee) restore(regs *registers, mask uint64) error {
	if err := ptrace(unix.PTRACE_INTERRUPT, t.tid, 0); err != nil {
		return fmt.Errorf("interrupt thread %d: %w", t.tid, procError(err))
	}
	var signal unix.Signal
	for {
		status, err := t.resume(unix.PTRACE_CONT, signal)
		if err != nil {
			return err
		}
		if trapped(status) {
			break
		}
		signal = 0
		if status.StopSignal() == unix.SIGSTOP {
			signal = unix.SIGSTOP
		}
	}
	return errors.Join(t.setRegisters(regs), t.setSignalMask(mask), t.detach())
}

func (t *tracee) resume(request int, signal unix.Signal) (unix.WaitStatus, error) {
	if err := ptrace(request, t.tid, uintptr(signal)); err != nil {
		return 0, fmt.Errorf("resume thread %d: %w", t.tid, procError(err))
	}
	return t.wait(0)
}

func (t *tracee) signalMask() (uint64, error) {
	var mask uint64
	if err := ptraceData(unix.PTRACE_GETSIGMASK, t.tid, kernelSigset, unsafe.Pointer(&mask)); err != nil {
		return 0, fmt.Errorf("read the signal mask of thread %d: %w", t.tid, procError(err))
	}
	return mask, nil
}

func (t *tracee) setSignalMask(mask uint64) error {
	if err := ptraceData(unix.PTRACE_SETSIGMASK, t.tid, kernelSigset, unsafe.Pointer(&mask)); err != nil {
		return fmt.Errorf("write the signal mask of thread %d: %w", t.tid, procError(err))
	}
	return nil
}

// refusesCalls finds out whether the thread has its own system calls sent back
// to it as signals (syscall user dispatch, as Wine does).
func (t *tracee) refusesCalls() error {
	const getDispatch = 0x4211 // PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, Linux 6.4
	var config struct{ mode, selector, offset, length uint64 }
	err := ptraceData(getDispatch, t.tid, unsafe.Sizeof(config), unsafe.Pointer(&config))
	if err == nil && config.mode != 0 {
		return fmt.Errorf("thread %d uses syscall user dispatch: %w", t.tid, ErrForeignABI)
	}
	return nil // an older kernel cannot tell
}

// abortRestartableSequence does what the kernel does when it interrupts a thread
// inside a restartable sequence (rseq(2)): it makes it start over. The kernel
// itself looks at the address of the borrowed call instead.
func (t *tracee) abortRestartableSequence(regs *registers) error {
	var config struct {
		area            uint64
		size, signature uint32
		flags, _        uint32
	}
	if err := ptraceData(unix.PTRACE_GET_RSEQ_CONFIGURATION, t.tid, unsafe.Sizeof(config), unsafe.Pointer(&config)); err != nil || config.area == 0 {
		return nil // the kernel has no rseq, or the thread does not use it
	}
	var sequence uint64
	const sequenceOffset = 8 // struct rseq: cpu_id_start, cpu_id, rseq_cs
	if err := ptraceData(unix.PTRACE_PEEKDATA, t.tid, uintptr(config.area+sequenceOffset), unsafe.Pointer(&sequence)); err != nil {
		return fmt.Errorf("read the rseq area of thread %d: %w", t.tid, procError(err))
	}
	if sequence == 0 {
		return nil
	}
	// struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip.
	var field [4]uint64
	for i := range field {
		if err := ptraceData(unix.PTRACE_PEEKDATA, t.tid, uintptr(sequence)+uintptr(i*8), unsafe.Pointer(&field[i])); err != nil {
			return fmt.Errorf("read the restartable sequence of thread %d: %w", t.tid, procError(err))
		}
	}
	start, length, abort := field[1], field[2], field[3]
	if regs.pc()-start < length {
		regs.setPC(abort)
	}
	return nil
}

// findSyscallInstruction looks for a system call instruction that the process
// can execute, in the vdso if it has one.
func findSyscallInstruction(hostPID int) (uint64, error) {
	all, err := readMaps(hostPID)
	if err != nil {
		return 0, err
	}
	if len(all) == 0 {
		return 0, errGone
	}
	const enough = 4 << 20 // every C library has one long before
	search := func(m mapping) (uint64, bool) {
		code := make([]byte, min(m.end-m.start, enough))
		if err := ReadMemory(hostPID, m.start, code, func(uint64, checkpoint.Pages) {}); err != nil {
			return 0, false
		}
		i := bytes.Index(code, syscallInstruction)
		return m.start + uint64(i), i >= 0
	}
	for _, vdso := range []bool{true, false} {
		for _, m := range all {
			if m.exec && m.name != "[vsyscall]" && (m.name == "[vdso]") == vdso {
				if pc, ok := search(m); ok {
					return pc, nil
				}
			}
		}
	}
	// None of it can be read when the process ended meanwhile.
	if all, err := readMaps(hostPID); err != nil || len(all) == 0 {
		return 0, errGone
	}
	return 0, errors.New("no system call instruction in its memory")
}

// takeFile duplicates a descriptor of a process into this one, and makes sure
// that it is a userfaultfd.
func takeFile(hostPID, tid, inside int) (int, error) {
	fd, err := takeDescriptor(hostPID, inside, 0)
	if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
		// The main thread has no descriptors when it has exited.
		if byThread, threadErr := takeDescriptor(tid, inside, unix.PIDFD_THREAD); threadErr == nil {
			fd, err = byThread, nil
		}
	}
	if errors.Is(err, unix.EBADF) {
		return -1, errBusy // another thread has closed it: try again later
	}
	if err != nil {
		return -1, fmt.Errorf("take the userfaultfd: %w", procError(err))
	}
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err == nil && link != userfaultfdLink {
		err = errBusy // another thread has put something else in its place
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func takeDescriptor(pid, inside, flags int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, flags)
	if err != nil {
		return -1, err
	}
	defer func() { _ = unix.Close(pidfd) }() // read only: nothing to lose
	return unix.PidfdGetfd(pidfd, inside, 0)
}

// sameFile says whether our descriptor and one of another process are the same
// open file.
func sameFile(fd, hostPID, inside int) (bool, error) {
	const kcmpFile = 0
	r, err := kcmp(os.Getpid(), hostPID, kcmpFile, fd, inside)
	if errors.Is(err, unix.EBADF) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("compare descriptors with process %d: %w", hostPID, procError(err))
	}
	return r == 0, nil
}

// sameMemory says whether two processes share one address space.
func sameMemory(a, b int) (bool, error) {
	const kcmpVM = 1
	r, err := kcmp(a, b, kcmpVM, 0, 0)
	if err != nil {
		return false, fmt.Errorf("compare the memory of processes %d and %d: %w", a, b, procError(err))
	}
	return r == 0, nil
}

func kcmp(a, b, kind, x, y int) (int, error) {
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), uintptr(kind), uintptr(x), uintptr(y), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
