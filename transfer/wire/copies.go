package wire

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/tranship/tranship/checkpoint"
)

// MaxCopies bounds the pages of a Copies frame.
const MaxCopies = 4096

// Copy is a run of pages whose content the receiver has elsewhere.
type Copy struct {
	PID  checkpoint.PID
	Addr uint64
	// FromPID and From are where the first page's content is; the others follow it.
	// Both are 0 if it is another shard's, wherever: each page is known by its hash.
	FromPID checkpoint.PID
	From    uint64
	Pages   checkpoint.Pages
}

func (c Copy) len() int {
	return uvarintLen(uint64(c.PID)) + uvarintLen(c.Addr/checkpoint.PageSize) +
		uvarintLen(uint64(c.FromPID)) + uvarintLen(c.From/checkpoint.PageSize) + uvarintLen(uint64(c.Pages))
}

// sumLen is a hash's length in a Copies frame.
const sumLen = 16

// Twin says that the content is another shard's.
func (c Copy) Twin() bool { return c.FromPID == 0 }

// Copies names pages by what the receiver has. It comes only once what it refers
// to has been acknowledged, or told of.
type Copies struct {
	// Seed is that of the hashes.
	Seed uint64
	Runs []Copy
	// Sums are the 128-bit xxh3 of each page, 16 bytes big-endian; parsed, a part of
	// the body.
	Sums []byte
}

func (c Copies) body() int {
	n := 8 + uvarintLen(uint64(len(c.Runs))) + len(c.Sums)
	for _, run := range c.Runs {
		n += run.len()
	}
	return n
}

// Len is the length of the whole frame.
func (c Copies) Len() int { return frameLen(c.body()) }

// Append appends the whole frame.
func (c Copies) Append(b []byte) []byte {
	b = AppendHeader(b, TypeCopies, c.body())
	b = binary.BigEndian.AppendUint64(b, c.Seed)
	b = binary.AppendUvarint(b, uint64(len(c.Runs)))
	for _, run := range c.Runs {
		b = binary.AppendUvarint(b, uint64(run.PID))
		b = binary.AppendUvarint(b, run.Addr/checkpoint.PageSize)
		b = binary.AppendUvarint(b, uint64(run.FromPID))
		b = binary.AppendUvarint(b, run.From/checkpoint.PageSize)
		b = binary.AppendUvarint(b, uint64(run.Pages))
	}
	return append(b, c.Sums...)
}

// ParseCopies parses the body. What it accepts names whole pages inside the
// user's address space, at most MaxCopies, and has a hash for each.
func ParseCopies(body []byte) (Copies, error) {
	r := reader{b: body}
	c := Copies{Seed: r.uint64()}
	count := int(r.uvarint(MaxCopies))
	pages := uint64(0)
	for i := 0; i < count && r.err == nil; i++ {
		run := Copy{
			PID:     checkpoint.PID(r.uvarint(math.MaxInt32)),
			Addr:    r.uvarint(MaxAddr/checkpoint.PageSize) * checkpoint.PageSize,
			FromPID: checkpoint.PID(r.uvarint(math.MaxInt32)),
			From:    r.uvarint(MaxAddr/checkpoint.PageSize) * checkpoint.PageSize,
			Pages:   checkpoint.Pages(r.uvarint(MaxCopies)),
		}
		pages += uint64(run.Pages)
		if r.err == nil && (run.PID == 0 || run.FromPID == 0 && run.From != 0 || run.Pages == 0) {
			r.fail(ErrMalformed)
		}
		if size := uint64(run.Pages.Bytes()); r.err == nil && (run.Addr+size > MaxAddr || run.From+size > MaxAddr || pages > MaxCopies) {
			r.fail(ErrLimit)
		}
		if r.err == nil {
			c.Runs = append(c.Runs, run)
		}
	}
	c.Sums = r.b
	if r.err == nil && (count == 0 || uint64(len(c.Sums)) != pages*sumLen) {
		r.fail(ErrMalformed)
	}
	if r.err != nil {
		return Copies{}, fmt.Errorf("%v: %w", TypeCopies, r.err)
	}
	return c, nil
}
