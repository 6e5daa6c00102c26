package encoding

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
)

// A delta says what makes a page of an older version of it. It is the 64-bit
// xxh3 of the page, big-endian, then runs of changed 8-byte words: how many, how
// many unchanged ones stand before them, the words as they are now; both numbers
// are uvarints. A run of no words ends it.
//
// QEMU's XBZRLE (docs/devel/migration/xbzrle.rst) counts bytes; words compare
// eight times as fast, and what a program changes, it mostly changes by words.
const (
	pageSize = checkpoint.PageSize
	// MaxDelta is what a delta may take: beyond half a page, the pages around it
	// and s2 are likely to do as well without a base.
	MaxDelta = pageSize / 2
	// MinDelta is the length of the shortest delta.
	MinDelta = 8 + 1

	word      = 8
	pageWords = pageSize / word
	// runHead is more than the two numbers of a run take.
	runHead = 4
)

// ErrBase says that a delta was made of another version than the one it was
// applied to.
var ErrBase = errors.New("the delta is not of this page")

// AppendDelta appends what makes now of old, both of a page's length, or says that it
// would take more than MaxDelta.
func AppendDelta(dst, old, now []byte) ([]byte, bool) {
	start := len(dst)
	old, now = old[:pageSize], now[:pageSize]
	out := append(dst, 0, 0, 0, 0, 0, 0, 0, 0)
	at := 0
	for {
		from := at
		for from < pageSize && binary.NativeEndian.Uint64(old[from:]) == binary.NativeEndian.Uint64(now[from:]) {
			from += word
		}
		if from == pageSize {
			break
		}
		to := from + word
		for to < pageSize && binary.NativeEndian.Uint64(old[to:]) != binary.NativeEndian.Uint64(now[to:]) {
			to += word
		}
		if len(out)-start+runHead+to-from+1 > MaxDelta {
			return dst, false
		}
		out = binary.AppendUvarint(out, uint64(to-from)/word)
		out = binary.AppendUvarint(out, uint64(from-at)/word)
		out = append(out, now[from:to]...)
		at = to
	}
	binary.BigEndian.PutUint64(out[start:], xxh3.Hash(now))
	return append(out, 0), true
}

// ApplyDelta makes the page of its older version, in place, from the delta that
// b begins with, and returns what follows it. After ErrCorrupt or ErrBase page
// is of no use.
func ApplyDelta(page, b []byte) (rest []byte, err error) {
	page = page[:pageSize]
	if len(b) < MinDelta {
		return nil, fmt.Errorf("delta of %d bytes: %w", len(b), ErrCorrupt)
	}
	sum := binary.BigEndian.Uint64(b)
	b = b[8:]
	at := 0
	for {
		n, size := binary.Uvarint(b)
		if size <= 0 || n > pageWords {
			return nil, fmt.Errorf("delta: run of %d words: %w", n, ErrCorrupt)
		}
		b = b[size:]
		if n == 0 {
			break
		}
		skip, size := binary.Uvarint(b)
		if size <= 0 || skip > pageWords {
			return nil, fmt.Errorf("delta: run after %d words: %w", skip, ErrCorrupt)
		}
		b = b[size:]
		at += int(skip) * word
		length := int(n) * word
		if at+length > pageSize || length > len(b) {
			return nil, fmt.Errorf("delta: run of %d bytes at %d: %w", length, at, ErrCorrupt)
		}
		copy(page[at:], b[:length])
		at, b = at+length, b[length:]
	}
	if xxh3.Hash(page) != sum {
		return nil, ErrBase
	}
	return b, nil
}
