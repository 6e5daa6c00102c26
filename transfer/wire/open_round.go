package wire

import "encoding/binary"

// OpenRound is the first frame of a stream of pages.
type OpenRound struct {
	// Epoch grows with every round that the sender begins, also with one that
	// repeats a broken one. Pages of a later epoch are never applied before
	// those of an earlier one have been applied or dropped.
	Epoch uint64
	// Round is the caller's number, for logs.
	Round uint64
}

func (o OpenRound) body() int { return uvarintLen(o.Epoch) + uvarintLen(o.Round) }

// Len is the length of the whole frame.
func (o OpenRound) Len() int { return frameLen(o.body()) }

// Append appends the whole frame.
func (o OpenRound) Append(b []byte) []byte {
	b = AppendHeader(b, TypeOpenRound, o.body())
	b = binary.AppendUvarint(b, o.Epoch)
	return binary.AppendUvarint(b, o.Round)
}

// ParseOpenRound parses the body.
func ParseOpenRound(body []byte) (OpenRound, error) {
	r := reader{b: body}
	o := OpenRound{Epoch: r.uvarint(1 << 62), Round: r.uvarint(1 << 31)}
	if r.err == nil && o.Epoch == 0 {
		r.fail(ErrMalformed)
	}
	if err := r.end(TypeOpenRound); err != nil {
		return OpenRound{}, err
	}
	return o, nil
}
