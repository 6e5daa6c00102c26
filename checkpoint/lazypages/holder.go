package lazypages

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A holder is a second process with the server's table of descriptors (clone(2)
// with CLONE_FILES, without CLONE_VM): what the server has open, a child's
// userfaultfd that came with an event a moment ago included, stays open when the
// server dies. What the server closes is closed.
//
// It is not another program, because execve(2) gives a process a table of its
// own, and not Go: it runs a few system calls, with every signal blocked, on its
// copy of the stack of the thread that cloned it. Nothing of Go's runtime works
// there.
//
// When the server has died, it closes everything but userfaultfds, so that the
// server's clients see the end of their connections and its lock is free. Then
// it waits to be killed, by the server that takes over or by the daemon.

// holderName is at most 15 characters, as the kernel keeps them.
var holderName = [16]byte{'t', 'r', 'a', 'n', 's', 'h', 'i', 'p', '-', 'h', 'o', 'l', 'd'}

// maxGap ends a holder's walk through the table: descriptors get the lowest
// number that is free, so a longer gap needs as many that were closed at once.
const maxGap = 1 << 16

// cloneHolder returns the holder's pid. server is a pidfd of this process; the
// holder ends with it until the eventfd gate is readable.
//
//go:nosplit
//go:norace
//go:noinline
func cloneHolder(server, gate int32) (int, unix.Errno) {
	pid, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, uintptr(syscall.SIGCHLD|unix.CLONE_FILES), 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		return int(pid), errno
	}
	syscall.RawSyscall(syscall.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(&holderName)), 0)
	syscall.RawSyscall(syscall.SYS_SETSID, 0, 0, 0) // a signal to the server's group is not for both
	fds := [2]unix.PollFd{{Fd: server, Events: unix.POLLIN}, {Fd: gate, Events: unix.POLLIN}}
	for fds[1].Revents == 0 {
		if fds[0].Revents != 0 {
			syscall.RawSyscall(syscall.SYS_EXIT_GROUP, 0, 0, 0)
		}
		syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), 2, 0, 0, 0, 0)
	}
	for fds[0].Revents == 0 {
		syscall.RawSyscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), 1, 0, 0, 0, 0)
	}
	// A userfaultfd, and nothing else that a server has, knows UFFDIO_WAKE and says
	// that no range is none.
	var none uffdRange
	for fd, gap := uintptr(0), 0; gap < maxGap; fd++ {
		_, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, fd, uffdioWake, uintptr(unsafe.Pointer(&none)))
		if errno == unix.EBADF {
			gap++
			continue
		}
		gap = 0
		if errno != unix.EINVAL {
			syscall.RawSyscall(syscall.SYS_CLOSE, fd, 0, 0)
		}
	}
	for {
		syscall.RawSyscall6(syscall.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
	}
}

// startHolder clones a holder that waits at its gate.
func startHolder(server, gate int) (int, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// A signal would run Go's handler there.
	var all, before unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^uint64(0)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &before); err != nil {
		return 0, fmt.Errorf("holder: block signals: %w", err)
	}
	pid, errno := cloneHolder(int32(server), int32(gate))
	err := unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil)
	if errno != 0 {
		return 0, fmt.Errorf("holder: clone: %w", errno)
	}
	if err != nil {
		return pid, fmt.Errorf("holder: unblock signals: %w", err)
	}
	return pid, nil
}

const (
	// A holder that dies is followed by another, at most holderLimit times in
	// holderSpan: somebody may kill it, but if it dies by itself, so will the next.
	holderLimit = 100
	holderSpan  = time.Minute
)

// keeper sees to it that a server has a holder, and that whoever takes over finds
// it: its pid is on file before it may outlive the server.
type keeper struct {
	dir    string // of the store
	self   int    // pidfd
	endFD  int    // an eventfd; readable when the watch is to end
	failed func(error)
	watch  sync.WaitGroup

	mu    sync.Mutex // guards what follows
	state fillState
	gate  int
	pid   int // of the holder
	pidfd int // -1 without one
}

// newKeeper starts the first holder. state is written with it; failed is told
// when there is none any more and the server lives.
func newKeeper(dir string, state fillState, failed func(error)) (*keeper, error) {
	k := &keeper{dir: dir, self: -1, endFD: -1, gate: -1, pidfd: -1, state: state, failed: failed}
	var err error
	if k.self, err = unix.PidfdOpen(os.Getpid(), 0); err == nil {
		k.endFD, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err == nil {
		err = k.start()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("keep a holder: %w", err), k.close())
	}
	k.watch.Go(k.keep)
	return k, nil
}

// start puts another holder in the place of the last, which has ended.
func (k *keeper) start() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var err error
	if k.gate, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return err
	}
	pid, err := startHolder(k.self, k.gate)
	if pid == 0 {
		return err
	}
	k.pid = pid
	if k.pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
		return err // it ends with this process
	}
	holder, err := procOf(pid)
	if err != nil {
		return err
	}
	k.state.holderStarts(holder)
	if err := k.state.write(k.dir); err != nil {
		return err
	}
	if _, err := unix.Write(k.gate, []byte{1, 0, 0, 0, 0, 0, 0, 0}); err != nil || k.state.next {
		return err
	}
	k.state.Holder, k.state.Heir = holder, proc{}
	return k.state.write(k.dir)
}

// update changes the state on file.
func (k *keeper) update(change func(*fillState)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	change(&k.state)
	return k.state.write(k.dir)
}

// keep follows holders that die by others.
func (k *keeper) keep() {
	var began []time.Time
	for {
		fds := []unix.PollFd{{Fd: int32(k.endFD), Events: unix.POLLIN}, {Fd: int32(k.pidfd), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			k.failed(fmt.Errorf("watch the holder: %w", err))
			return
		}
		if fds[0].Revents != 0 {
			return
		}
		if fds[1].Revents == 0 {
			continue
		}
		k.reap()
		now := time.Now()
		if began = append(began, now); len(began) > holderLimit {
			if now.Sub(began[0]) < holderSpan {
				k.failed(fmt.Errorf("%d holders died within %v", len(began), holderSpan))
				return
			}
			began = began[1:]
		}
		if err := k.start(); err != nil {
			k.failed(fmt.Errorf("another holder: %w", err))
			return
		}
	}
}

// reap collects a holder that has died.
func (k *keeper) reap() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.pidfd >= 0 {
		for {
			if _, err := unix.Wait4(k.pid, nil, 0, nil); err != unix.EINTR {
				break
			}
		}
	}
	closeAll([]int{k.pidfd, k.gate})
	k.pidfd, k.gate = -1, -1
}

// close ends the holder: nothing is left to hold, or nobody.
func (k *keeper) close() error {
	if k.endFD >= 0 {
		_, _ = unix.Write(k.endFD, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
	k.watch.Wait()
	var err error
	if k.pidfd >= 0 {
		if err = unix.PidfdSendSignal(k.pidfd, unix.SIGKILL, nil, 0); errors.Is(err, unix.ESRCH) {
			err = nil
		}
	}
	if err == nil {
		k.reap()
	}
	closeAll([]int{k.self, k.endFD})
	return err
}
