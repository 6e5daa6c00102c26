package track

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// ReadMemory fills dst, a whole number of pages, with the memory of a process
// from addr, which is page-aligned. It neither stops the process nor cares about
// the protection of its memory.
//
// Pages that are not mapped any more are zeroed in dst and reported through
// gone, in ascending order: the caller leaves them out, and the next Collect
// sees what became of them. All of them are gone when the process has ended.
// Reading a page that is mapped but not populated gives zeros, and leaves the
// zero page behind there.
func ReadMemory(hostPID int, addr uint64, dst []byte, gone func(addr uint64, n checkpoint.Pages)) error {
	if addr%checkpoint.PageSize != 0 || len(dst)%checkpoint.PageSize != 0 {
		return fmt.Errorf("read %d bytes at %#x of process %d: not whole pages", len(dst), addr, hostPID)
	}
	r := reader{pid: hostPID, gone: gone}
	err := r.read(addr, dst)
	r.flush()
	if closeErr := r.close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("read the memory of process %d: %w", hostPID, err)
	}
	return nil
}

type reader struct {
	pid  int
	gone func(addr uint64, n checkpoint.Pages)
	// mem and pagemap are opened by the first page that needs them.
	mem, pagemap *os.File
	// from and n are the run of missing pages not yet reported.
	from uint64
	n    checkpoint.Pages
}

// memRun is how much is read at a time through /proc/PID/mem, which ignores
// protection but copies twice: so much that a mapping without read permission
// costs little, and so little that a readable one behind it is soon read the
// fast way again.
const memRun = 128 << 10

func (r *reader) read(addr uint64, dst []byte) error {
	for len(dst) > 0 {
		n, err := readv(r.pid, addr, dst)
		if errors.Is(err, unix.ESRCH) {
			r.missing(addr, dst)
			return nil
		}
		if err != nil && !errors.Is(err, unix.EFAULT) {
			return fmt.Errorf("%d bytes at %#x: %w", len(dst), addr, err)
		}
		// Whole pages: the kernel copies page by page and stops before the first
		// that it cannot have.
		n -= n % checkpoint.PageSize
		addr, dst = addr+uint64(n), dst[n:]
		if len(dst) == 0 {
			break
		}
		if n == 0 {
			if n, err = r.forced(addr, dst); err != nil {
				return err
			}
			addr, dst = addr+uint64(n), dst[n:]
		}
	}
	return nil
}

// forced reads what process_vm_readv refuses, up to memRun, or accounts for one
// missing page.
func (r *reader) forced(addr uint64, dst []byte) (int, error) {
	if r.mem == nil {
		var err error
		if r.mem, err = os.Open(fmt.Sprintf("/proc/%d/mem", r.pid)); err != nil {
			if err = procError(err); !errors.Is(err, errGone) {
				return 0, err
			}
			r.missing(addr, dst)
			return len(dst), nil
		}
	}
	const attempts = 3
	for attempt := 1; ; attempt++ {
		n, err := unix.Pread(int(r.mem.Fd()), dst[:min(len(dst), memRun)], int64(addr))
		if n >= checkpoint.PageSize {
			return n - n%checkpoint.PageSize, nil
		}
		if err != nil && !errors.Is(err, unix.EIO) && !errors.Is(err, unix.EFAULT) && !errors.Is(err, unix.ESRCH) {
			return 0, fmt.Errorf("the page at %#x: %w", addr, err)
		}
		there, lookErr := r.populated(addr)
		if lookErr != nil {
			return 0, lookErr
		}
		if !there {
			r.missing(addr, dst[:checkpoint.PageSize])
			return checkpoint.PageSize, nil
		}
		// It may have been mapped since the attempt to read it. A page that stays
		// unreadable is poisoned, or the kernel's proc_mem.force_override forbids.
		if attempt == attempts {
			return 0, fmt.Errorf("the page at %#x is there but cannot be read: %w", addr, errors.Join(err, io.ErrUnexpectedEOF))
		}
	}
}

// populated says whether a page holds anything.
func (r *reader) populated(addr uint64) (bool, error) {
	if r.pagemap == nil {
		var err error
		if r.pagemap, err = os.Open(fmt.Sprintf("/proc/%d/pagemap", r.pid)); err != nil {
			if err = procError(err); errors.Is(err, errGone) {
				return false, nil
			}
			return false, err
		}
	}
	var raw [8]byte
	n, err := r.pagemap.ReadAt(raw[:], int64(addr/checkpoint.PageSize*8))
	if n == 0 {
		return false, nil // no memory any more
	}
	if n < len(raw) {
		return false, fmt.Errorf("the page table entry of %#x: %w", addr, err)
	}
	entry := binary.NativeEndian.Uint64(raw[:])
	return entry&entryPresent != 0 || entry&entrySwap != 0 && entry&swapTypeMask != swapTypeMarker, nil
}

// missing zeroes dst and notes its pages, joining them with those before.
func (r *reader) missing(addr uint64, dst []byte) {
	clear(dst)
	n := checkpoint.Pages(len(dst) / checkpoint.PageSize)
	if r.n > 0 && r.from+uint64(r.n.Bytes()) == addr {
		r.n += n
		return
	}
	r.flush()
	r.from, r.n = addr, n
}

func (r *reader) flush() {
	if r.n > 0 && r.gone != nil {
		r.gone(r.from, r.n)
	}
	r.n = 0
}

func (r *reader) close() error {
	var err error
	for _, f := range []*os.File{r.mem, r.pagemap} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}

func readv(pid int, addr uint64, dst []byte) (int, error) {
	local := unix.Iovec{Base: unsafe.SliceData(dst)}
	local.SetLen(len(dst))
	remote := unix.RemoteIovec{Base: uintptr(addr), Len: len(dst)}
	n, err := unix.ProcessVMReadv(pid, []unix.Iovec{local}, []unix.RemoteIovec{remote}, 0)
	return max(n, 0), err
}
