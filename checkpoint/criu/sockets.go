package criu

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// repairOffNoProbe leaves TCP repair mode without sending a window probe
// (TCP_REPAIR_OFF_NO_WP, linux/tcp.h): the peer must not hear from a source
// whose link is just coming back.
const repairOffNoProbe = -1

// ReleaseSockets takes every TCP socket of the processes out of repair mode. A
// CRIU that was killed leaves them in it, and a socket in repair mode neither
// sends nor answers. It returns how many there were; processes and descriptors
// that vanish meanwhile are no error.
func ReleaseSockets(hostPIDs []int) (int, error) {
	released := 0
	var errs []error
	for _, pid := range hostPIDs {
		n, err := releaseProcess(pid)
		released += n
		if err != nil {
			errs = append(errs, fmt.Errorf("TCP sockets of process %d: %w", pid, err))
		}
	}
	return released, errors.Join(errs...)
}

func releaseProcess(pid int) (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			return 0, nil
		}
		return 0, err
	}
	var sockets []int
	for _, e := range entries {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		if err != nil || !strings.HasPrefix(target, "socket:") {
			continue
		}
		if fd, err := strconv.Atoi(e.Name()); err == nil {
			sockets = append(sockets, fd)
		}
	}
	if len(sockets) == 0 {
		return 0, nil
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return 0, nil
		}
		return 0, fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(pidfd)
	released := 0
	for _, fd := range sockets {
		sock, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
				continue
			}
			return released, fmt.Errorf("pidfd_getfd %d: %w", fd, err)
		}
		on, err := unix.GetsockoptInt(sock, unix.IPPROTO_TCP, unix.TCP_REPAIR)
		if err == nil && on != 0 {
			if err = unix.SetsockoptInt(sock, unix.IPPROTO_TCP, unix.TCP_REPAIR, repairOffNoProbe); err == nil {
				released++
			}
		} else {
			err = nil // not a TCP socket
		}
		_ = unix.Close(sock)
		if err != nil {
			return released, fmt.Errorf("leave repair mode on %d: %w", fd, err)
		}
	}
	return released, nil
}
