package track

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/internal/testenv"
)

const page = checkpoint.PageSize

// rig keeps a replica of a victim's memory by nothing but Collect and
// ReadMemory, as the destination does.
type rig struct {
	*testing.T
	kind    Kind
	victim  *victim
	tracker Tracker
	procs   []checkpoint.Process
	replica map[checkpoint.PID]map[uint64][]byte
	// before, if set, runs once for the first extent that it accepts, after the
	// extent was reported and before it is read.
	before func(e checkpoint.Extent) bool
}

func newRig(t *testing.T, kind Kind) *rig {
	t.Helper()
	r := &rig{T: t, kind: kind, victim: startVictim(t, nil), replica: map[checkpoint.PID]map[uint64][]byte{}}
	var err error
	if r.tracker, err = New(kind, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.tracker.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	r.follow(r.victim.pid())
	return r
}

// follow adds a process, under its host pid.
func (r *rig) follow(pid int) {
	r.procs = append(r.procs, checkpoint.Process{PID: checkpoint.PID(pid), HostPID: pid})
}

func (r *rig) unfollow(pid int) {
	r.procs = slices.DeleteFunc(r.procs, func(p checkpoint.Process) bool { return p.HostPID == pid })
}

func (r *rig) do(format string, args ...any) uint64 {
	r.Helper()
	return r.victim.do(r.T, format, args...)
}

// mmap maps pages that the victim may read and write.
func (r *rig) mmap(pages int) uint64 {
	r.Helper()
	return r.do("mmap 0 %d %d 0", pages*page, unix.PROT_READ|unix.PROT_WRITE)
}

// mapAgain maps pages where some were unmapped.
func (r *rig) mapAgain(at uint64, pages int) {
	r.Helper()
	r.do("mmap %d %d %d %d", at, pages*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_FIXED_NOREPLACE)
}

func (r *rig) write(addr uint64, pages int) {
	r.Helper()
	r.do("write %d %d", addr, pages*page)
}

// collect takes one round into the replica.
func (r *rig) collect() Stats {
	r.Helper()
	return r.round(Options{})
}

func (r *rig) round(opt Options) Stats {
	r.Helper()
	var seen []checkpoint.Extent
	stats, err := r.tracker.Collect(r.Context(), r.procs, opt, func(e checkpoint.Extent) error {
		seen = append(seen, e)
		return r.take(e)
	})
	if err != nil {
		r.Fatal(err)
	}
	slices.SortFunc(seen, func(a, b checkpoint.Extent) int {
		if a.PID != b.PID {
			return int(a.PID - b.PID)
		}
		if a.Addr < b.Addr {
			return -1
		}
		return 1
	})
	for i, e := range seen {
		if e.Pages <= 0 || e.Addr%page != 0 || !e.Hole && e.Bytes() > MaxExtent {
			r.Errorf("bad extent %v", e)
		}
		if i > 0 && seen[i-1].PID == e.PID && seen[i-1].End() > e.Addr {
			r.Errorf("%v overlaps %v", seen[i-1], e)
		}
	}
	return stats
}

// take brings one extent into the replica.
func (r *rig) take(e checkpoint.Extent) error {
	if before := r.before; before != nil {
		r.before = nil
		if !before(e) {
			r.before = before
		}
	}
	pages := r.replica[e.PID]
	if pages == nil {
		pages = map[uint64][]byte{}
		r.replica[e.PID] = pages
	}
	if e.Hole {
		for at := e.Addr; at < e.End(); at += page {
			delete(pages, at)
		}
		return nil
	}
	i := slices.IndexFunc(r.procs, func(p checkpoint.Process) bool { return p.PID == e.PID })
	if i < 0 {
		return fmt.Errorf("%v of an unknown process", e)
	}
	buf := make([]byte, e.Bytes())
	gone := map[uint64]bool{}
	err := ReadMemory(r.procs[i].HostPID, e.Addr, buf, func(addr uint64, n checkpoint.Pages) {
		for ; n > 0; n-- {
			gone[addr] = true
			addr += page
		}
	})
	if err != nil {
		return err
	}
	for i := 0; i < len(buf); i += page {
		if at := e.Addr + uint64(i); !gone[at] {
			pages[at] = buf[i : i+page]
		}
	}
	return nil
}

// verify stops the victim for good, takes the last round and compares the
// replica with the memory itself.
func (r *rig) verify() Stats {
	r.Helper()
	for _, p := range r.procs {
		stopProcess(r.T, p.HostPID)
	}
	stats := r.round(Options{Frozen: true})
	for _, p := range r.procs {
		compare(r.T, p.HostPID, r.replica[p.PID])
	}
	return stats
}

// resume lets the victim run again after verify.
func (r *rig) resume() {
	r.Helper()
	for _, p := range r.procs {
		if err := syscall.Kill(p.HostPID, syscall.SIGCONT); err != nil {
			r.Fatal(err)
		}
	}
}

// stopProcess stops all threads by SIGSTOP and waits until they are stopped.
func stopProcess(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitFor(t, fmt.Sprintf("process %d to stop", pid), func() bool { return allStopped(t, pid) })
}

func allStopped(t *testing.T, pid int) bool {
	t.Helper()
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		st, err := readStat(fmt.Sprintf("/proc/%d/task/%s/stat", pid, task.Name()))
		if err == nil && st.state != 'T' {
			return false
		}
	}
	return true
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	deadline := time.After(20 * time.Second)
	for !done() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// compare reads all memory that the tracker has to cover, by other means than
// the tracker's, and expects the replica to hold it byte for byte.
func compare(t *testing.T, pid int, replica map[uint64][]byte) {
	t.Helper()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	tables, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	mappings, err := readSmaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	var zero [page]byte
	var compared, wrong int
	check := func(at uint64, truth []byte) {
		compared++
		got := replica[at]
		if got == nil {
			got = zero[:]
		}
		if !bytes.Equal(got, truth) {
			if wrong++; wrong <= 5 {
				i := slices.IndexFunc(truth, func(byte) bool { return true })
				for i = range truth {
					if truth[i] != got[i] {
						break
					}
				}
				t.Errorf("page %#x of process %d differs at byte %d: replica %x, memory %x", at, pid, i, got[i:min(i+16, page)], truth[i:min(i+16, page)])
			}
		}
	}
	for _, m := range mappings {
		if !m.private || !m.anonymous || m.locked || m.huge || m.droppable || specialMapping(m.name) {
			continue
		}
		size := m.end - m.start
		populated := map[uint64]bool{}
		read := func(start, end uint64) error {
			buf := make([]byte, end-start)
			for at := start; at < end; {
				n := peek(mem, buf[:end-at], at)
				for i := 0; i+page <= n; i += page {
					populated[at+uint64(i)] = true
					check(at+uint64(i), buf[i:i+page])
				}
				at += uint64(n - n%page)
				if n < page {
					at += page // a guard page
				}
			}
			return nil
		}
		switch {
		case size <= 1<<20:
			// Small enough to be read whether there is something or not.
			_ = read(m.start, m.end)
		case size <= 1<<30:
			entries := make([]byte, size/page*8)
			if n := peek(tables, entries, m.start/page*8); n != len(entries) {
				t.Fatalf("pagemap of %#x-%#x: %d bytes", m.start, m.end, n)
			}
			for i := uint64(0); i < size/page; i++ {
				if binary.NativeEndian.Uint64(entries[i*8:])>>62 != 0 { // present or swapped
					_ = read(m.start+i*page, m.start+(i+1)*page)
				}
			}
		default:
			// So large that not even that can be read.
			pages, err := openPagemap(pid, new(buffers), nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(pages.chunks(m.start, m.end, read), pages.Close()); err != nil {
				t.Fatal(err)
			}
		}
		for at := range replica {
			if at >= m.start && at < m.end && !populated[at] {
				check(at, zero[:])
			}
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d pages of process %d differ", wrong, compared, pid)
	}
	if compared < 100 {
		t.Errorf("only %d pages compared: the comparison is broken", compared)
	}
}

// peek is pread without the race detector's bookkeeping, which takes longer than
// all the rest.
func peek(f *os.File, buf []byte, at uint64) int {
	n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, f.Fd(), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), uintptr(at), 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// each runs a test once for every kind that the kernel has. A kernel new enough
// for a kind but without it fails under TRANSHIP_TEST_STRICT, except for
// soft-dirty, which is a matter of configuration.
func each(t *testing.T, test func(t *testing.T, kind Kind)) {
	t.Helper()
	for _, kind := range []Kind{UffdWP, SoftDirty, None} {
		t.Run(string(kind), func(t *testing.T) {
			testenv.NeedRoot(t)
			switch kind {
			case UffdWP:
				testenv.NeedKernel(t, 6, 7)
				if err := uffdWorks(); err != nil {
					testenv.Missing(t, err.Error())
				}
			case SoftDirty:
				if err := softDirtyWorks(); err != nil {
					t.Skip(err)
				}
			}
			test(t, kind)
		})
	}
}

// lifetimes are all the ways in which a page changes between two rounds.
var lifetimes = []struct {
	name string
	run  func(r *rig)
}{
	{"a page written after it was reported is reported again", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.write(a+3*page, 2)
		r.collect()
	}},
	{"a page written between the report and the read is not lost", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.write(a, 8)
		r.before = func(e checkpoint.Extent) bool {
			if e.Addr > a || e.End() <= a {
				return false
			}
			r.write(a+page, 1)
			return true
		}
		r.collect()
		r.collect()
	}},
	{"memory that is unmapped between the report and the read is left out", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.before = func(e checkpoint.Extent) bool {
			if e.Addr > a || e.End() <= a {
				return false
			}
			r.do("munmap %d %d", a, 64*page)
			return true
		}
		r.collect()
		r.collect()
	}},
	{"memory that is unmapped and mapped again empty reads as zero", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("munmap %d %d", a, 64*page)
		r.collect()
		r.mapAgain(a, 64)
		r.collect()
	}},
	{"memory that is mapped over between the report and the read", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.write(a, 64)
		r.before = func(e checkpoint.Extent) bool {
			if e.Addr > a || e.End() <= a {
				return false
			}
			r.do("mmap %d %d 3 %d", a+8*page, 16*page, unix.MAP_FIXED)
			r.write(a+10*page, 2)
			return true
		}
		r.collect()
		r.write(a+12*page, 1)
	}},
	{"memory that is mapped over in the middle of a tracked mapping", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("mmap %d %d 3 %d", a+8*page, 16*page, unix.MAP_FIXED)
		r.write(a+10*page, 2)
		r.collect()
		r.write(a+11*page, 2)
		r.collect()
	}},
	{"memory that is mapped over after it was found tracked and before it is scanned", func(r *rig) {
		a := r.mmap(64)
		b := r.mmap(16) // below it, and so visited before it
		if b > a {
			r.Skip("the kernel did not map downwards")
		}
		r.write(a, 64)
		r.write(b, 16)
		r.collect()
		r.write(a, 64)
		r.write(b, 16)
		r.before = func(e checkpoint.Extent) bool {
			if e.Addr > b || e.End() <= b {
				return false
			}
			r.do("mmap %d %d 3 %d", a+32*page, 16*page, unix.MAP_FIXED)
			r.write(a+32*page, 16)
			return true
		}
		r.collect()
		r.collect()
	}},
	{"memory that moved", func(r *rig) {
		a, b := r.mmap(64), r.mmap(256)
		r.write(a, 64)
		r.write(b, 256)
		r.collect()
		r.do("mremap %d %d %d %d %d", a, 64*page, 64*page, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, b+32*page)
		r.collect()
		r.write(b+40*page, 3)
		r.collect()
	}},
	{"memory that moved by whole page tables keeps no stale mark", func(r *rig) {
		const huge = chunkSize / page
		a := chunkCeil(r.mmap(4 * huge))
		b := chunkCeil(r.mmap(4 * huge))
		r.write(a, huge)
		r.collect()
		r.do("mremap %d %d %d %d %d", a, chunkSize, chunkSize, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, b+chunkSize)
		r.collect()
		r.write(b+chunkSize+5*page, 3)
		r.collect()
	}},
	{"memory that moved and left its mapping behind", func(r *rig) {
		a := r.mmap(64)
		b := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("mremap %d %d %d %d %d", a, 64*page, 64*page, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED|unix.MREMAP_DONTUNMAP, b)
		r.collect()
		r.write(a+4*page, 1)
		r.write(b+4*page, 1)
	}},
	{"memory that moved beside other tracked memory and back", func(r *rig) {
		a := r.mmap(128)
		b := r.mmap(64)
		r.write(a, 128)
		r.write(b, 64)
		r.collect()
		const flags = unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED
		r.do("mremap %d %d %d %d %d", a+64*page, 64*page, 64*page, flags, b)
		r.do("mremap %d %d %d %d %d", b, 64*page, 64*page, flags, a+64*page)
		r.write(a+70*page, 2)
		r.collect()
	}},
	{"memory that grew and shrank in place", func(r *rig) {
		a := r.mmap(256)
		r.do("munmap %d %d", a+64*page, 192*page)
		r.write(a, 64)
		r.collect()
		r.do("mremap %d %d %d 0 0", a, 64*page, 128*page)
		r.write(a+60*page, 40)
		r.collect()
		r.do("mremap %d %d %d 0 0", a, 128*page, 32*page)
		r.collect()
		r.do("mremap %d %d %d 0 0", a, 32*page, 128*page)
		r.write(a+100*page, 1)
	}},
	{"a heap that grows and shrinks", func(r *rig) {
		a := (r.do("brk %d", 64*page) + page - 1) &^ (page - 1)
		r.write(a, 60)
		r.collect()
		r.do("brk %d", 64*page)
		r.write(a+50*page, 60)
		r.collect()
		r.do("brk %d", ^uint64(80*page)+1)
		r.collect()
		r.do("brk %d", 80*page)
		r.write(a+100*page, 1)
	}},
	{"a stack that grows downwards", func(r *rig) {
		// The kernel keeps a gap of 256 pages below such a mapping.
		a := r.mmap(1024)
		r.do("munmap %d %d", a, 1024*page)
		top := a + 1000*page
		r.do("mmap %d %d 3 %d", top, 8*page, unix.MAP_FIXED|unix.MAP_GROWSDOWN)
		r.write(top, 8)
		r.collect()
		r.write(top-page, 1)
		r.write(top-2*page, 1)
		r.collect()
		r.write(top-page, 1)
		r.write(top-3*page, 1)
		r.collect()
	}},
	{"a new mapping beside a tracked one", func(r *rig) {
		a := r.mmap(128)
		r.do("munmap %d %d", a+64*page, 64*page)
		r.write(a, 64)
		r.collect()
		r.mapAgain(a+64*page, 64)
		r.write(a+60*page, 10)
		r.collect()
		r.write(a+64*page, 10)
		r.collect()
		r.write(a+66*page, 10)
	}},
	{"pages given back with MADV_DONTNEED", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("madvise %d %d %d", a+8*page, 16*page, unix.MADV_DONTNEED)
		if got := r.collect(); r.kind == UffdWP && got.Holes < 16 {
			r.Errorf("%d pages reported as holes, want at least 16", got.Holes)
		}
	}},
	{"pages given back and read again, which maps the zero page", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("madvise %d %d %d", a+8*page, 16*page, unix.MADV_DONTNEED)
		r.do("read %d %d", a+8*page, 8*page)
		r.collect()
		r.write(a+9*page, 1)
		r.collect()
		r.do("read %d %d", a+16*page, 8*page)
	}},
	{"a page given back between two rounds and written in the third", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("madvise %d %d %d", a, 64*page, unix.MADV_DONTNEED)
		r.collect()
		r.collect()
		r.write(a+5*page, 5)
		r.collect()
		r.write(a+5*page, 1)
	}},
	{"a huge page given back as a whole", func(r *rig) {
		const huge = chunkSize / page
		a := chunkCeil(r.mmap(4 * huge))
		r.do("madvise %d %d %d", a, 2*chunkSize, unix.MADV_HUGEPAGE)
		r.write(a, 2*huge)
		r.collect()
		r.do("madvise %d %d %d", a, chunkSize, unix.MADV_DONTNEED)
		if got := r.collect(); got.Holes < huge {
			r.Errorf("%d pages reported as holes, want at least %d", got.Holes, huge)
		}
		r.do("read %d %d", a, chunkSize)
		r.collect()
		r.write(a+7*page, 1)
	}},
	{"a huge page given back and read again at once", func(r *rig) {
		const huge = chunkSize / page
		a := chunkCeil(r.mmap(4 * huge))
		r.do("madvise %d %d %d", a, 2*chunkSize, unix.MADV_HUGEPAGE)
		r.write(a, 2*huge)
		r.collect()
		r.do("madvise %d %d %d", a, chunkSize, unix.MADV_DONTNEED)
		r.do("read %d %d", a, chunkSize)
		r.collect()
	}},
	{"a huge page that is written in part and split", func(r *rig) {
		const huge = chunkSize / page
		a := chunkCeil(r.mmap(4 * huge))
		r.do("madvise %d %d %d", a, 2*chunkSize, unix.MADV_HUGEPAGE)
		r.write(a, 2*huge)
		r.collect()
		r.write(a+100*page, 1)
		if got := r.collect(); r.kind == UffdWP && got.Written > 4*huge {
			r.Errorf("%d pages reported for one", got.Written)
		}
		r.do("madvise %d %d %d", a+chunkSize+10*page, 20*page, unix.MADV_DONTNEED)
		r.do("mprotect %d %d 1", a+50*page, 20*page)
		r.collect()
	}},
	{"pages that collapse into a huge page while armed", func(r *rig) {
		const huge = chunkSize / page
		a := chunkCeil(r.mmap(4 * huge))
		r.write(a, huge)
		r.collect()
		r.write(a, huge/2)
		// Refused while a page is armed; either way nothing may be lost.
		_, _ = r.victim.try("madvise %d %d %d", a, chunkSize, unix.MADV_COLLAPSE)
		r.collect()
		r.write(a, huge)
		_, _ = r.victim.try("madvise %d %d %d", a, chunkSize, unix.MADV_COLLAPSE)
		r.write(a+300*page, 3)
		r.collect()
		r.write(a+301*page, 3)
	}},
	{"pages freed lazily, paged out and cooled", func(r *rig) {
		a := r.mmap(192)
		r.write(a, 192)
		r.collect()
		r.do("madvise %d %d %d", a, 64*page, unix.MADV_FREE)
		r.do("madvise %d %d %d", a+64*page, 64*page, unix.MADV_PAGEOUT)
		r.do("madvise %d %d %d", a+128*page, 64*page, unix.MADV_COLD)
		r.collect()
		r.do("madvise %d %d %d", a, 64*page, unix.MADV_PAGEOUT)
		r.collect()
		r.write(a+3*page, 2)
		r.write(a+70*page, 2)
	}},
	{"protection that changes, splits and merges", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("mprotect %d %d 0", a+8*page, 16*page)
		r.collect()
		r.do("mprotect %d %d 3", a+8*page, 16*page)
		r.write(a+9*page, 1)
		r.do("mprotect %d %d 1", a+32*page, 16*page)
		r.collect()
		r.do("mprotect %d %d 0", a, 64*page)
	}},
	{"memory that was never accessible after it was written", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.do("mprotect %d %d 0", a, 64*page)
		r.collect()
		r.collect()
	}},
	{"memory that is locked and unlocked", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("mlock %d %d", a+16*page, 16*page)
		r.write(a, 64)
		r.collect()
		r.write(a+20*page, 1)
		r.do("munlock %d %d", a+16*page, 16*page)
		r.collect()
		b := r.mmap(16)
		r.do("mlock %d %d", b, 16*page)
		r.write(b, 16)
		r.collect()
		r.do("munlock %d %d", b, 16*page)
	}},
	{"memory with a name", func(r *rig) {
		a := r.mmap(64)
		if _, err := r.victim.try("name %d %d", a, 64*page); err != nil {
			r.Skip("kernel without CONFIG_ANON_VMA_NAME")
		}
		r.write(a, 64)
		r.collect()
		r.write(a+5*page, 5)
		r.do("name %d %d", a+8*page, 8*page)
		r.collect()
		r.write(a+9*page, 1)
	}},
	{"the zero device, mapped privately", func(r *rig) {
		a := r.do("mapzero %d", 64*page)
		r.write(a, 32)
		r.collect()
		r.write(a+20*page, 20)
		r.collect()
		for i := range uint64(64) {
			at := a + i*page
			got := r.replica[checkpoint.PID(r.victim.pid())][at]
			if want := i < 40; want != (got != nil && !bytes.Equal(got, make([]byte, page))) {
				r.Errorf("page %d of the zero device: in the replica %v, want %v", i, !want, want)
			}
		}
	}},
	{"guard pages that come and go", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		if _, err := r.victim.try("madvise %d %d 102", a+8*page, 16*page); err != nil {
			r.Skip("kernel without MADV_GUARD_INSTALL (Linux 6.13)")
		}
		r.collect()
		r.collect()
		r.do("madvise %d %d 103", a+8*page, 8*page)
		r.write(a+9*page, 2)
		r.collect()
	}},
	{"a vast mapping with little in it", func(r *rig) {
		size := uint64(1 << 40)
		if !hasPagemapScan() {
			// Each page that could be there has to be looked at.
			size = 1 << 31
		}
		a := r.do("mmap 0 %d 3 %d", size, unix.MAP_NORESERVE)
		for i := range uint64(8) {
			r.write(a+i*size/8+i*page, 3)
		}
		r.collect()
		began := time.Now()
		got := r.collect()
		if took := time.Since(began); r.kind == UffdWP && took > 5*time.Second {
			r.Errorf("a round took %v (%v in the kernel)", took, got.Scan)
		}
		r.write(a+size/2+100*page, 1)
		r.do("madvise %d %d %d", a, size/4, unix.MADV_DONTNEED)
		r.collect()
	}},
	{"a vast reservation that is made accessible piece by piece", func(r *rig) {
		const size = 64 << 30
		a := r.do("mmap 0 %d 0 %d", uint64(size), unix.MAP_NORESERVE)
		r.collect()
		r.do("mprotect %d %d 3", a+1<<30, 64*page)
		r.write(a+1<<30, 64)
		r.collect()
		r.do("mprotect %d %d 3", a+1<<30, 128*page)
		r.write(a+1<<30+60*page, 20)
		r.collect()
		r.write(a+1<<30+61*page, 1)
	}},
	{"a child that was forked and writes on", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		child := int(r.do("fork %d %d", a, 64*page))
		r.follow(child)
		for range 5 {
			r.collect()
			r.write(a, 32)
		}
		r.verify()
		r.resume()
		r.unfollow(child)
		r.do("reap %d", child)
		r.collect()
	}},
	{"a child without what is wiped on fork", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.do("madvise %d %d %d", a+32*page, 32*page, unix.MADV_WIPEONFORK)
		child := int(r.do("fork %d %d", a, 16*page))
		r.follow(child)
		r.collect()
		r.collect()
		r.verify()
		r.resume()
		r.unfollow(child)
		r.do("reap %d", child)
	}},
	{"another program is executed", func(r *rig) {
		a := r.mmap(512)
		r.write(a, 512)
		r.collect()
		r.collect()
		r.do("exec")
		r.do("hello")
		r.do("mmap %d %d 3 %d", a, 512*page, unix.MAP_FIXED)
		r.write(a+100*page, 1)
		r.collect()
		r.write(a+101*page, 1)
		r.collect()
	}},
	{"children that are started by vfork", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		for range 5 {
			r.collect()
			r.do("spawn 5")
			r.write(a+3*page, 2)
		}
	}},
	{"a round that is broken off by its visitor", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.write(a, 64)
		stop := errors.New("enough")
		_, err := r.tracker.Collect(r.Context(), r.procs, Options{}, func(checkpoint.Extent) error { return stop })
		if !errors.Is(err, stop) {
			r.Errorf("error %v, want the visitor's", err)
		}
		r.do("madvise %d %d %d", a, 8*page, unix.MADV_DONTNEED)
		_, err = r.tracker.Collect(r.Context(), r.procs, Options{}, func(e checkpoint.Extent) error {
			if e.Hole {
				return stop
			}
			return r.take(e)
		})
		if !errors.Is(err, stop) {
			r.Errorf("error %v, want the visitor's", err)
		}
	}},
	{"a round that is cancelled", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.write(a, 64)
		cause := errors.New("changed its mind")
		ctx, cancel := context.WithCancelCause(r.Context())
		_, err := r.tracker.Collect(ctx, r.procs, Options{}, func(e checkpoint.Extent) error {
			cancel(cause)
			return nil
		})
		// Cancelled during the very last extent, there is nothing left to cancel.
		if err != nil && !errors.Is(err, cause) {
			r.Errorf("error %v, want the cause", err)
		}
		if err == nil {
			r.Error("cancellation was taken for success")
		}
	}},
	{"a frozen round that is taken twice", func(r *rig) {
		a := r.mmap(64)
		r.write(a, 64)
		r.collect()
		r.write(a, 3)
		r.verify()
		r.resume()
		r.write(a+20*page, 3)
	}},
	{"a frozen round without any before", func(r *rig) {
		r.write(r.mmap(64), 64)
	}},
	{"everything at once, from several threads and processes", func(r *rig) {
		seed := uint64(time.Now().UnixNano())
		if s := os.Getenv("TRANSHIP_TRACK_SEED"); s != "" {
			var err error
			if seed, err = strconv.ParseUint(s, 0, 64); err != nil {
				r.Fatal(err)
			}
		}
		r.Logf("TRANSHIP_TRACK_SEED=%d", seed)
		a := r.mmap(256)
		r.write(a, 256)
		r.do("stress %d", seed)
		rounds := 30
		if testing.Short() {
			rounds = 8
		}
		var child int
		for i := range rounds {
			if i%5 == 2 {
				child = int(r.do("fork %d %d", a, 256*page))
				r.follow(child)
			}
			r.collect()
			r.write(a+uint64(i)*page, 3)
			if i%5 == 4 {
				r.unfollow(child)
				r.do("reap %d", child)
			}
			if i%7 == 6 {
				r.verify()
				r.resume()
			}
			runtime.Gosched()
		}
		r.verify()
		r.resume()
		if n := r.do("unstress"); n < 100 {
			r.Errorf("only %d operations under stress", n)
		}
	}},
}

