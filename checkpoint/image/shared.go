package image

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/tranship/tranship/checkpoint"
)

// PageRun is a run of a segment's pages, by number.
type PageRun struct {
	First uint64
	Pages checkpoint.Pages
}

// End returns the number behind the last page.
func (r PageRun) End() uint64 { return r.First + uint64(r.Pages) }

// Place says where in the pages image a run of pages stands; Slot counts pages.
type Place struct {
	PageRun
	Slot uint64
}

// Packed is the order in which the pages of a segment of shared memory stand in
// its pages image: as they were first met, so that an image which is written
// while the segment is in use needs no page moved when another one is filled.
// CRIU reads such an image run by run, in whatever order. A page once placed
// keeps its slot; if it is given back, the slot holds zeros.
type Packed struct {
	places []Place // by page; neighbours in both orders are joined
	slots  uint64
}

// Pages is how many slots there are.
func (p *Packed) Pages() checkpoint.Pages { return checkpoint.Pages(p.slots) }

// End returns the number behind the last page that has a slot.
func (p *Packed) End() uint64 {
	if len(p.places) == 0 {
		return 0
	}
	return p.places[len(p.places)-1].End()
}

// Update gives slots to the pages that hold something now, ascending runs that do
// not touch. It returns where each of them stands, and the places of those that
// held something and do not any more.
func (p *Packed) Update(data []PageRun) (full, empty []Place) {
	var all []Place
	keep := func(pl Place) { all = join(all, pl) }
	at := 0 // in p.places
	var used uint64
	for _, d := range data {
		for next := d.First; next < d.End(); {
			for at < len(p.places) && p.places[at].End() <= next {
				if rest := p.places[at].from(used); rest.Pages > 0 {
					empty = append(empty, rest)
				}
				keep(p.places[at])
				at++
			}
			var pl Place
			if at < len(p.places) && p.places[at].First <= next {
				old := p.places[at]
				if hole := old.from(used).until(next); hole.Pages > 0 {
					empty = append(empty, hole)
				}
				pl = old.from(next).until(d.End())
			} else {
				end := d.End()
				if at < len(p.places) {
					end = min(end, p.places[at].First)
				}
				pl = Place{PageRun{next, checkpoint.Pages(end - next)}, p.slots}
				p.slots += end - next
				keep(pl)
			}
			full = join(full, pl)
			next, used = pl.End(), pl.End()
		}
	}
	for ; at < len(p.places); at++ {
		if rest := p.places[at].from(used); rest.Pages > 0 {
			empty = append(empty, rest)
		}
		keep(p.places[at])
	}
	p.places = all
	return full, empty
}

// from returns the part that does not lie before a page, until the part that
// does; either may have no pages.
func (pl Place) from(page uint64) Place {
	if page <= pl.First {
		return pl
	}
	skip := min(page-pl.First, uint64(pl.Pages))
	return Place{PageRun{pl.First + skip, pl.Pages - checkpoint.Pages(skip)}, pl.Slot + skip}
}

func (pl Place) until(page uint64) Place {
	pl.Pages = min(pl.Pages, checkpoint.Pages(max(page, pl.First)-pl.First))
	return pl
}

func join(all []Place, pl Place) []Place {
	if n := len(all); n > 0 && all[n-1].End() == pl.First && all[n-1].Slot+uint64(all[n-1].Pages) == pl.Slot {
		all[n-1].Pages += pl.Pages
		return all
	}
	return append(all, pl)
}

// covers says whether all pages of a run have slots.
func (p *Packed) covers(r PageRun) bool {
	i, _ := slices.BinarySearchFunc(p.places, r.First, func(pl Place, page uint64) int {
		if pl.End() <= page {
			return -1
		}
		return 1
	})
	for ; i < len(p.places) && p.places[i].First <= r.First; i++ {
		if p.places[i].End() >= r.End() {
			return true
		}
		r = PageRun{p.places[i].End(), checkpoint.Pages(r.End() - p.places[i].End())}
	}
	return false
}

const sharedPrefix = "pagemap-shmem-"

// SettleShared makes the images of a segment say that its pages are in
// pages-<pagesID>.img, packed, and removes those that CRIU wrote. Each page that
// CRIU found must have a slot. A segment that CRIU does not know is ErrNoSegment.
func SettleShared(dir string, segment uint64, p *Packed, pagesID uint32) error {
	name := filepath.Join(dir, sharedPrefix+strconv.FormatUint(segment, 10)+".img")
	pm, err := readFile(name, ReadPagemap)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %d", ErrNoSegment, segment)
	}
	if err != nil {
		return err
	}
	for _, r := range pm.Runs {
		if run := (PageRun{r.Addr / checkpoint.PageSize, r.Pages}); !p.covers(run) {
			return fmt.Errorf("%s: not all of %d pages at %#x were sent", name, r.Pages, r.Addr)
		}
	}
	packed := Pagemap{PagesID: pagesID}
	for _, pl := range slices.SortedFunc(slices.Values(p.places), func(a, b Place) int {
		if a.Slot < b.Slot {
			return -1
		}
		return 1
	}) {
		packed.Runs = append(packed.Runs, Run{Addr: pl.First * checkpoint.PageSize, Pages: pl.Pages, Flags: Present})
	}
	if err := replaceFile(name, func(w io.Writer) error { return writePagemap(w, packed, true) }); err != nil {
		return err
	}
	return os.Remove(filepath.Join(dir, fmt.Sprintf("pages-%d.img", pm.PagesID)))
}

// LostSegment returns the pages image of a segment whose pages were thrown away
// and that SettleShared was not called for, 0 if there is none.
func LostSegment(dir string) (uint32, error) {
	ids, err := SharedPages(dir)
	if err != nil {
		return 0, err
	}
	for id := range ids {
		switch gone, err := discarded(filepath.Join(dir, fmt.Sprintf("pages-%d.img", id))); {
		case errors.Is(err, os.ErrNotExist): // elsewhere
		case err != nil:
			return 0, err
		case gone:
			return id, nil
		}
	}
	return 0, nil
}

// ErrNoSegment says that a dump has no such segment of shared memory.
var ErrNoSegment = errors.New("no such shared memory in the images")

// SharedPages returns, for every segment of shared memory in a dump, the id of its
// pages image and how many pages that must hold.
func SharedPages(dir string) (map[uint32]checkpoint.Pages, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[uint32]checkpoint.Pages{}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), sharedPrefix) {
			continue
		}
		pm, err := readFile(filepath.Join(dir, e.Name()), ReadPagemap)
		if err != nil {
			return nil, err
		}
		if _, twice := out[pm.PagesID]; twice {
			return nil, malformed("pages image %d belongs to two segments", pm.PagesID)
		}
		var sum checkpoint.Pages
		for _, r := range pm.Runs {
			if r.Flags&Present != 0 {
				sum += r.Pages
			}
			if sum.Bytes() > maxAddr/2 {
				return nil, malformed("%s: more than %d pages", e.Name(), sum)
			}
		}
		out[pm.PagesID] = sum
	}
	return out, nil
}
