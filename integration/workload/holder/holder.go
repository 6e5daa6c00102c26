// Package holder keeps one kernel object open that no checkpoint can carry, so
// that tests can see a shard with it refused.
package holder

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Kinds lists what Hold knows.
func Kinds() []string { return slices.Sorted(maps.Keys(kinds)) }

var kinds = map[string]func() (int, error){
	"io_uring":    ioUring,
	"userfaultfd": userfaultfd,
	"mptcp":       func() (int, error) { return unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP) },
	"perf_event":  perfEvent,
}

// Hold opens the object, calls ready, and keeps it open until ctx is done.
func Hold(ctx context.Context, kind string, ready func() error) error {
	open, ok := kinds[kind]
	if !ok {
		return fmt.Errorf("unknown kind %q, there are %s", kind, strings.Join(Kinds(), ", "))
	}
	fd, err := open()
	if err != nil {
		return fmt.Errorf("open %s: %w", kind, err)
	}
	defer unix.Close(fd)
	if err := ready(); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// ioUring needs no more than a place for the kernel's answer (io_uring_setup(2)).
func ioUring() (int, error) {
	var params [120]byte // struct io_uring_params
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params[0])), 0)
	return result(fd, errno)
}

func userfaultfd() (int, error) {
	const userModeOnly = 1 // UFFD_USER_MODE_ONLY, include/uapi/linux/userfaultfd.h
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|userModeOnly, 0, 0)
	return result(fd, errno)
}

func perfEvent() (int, error) {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_DUMMY, Bits: unix.PerfBitExcludeKernel}
	attr.Size = uint32(unsafe.Sizeof(attr))
	return unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
}

func result(fd uintptr, errno unix.Errno) (int, error) {
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}
