package track

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestRunsOfSetBits(t *testing.T) {
	const all = ^uint64(0)
	for _, tt := range []struct {
		name  string
		field []uint64
		want  string
	}{
		{"none", []uint64{0, 0}, ""},
		{"all", []uint64{all, all}, "0-128"},
		{"the first", []uint64{1, 0}, "0-1"},
		{"the last", []uint64{0, 1 << 63}, "127-128"},
		{"across a word", []uint64{1 << 63, 1}, "63-65"},
		{"ending with a word", []uint64{0xf << 60, 0}, "60-64"},
		{"beginning with a word", []uint64{0, 3}, "64-66"},
		{"two in a word", []uint64{0b1100110, 0}, "1-3 5-7"},
		{"every second of the last", []uint64{0, 0b101 << 61}, "125-126 127-128"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := ""
			for from, to := range runs(0, tt.field) {
				if got != "" {
					got += " "
				}
				got += fmt.Sprintf("%d-%d", from/page, to/page)
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// FuzzPageSet does the same to a pageSet and to a map of pages, and looks at the
// result through a window.
func FuzzPageSet(f *testing.F) {
	f.Add(uint64(1))
	f.Add(uint64(2))
	f.Fuzz(func(t *testing.T, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 0))
		const base = 0x7f00_0000_0000
		const span = 4 * chunkPages
		set, model := pageSet{}, map[uint64]bool{}
		between := func() (uint64, uint64) {
			from := rng.Uint64N(span)
			return base + from*page, base + (from+1+rng.Uint64N(span-from))*page
		}
		for range 20 {
			from, to := between()
			add := rng.IntN(3) > 0
			if add {
				set.add(from, to)
			} else {
				set.remove(from, to)
			}
			for at := from; at < to; at += page {
				if add {
					model[at] = true
				} else {
					delete(model, at)
				}
			}
		}
		if !slices.IsSorted(set.bases()) {
			t.Error("the chunks are not in order")
		}
		var w window
		w.reset(between())
		from, to := between()
		w.mark(w.populated, from, to)
		want := map[uint64]bool{}
		for at := range model {
			if at >= w.start && at < w.end && (at < from || at >= to) {
				want[at] = true
			}
		}
		last := uint64(0)
		for start, end := range w.holes(set) {
			if start <= last || end <= start {
				t.Fatalf("run %#x-%#x after %#x", start, end, last)
			}
			last = end
			for at := start; at < end; at += page {
				if !want[at] {
					t.Fatalf("page %#x is no hole", at)
				}
				delete(want, at)
			}
		}
		if len(want) > 0 {
			t.Errorf("%d holes were not found", len(want))
		}
		w.markSet(w.written, set)
		for start, end := range w.content() {
			for at := start; at < end; at += page {
				if !model[at] || at < w.start || at >= w.end || at < from || at >= to {
					t.Fatalf("page %#x is not written and populated", at)
				}
			}
		}
	})
}
