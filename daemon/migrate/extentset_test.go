package migrate

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/tranship/tranship/checkpoint"
)

func TestAnExtentSetAnswersLikeASetOfPages(t *testing.T) {
	const pages = 200
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 1))
		set, truth := extentSet{}, map[checkpoint.PID]*[pages]bool{1: {}, 2: {}}
		random := func() checkpoint.Extent {
			first := rng.IntN(pages)
			return checkpoint.Extent{
				PID:   checkpoint.PID(1 + rng.IntN(2)),
				Addr:  uint64(first) * checkpoint.PageSize,
				Pages: checkpoint.Pages(1 + rng.IntN(pages-first)),
			}
		}
		for range rng.IntN(30) {
			e := random()
			e.Pages = min(e.Pages, 9)
			set.add(e)
			for p := e.Addr / checkpoint.PageSize; p < e.End()/checkpoint.PageSize; p++ {
				truth[e.PID][p] = true
			}
			for _, spans := range set {
				for i := 1; i < len(spans); i++ {
					if spans[i-1].to >= spans[i].from {
						t.Fatalf("seed %d: spans %v touch or overlap", seed, spans)
					}
				}
			}
		}
		for range 20 {
			e := random()
			got := map[uint64]bool{}
			for _, m := range set.missing(e) {
				for a := m.Addr; a < m.End(); a += checkpoint.PageSize {
					got[a/checkpoint.PageSize] = true
				}
			}
			for p := range uint64(pages) {
				inside := p*checkpoint.PageSize >= e.Addr && p*checkpoint.PageSize < e.End()
				if want := inside && !truth[e.PID][p]; got[p] != want {
					t.Fatalf("seed %d: %v page %d: missing is %v, want %v", seed, e, p, got[p], want)
				}
			}
		}
	}
}

// The comparison runs while the shard is frozen: a memory of some gigabytes with
// holes is hundreds of thousands of extents.
func TestAMemoryFullOfHolesIsComparedQuickly(t *testing.T) {
	const extents = 200_000
	set := extentSet{}
	extent := func(i int) checkpoint.Extent {
		return checkpoint.Extent{PID: 1, Addr: uint64(i) * 2 * checkpoint.PageSize, Pages: 1}
	}
	for i := range extents {
		set.add(extent(i))
	}
	began := time.Now()
	for i := range extents {
		if missing := set.missing(extent(i)); len(missing) != 0 {
			t.Fatalf("%v is missing", missing)
		}
	}
	// Milliseconds; a scan of all spans for each would take half a minute.
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("%d extents were compared in %v", extents, took)
	}
}
