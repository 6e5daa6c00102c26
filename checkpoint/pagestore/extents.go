package pagestore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// The runs of data in a file can be asked of the kernel, two seeks a run: a
// fragmented gigabyte takes 0.1 s, and the restored shard stands still for it.
// So the writer notes what it puts, and Seal writes it down. It is a shortcut
// and no authority: what does not agree with the file's size is not used.

const (
	extentsSuffix = ".extents"
	extentsMagic  = "tranship extents 1\n"

	groupPages = 512 // 2 MiB of addresses
)

// extentIndex is the set of pages that a process has in the store.
type extentIndex struct {
	mu     sync.Mutex
	groups map[uint64]*[groupPages / 64]uint64 // by page number / groupPages
}

func newExtentIndex() *extentIndex {
	return &extentIndex{groups: map[uint64]*[groupPages / 64]uint64{}}
}

func (x *extentIndex) put(addr uint64, n checkpoint.Pages) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for page, end := addr/checkpoint.PageSize, addr/checkpoint.PageSize+uint64(n); page < end; {
		g := x.groups[page/groupPages]
		if g == nil {
			g = new([groupPages / 64]uint64)
			x.groups[page/groupPages] = g
		}
		page = eachWord(page, end, func(w int, mask uint64) { g[w] |= mask })
	}
}

// clear may span an address space: it looks at groups that exist only.
func (x *extentIndex) clear(addr uint64, n checkpoint.Pages) {
	x.mu.Lock()
	defer x.mu.Unlock()
	from, end := addr/checkpoint.PageSize, addr/checkpoint.PageSize+uint64(n)
	drop := func(group uint64) {
		g := x.groups[group]
		if g == nil {
			return
		}
		lo, hi := max(from, group*groupPages), min(end, (group+1)*groupPages)
		if lo < hi {
			eachWord(lo, hi, func(w int, mask uint64) { g[w] &^= mask })
		}
		if *g == [groupPages / 64]uint64{} {
			delete(x.groups, group)
		}
	}
	if (end-from)/groupPages > uint64(len(x.groups)) {
		for group := range x.groups {
			drop(group)
		}
		return
	}
	for group := from / groupPages; group*groupPages < end; group++ {
		drop(group)
	}
}

// eachWord gives the words of page's group with the bits of [page, end), and
// returns where the group, or the range, ends.
func eachWord(page, end uint64, f func(w int, mask uint64)) uint64 {
	end = min(end, page-page%groupPages+groupPages)
	for page < end {
		stop := min(end, page-page%64+64)
		mask := ^uint64(0) << (page % 64)
		if stop%64 != 0 {
			mask &= 1<<(stop%64) - 1
		}
		f(int(page%groupPages/64), mask)
		page = stop
	}
	return end
}

// pageRun is [from, to), in pages.
type pageRun struct{ from, to uint64 }

// has says whether any of n pages at addr is in the set, and whether all are.
func (x *extentIndex) has(addr uint64, n checkpoint.Pages) (some, all bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	all = true
	for page, end := addr/checkpoint.PageSize, addr/checkpoint.PageSize+uint64(n); page < end; {
		g := x.groups[page/groupPages]
		if g == nil {
			all = false
			page = page - page%groupPages + groupPages
			continue
		}
		page = eachWord(page, end, func(w int, mask uint64) {
			some = some || g[w]&mask != 0
			all = all && g[w]&mask == mask
		})
	}
	return some, all
}

// runs are the set in order, merged.
func (x *extentIndex) runs() []pageRun {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []pageRun
	for _, group := range slices.Sorted(maps.Keys(x.groups)) {
		for w, word := range x.groups[group] {
			base := group*groupPages + uint64(w)*64
			for word != 0 {
				from := uint64(bits.TrailingZeros64(word))
				length := uint64(bits.TrailingZeros64(^(word >> from)))
				if n := len(out); n > 0 && out[n-1].to == base+from {
					out[n-1].to += length
				} else {
					out = append(out, pageRun{base + from, base + from + length})
				}
				if from+length == 64 {
					break
				}
				word &= ^uint64(0) << (from + length)
			}
		}
	}
	return out
}

// Seal writes down which pages the store has, and which of them came last, for
// whoever opens it next. Nothing is put into the store after that.
func (s *Store) Seal() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for pid, f := range s.files {
		if f.index == nil {
			continue
		}
		path := filepath.Join(s.dir, strconv.Itoa(int(pid))+extentsSuffix)
		if err := os.WriteFile(path, encodeRuns(f.index.runs()), 0o600); err != nil {
			return fmt.Errorf("seal the pages of pid %d: %w", pid, full(err))
		}
	}
	return s.sealLatest()
}

func encodeRuns(runs []pageRun) []byte { return encodeList(extentsMagic, runs) }

// encodeList is magic, the number of runs, each run's distance from the last and
// its length, and the xxh3 of all that.
func encodeList(magic string, runs []pageRun) []byte {
	b := []byte(magic)
	b = binary.AppendUvarint(b, uint64(len(runs)))
	at := uint64(0)
	for _, r := range runs {
		b = binary.AppendUvarint(b, r.from-at)
		b = binary.AppendUvarint(b, r.to-r.from)
		at = r.to
	}
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b))
}

var errExtents = errors.New("not a list of extents")

func parseRuns(b []byte) ([]pageRun, error) { return parseList(b, extentsMagic) }

func parseList(b []byte, magic string) ([]pageRun, error) {
	if len(b) < 8 || xxh3.Hash(b[:len(b)-8]) != binary.LittleEndian.Uint64(b[len(b)-8:]) {
		return nil, fmt.Errorf("%w: damaged", errExtents)
	}
	b, ok := bytes.CutPrefix(b[:len(b)-8], []byte(magic))
	if !ok {
		return nil, fmt.Errorf("%w: magic", errExtents)
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
	if count > uint64(len(b))/2 {
		return nil, fmt.Errorf("%w: %d runs in %d bytes", errExtents, count, len(b))
	}
	runs := make([]pageRun, 0, count)
	at := uint64(0)
	for range count {
		gap, length := next(), next()
		const limit = AddressLimit / checkpoint.PageSize
		if !ok || length == 0 || gap > limit || length > limit || at+gap+length > limit {
			return nil, fmt.Errorf("%w: run %d", errExtents, len(runs))
		}
		runs = append(runs, pageRun{at + gap, at + gap + length})
		at += gap + length
	}
	if !ok || len(b) > 0 {
		return nil, fmt.Errorf("%w: length", errExtents)
	}
	return runs, nil
}

// sealed are the runs that Seal wrote down; false if there are none, or if they
// are not what the file holds: since pages were released or have arrived, its
// size would prove nothing.
func (s *Store) sealed(f *taskFile) ([]pageRun, bool) {
	if f.placed.any() || f.came.any() {
		return nil, false
	}
	raw, err := os.ReadFile(filepath.Join(s.dir, strconv.Itoa(int(f.pid))+extentsSuffix))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false
	}
	if err != nil {
		return nil, false
	}
	runs, err := parseRuns(raw)
	if err != nil {
		return nil, false
	}
	pages := uint64(0)
	for _, r := range runs {
		pages += r.to - r.from
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.pages.Fd()), &st); err != nil || uint64(st.Blocks)*512 != pages*checkpoint.PageSize {
		return nil, false
	}
	return runs, true
}
