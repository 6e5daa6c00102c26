package wire

import (
	"encoding/binary"
	"math"
)

// OpenBlob is the first frame of a stream that carries one blob.
type OpenBlob struct {
	Kind string
	// Name may hold anything that is UTF-8, slashes and NUL as well: whoever
	// makes a path of it checks it.
	Name string
	// Size is the blob's length in bytes, -1 when the sender does not know.
	Size int64
}

func (o OpenBlob) body() int {
	return stringLen(o.Kind) + stringLen(o.Name) + uvarintLen(uint64(o.Size+1))
}

// Len is the length of the whole frame.
func (o OpenBlob) Len() int { return frameLen(o.body()) }

// Append appends the whole frame.
func (o OpenBlob) Append(b []byte) []byte {
	b = AppendHeader(b, TypeOpenBlob, o.body())
	b = appendString(b, o.Kind)
	b = appendString(b, o.Name)
	return binary.AppendUvarint(b, uint64(o.Size+1))
}

// ParseOpenBlob parses the body.
func ParseOpenBlob(body []byte) (OpenBlob, error) {
	r := reader{b: body}
	o := OpenBlob{Kind: r.string(MaxKind), Name: r.string(MaxName), Size: int64(r.uvarint(math.MaxInt64)) - 1}
	if r.err == nil && o.Kind == "" {
		r.fail(ErrMalformed)
	}
	if err := r.end(TypeOpenBlob); err != nil {
		return OpenBlob{}, err
	}
	return o, nil
}
