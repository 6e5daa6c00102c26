// Package pagestore keeps the pages of an arriving shard at the destination,
// from the first pre-copy round until the last page was placed under the
// restored process.
//
// A store is a directory on a tmpfs with one sparse file per process, in which
// the offset of a page is its virtual address and a hole is a zero page. There
// is no index to lose: what was written before its writer was killed is found
// again by Open. The flow is PutPages and ZeroPages (rounds), Seal, Extents and
// ReadPages (restore), Release (filling), Remove; in post-copy Owe before Seal,
// and Arrive between restore and filling (owed.go).
//
// It refuses other file systems, addresses past 57 bits, and to answer for
// pages that were released.
package pagestore

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// AddressLimit is the first address that no process can have: 57 bits is
// user space under five-level page tables, the largest of amd64 and arm64.
const AddressLimit = 1 << 57

// marker names the file that says a directory is a store of this layout.
const marker = "pagestore.v1"

const (
	pagesSuffix  = ".pages"
	placedSuffix = ".placed"
	owedSuffix   = ".owed"
	cameSuffix   = ".came"
)

var (
	// ErrFull says that the tmpfs has no room for another page.
	ErrFull = errors.New("page store is full")
	// ErrReleased says that a page was placed and given back: the store no
	// longer knows its content.
	ErrReleased = errors.New("page was released")
	// ErrLost says that a page with content is a hole now and nobody released it.
	ErrLost = errors.New("page was lost")
	// ErrOwed says that a page has not arrived: what the store may have there is
	// older than the process.
	ErrOwed = errors.New("page has not arrived")
	// ErrNotOwed says that a page was not promised, or has arrived before.
	ErrNotOwed = errors.New("page is not owed")
	// ErrNotTmpfs says that the directory is on another file system. Others
	// end at 16 TiB, below the addresses of processes, or write pages to disk.
	ErrNotTmpfs = errors.New("not on a tmpfs")
	// ErrExtent says that an address, a length or a pid is impossible.
	ErrExtent = errors.New("impossible extent")
)

// Store is one shard's pages. Its methods may be called concurrently; calls
// that overlap in address for one pid are ordered by the caller.
type Store struct {
	dir string
	// made: by Create, so that every page in it went through this Store.
	made   bool
	latest latest

	mu    sync.RWMutex // guards files
	files map[checkpoint.PID]*taskFile
}

// taskFile holds the pages of one process.
type taskFile struct {
	pid   checkpoint.PID
	pages *os.File
	// seek serialises SEEK_DATA and SEEK_HOLE, which move the file's offset.
	// Reads and writes carry their own.
	seek sync.Mutex

	placed placedRecord
	index  *extentIndex // nil when others may have put pages
	// owed are the pages that will arrive after the restore; came are those of
	// them that have, in a record like placed.
	owed *extentIndex
	came placedRecord
}

// Create makes an empty store in dir, which must not exist or be empty, on a
// tmpfs.
func Create(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("page store: %w", err)
	}
	if err := onTmpfs(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("page store: %w", err)
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("page store %s: not empty: %w", dir, fs.ErrExist)
	}
	if err := os.WriteFile(filepath.Join(dir, marker), nil, 0o600); err != nil {
		return nil, fmt.Errorf("page store: %w", full(err))
	}
	return &Store{dir: dir, made: true, files: map[checkpoint.PID]*taskFile{}}, nil
}

// Open opens a store that another process made, and may still be writing to:
// processes that it adds later are found, too.
func Open(dir string) (*Store, error) {
	if _, err := os.Stat(filepath.Join(dir, marker)); err != nil {
		return nil, fmt.Errorf("page store: %w", err)
	}
	if err := onTmpfs(dir); err != nil {
		return nil, err
	}
	s := &Store{dir: dir, files: map[checkpoint.PID]*taskFile{}}
	if _, err := s.Tasks(); err != nil {
		return nil, err
	}
	return s, nil
}

func onTmpfs(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("page store: statfs %s: %w", dir, err)
	}
	if st.Type != unix.TMPFS_MAGIC {
		return fmt.Errorf("page store %s: %w", dir, ErrNotTmpfs)
	}
	return nil
}

