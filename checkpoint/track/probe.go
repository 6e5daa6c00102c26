package track

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// Probe finds the best way of tracking that works here, by trying it on memory
// of its own. The error, if any, says why it is not a better one. What it finds
// does not change while the machine runs.
func Probe() (Kind, error) {
	ptraceErr := canTrace()
	uffdErr := ptraceErr
	if uffdErr == nil {
		uffdErr = uffdWorks()
	}
	if uffdErr == nil {
		return UffdWP, nil
	}
	softErr := ptraceErr
	if softErr == nil {
		softErr = softDirtyWorks()
	}
	if softErr == nil {
		_, softErr = newSoftDirtyMethod(nil)
	}
	if softErr == nil {
		return SoftDirty, fmt.Errorf("%s: %w", UffdWP, uffdErr)
	}
	return None, fmt.Errorf("%s: %w; %s: %w", UffdWP, uffdErr, SoftDirty, softErr)
}

// canTrace says what keeps this process from stopping others.
func canTrace() error {
	raw, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	if err == nil && strings.TrimSpace(string(raw)) == "3" {
		return errors.New("kernel.yama.ptrace_scope=3 forbids ptrace")
	}
	raw, err = os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	value, _ := statusField(raw, "CapEff")
	var effective uint64
	if _, err := fmt.Sscanf(value, "%x", &effective); err != nil {
		return fmt.Errorf("effective capabilities %q: %w", value, err)
	}
	for _, c := range []struct {
		bit  int
		name string
	}{
		{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"},
		{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"},
	} {
		if effective&(1<<c.bit) == 0 {
			return fmt.Errorf("%s is missing", c.name)
		}
	}
	return nil
}

// uffdWorks arms four pages, writes one, zaps one and reads the result.
func uffdWorks() (err error) {
	const pages = 4
	if !hasPagemapScan() {
		return errors.New("kernel without PAGEMAP_SCAN (Linux 6.7)")
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|uffdUserModeOnly, 0, 0)
	if errno != 0 {
		return fmt.Errorf("userfaultfd: %w", errno)
	}
	u := &userfault{fd: int(fd)}
	defer func() { err = errors.Join(err, u.Close()) }()
	if err := u.handshake(); err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, pages*checkpoint.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(mem) }() // it cannot fail for a mapping that is there
	for i := range pages {
		mem[i*checkpoint.PageSize] = 1
	}
	start := uint64(uintptr(unsafe.Pointer(&mem[0])))
	end := start + uint64(len(mem))
	if err := u.register(start, end); err != nil {
		return fmt.Errorf("register memory: %w", err)
	}
	if err := u.protect(start, end, true); err != nil {
		return fmt.Errorf("write-protect memory: %w", err)
	}
	mem[1*checkpoint.PageSize] = 2
	if err := unix.Madvise(mem[2*checkpoint.PageSize:3*checkpoint.PageSize], unix.MADV_DONTNEED); err != nil {
		return err
	}
	m, err := openPagemap(os.Getpid(), new(buffers), nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	page := func(i uint64) uint64 { return start + i*checkpoint.PageSize }
	for _, want := range [][]scanRegion{{{start: page(1), end: page(3)}}, nil} {
		var w window
		w.reset(start, end)
		if err := m.written(&w, start, end, true); err != nil {
			return err
		}
		var got []scanRegion
		for from, to := range runs(w.base, w.written) {
			got = append(got, scanRegion{start: from, end: to})
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("PAGEMAP_SCAN shows %#x as written, not %#x", got, want)
		}
	}
	return nil
}

// softDirty reads the bit of the first page.
func softDirty(mem []byte) (bool, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false, err
	}
	defer f.Close()
	var raw [8]byte
	if _, err := f.ReadAt(raw[:], int64(uintptr(unsafe.Pointer(&mem[0]))/checkpoint.PageSize*8)); err != nil {
		return false, err
	}
	return binary.NativeEndian.Uint64(raw[:])&entrySoftDirty != 0, nil
}
