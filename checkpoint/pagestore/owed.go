package pagestore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
)

// In post-copy a shard is restored before its last pages are here. Those are
// owed: what an earlier round left in their place is older than the process,
// and must not be read. One page goes this way, each step durable before the
// next, and no way leads back:
//
//	owed (PID.owed)  →  came (its content is in the file, then PID.came)  →  placed (PID.placed)
//	                 →  placed at once, when nobody needs it any more
const (
	owedMagic = "tranship owed pages 1\n"
	listMagic = "tranship owed 1\n"

	// maxOwed bounds an encoded list, and with it what a source can make a
	// destination hold: some twenty million runs, a terabyte of them at 13 pages each.
	maxOwed = 64 << 20
	// maxOwedTasks is the kernel's limit of process ids.
	maxOwedTasks = 1 << 22
)

// ErrOwedList says that a list of owed pages is malformed.
var ErrOwedList = errors.New("not a list of owed pages")

// MaxOwedList is the size of the largest list that ParseOwed takes, in bytes.
const MaxOwedList = maxOwed

// AppendOwed encodes the pages that are owed, by process. The extents of a
// process are in ascending order, disjoint, and none is a hole.
func AppendOwed(b []byte, owed map[checkpoint.PID][]checkpoint.Extent) []byte {
	start := len(b)
	b = append(b, listMagic...)
	b = binary.AppendUvarint(b, uint64(len(owed)))
	for _, pid := range slices.Sorted(maps.Keys(owed)) {
		list := encodeList(owedMagic, runsOf(owed[pid]))
		b = binary.AppendUvarint(b, uint64(pid))
		b = binary.AppendUvarint(b, uint64(len(list)))
		b = append(b, list...)
	}
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b[start:]))
}

// ParseOwed is the inverse of AppendOwed. Whatever is wrong is ErrOwedList.
func ParseOwed(b []byte) (map[checkpoint.PID][]checkpoint.Extent, error) {
	bad := func(what string, args ...any) (map[checkpoint.PID][]checkpoint.Extent, error) {
		return nil, fmt.Errorf("%w: %s", ErrOwedList, fmt.Sprintf(what, args...))
	}
	if len(b) > maxOwed {
		return bad("%d bytes, at most %d", len(b), maxOwed)
	}
	if len(b) < 8 || xxh3.Hash(b[:len(b)-8]) != binary.LittleEndian.Uint64(b[len(b)-8:]) {
		return bad("damaged")
	}
	b, ok := bytes.CutPrefix(b[:len(b)-8], []byte(listMagic))
	if !ok {
		return bad("magic")
	}
	next := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			ok = false
			return 0
		}
		b = b[n:]
		return v
	}
	count := next()
	if count > maxOwedTasks || count > uint64(len(b))/2 {
		return bad("%d processes in %d bytes", count, len(b))
	}
	out := make(map[checkpoint.PID][]checkpoint.Extent, count)
	last := uint64(0)
	for range count {
		pid, size := next(), next()
		if !ok || pid <= last || pid > maxOwedTasks || size > uint64(len(b)) {
			return bad("process %d", pid)
		}
		runs, err := parseList(b[:size], owedMagic)
		if err != nil {
			return bad("process %d: %v", pid, err)
		}
		out[checkpoint.PID(pid)] = extentsOfRuns(checkpoint.PID(pid), runs)
		last, b = pid, b[size:]
	}
	if !ok || len(b) > 0 {
		return bad("length")
	}
	return out, nil
}

func runsOf(extents []checkpoint.Extent) []pageRun {
	runs := make([]pageRun, 0, len(extents))
	for _, e := range extents {
		runs = append(runs, pageRun{e.Addr / checkpoint.PageSize, e.End() / checkpoint.PageSize})
	}
	return runs
}

func extentsOfRuns(pid checkpoint.PID, runs []pageRun) []checkpoint.Extent {
	out := make([]checkpoint.Extent, 0, len(runs))
	for _, r := range runs {
		out = append(out, checkpoint.Extent{PID: pid, Addr: r.from * checkpoint.PageSize, Pages: checkpoint.Pages(r.to - r.from)})
	}
	return out
}

