package track

import "golang.org/x/sys/unix"

const (
	sysPoll      = unix.SYS_PPOLL
	sysSelect    = unix.SYS_PSELECT6
	sysEpollWait = unix.SYS_EPOLL_PWAIT
	sysPause     = unix.SYS_PPOLL
)
