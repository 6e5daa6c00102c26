package wire

import (
	"encoding/binary"
	"math"
)

// Answer is the receiver's last word on a stream of pages or a blob. The sender
// holds nothing for done before it.
type Answer struct {
	// Code is a stable reason of failure, "" when all was applied.
	Code string
	Text string
	// Tally is what was applied, of a stream of pages.
	Tally
	// Bytes is what was read, of a blob.
	Bytes uint64
}

func (a Answer) body() int {
	return stringLen(a.Code) + stringLen(a.Text) + a.len() + uvarintLen(a.Bytes)
}

// Len is the length of the whole frame.
func (a Answer) Len() int { return frameLen(a.body()) }

// Append appends the whole frame.
func (a Answer) Append(b []byte) []byte {
	b = AppendHeader(b, TypeAnswer, a.body())
	b = appendString(b, a.Code)
	b = appendString(b, a.Text)
	b = a.append(b)
	return binary.AppendUvarint(b, a.Bytes)
}

// ParseAnswer parses the body.
func ParseAnswer(body []byte) (Answer, error) {
	r := reader{b: body}
	a := Answer{Code: r.string(MaxCode), Text: r.string(MaxText), Tally: r.tally(), Bytes: r.uvarint(math.MaxInt64)}
	if err := r.end(TypeAnswer); err != nil {
		return Answer{}, err
	}
	return a, nil
}
