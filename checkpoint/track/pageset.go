package track

import (
	"iter"
	"maps"
	"math/bits"
	"slices"

	"github.com/tranship/tranship/checkpoint"
)

const (
	// chunkSize is what one page of page tables maps on the platforms that
	// tranship supports: scanning in such units neither splits a transparent huge
	// page nor makes the kernel allocate a page table for untouched memory.
	chunkSize  = 2 << 20
	chunkPages = chunkSize / checkpoint.PageSize
	chunkWords = chunkPages / 64

	// maxWindow bounds one walk over page tables: it holds the process's mmap
	// lock, for about 0.8 ms here when every page has to be armed.
	maxWindow = 64 << 20
)

func chunkFloor(addr uint64) uint64 { return addr &^ (chunkSize - 1) }
func chunkCeil(addr uint64) uint64  { return chunkFloor(addr + chunkSize - 1) }

// chunk has one bit for each page of chunkSize bytes.
type chunk [chunkWords]uint64

// pageSet is a set of page addresses: 64 bytes for each 2 MiB that it touches.
type pageSet map[uint64]*chunk

func (s pageSet) add(start, end uint64) {
	for base := chunkFloor(start); base < end; base += chunkSize {
		c := s[base]
		if c == nil {
			c = new(chunk)
			s[base] = c
		}
		setBits(c[:], pageIndex(base, max(start, base)), pageIndex(base, min(end, base+chunkSize)))
	}
}

func (s pageSet) remove(start, end uint64) {
	for base := chunkFloor(start); base < end; base += chunkSize {
		c := s[base]
		if c == nil {
			continue
		}
		clearBits(c[:], pageIndex(base, max(start, base)), pageIndex(base, min(end, base+chunkSize)))
		if *c == (chunk{}) {
			delete(s, base)
		}
	}
}

// bases returns the addresses of the chunks in ascending order.
func (s pageSet) bases() []uint64 { return slices.Sorted(maps.Keys(s)) }

// window is a range of at most maxWindow whose pages are being classified.
type window struct {
	start, end uint64
	// base is start rounded down to a chunk, so that words line up with those of
	// a pageSet.
	base               uint64
	written, populated []uint64
	inside, scratch    []uint64
}

// reset empties the window and moves it. The buffers are kept.
func (w *window) reset(start, end uint64) {
	w.start, w.end, w.base = start, end, chunkFloor(start)
	words := int((chunkCeil(end) - w.base) / chunkSize * chunkWords)
	for _, b := range []*[]uint64{&w.written, &w.populated, &w.inside, &w.scratch} {
		if cap(*b) < words {
			*b = make([]uint64, words)
		}
		*b = (*b)[:words]
		clear(*b)
	}
	setBits(w.inside, pageIndex(w.base, start), pageIndex(w.base, end))
}

// mark sets the bits of [start,end) in one of the window's bit fields, as far as
// they lie inside.
func (w *window) mark(field []uint64, start, end uint64) {
	start, end = max(start, w.start), min(end, w.end)
	if start < end {
		setBits(field, pageIndex(w.base, start), pageIndex(w.base, end))
	}
}

// markSet sets the bits of all pages of s that lie inside.
func (w *window) markSet(field []uint64, s pageSet) {
	w.combine(s, func(i int, word uint64) { field[i] |= word & w.inside[i] })
}

// holes returns the runs that s has and that are not populated.
func (w *window) holes(s pageSet) iter.Seq2[uint64, uint64] {
	clear(w.scratch)
	w.combine(s, func(i int, word uint64) { w.scratch[i] = word &^ w.populated[i] & w.inside[i] })
	return runs(w.base, w.scratch)
}

// content returns the runs that are both written and populated.
func (w *window) content() iter.Seq2[uint64, uint64] {
	for i := range w.scratch {
		w.scratch[i] = w.written[i] & w.populated[i] & w.inside[i]
	}
	return runs(w.base, w.scratch)
}

func (w *window) combine(s pageSet, f func(i int, word uint64)) {
	for i := 0; i < len(w.inside); i += chunkWords {
		c := s[w.base+uint64(i/chunkWords)*chunkSize]
		if c == nil {
			continue
		}
		for j, word := range c {
			f(i+j, word)
		}
	}
}

// runs yields the address ranges of consecutive set bits.
func runs(base uint64, field []uint64) iter.Seq2[uint64, uint64] {
	return func(yield func(start, end uint64) bool) {
		open, start := false, 0
		for i, word := range field {
			at := i * 64
			for left := 64; left > 0; {
				var n int
				if open {
					n = bits.TrailingZeros64(^word)
				} else {
					n = bits.TrailingZeros64(word)
				}
				if n >= left {
					break
				}
				at += n
				left -= n
				word >>= n
				if open {
					if !yield(pageAddr(base, start), pageAddr(base, at)) {
						return
					}
				} else {
					start = at
				}
				open = !open
			}
		}
		if open {
			yield(pageAddr(base, start), pageAddr(base, len(field)*64))
		}
	}
}

func pageIndex(base, addr uint64) int    { return int((addr - base) / checkpoint.PageSize) }
func pageAddr(base uint64, i int) uint64 { return base + uint64(i)*checkpoint.PageSize }

// setBits sets the bits [from,to).
func setBits(field []uint64, from, to int) {
	eachWord(from, to, func(i int, mask uint64) { field[i] |= mask })
}

func clearBits(field []uint64, from, to int) {
	eachWord(from, to, func(i int, mask uint64) { field[i] &^= mask })
}

func eachWord(from, to int, f func(i int, mask uint64)) {
	for from < to {
		i, low := from/64, from%64
		high := min(64, low+to-from)
		f(i, ^uint64(0)>>(64-(high-low))<<low)
		from += high - low
	}
}

func anySet(field []uint64) bool {
	for _, word := range field {
		if word != 0 {
			return true
		}
	}
	return false
}
