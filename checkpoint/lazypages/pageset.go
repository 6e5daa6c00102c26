package lazypages

import (
	"math/bits"
	"slices"

	"github.com/tranship/tranship/checkpoint"
)

// pageSet is a set of page numbers (store address / page size), made once from
// ascending runs and then only cleared. Sets with one origin share their
// skeleton of groups, so that they can be compared word by word.
//
// A bitmap rather than a list of ranges: memory after pre-copy may alternate
// between data and holes page by page, and faults tear pieces out of its middle.
type pageSet struct {
	groups []group // ascending by first
	count  checkpoint.Pages
}

// group is 2 MiB of address space, as much as one page table maps.
type group struct {
	first uint64 // first page number, a multiple of groupPages
	words [groupWords]uint64
}

const (
	groupPages = 512
	groupWords = groupPages / 64
)

// appendRun adds pages [from, to), none of which lies before an earlier run.
func (s *pageSet) appendRun(from, to uint64) {
	for from < to {
		first := from &^ (groupPages - 1)
		if n := len(s.groups); n == 0 || s.groups[n-1].first != first {
			s.groups = append(s.groups, group{first: first})
		}
		g := &s.groups[len(s.groups)-1]
		end := min(to, first+groupPages)
		for ; from < end; from++ {
			word, bit := (from-first)/64, uint64(1)<<(from%64)
			if g.words[word]&bit == 0 {
				g.words[word] |= bit
				s.count++
			}
		}
	}
}

// clone copies the set; the copy has the same skeleton.
func (s *pageSet) clone() pageSet {
	return pageSet{groups: slices.Clone(s.groups), count: s.count}
}

// empty returns a set with the same skeleton and no pages.
func (s *pageSet) empty() pageSet {
	out := s.clone()
	for i := range out.groups {
		out.groups[i].words = [groupWords]uint64{}
	}
	out.count = 0
	return out
}

// add puts pages [from, to) into the set as far as its skeleton has them.
func (s *pageSet) add(from, to uint64) {
	s.each(from, to, func(w *uint64, mask uint64) {
		s.count += checkpoint.Pages(bits.OnesCount64(mask &^ *w))
		*w |= mask
	})
}

// union adds what is in other, a set with the same skeleton.
func (s *pageSet) union(other *pageSet) {
	s.count = 0
	for i := range s.groups {
		for w := range s.groups[i].words {
			s.groups[i].words[w] |= other.groups[i].words[w]
			s.count += checkpoint.Pages(bits.OnesCount64(s.groups[i].words[w]))
		}
	}
}

// intersect leaves what is also in other, a set with the same skeleton.
func (s *pageSet) intersect(other *pageSet) {
	s.count = 0
	for i := range s.groups {
		for w := range s.groups[i].words {
			s.groups[i].words[w] &= other.groups[i].words[w]
			s.count += checkpoint.Pages(bits.OnesCount64(s.groups[i].words[w]))
		}
	}
}

// clear takes pages [from, to) out and returns how many were in.
func (s *pageSet) clear(from, to uint64) checkpoint.Pages {
	before := s.count
	s.each(from, to, func(w *uint64, mask uint64) {
		s.count -= checkpoint.Pages(bits.OnesCount64(*w & mask))
		*w &^= mask
	})
	return before - s.count
}

func (s *pageSet) has(page uint64) bool {
	i := s.groupAt(page)
	return i < len(s.groups) && s.groups[i].first <= page &&
		s.groups[i].words[page%groupPages/64]&(1<<(page%64)) != 0
}

// next returns the first run of at most limit pages in [from, to); ok is false
// when there is none.
func (s *pageSet) next(from, to, limit uint64) (start, end uint64, ok bool) {
	for i := s.groupAt(from); i < len(s.groups) && s.groups[i].first < to; i++ {
		g := &s.groups[i]
		for w := range g.words {
			base := g.first + uint64(w)*64
			word := g.words[w] & mask64(base, from, to)
			if word == 0 {
				continue
			}
			start = base + uint64(bits.TrailingZeros64(word))
			return start, s.runEnd(i, start, min(to, start+limit)), true
		}
	}
	return 0, 0, false
}

// nextWithout is next for the pages that are not in other, a set with the same
// skeleton.
func (s *pageSet) nextWithout(from, to, limit uint64, other *pageSet) (start, end uint64, ok bool) {
	if other.count == 0 {
		return s.next(from, to, limit)
	}
	for i := s.groupAt(from); i < len(s.groups) && s.groups[i].first < to; i++ {
		g := &s.groups[i]
		for w := range g.words {
			base := g.first + uint64(w)*64
			word := g.words[w] &^ other.groups[i].words[w] & mask64(base, from, to)
			if word == 0 {
				continue
			}
			start = base + uint64(bits.TrailingZeros64(word))
			// A run ends where this set does, or where other begins.
			end = s.runEnd(i, start, min(to, start+limit))
			if at, _, ok := other.next(start, end, 1); ok {
				end = at
			}
			return start, end, true
		}
	}
	return 0, 0, false
}

// runEnd returns where the run that begins at start, in group i, ends.
func (s *pageSet) runEnd(i int, start, to uint64) uint64 {
	end := start
	for ; i < len(s.groups) && s.groups[i].first <= end && end < to; i++ {
		g := &s.groups[i]
		for end < to && end < g.first+groupPages {
			ones := uint64(bits.TrailingZeros64(^(g.words[end%groupPages/64] >> (end % 64))))
			end += ones
			if ones == 0 || end%64 != 0 {
				return min(end, to)
			}
		}
	}
	return min(end, to)
}

// groupAt returns the index of the first group that ends after page.
func (s *pageSet) groupAt(page uint64) int {
	i, _ := slices.BinarySearchFunc(s.groups, page, func(g group, page uint64) int {
		switch {
		case g.first+groupPages <= page:
			return -1
		case g.first > page:
			return 1
		}
		return 0
	})
	return i
}

// each calls edit for every word that has pages of [from, to), with their mask.
func (s *pageSet) each(from, to uint64, edit func(word *uint64, mask uint64)) {
	for i := s.groupAt(from); i < len(s.groups) && s.groups[i].first < to; i++ {
		g := &s.groups[i]
		for w := range g.words {
			if mask := mask64(g.first+uint64(w)*64, from, to); mask != 0 {
				edit(&g.words[w], mask)
			}
		}
	}
}

// mask64 has the bits of the 64 pages at base that lie in [from, to).
func mask64(base, from, to uint64) uint64 {
	if base+64 <= from || base >= to {
		return 0
	}
	mask := ^uint64(0)
	if from > base {
		mask <<= from - base
	}
	if to < base+64 {
		mask &= 1<<(to-base) - 1
	}
	return mask
}
