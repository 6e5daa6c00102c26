package migrate

import (
	"slices"

	"github.com/tranship/tranship/checkpoint"
)

// extentSet is a set of page ranges per process: what the destination was told
// about. It is the safety net under the tracker: whatever CRIU left out of its
// images and is not in the set is read from the frozen shard and sent.
type extentSet map[checkpoint.PID][]span

// span is [from, to) in bytes; spans of one process are sorted and disjoint.
type span struct{ from, to uint64 }

// add includes an extent.
func (s extentSet) add(e checkpoint.Extent) {
	spans := s[e.PID]
	n := span{e.Addr, e.End()}
	// The first span that ends at or behind the new one's start touches it or
	// lies beyond it.
	i, _ := slices.BinarySearchFunc(spans, n.from, func(sp span, from uint64) int {
		if sp.to < from {
			return -1
		}
		return 1
	})
	j := i
	for j < len(spans) && spans[j].from <= n.to {
		n.from, n.to = min(n.from, spans[j].from), max(n.to, spans[j].to)
		j++
	}
	s[e.PID] = slices.Replace(spans, i, j, n)
}

// missing returns the parts of e that the set lacks, in order.
func (s extentSet) missing(e checkpoint.Extent) []checkpoint.Extent {
	var out []checkpoint.Extent
	at, end := e.Addr, e.End()
	emit := func(to uint64) {
		if to > at {
			out = append(out, checkpoint.Extent{PID: e.PID, Addr: at, Pages: checkpoint.Pages(to-at) / checkpoint.PageSize})
		}
	}
	for _, sp := range s[e.PID] {
		if sp.to <= at {
			continue
		}
		if sp.from >= end {
			break
		}
		emit(sp.from)
		at = max(at, sp.to)
	}
	emit(end)
	return out
}
