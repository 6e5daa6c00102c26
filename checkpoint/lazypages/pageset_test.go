package lazypages

import (
	"math/rand/v2"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

// model is a pageSet that cannot be wrong.
type model map[uint64]bool

func (m model) next(from, to, limit uint64) (start, end uint64, ok bool) {
	for start = from; start < to; start++ {
		if m[start] {
			for end = start; end < to && end < start+limit && m[end]; end++ {
			}
			return start, end, true
		}
	}
	return 0, 0, false
}

func TestAPageSetIsASet(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	const top = 6 * groupPages
	for range 200 {
		var s pageSet
		m := model{}
		for page := rng.Uint64N(3 * groupPages); page < top; {
			end := min(top, page+1+rng.Uint64N(1<<rng.UintN(11)))
			s.appendRun(page, end)
			for i := page; i < end; i++ {
				m[i] = true
			}
			page = end + rng.Uint64N(1<<rng.UintN(11))
		}
		all := s.clone()
		for range 50 {
			from := rng.Uint64N(top)
			to := from + rng.Uint64N(1<<rng.UintN(12))
			switch rng.UintN(4) {
			case 0:
				was := checkpoint.Pages(0)
				for i := from; i < to; i++ {
					if m[i] {
						was++
					}
					delete(m, i)
				}
				if got := s.clear(from, to); got != was {
					t.Fatalf("clear(%d, %d) = %d, want %d", from, to, got, was)
				}
			case 1:
				s.add(from, to)
				for i := from; i < to; i++ {
					if all.groupAt(i) < len(all.groups) && all.groups[all.groupAt(i)].first <= i {
						m[i] = true
					}
				}
			default:
				limit := 1 + rng.Uint64N(100)
				gs, ge, gok := s.next(from, to, limit)
				ws, we, wok := m.next(from, to, limit)
				if gs != ws || ge != we || gok != wok {
					t.Fatalf("next(%d, %d, %d) = %d-%d %v, want %d-%d %v", from, to, limit, gs, ge, gok, ws, we, wok)
				}
			}
			if int(s.count) != len(m) {
				t.Fatalf("count %d, want %d", s.count, len(m))
			}
			page := rng.Uint64N(top)
			if s.has(page) != m[page] {
				t.Fatalf("has(%d) = %v", page, s.has(page))
			}
		}
		other := all.empty()
		other.add(0, top/2)
		s.intersect(&other)
		for i := range uint64(top) {
			if want := m[i] && i < top/2; s.has(i) != want {
				t.Fatalf("after intersect: has(%d) = %v", i, !want)
			}
		}
	}
}
