package track

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// The ABI of PAGEMAP_SCAN, include/uapi/linux/fs.h since Linux 6.7.
const (
	ioctlPagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

	pageIsWritten = 1 << 1
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsZero    = 1 << 5

	scanWriteProtect = 1 << 0 // PM_SCAN_WP_MATCHING
	scanCheckAsync   = 1 << 1 // PM_SCAN_CHECK_WPASYNC
)

type scanArg struct {
	size, flags                                   uint64
	start, end, walkEnd                           uint64
	vec, vecLen, maxPages                         uint64
	inverted, categoryMask, anyofMask, returnMask uint64
}

type scanRegion struct{ start, end, categories uint64 }

// Bits of a /proc/PID/pagemap entry, Documentation/admin-guide/mm/pagemap.rst.
const (
	entrySoftDirty = 1 << 55
	entryFile      = 1 << 61
	entrySwap      = 1 << 62
	entryPresent   = 1 << 63
	entryPFN       = 1<<55 - 1

	// swapTypeMarker is the swap type under which the kernel files notes about
	// pages that do not exist: write-protected before their first use, guard
	// pages, poison. It is the last of the 32 types in every kernel that has such
	// markers (include/linux/swap.h, SWP_PTE_MARKER), and no swap area's, whose
	// types come first.
	swapTypeMarker = 31
	swapTypeMask   = 31
)

// scanRegions is how many regions one ioctl may return: as many as a window can
// hold, so that one call suffices.
const scanRegions = maxWindow / checkpoint.PageSize / 2

// scanSpan bounds the addresses of one walk that looks for populated memory. A
// span without page tables costs next to nothing, but one page in each chunk of
// it would cost 262144 entries.
const scanSpan = 1 << 30

// pagemap is the page tables of one process, opened for one Collect: a process
// that executes another program meanwhile leaves it showing no mappings.
type pagemap struct {
	f *os.File
	// scan says that the kernel has PAGEMAP_SCAN.
	scan bool
	// zeroPFN is the frame of the zero page where PAGEMAP_SCAN, which tells by
	// itself, is missing.
	zeroPFN uint64
	regions []scanRegion
	raw     []byte
	spent   *time.Duration
}

// buffers are kept between Collects: 256 KiB.
type buffers struct {
	regions []scanRegion
	raw     []byte
	window  window
}

func openPagemap(pid int, buf *buffers, spent *time.Duration) (*pagemap, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, procError(err)
	}
	if buf.regions == nil {
		buf.regions = make([]scanRegion, scanRegions)
		buf.raw = make([]byte, maxWindow/checkpoint.PageSize*8)
	}
	m := &pagemap{f: f, regions: buf.regions, raw: buf.raw, spent: spent, scan: hasPagemapScan()}
	if !m.scan {
		if m.zeroPFN, err = zeroPageFrame(); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return m, nil
}

func (m *pagemap) Close() error { return m.f.Close() }

// chunks yields runs of chunks of [start,end), at most maxWindow each and cut
// to the range, that may hold populated pages; all others hold none.
func (m *pagemap) chunks(start, end uint64, f func(start, end uint64) error) error {
	emit := func(from, to uint64) error {
		for from < to {
			// Cut at a chunk's border.
			next := min(to, chunkFloor(from)+maxWindow)
			if err := f(from, next); err != nil {
				return err
			}
			from = next
		}
		return nil
	}
	var runStart, runEnd uint64
	for at := start; at < end; {
		regions, next, err := m.populatedRegions(at, min(end, at+scanSpan))
		if err != nil {
			return err
		}
		// The buffer is used by others as soon as a run is emitted, so the runs of
		// one walk are gathered first.
		type run struct{ start, end uint64 }
		var found []run
		for _, r := range regions {
			from, to := max(chunkFloor(r.start), start), min(chunkCeil(r.end), end)
			switch {
			case runEnd == 0:
				runStart, runEnd = from, to
			case from <= runEnd:
				runEnd = max(runEnd, to)
			default:
				found = append(found, run{runStart, runEnd})
				runStart, runEnd = from, to
			}
		}
		for _, r := range found {
			if err := emit(r.start, r.end); err != nil {
				return err
			}
		}
		// A run counts as populated up to its end, so the search goes on behind it.
		at = max(next, runEnd)
	}
	if runEnd != 0 {
		return emit(runStart, runEnd)
	}
	return nil
}