// Owe notes that pages will only arrive after the restore. It comes once, after
// the last round and before Seal; what the store has of them is never read.
func (s *Store) Owe(owed map[checkpoint.PID][]checkpoint.Extent) error {
	for pid, extents := range owed {
		end := uint64(0)
		for _, e := range extents {
			if err := checkPages(pid, e.Addr, e.Pages); err != nil {
				return fmt.Errorf("owe pages: %w", err)
			}
			if e.Hole || e.Addr < end {
				return fmt.Errorf("owe pages: %v: %w", e, ErrExtent)
			}
			end = e.End()
		}
		f, err := s.file(pid, true)
		if err != nil {
			return err
		}
		path := filepath.Join(s.dir, strconv.Itoa(int(pid))+owedSuffix)
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) || f.placed.any() || f.came.any() {
			return fmt.Errorf("owe pages of pid %d a second time: %w", pid, fs.ErrExist)
		}
		for _, e := range extents {
			f.owed.put(e.Addr, e.Pages)
		}
		if err := os.WriteFile(path, encodeList(owedMagic, f.owed.runs()), 0o600); err != nil {
			return fmt.Errorf("owe pages of pid %d: %w", pid, full(err))
		}
	}
	return nil
}

// Owed visits, in order, the pages of pid that have not arrived and were not
// given up. An error from visit ends it.
func (s *Store) Owed(pid checkpoint.PID, visit func(addr uint64, n checkpoint.Pages) error) error {
	f, err := s.file(pid, false)
	if f == nil || err != nil {
		return err
	}
	for _, r := range f.owed.runs() {
		if err := visit(r.from*checkpoint.PageSize, checkpoint.Pages(r.to-r.from)); err != nil {
			return err
		}
	}
	return nil
}

// Arrive stores owed pages. It refuses all of data, with ErrNotOwed, if one of
// the pages was not promised, has arrived, or was given up. After ErrFull they
// are still owed.
func (s *Store) Arrive(pid checkpoint.PID, addr uint64, data []byte) error {
	if err := checkExtent(pid, addr, uint64(len(data))); err != nil {
		return err
	}
	f, err := s.file(pid, false)
	if err != nil {
		return err
	}
	n := checkpoint.Pages(len(data) / checkpoint.PageSize)
	fail := func(err error) error {
		return fmt.Errorf("%d pages arrive at pid %d %#x: %w", n, pid, addr, full(err))
	}
	if f == nil {
		return fail(ErrNotOwed)
	}
	if _, all := f.owed.has(addr, n); !all {
		return fail(ErrNotOwed)
	}
	if _, err := f.pages.WriteAt(data, int64(addr)); err != nil {
		return fail(err)
	}
	// Recorded after the content: whoever opens the store in between has it sent
	// again.
	if err := f.came.add(addr, n); err != nil {
		return fail(err)
	}
	f.owed.clear(addr, n)
	return nil
}

// loadOwed reads what an earlier opener was promised, less what has become of it.
func (f *taskFile) loadOwed(path string) error {
	f.owed = newExtentIndex()
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	runs, err := parseList(raw, owedMagic)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrOwedList, err)
	}
	for _, r := range runs {
		f.owed.put(r.from*checkpoint.PageSize, checkpoint.Pages(r.to-r.from))
	}
	for _, record := range []*placedRecord{&f.came, &f.placed} {
		if err := f.settleOwed(runs, record); err != nil {
			return err
		}
	}
	return nil
}

// settleOwed takes out of owed what a record has.
func (f *taskFile) settleOwed(runs []pageRun, record *placedRecord) error {
	if !record.any() {
		return nil
	}
	record.mu.Lock()
	defer record.mu.Unlock()
	for _, r := range runs {
		err := record.each(r.from*checkpoint.PageSize, checkpoint.Pages(r.to-r.from), func(buf []byte, first, last uint64, at int64) error {
			for i := first; i < last; i++ {
				if buf[i/pagesPerByte]&(1<<(i%pagesPerByte)) != 0 {
					f.owed.clear((uint64(at)*pagesPerByte+i)*checkpoint.PageSize, 1)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
