package transfer

import (
	"fmt"
	"sync"

	"github.com/google/btree"

	"github.com/tranship/tranship/checkpoint"
)

// claims holds the extents that were given to a round. The streams of a round
// overtake each other, so a page that came twice could end with its older
// content; claims makes that an error. Neighbouring extents melt into one.
type claims struct {
	mu    sync.Mutex
	spans map[checkpoint.PID]*btree.BTreeG[span]
}

// span is a range of addresses, its end not included.
type span struct{ start, end uint64 }

func newClaims() *claims {
	return &claims{spans: map[checkpoint.PID]*btree.BTreeG[span]{}}
}

func (c *claims) add(pid checkpoint.PID, start, end uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	tree := c.spans[pid]
	if tree == nil {
		tree = btree.NewG(32, func(a, b span) bool { return a.start < b.start })
		c.spans[pid] = tree
	}
	claim := span{start, end}
	var before, after span
	var hasBefore, hasAfter bool
	tree.DescendLessOrEqual(claim, func(s span) bool { before, hasBefore = s, true; return false })
	tree.AscendGreaterOrEqual(claim, func(s span) bool { after, hasAfter = s, true; return false })
	if hasBefore && before.end > start {
		return fmt.Errorf("pid %d %#x-%#x: %#x-%#x was given to this round before", pid, start, end, max(start, before.start), min(end, before.end))
	}
	if hasAfter && after.start < end {
		return fmt.Errorf("pid %d %#x-%#x: %#x-%#x was given to this round before", pid, start, end, after.start, min(end, after.end))
	}
	if hasAfter && after.start == end {
		tree.Delete(after)
		claim.end = after.end
	}
	if hasBefore && before.end == start {
		claim.start = before.start // replaces it: the tree knows a span by its start
	}
	tree.ReplaceOrInsert(claim)
	return nil
}
