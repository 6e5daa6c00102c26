package image

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

// A segment and its packed copy, both as a byte a page; 0 is a hole.
func TestAPackedCopyIsTheSegment(t *testing.T) {
	const pages = 64
	for seed := range uint64(500) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		var p Packed
		var segment [pages]byte
		slots := map[uint64]byte{}
		for range 1 + rnd.IntN(8) {
			for range rnd.IntN(20) { // written, given back
				from := rnd.IntN(pages)
				fill := byte(rnd.IntN(3) * (1 + rnd.IntN(100)))
				for i := from; i < min(pages, from+1+rnd.IntN(9)); i++ {
					segment[i] = fill
				}
			}
			var data []PageRun
			for i, b := range segment {
				switch n := len(data); {
				case b == 0:
				case n > 0 && data[n-1].End() == uint64(i):
					data[n-1].Pages++
				default:
					data = append(data, PageRun{uint64(i), 1})
				}
			}
			full, empty := p.Update(data)
			for _, pl := range full {
				for i := range uint64(pl.Pages) {
					slots[pl.Slot+i] = segment[pl.First+i]
				}
			}
			for _, pl := range empty {
				for i := range uint64(pl.Pages) {
					if segment[pl.First+i] != 0 {
						t.Fatalf("seed %d: page %d holds something and was called empty", seed, pl.First+i)
					}
					slots[pl.Slot+i] = 0
				}
			}
		}
		var back [pages]byte
		seen := map[uint64]bool{}
		for _, pl := range p.places {
			for i := range uint64(pl.Pages) {
				if seen[pl.Slot+i] || pl.Slot+i >= uint64(p.Pages()) {
					t.Fatalf("seed %d: slot %d of %d is used twice or is none", seed, pl.Slot+i, p.Pages())
				}
				seen[pl.Slot+i] = true
				back[pl.First+i] = slots[pl.Slot+i]
			}
		}
		if back != segment || len(seen) != int(p.Pages()) {
			t.Fatalf("seed %d: restored %v from %v", seed, back, segment)
		}
		for i, b := range segment {
			if b != 0 && !p.covers(PageRun{uint64(i), 1}) {
				t.Fatalf("seed %d: page %d has no slot", seed, i)
			}
		}
		if p.covers(PageRun{0, pages + 1}) {
			t.Fatalf("seed %d: covers what is beyond the end", seed)
		}
	}
}

func TestImagesOfASegmentPointToThePackedPages(t *testing.T) {
	dir := t.TempDir()
	write := func(runs ...Run) {
		t.Helper()
		err := writeFile(filepath.Join(dir, "pagemap-shmem-77.img"), func(w io.Writer) error {
			return WritePagemap(w, Pagemap{PagesID: 9, Runs: runs})
		})
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "pages-9.img"), nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var p Packed
	p.Update([]PageRun{{10, 5}})
	p.Update([]PageRun{{2, 2}, {10, 6}})

	write(Run{Addr: 2 * checkpoint.PageSize, Pages: 2, Flags: Present}, Run{Addr: 10 * checkpoint.PageSize, Pages: 7, Flags: Present})
	if err := SettleShared(dir, 77, &p, 1<<30); err == nil {
		t.Fatal("a page without a slot was accepted")
	}
	write(Run{Addr: 2 * checkpoint.PageSize, Pages: 2, Flags: Present}, Run{Addr: 10 * checkpoint.PageSize, Pages: 6, Flags: Present})
	if err := SettleShared(dir, 78, &p, 1<<30); !errors.Is(err, ErrNoSegment) {
		t.Fatalf("segment 78: %v", err)
	}
	if err := SettleShared(dir, 77, &p, 1<<30); err != nil {
		t.Fatal(err)
	}
	got, err := readFile(filepath.Join(dir, "pagemap-shmem-77.img"), ReadPagemap)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprint(Pagemap{PagesID: 1 << 30, Runs: []Run{
		{Addr: 10 * checkpoint.PageSize, Pages: 5, Flags: Present},
		{Addr: 2 * checkpoint.PageSize, Pages: 2, Flags: Present},
		{Addr: 15 * checkpoint.PageSize, Pages: 1, Flags: Present},
	}})
	if fmt.Sprint(got) != want {
		t.Fatalf("runs %v, want %v", got, want)
	}
	if _, err := os.Stat(filepath.Join(dir, "pages-9.img")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("CRIU's pages are still there: %v", err)
	}
	sizes, err := SharedPages(dir)
	if err != nil || len(sizes) != 1 || sizes[1<<30] != 8 {
		t.Fatalf("sizes %v, %v", sizes, err)
	}
}