func openTask(dir string, pid checkpoint.PID, flags int) (*taskFile, error) {
	base := filepath.Join(dir, strconv.Itoa(int(pid)))
	pages, err := os.OpenFile(base+pagesSuffix, os.O_RDWR|flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("page store of pid %d: %w", pid, full(err))
	}
	f := &taskFile{
		pid: pid, pages: pages,
		placed: placedRecord{path: base + placedSuffix}, came: placedRecord{path: base + cameSuffix},
	}
	if err := errors.Join(f.placed.find(), f.came.find()); err != nil {
		return nil, errors.Join(fmt.Errorf("page store of pid %d: %w", pid, err), pages.Close())
	}
	if err := f.loadOwed(base + owedSuffix); err != nil {
		return nil, errors.Join(fmt.Errorf("page store of pid %d: %w", pid, err), f.close())
	}
	return f, nil
}

func (f *taskFile) close() error {
	return errors.Join(f.placed.close(), f.came.close(), f.pages.Close())
}

// PutPages stores data, whole pages, at addr of pid; it replaces what was
// there. Pages of a process are put before the first of them is released. A full tmpfs is ErrFull, after which the extent's content is
// undefined: it must be put again before it is read.
func (s *Store) PutPages(pid checkpoint.PID, addr uint64, data []byte) error {
	if err := checkExtent(pid, addr, uint64(len(data))); err != nil {
		return err
	}
	f, err := s.file(pid, true)
	if err != nil {
		return err
	}
	if f.placed.any() {
		return fmt.Errorf("put pages at pid %d %#x: placing has begun: %w", pid, addr, ErrReleased)
	}
	if _, err := f.pages.WriteAt(data, int64(addr)); err != nil {
		return fmt.Errorf("put %d pages at pid %d %#x: %w", len(data)/checkpoint.PageSize, pid, addr, full(err))
	}
	if f.index != nil {
		n := checkpoint.Pages(len(data) / checkpoint.PageSize)
		f.index.put(addr, n)
		s.latest.add(pid, addr, n)
	}
	return nil
}

// ZeroPages makes n pages at addr of pid read as zero and gives their memory
// back.
func (s *Store) ZeroPages(pid checkpoint.PID, addr uint64, n checkpoint.Pages) error {
	if err := checkPages(pid, addr, n); err != nil {
		return err
	}
	f, err := s.file(pid, true)
	if err != nil {
		return err
	}
	if f.placed.any() {
		return fmt.Errorf("zero pages at pid %d %#x: placing has begun: %w", pid, addr, ErrReleased)
	}
	if f.index != nil {
		f.index.clear(addr, n)
	}
	return f.punch(addr, n)
}

func (f *taskFile) punch(addr uint64, n checkpoint.Pages) error {
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	if err := retry(func() error {
		return unix.Fallocate(int(f.pages.Fd()), mode, int64(addr), int64(n.Bytes()))
	}); err != nil {
		return fmt.Errorf("zero %d pages at pid %d %#x: %w", n, f.pid, addr, full(err))
	}
	return nil
}

// Tasks returns the processes that have pages, or had, in order.
func (s *Store) Tasks() ([]checkpoint.PID, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("page store: %w", err)
	}
	var pids []checkpoint.PID
	for _, e := range entries {
		name, isPages := strings.CutSuffix(e.Name(), pagesSuffix)
		if !isPages {
			continue
		}
		pid, err := strconv.ParseInt(name, 10, 32)
		if err != nil || pid <= 0 {
			return nil, fmt.Errorf("page store %s: %q is not named after a pid", s.dir, e.Name())
		}
		pids = append(pids, checkpoint.PID(pid))
	}
	slices.Sort(pids)
	return pids, nil
}

// Extents visits, in order, the runs of [from, to) of pid that hold data. What
// lies between them reads as zero, or was released. An error from visit ends it.
// A pid without pages has no extents.
func (s *Store) Extents(pid checkpoint.PID, from, to uint64, visit func(addr uint64, n checkpoint.Pages) error) error {
	if err := checkExtent(pid, from, to-from); err != nil {
		return err
	}
	f, err := s.file(pid, false)
	if f == nil || err != nil {
		return err
	}
	if f.placed.any() {
		all := visit
		visit = func(addr uint64, n checkpoint.Pages) error { return f.placed.runs(addr, n, false, all) }
	}
	if runs, ok := s.sealed(f); ok {
		for _, r := range runs {
			start, end := max(from, r.from*checkpoint.PageSize), min(to, r.to*checkpoint.PageSize)
			if start >= end {
				continue
			}
			if err := visit(start, checkpoint.Pages((end-start)/checkpoint.PageSize)); err != nil {
				return err
			}
		}
		return nil
	}
	for from < to {
		start, end, err := f.nextData(from)
		if err != nil {
			return fmt.Errorf("extents of pid %d from %#x: %w", pid, from, err)
		}
		if start >= to || start == end {
			return nil
		}
		end = min(end, to)
		if err := visit(start, checkpoint.Pages((end-start)/checkpoint.PageSize)); err != nil {
			return err
		}
		from = end
	}
	return nil
}

