package wire

import (
	"encoding/binary"
	"math"
)

// EndBlob is the last frame of a blob. A stream that ends without it was cut.
type EndBlob struct {
	// Bytes is the blob's length before encoding.
	Bytes uint64
}

func (e EndBlob) body() int { return uvarintLen(e.Bytes) }

// Len is the length of the whole frame.
func (e EndBlob) Len() int { return frameLen(e.body()) }

// Append appends the whole frame.
func (e EndBlob) Append(b []byte) []byte {
	return binary.AppendUvarint(AppendHeader(b, TypeEndBlob, e.body()), e.Bytes)
}

// ParseEndBlob parses the body.
func ParseEndBlob(body []byte) (EndBlob, error) {
	r := reader{b: body}
	e := EndBlob{Bytes: r.uvarint(math.MaxInt64)}
	if err := r.end(TypeEndBlob); err != nil {
		return EndBlob{}, err
	}
	return e, nil
}