// Only too much is ever reported by mistake; this is what it may come to.
func TestWhatIsNotWrittenIsNotReported(t *testing.T) {
	each(t, func(t *testing.T, kind Kind) {
		if kind == None {
			t.Skip("it reports everything")
		}
		r := newRig(t, kind)
		a := r.mmap(8192)
		r.write(a, 8192)
		if got := r.collect(); got.Written < 8192 || got.Registered == 0 {
			t.Errorf("the first round: %+v", got)
		}
		b := r.mmap(4096)
		r.write(b, 4096)
		got := r.collect()
		if kind == SoftDirty {
			// The kernel joins it with the mapping beside it, and the joined one counts
			// as new as a whole (is_mergeable_vma in mm/mmap.c); nothing is registered.
			if got.Written < 4096 || got.Written >= 8192+4096+2048 || got.Registered != 0 {
				t.Errorf("a new mapping of 4096 pages: %+v", got)
			}
		} else if got.Written < 4096 || got.Written >= 8192 || got.Registered == 0 {
			t.Errorf("a new mapping of 4096 pages: %+v", got)
		}
		for range 2 {
			// The victim's own runtime writes a little.
			if got := r.collect(); got.Written >= 2048 {
				t.Errorf("nothing but its runtime writes: %+v", got)
			}
		}
		r.write(a+1000*page, 100)
		if got := r.collect(); got.Written < 100 || got.Written >= 2048 {
			t.Errorf("100 pages were written: %+v", got)
		}
		if got := r.verify(); got.Written >= 2048 || got.Registered != 0 {
			t.Errorf("the frozen round: %+v", got)
		}
	})
}

func TestAReplicaKeptByRoundsEqualsTheMemory(t *testing.T) {
	each(t, func(t *testing.T, kind Kind) {
		for _, tt := range lifetimes {
			t.Run(tt.name, func(t *testing.T) {
				r := newRig(t, kind)
				tt.run(r)
				stats := r.verify()
				if r.tracker.Kind() != kind {
					t.Errorf("kind %q, want %q", r.tracker.Kind(), kind)
				}
				if stats.Pause != 0 {
					t.Errorf("a frozen process was stopped for %v", stats.Pause)
				}
			})
		}
	})
}