// populatedRegions returns where [start,end) is populated, up to the address
// that it returns with them. Pages that only are marked may be among it.
func (m *pagemap) populatedRegions(start, end uint64) ([]scanRegion, uint64, error) {
	if !m.scan {
		end = min(end, start+maxWindow)
		var out []scanRegion
		err := m.entries(start, end, func(addr, entry uint64) {
			if !m.holdsPage(entry) {
				return
			}
			if n := len(out); n > 0 && out[n-1].end == addr {
				out[n-1].end += checkpoint.PageSize
			} else {
				out = append(out, scanRegion{start: addr, end: addr + checkpoint.PageSize})
			}
		})
		return out, end, err
	}
	arg := scanArg{
		start: start, end: end, maxPages: maxWindow / checkpoint.PageSize,
		anyofMask: pageIsPresent | pageIsSwapped, returnMask: pageIsPresent,
	}
	n, err := m.ioctl(&arg)
	if err != nil {
		return nil, 0, fmt.Errorf("look for populated memory in %#x-%#x: %w", start, end, err)
	}
	return m.regions[:n], arg.walkEnd, nil
}

// populated marks the pages of the window that hold something other than
// zeros-by-default: present or swapped out, but neither the zero page nor a mere
// marker.
func (m *pagemap) populated(w *window) error {
	clear(w.populated)
	if !m.scan {
		return m.entries(w.start, w.end, func(addr, entry uint64) {
			if m.holdsPage(entry) {
				w.mark(w.populated, addr, addr+checkpoint.PageSize)
			}
		})
	}
	type span struct{ start, end uint64 }
	var swapped []span
	for at := w.start; at < w.end; {
		const interesting = pageIsPresent | pageIsSwapped | pageIsZero
		arg := scanArg{
			start: at, end: w.end,
			anyofMask: pageIsPresent | pageIsSwapped, returnMask: interesting,
		}
		n, err := m.ioctl(&arg)
		if err != nil {
			return fmt.Errorf("look for pages in %#x-%#x: %w", at, w.end, err)
		}
		for _, r := range m.regions[:n] {
			switch r.categories & interesting {
			case pageIsPresent:
				w.mark(w.populated, r.start, r.end)
			case pageIsSwapped:
				swapped = append(swapped, span{r.start, r.end})
			case pageIsPresent | pageIsZero:
			default:
				// No such combination is known: better too much.
				w.mark(w.populated, r.start, r.end)
			}
		}
		at = arg.walkEnd
	}
	for _, s := range swapped {
		err := m.entries(s.start, s.end, func(addr, entry uint64) {
			// What was swapped in since counts as well.
			if entry&entryPresent != 0 || entry&entrySwap != 0 && entry&swapTypeMask != swapTypeMarker {
				w.mark(w.populated, addr, addr+checkpoint.PageSize)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// holdsPage judges a pagemap entry of private anonymous memory.
func (m *pagemap) holdsPage(entry uint64) bool {
	if entry&entryPresent != 0 {
		return entry&entryPFN != m.zeroPFN
	}
	return entry&entrySwap != 0 && entry&swapTypeMask != swapTypeMarker
}

// errNotTracked: the range holds a mapping without asynchronous write-protection.
var errNotTracked = errors.New("not write-protected")

// written marks the pages of [start,end), within the window, written since they
// were armed, and arms them again if rearm is set. Nothing is lost when it
// returns errNotTracked, as long as the caller then takes the whole window for
// written: part of it may have been armed.
//
// Only PAGE_IS_WRITTEN may be asked for. With any other mask, kernels without
// commits 07b4377bdbe7 and 40de8160ca7f show pages that were zapped as clean.
// Even so a chunk without page tables is shown as clean; chunks keeps those away.
func (m *pagemap) written(w *window, start, end uint64, rearm bool) error {
	for at := start; at < end; {
		arg := scanArg{
			flags: scanCheckAsync, start: at, end: end,
			categoryMask: pageIsWritten, returnMask: pageIsWritten,
		}
		if rearm {
			arg.flags |= scanWriteProtect
		}
		n, err := m.ioctl(&arg)
		if errors.Is(err, unix.EPERM) {
			return errNotTracked
		}
		if err != nil {
			return fmt.Errorf("look for written pages in %#x-%#x: %w", at, end, err)
		}
		for _, r := range m.regions[:n] {
			w.mark(w.written, r.start, r.end)
		}
		at = arg.walkEnd
	}
	return nil
}

// tracked says whether the mapping that holds addr has asynchronous
// write-protection.
func (m *pagemap) tracked(addr uint64) (bool, error) {
	arg := scanArg{
		flags: scanCheckAsync, start: addr, end: addr + checkpoint.PageSize,
		categoryMask: pageIsWritten, returnMask: pageIsWritten,
	}
	_, err := m.ioctl(&arg)
	if errors.Is(err, unix.EPERM) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at the mapping at %#x: %w", addr, err)
	}
	return true, nil
}

func (m *pagemap) ioctl(arg *scanArg) (int, error) {
	arg.size = uint64(unsafe.Sizeof(*arg))
	arg.vec = uint64(uintptr(unsafe.Pointer(&m.regions[0])))
	arg.vecLen = uint64(len(m.regions))
	defer m.clock(time.Now())
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, m.f.Fd(), ioctlPagemapScan, uintptr(unsafe.Pointer(arg)))
	runtime.KeepAlive(m.regions)
	if errno != 0 {
		return 0, procError(errno)
	}
	if arg.walkEnd <= arg.start || arg.walkEnd > arg.end {
		return 0, fmt.Errorf("PAGEMAP_SCAN of %#x-%#x ended at %#x", arg.start, arg.end, arg.walkEnd)
	}
	return int(n), nil
}

// entries reads the pagemap entries of [start,end), which is at most maxWindow.
func (m *pagemap) entries(start, end uint64, f func(addr, entry uint64)) error {
	defer m.clock(time.Now())
	raw := m.raw[:(end-start)/checkpoint.PageSize*8]
	n, err := m.f.ReadAt(raw, int64(start/checkpoint.PageSize*8))
	if n < len(raw) {
		// It ends early only when the memory is gone altogether, or at the end of
		// the address space, which no mapping crosses.
		if err == nil || n == 0 {
			return errGone
		}
		return fmt.Errorf("page table entries of %#x-%#x: %w", start, end, procError(err))
	}
	for i := 0; i < len(raw); i += 8 {
		f(start+uint64(i)/8*checkpoint.PageSize, binary.NativeEndian.Uint64(raw[i:]))
	}
	return nil
}

func (m *pagemap) clock(began time.Time) {
	if m.spent != nil {
		*m.spent += time.Since(began)
	}
}

// hasPagemapScan asks by an empty range, which a kernel without the ioctl
// answers with ENOTTY.
var hasPagemapScan = sync.OnceValue(func() bool {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false
	}
	defer f.Close()
	arg := scanArg{categoryMask: pageIsWritten, returnMask: pageIsWritten}
	arg.size = uint64(unsafe.Sizeof(arg))
	region := make([]scanRegion, scanRegions) // too large for the stack, which may move
	arg.vec, arg.vecLen = uint64(uintptr(unsafe.Pointer(&region[0]))), 1
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), ioctlPagemapScan, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(region)
	return errno == 0
})

// zeroPageFrame finds the frame that the kernel maps for memory that was read
// but never written.
var zeroPageFrame = sync.OnceValues(func() (uint64, error) {
	mem, err := unix.Mmap(-1, 0, checkpoint.PageSize, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0, fmt.Errorf("find the zero page: %w", err)
	}
	defer func() { _ = unix.Munmap(mem) }() // it cannot fail for a mapping that is there
	if mem[0] != 0 {
		return 0, errors.New("fresh memory is not zero")
	}
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, fmt.Errorf("find the zero page: %w", err)
	}
	defer f.Close()
	var raw [8]byte
	if _, err := f.ReadAt(raw[:], int64(uintptr(unsafe.Pointer(&mem[0]))/checkpoint.PageSize*8)); err != nil {
		return 0, fmt.Errorf("find the zero page: %w", err)
	}
	entry := binary.NativeEndian.Uint64(raw[:])
	if entry&entryPresent == 0 || entry&entryPFN == 0 {
		return 0, errors.New("find the zero page: /proc/self/pagemap hides page frames (CAP_SYS_ADMIN is needed)")
	}
	return entry & entryPFN, nil
})
