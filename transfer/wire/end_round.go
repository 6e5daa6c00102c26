package wire

import "encoding/binary"

// Tally counts what went through one stream of a round.
type Tally struct {
	Batches uint64
	Pages   uint64 // with content
	Zeros   uint64 // pages sent as zero
	// Copies are pages named by what the receiver has, Missed those of them that it
	// had otherwise, and has left as they were; a sender knows of none.
	Copies, Missed uint64
}

func (t Tally) len() int {
	return uvarintLen(t.Batches) + uvarintLen(t.Pages) + uvarintLen(t.Zeros) + uvarintLen(t.Copies) + uvarintLen(t.Missed)
}

func (t Tally) append(b []byte) []byte {
	b = binary.AppendUvarint(b, t.Batches)
	b = binary.AppendUvarint(b, t.Pages)
	b = binary.AppendUvarint(b, t.Zeros)
	b = binary.AppendUvarint(b, t.Copies)
	return binary.AppendUvarint(b, t.Missed)
}

func (r *reader) tally() Tally {
	return Tally{Batches: r.uvarint(1 << 62), Pages: r.uvarint(1 << 62), Zeros: r.uvarint(1 << 62), Copies: r.uvarint(1 << 62), Missed: r.uvarint(1 << 62)}
}

// EndRound is the last frame of a stream of pages. A stream that ends without
// it was cut.
type EndRound struct{ Tally }

// Len is the length of the whole frame.
func (e EndRound) Len() int { return frameLen(e.len()) }

// Append appends the whole frame.
func (e EndRound) Append(b []byte) []byte {
	return e.append(AppendHeader(b, TypeEndRound, e.len()))
}

// ParseEndRound parses the body.
func ParseEndRound(body []byte) (EndRound, error) {
	r := reader{b: body}
	e := EndRound{r.tally()}
	if err := r.end(TypeEndRound); err != nil {
		return EndRound{}, err
	}
	return e, nil
}
