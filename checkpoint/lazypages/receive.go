package lazypages

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// CRIU's protocol (criu/uffd.c; the same in 4.1.1 and 4.2): one stream
// connection, on which each task sends its pid as a native int32 and then one
// byte with its userfaultfd by SCM_RIGHTS. The pid of a zombie is negative and no
// descriptor follows. At the end comes restoreFinished, as uint32, when every
// task is stopped before its first instruction. CRIU waits for no answer.
const restoreFinished = 0x52535446

// pidLimit is the kernel's PID_MAX_LIMIT; it tells pids from restoreFinished.
const pidLimit = 1 << 22

type received int

const (
	gotTask received = iota
	gotZombie
	gotFinished
)

func (t Task) close() {
	for _, fd := range []int{t.PIDFD, t.UFFD} {
		if fd > 0 {
			_ = unix.Close(fd)
		}
	}
}

// listenLazy listens for CRIU. The kernel is asked to name the sender of each
// message: every task sends its own, and that is how its host pid is known.
func listenLazy(path string) (*net.UnixListener, error) {
	l, err := listen(path)
	if err != nil {
		return nil, err
	}
	raw, err := l.SyscallConn()
	if err == nil {
		ctlErr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
		})
		err = errors.Join(err, ctlErr)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
	}
	return l, nil
}

// listen makes a unix socket for root alone; a stale one is replaced.
func listen(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	var l *net.UnixListener
	err := withShortPath(path, func(short string) (err error) {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false) // its name may be the short one
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
	}
	return l, nil
}

// withShortPath calls use with a name for path that fits into a socket address:
// 108 bytes, and containerd's work directories can be longer.
func withShortPath(path string, use func(string) error) error {
	if len(path) < 100 {
		return use(path)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return use(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)))
}

// watchPeer ends the stream when the process that connected, CRIU itself, has
// died. The tasks hold the connection too, and would wait for CRIU for ever.
// What was sent before is still read. stop ends the watch.
func watchPeer(conn *net.UnixConn) (stop func(), err error) {
	fail := func(err error) (func(), error) { return nil, fmt.Errorf("watch CRIU: %w", err) }
	raw, err := conn.SyscallConn()
	if err != nil {
		return fail(err)
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, ctlErr); err != nil {
		return fail(err)
	}
	pidfd, err := unix.PidfdOpen(int(cred.Pid), 0)
	if errors.Is(err, unix.ESRCH) { // dead already
		return func() {}, conn.CloseRead()
	}
	if err != nil {
		return fail(err)
	}
	end, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return fail(errors.Join(err, unix.Close(pidfd)))
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}, {Fd: int32(end), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds, -1); err != unix.EINTR {
				break
			}
		}
		if fds[0].Revents != 0 {
			_ = conn.CloseRead()
		}
	}()
	return func() {
		_, _ = unix.Write(end, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		<-done
		closeAll([]int{pidfd, end})
	}, nil
}

// receiveTask reads the next thing that CRIU says.
func receiveTask(conn *net.UnixConn) (Task, received, error) {
	var word [4]byte
	for n := 0; n < len(word); {
		m, _, fds, err := receiveMessage(conn, word[n:])
		closeAll(fds)
		if err == nil && len(fds) > 0 {
			err = errors.New("a descriptor before its pid")
		}
		if err != nil {
			return Task{}, 0, fmt.Errorf("pid of a task: %w", err)
		}
		n += m
	}
	pid := int32(binary.NativeEndian.Uint32(word[:]))
	switch {
	case pid == restoreFinished:
		return Task{}, gotFinished, nil
	case pid < 0 && pid > -pidLimit:
		return Task{}, gotZombie, nil
	case pid <= 0 || pid > pidLimit:
		return Task{}, 0, fmt.Errorf("%d is not a pid", pid)
	}
	var dummy [1]byte
	_, sender, fds, err := receiveMessage(conn, dummy[:])
	if err == nil && len(fds) != 1 {
		err = fmt.Errorf("%d descriptors", len(fds))
	}
	if err != nil {
		closeAll(fds)
		return Task{}, 0, fmt.Errorf("userfaultfd of pid %d: %w", pid, err)
	}
	task := Task{PID: checkpoint.PID(pid), HostPID: sender, UFFD: fds[0]}
	if task.PIDFD, err = identify(sender, pid); err != nil {
		closeAll(fds)
		return Task{}, 0, fmt.Errorf("userfaultfd of pid %d: %w", pid, err)
	}
	return task, gotTask, nil
}

// identify returns a pidfd of the host process that calls itself pid. The
// process waits for CRIU, so its number cannot have been given to another.
func identify(hostPID int, pid int32) (int, error) {
	if hostPID <= 0 {
		return 0, errors.New("the kernel does not know its sender")
	}
	pidfd, err := unix.PidfdOpen(hostPID, 0)
	if err != nil {
		return 0, fmt.Errorf("sender %d: %w", hostPID, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", hostPID))
	if err != nil {
		return 0, errors.Join(fmt.Errorf("sender %d: %w", hostPID, err), unix.Close(pidfd))
	}
	if !slices.Contains(statusField(status, "NSpid"), strconv.Itoa(int(pid))) {
		return 0, errors.Join(fmt.Errorf("sender %d has another pid", hostPID), unix.Close(pidfd))
	}
	return pidfd, nil
}

// statusField returns the words of a field of /proc/PID/status.
func statusField(status []byte, name string) []string {
	for line := range bytes.Lines(status) {
		if key, value, ok := strings.Cut(string(line), ":"); ok && key == name {
			return strings.Fields(value)
		}
	}
	return nil
}

// receiveMessage reads at most len(buf) bytes with the host pid of their sender
// and the descriptors that came along, which belong to the caller.
func receiveMessage(conn *net.UnixConn, buf []byte) (n, sender int, fds []int, err error) {
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*8))
	n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return 0, 0, nil, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return 0, 0, nil, fmt.Errorf("control message: %w", err)
	}
	for i := range msgs {
		if cred, err := unix.ParseUnixCredentials(&msgs[i]); err == nil {
			sender = int(cred.Pid)
		} else if got, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	switch {
	case flags&unix.MSG_CTRUNC != 0:
		closeAll(fds)
		return 0, 0, nil, errors.New("control message cut short")
	case n == 0:
		closeAll(fds)
		return 0, 0, nil, io.ErrUnexpectedEOF
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	return n, sender, fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}
