package wire

import (
	"encoding/binary"
	"math"
	"math/bits"
)

// MaxMissing bounds a bitmap of missed copies: as many as may be left out of a round.
const MaxMissing = 1 << 18 / 8

// Answer is the receiver's last word on a stream of pages or a blob. The sender
// holds nothing for done before it.
type Answer struct {
	// Code is a stable reason of failure, "" when all was applied.
	Code string
	Text string
	// Tally is what was applied, of a stream of pages.
	Tally
	// Missing says which of the stream's copies are Missed: bit i%8 of byte i/8 is
	// that of the i-th page. It ends with a byte that is not zero; parsed, it is a
	// part of the body.
	Missing []byte
	// Bytes is what was read, of a blob, or how many pages were told of.
	Bytes uint64
}

func (a Answer) body() int {
	return stringLen(a.Code) + stringLen(a.Text) + a.len() +
		uvarintLen(uint64(len(a.Missing))) + len(a.Missing) + uvarintLen(a.Bytes)
}

// Len is the length of the whole frame.
func (a Answer) Len() int { return frameLen(a.body()) }

// Append appends the whole frame.
func (a Answer) Append(b []byte) []byte {
	b = AppendHeader(b, TypeAnswer, a.body())
	b = appendString(b, a.Code)
	b = appendString(b, a.Text)
	b = a.append(b)
	b = append(binary.AppendUvarint(b, uint64(len(a.Missing))), a.Missing...)
	return binary.AppendUvarint(b, a.Bytes)
}

// ParseAnswer parses the body.
func ParseAnswer(body []byte) (Answer, error) {
	r := reader{b: body}
	a := Answer{Code: r.string(MaxCode), Text: r.string(MaxText), Tally: r.tally(), Missing: r.bytes(MaxMissing), Bytes: r.uvarint(math.MaxInt64)}
	missed := uint64(0)
	for _, b := range a.Missing {
		missed += uint64(bits.OnesCount8(b))
	}
	if n := len(a.Missing); r.err == nil && (missed != a.Missed || n > 0 && a.Missing[n-1] == 0) {
		r.fail(ErrMalformed)
	}
	if err := r.end(TypeAnswer); err != nil {
		return Answer{}, err
	}
	return a, nil
}
