package track

import "golang.org/x/sys/unix"

// Calls that only amd64 has; the C library uses newer ones elsewhere.
const (
	sysPoll      = unix.SYS_POLL
	sysSelect    = unix.SYS_PSELECT6
	sysEpollWait = unix.SYS_EPOLL_WAIT
	sysPause     = unix.SYS_PAUSE
)