// nextData returns the first run of data at or after from; start == end when
// there is none.
func (f *taskFile) nextData(from uint64) (start, end uint64, err error) {
	f.seek.Lock()
	defer f.seek.Unlock()
	data, err := unix.Seek(int(f.pages.Fd()), int64(from), unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return from, from, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("seek data: %w", err)
	}
	hole, err := unix.Seek(int(f.pages.Fd()), data, unix.SEEK_HOLE)
	if err != nil {
		return 0, 0, fmt.Errorf("seek hole: %w", err)
	}
	return uint64(data), uint64(hole), nil
}

// ReadPages fills dst, whole pages, from addr of pid. Holes and processes
// without pages are zero; a page that was released is ErrReleased, one that has
// not arrived ErrOwed.
func (s *Store) ReadPages(pid checkpoint.PID, addr uint64, dst []byte) error {
	if err := checkExtent(pid, addr, uint64(len(dst))); err != nil {
		return err
	}
	f, err := s.file(pid, false)
	if err != nil {
		return err
	}
	if f == nil {
		clear(dst)
		return nil
	}
	// Looked up before the read: what arrives in between is read, or refused.
	if some, _ := f.owed.has(addr, checkpoint.Pages(len(dst)/checkpoint.PageSize)); some {
		return fmt.Errorf("read %d pages at pid %d %#x: %w", len(dst)/checkpoint.PageSize, pid, addr, ErrOwed)
	}
	n, err := readAt(f.pages, dst, int64(addr))
	if err != nil {
		return fmt.Errorf("read %d pages at pid %d %#x: %w", len(dst)/checkpoint.PageSize, pid, addr, err)
	}
	clear(dst[n:]) // past the last page put
	// Looked up after the read: a page is recorded as placed before it is
	// punched, so a read that saw the hole also sees the record.
	released, err := f.placed.contains(addr, checkpoint.Pages(len(dst)/checkpoint.PageSize))
	if err != nil {
		return fmt.Errorf("read pages at pid %d %#x: %w", pid, addr, err)
	}
	if released {
		return fmt.Errorf("read %d pages at pid %d %#x: %w", len(dst)/checkpoint.PageSize, pid, addr, ErrReleased)
	}
	return nil
}

// ReadData is ReadPages for pages that Extents has shown: if one of them reads as
// a hole by now, that is ErrLost and not a zero page.
func (s *Store) ReadData(pid checkpoint.PID, addr uint64, dst []byte) error {
	if err := s.ReadPages(pid, addr, dst); err != nil {
		return err
	}
	f, err := s.file(pid, false)
	if err != nil {
		return err
	}
	end := addr
	if f != nil {
		start, hole, err := f.nextData(addr)
		if err != nil {
			return fmt.Errorf("check pages at pid %d %#x: %w", pid, addr, err)
		}
		if start == addr {
			end = hole
		}
	}
	if end < addr+uint64(len(dst)) {
		return fmt.Errorf("read %d pages at pid %d %#x: %w", len(dst)/checkpoint.PageSize, pid, addr, ErrLost)
	}
	return nil
}

// Release records that n pages at addr of pid were placed wherever they were
// needed, and then gives their memory back. The record stands before the
// memory goes, so that no crash in between leaves a hole that could be taken
// for a zero page. A page that has not arrived is owed no more.
func (s *Store) Release(pid checkpoint.PID, addr uint64, n checkpoint.Pages) error {
	if err := checkPages(pid, addr, n); err != nil {
		return err
	}
	f, err := s.file(pid, false)
	if f == nil || err != nil {
		return err
	}
	if err := f.placed.add(addr, n); err != nil {
		return fmt.Errorf("release %d pages at pid %d %#x: %w", n, pid, addr, full(err))
	}
	f.owed.clear(addr, n)
	return f.punch(addr, n)
}

// Finish gives back what a Release that was killed has recorded and not given
// back.
func (s *Store) Finish(pid checkpoint.PID) error {
	f, err := s.file(pid, false)
	if f == nil || err != nil || !f.placed.any() {
		return err
	}
	for at := uint64(0); ; {
		start, end, err := f.nextData(at)
		if err != nil {
			return fmt.Errorf("finish releases of pid %d: %w", pid, err)
		}
		if start == end {
			return nil
		}
		if err := f.placed.runs(start, checkpoint.Pages((end-start)/checkpoint.PageSize), true, f.punch); err != nil {
			return err
		}
		at = end
	}
}

