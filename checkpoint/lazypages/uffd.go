package lazypages

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// ioctls and messages of include/uapi/linux/userfaultfd.h; amd64 and arm64 share
// the encoding.
const (
	uffdioWake     = 0x8010aa02
	uffdioCopy     = 0xc028aa03
	uffdioZeropage = 0xc020aa04

	eventPagefault = 0x12
	eventFork      = 0x13
	eventRemap     = 0x14
	eventRemove    = 0x15
	eventUnmap     = 0x16

	msgSize = 32
)

type uffdRange struct{ start, length uint64 }

type uffdCopy struct {
	dst, src, length, mode uint64
	copied                 int64
}

type uffdZeropage struct {
	uffdRange
	mode   uint64
	zeroed int64
}

// message is a decoded uffd_msg. Of the fields only those of its event are set.
type message struct {
	event byte
	addr  uint64 // page fault
	child int32  // fork: the child's userfaultfd, opened in this process
	from  uint64 // remap
	to    uint64
	size  uint64
	span  span // remove, unmap
}

func decodeMessage(raw []byte) (message, error) {
	if len(raw) < msgSize {
		return message{}, fmt.Errorf("userfaultfd message of %d bytes", len(raw))
	}
	m := message{event: raw[0]}
	arg := func(i int) uint64 { return binary.NativeEndian.Uint64(raw[8+8*i:]) }
	switch m.event {
	case eventPagefault:
		m.addr = arg(1) &^ (checkpoint.PageSize - 1)
	case eventFork:
		m.child = int32(binary.NativeEndian.Uint32(raw[8:]))
	case eventRemap:
		m.from, m.to, m.size = arg(0), arg(1), arg(2)
	case eventRemove, eventUnmap:
		m.span = span{arg(0), arg(1)}
	default:
		return m, fmt.Errorf("unknown userfaultfd event %#x", m.event)
	}
	return m, nil
}

// outcome says why an operation on a userfaultfd ended where it did.
type outcome int

const (
	// placed: all or a part was done, the count says how much.
	placed outcome = iota
	// present: the first page was there already.
	present
	// changing: an operation on the mappings is under way whose event must be
	// read first (or has been read by a thread that has not yet gone on).
	changing
	// absent: the range is not registered, or spans two mappings, and no event
	// that says so is outstanding.
	absent
	// gone: the process has exited or executed another program.
	gone
	// noMemory: the page could not be allocated or charged to the shard's cgroup.
	noMemory
)

// copyTo places src at addr.
func copyTo(fd int, addr uint64, src []byte) (checkpoint.Pages, outcome, error) {
	arg := uffdCopy{dst: addr, src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(src)))), length: uint64(len(src))}
	errno := ioctl(fd, uffdioCopy, unsafe.Pointer(&arg))
	n, out, err := classify(errno, arg.copied, arg.length)
	out = orChanging(fd, out)
	if err != nil {
		err = fmt.Errorf("place %d bytes at %#x: %w", len(src), addr, err)
	}
	return n, out, err
}

// zeroAt places n zero pages at addr.
func zeroAt(fd int, addr uint64, n checkpoint.Pages) (checkpoint.Pages, outcome, error) {
	arg := uffdZeropage{uffdRange: uffdRange{addr, uint64(n.Bytes())}}
	errno := ioctl(fd, uffdioZeropage, unsafe.Pointer(&arg))
	done, out, err := classify(errno, arg.zeroed, arg.length)
	out = orChanging(fd, out)
	if err != nil {
		err = fmt.Errorf("place %d zero pages at %#x: %w", n, addr, err)
	}
	return done, out, err
}

// orChanging doubts that a range is absent. The kernel looks whether mappings
// change, then, since Linux 6.9 without a lock in between, for the mapping, and
// only in a mapping that it has found does it look again (mfill_atomic of
// mm/userfaultfd.c). One that leaves, or moves, meanwhile is not found although
// its event has not been read. By now the event counts: a second question says so.
func orChanging(fd int, out outcome) outcome {
	if out != absent {
		return out
	}
	// The first thing that is looked at; nothing can be copied to no range.
	var nothing uffdCopy
	if ioctl(fd, uffdioCopy, unsafe.Pointer(&nothing)) == unix.EAGAIN {
		return changing
	}
	return absent
}

// wake lets the threads that wait for a page at addr try again.
func wake(fd int, addr uint64) error {
	arg := uffdRange{addr, checkpoint.PageSize}
	if errno := ioctl(fd, uffdioWake, unsafe.Pointer(&arg)); errno != 0 {
		return fmt.Errorf("wake %#x: %w", addr, errno)
	}
	return nil
}

// classify reads the answer of UFFDIO_COPY and UFFDIO_ZEROPAGE. A part of the
// range done is EAGAIN with a positive count; EAGAIN with nothing done means
// that the mappings are changing.
func classify(errno unix.Errno, done int64, length uint64) (checkpoint.Pages, outcome, error) {
	switch errno {
	case 0:
		return checkpoint.Pages(length / checkpoint.PageSize), placed, nil
	case unix.EAGAIN:
		if done > 0 {
			return checkpoint.Pages(done / checkpoint.PageSize), placed, nil
		}
		return 0, changing, nil
	case unix.EEXIST:
		return 0, present, nil
	case unix.ENOENT:
		return 0, absent, nil
	case unix.ESRCH, unix.ENOSPC: // ENOSPC: kernels before 4.13
		return 0, gone, nil
	case unix.ENOMEM:
		return 0, noMemory, nil
	}
	return 0, placed, errno
}

// prober asks a userfaultfd questions without placing anything: a copy from
// memory that cannot be read fails, if not earlier for another reason.
type prober struct{ unreadable []byte }

func newProber() (prober, error) {
	mem, err := unix.Mmap(-1, 0, checkpoint.PageSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return prober{}, fmt.Errorf("map a page: %w", err)
	}
	return prober{mem}, nil
}

func (p prober) close() error { return unix.Munmap(p.unreadable) }

// ask returns changing, gone or absent, or present when addr is registered.
func (p prober) ask(fd int, addr uint64) (outcome, error) {
	_, out, err := copyTo(fd, addr, p.unreadable)
	switch {
	case errors.Is(err, unix.EFAULT):
		return present, nil
	case err != nil:
		return out, err
	case out == placed:
		return out, fmt.Errorf("probe at %#x placed a page", addr)
	}
	return out, nil
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) unix.Errno {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		if errno != unix.EINTR {
			return errno
		}
	}
}
