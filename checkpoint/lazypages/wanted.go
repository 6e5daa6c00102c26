package lazypages

import (
	"slices"
	"sync"

	"github.com/tranship/tranship/checkpoint"
)

// wanted is what a family lacks in its store: the pages that are owed and that
// one of its spaces needs. The family's goroutine writes it, and those who pull
// read it, each of whom has at most one run of extents on its way (its flight).
//
// Store pages, as page numbers, throughout.
type wanted struct {
	mu sync.Mutex
	// owed have not arrived; flight are those of them that somebody has asked for,
	// and rush those of these that were asked for because a thread waits.
	owed, flight, rush pageSet
	// urgent are the pages that threads wait for, the longest waiting first.
	urgent []uint64
	// near is where the last fault was: what lies behind it comes first.
	near uint64
}

// maxExtents bounds one request, however scattered the pages.
const maxExtents = 512

// begin wants what is both owed and needed.
func (w *wanted) begin(owed, needed *pageSet) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.owed, w.flight, w.rush = owed.clone(), owed.empty(), owed.empty()
	w.owed.intersect(needed)
}

// take picks up to limit pages and marks them as on their way: with urgent the
// first page that a thread waits for and what follows it, else whatever comes
// next. It returns nothing when there is nothing to ask for.
//
// A page that a thread waits for is asked for even if it is on its way with
// others, which may be slow: who comes second finds that it is not owed any more.
func (w *wanted) take(urgent bool, limit checkpoint.Pages) []span {
	w.mu.Lock()
	defer w.mu.Unlock()
	for urgent && len(w.urgent) > 0 {
		page := w.urgent[0]
		w.urgent = w.urgent[1:]
		if !w.owed.has(page) || w.rush.has(page) {
			continue
		}
		end := page + 1
		for end < page+uint64(limit) && w.owed.has(end) && !w.flight.has(end) {
			end++
		}
		w.flight.add(page, end)
		w.rush.add(page, end)
		return []span{{page * checkpoint.PageSize, end * checkpoint.PageSize}}
	}
	if urgent {
		return nil
	}
	if out := w.collect(w.near, ^uint64(0), limit); len(out) > 0 {
		return out
	}
	return w.collect(0, w.near, limit)
}

func (w *wanted) collect(from, to uint64, limit checkpoint.Pages) []span {
	var out []span
	for limit > 0 && len(out) < maxExtents {
		start, end, ok := w.owed.nextWithout(from, to, uint64(limit), &w.flight)
		if !ok {
			break
		}
		w.flight.add(start, end)
		limit -= checkpoint.Pages(end - start)
		out = append(out, span{start * checkpoint.PageSize, end * checkpoint.PageSize})
		from = end
	}
	return out
}

// giveBack says that what take returned is not on its way any more. What of it is
// on its way with somebody else, too, may then come once more.
func (w *wanted) giveBack(spans []span) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range spans {
		w.flight.clear(s.start/checkpoint.PageSize, s.end/checkpoint.PageSize)
		w.rush.clear(s.start/checkpoint.PageSize, s.end/checkpoint.PageSize)
	}
}

// want makes a page urgent, unless it was asked for as such. It is said again as long as
// a thread waits, and reports whether that is news.
func (w *wanted) want(page uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.near = page
	if slices.Contains(w.urgent, page) || w.rush.has(page) {
		return false
	}
	w.urgent = append(w.urgent, page)
	return true
}

// settle takes pages out that have arrived or that nobody needs, and returns how
// many are still owed.
func (w *wanted) settle(from, to uint64) checkpoint.Pages {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.owed.clear(from, to)
	w.flight.clear(from, to)
	w.rush.clear(from, to)
	return w.owed.count
}

// clear forgets everything: the family has ended.
func (w *wanted) clear() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.owed, w.flight, w.rush, w.urgent = pageSet{}, pageSet{}, pageSet{}, nil
}

func (w *wanted) count() checkpoint.Pages {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.owed.count
}
