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
	i := endsBehind(spans, n.from) // touches it, or lies beyond it
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
	spans := s[e.PID]
	// Searched, because this runs while the shard is frozen, for each of the many
	// small extents of a memory with holes.
	for _, sp := range spans[endsBehind(spans, at):] {
		if sp.from >= end {
			break
		}
		emit(sp.from)
		at = max(at, sp.to)
	}
	emit(end)
	return out
}

// common returns the parts of e that the set has, in order.
func (s extentSet) common(e checkpoint.Extent) []checkpoint.Extent {
	var out []checkpoint.Extent
	at := e.Addr
	emit := func(to uint64) {
		if to > at {
			out = append(out, checkpoint.Extent{PID: e.PID, Addr: at, Pages: checkpoint.Pages(to-at) / checkpoint.PageSize})
		}
	}
	for _, gap := range s.missing(e) {
		emit(gap.Addr)
		at = gap.End()
	}
	emit(e.End())
	return out
}

// endsBehind is the index of the first span that ends at or behind an address.
func endsBehind(spans []span, at uint64) int {
	i, _ := slices.BinarySearchFunc(spans, at, func(sp span, at uint64) int {
		if sp.to < at {
			return -1
		}
		return 1
	})
	return i
}