// Released reports whether any of n pages at addr of pid was released.
func (s *Store) Released(pid checkpoint.PID, addr uint64, n checkpoint.Pages) (bool, error) {
	if err := checkPages(pid, addr, n); err != nil {
		return false, err
	}
	f, err := s.file(pid, false)
	if f == nil || err != nil {
		return false, err
	}
	return f.placed.contains(addr, n)
}

// Placing reports whether any page of pid was ever released.
func (s *Store) Placing(pid checkpoint.PID) (bool, error) {
	f, err := s.file(pid, false)
	if f == nil || err != nil {
		return false, err
	}
	if err := f.placed.find(); err != nil {
		return false, fmt.Errorf("page store of pid %d: %w", pid, err)
	}
	return f.placed.any(), nil
}

// Bytes is the memory that the pages take, without the tmpfs's own tables.
func (s *Store) Bytes() (checkpoint.Bytes, error) {
	pids, err := s.Tasks()
	if err != nil {
		return 0, err
	}
	var sum checkpoint.Bytes
	for _, pid := range pids {
		f, err := s.file(pid, false)
		if err != nil {
			return 0, err
		}
		if f == nil {
			continue // removed since
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.pages.Fd()), &st); err != nil {
			return 0, fmt.Errorf("size of the pages of pid %d: %w", pid, err)
		}
		sum += checkpoint.Bytes(st.Blocks * 512)
	}
	return sum, nil
}

// Export makes the first n pages of pid, from address 0 on, a file at path, in
// the same tmpfs; nothing is copied, and what is put later is in the file too.
func (s *Store) Export(pid checkpoint.PID, n checkpoint.Pages, path string) error {
	if n < 0 || n > AddressLimit/checkpoint.PageSize {
		return fmt.Errorf("export %d pages of pid %d: %w", n, pid, ErrExtent)
	}
	f, err := s.file(pid, true)
	if err != nil {
		return err
	}
	// The last pages may be holes, which never made the file longer.
	if err := f.pages.Truncate(int64(n.Bytes())); err != nil {
		return fmt.Errorf("export the pages of pid %d: %w", pid, full(err))
	}
	if err := os.Link(f.pages.Name(), path); err != nil {
		return fmt.Errorf("export the pages of pid %d: %w", pid, err)
	}
	return nil
}

// Close closes the files and leaves the store on the tmpfs.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for pid, f := range s.files {
		errs = append(errs, f.close())
		delete(s.files, pid)
	}
	return errors.Join(errs...)
}

// Remove closes the store and deletes it. May run twice.
func (s *Store) Remove() error {
	err := s.Close()
	if rmErr := os.RemoveAll(s.dir); rmErr != nil {
		err = errors.Join(err, fmt.Errorf("remove page store: %w", rmErr))
	}
	return err
}

// file returns the file of pid, or nil when there is none and it shall not be
// made.
func (s *Store) file(pid checkpoint.PID, create bool) (*taskFile, error) {
	s.mu.RLock()
	f := s.files[pid]
	s.mu.RUnlock()
	if f != nil {
		return f, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.files[pid]; f != nil {
		return f, nil
	}
	flags := 0
	if create {
		flags = os.O_CREATE
	}
	f, err := openTask(s.dir, pid, flags)
	if errors.Is(err, fs.ErrNotExist) && !create {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if s.made {
		f.index = newExtentIndex()
	}
	s.files[pid] = f
	return f, nil
}

func checkPages(pid checkpoint.PID, addr uint64, n checkpoint.Pages) error {
	if n <= 0 || n > AddressLimit/checkpoint.PageSize {
		return fmt.Errorf("pid %d %#x+%d pages: %w", pid, addr, n, ErrExtent)
	}
	return checkExtent(pid, addr, uint64(n.Bytes()))
}

func checkExtent(pid checkpoint.PID, addr, length uint64) error {
	switch {
	case pid <= 0:
		return fmt.Errorf("pid %d: %w", pid, ErrExtent)
	case addr%checkpoint.PageSize != 0 || length%checkpoint.PageSize != 0:
		return fmt.Errorf("pid %d %#x+%#x is not made of whole pages: %w", pid, addr, length, ErrExtent)
	case length == 0 || length > math.MaxInt64 || addr >= AddressLimit || length > AddressLimit-addr:
		return fmt.Errorf("pid %d %#x+%#x is outside of user space: %w", pid, addr, length, ErrExtent)
	}
	return nil
}

// full puts ErrFull before the errors by which the kernel says so.
func full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}

func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
