package wire

import (
	"encoding/binary"
	"fmt"
)

// Block is a piece of a blob, at most MaxRaw bytes of it.
type Block struct {
	// Encoding is a number of package encoding.
	Encoding byte
	// Sum is the 64-bit xxh3 of the raw bytes. QUIC already keeps them whole on
	// the way; this covers the encoders and the memory at both ends.
	Sum uint64
	// Raw is the length before encoding.
	Raw int
	// Payload is the encoded piece; parsed, it is a part of the body.
	Payload []byte
}

func (k Block) head() int { return 1 + 8 + uvarintLen(uint64(k.Raw)) }

// Len is the length of the whole frame.
func (k Block) Len() int { return frameLen(k.head() + len(k.Payload)) }

// AppendHead appends all of the frame that stands before the payload, which
// then goes out without having been copied.
func (k Block) AppendHead(b []byte) []byte {
	b = AppendHeader(b, TypeBlock, k.head()+len(k.Payload))
	return k.appendFields(b)
}

// Append appends the whole frame.
func (k Block) Append(b []byte) []byte { return append(k.AppendHead(b), k.Payload...) }

func (k Block) appendFields(b []byte) []byte {
	b = append(b, k.Encoding)
	b = binary.BigEndian.AppendUint64(b, k.Sum)
	return binary.AppendUvarint(b, uint64(k.Raw))
}

// ParseBlock parses the body; Payload points into it.
func ParseBlock(body []byte) (Block, error) {
	r := reader{b: body}
	k := Block{Encoding: r.byte(), Sum: r.uint64(), Raw: int(r.uvarint(MaxRaw))}
	k.Payload = r.b
	if r.err == nil && (k.Raw == 0 || len(k.Payload) == 0) {
		r.fail(ErrMalformed)
	}
	if r.err == nil && len(k.Payload) > k.Raw {
		// No encoder here makes anything longer: what does not shrink is sent raw.
		r.fail(ErrLimit)
	}
	if r.err != nil {
		return Block{}, fmt.Errorf("%v: %w", TypeBlock, r.err)
	}
	return k, nil
}
