package wire

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/tranship/tranship/checkpoint"
)

// Segment is a run of pages of one process in a batch.
type Segment struct {
	PID   checkpoint.PID
	Addr  uint64
	Pages checkpoint.Pages
	// Zero says that the pages read as zero and are not in the payload.
	Zero bool
	// Delta, above 0, says that the payload has not the pages but what makes them
	// of those that the receiver has: one delta a page, that many bytes of them.
	Delta int
}

// Kinds of segments, the low bits of a run. The fourth has its meaning still to get.
const (
	segmentPages = iota
	segmentZero
	segmentDelta
	segmentKinds = 4
)

// End is the address after the segment's last byte.
func (s Segment) End() uint64 { return s.Addr + uint64(s.Pages)*checkpoint.PageSize }

// Content is how many bytes of the payload, decoded, are the segment's.
func (s Segment) Content() int64 {
	switch {
	case s.Zero:
		return 0
	case s.Delta > 0:
		return int64(s.Delta)
	}
	return int64(s.Pages.Bytes())
}

func (s Segment) run() uint64 {
	run := uint64(s.Pages) * segmentKinds
	switch {
	case s.Zero:
		run |= segmentZero
	case s.Delta > 0:
		run |= segmentDelta
	}
	return run
}

func (s Segment) len() int {
	n := uvarintLen(uint64(s.PID)) + uvarintLen(s.Addr/checkpoint.PageSize) + uvarintLen(s.run())
	if s.Delta > 0 {
		n += uvarintLen(uint64(s.Delta))
	}
	return n
}

func (s Segment) append(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(s.PID))
	b = binary.AppendUvarint(b, s.Addr/checkpoint.PageSize)
	b = binary.AppendUvarint(b, s.run())
	if s.Delta > 0 {
		b = binary.AppendUvarint(b, uint64(s.Delta))
	}
	return b
}

// segment parses one segment and refuses what no process can have.
func (r *reader) segment() Segment {
	s := Segment{
		PID:  checkpoint.PID(r.uvarint(math.MaxInt32)),
		Addr: r.uvarint(MaxAddr/checkpoint.PageSize) * checkpoint.PageSize,
	}
	run := r.uvarint(segmentKinds*MaxAddr/checkpoint.PageSize | (segmentKinds - 1))
	s.Pages = checkpoint.Pages(run / segmentKinds)
	if r.err == nil && (s.PID == 0 || s.Pages == 0) {
		r.fail(ErrMalformed)
	}
	if r.err == nil && s.End() > MaxAddr {
		r.fail(ErrLimit)
	}
	switch run % segmentKinds {
	case segmentPages:
	case segmentZero:
		s.Zero = true
	case segmentDelta:
		s.Delta = int(r.uvarint(MaxRaw))
		if r.err == nil && (s.Delta == 0 || int64(s.Delta) < int64(s.Pages)) {
			r.fail(ErrMalformed) // no delta is empty
		}
	default:
		r.fail(ErrMalformed)
	}
	return s
}

// Batch carries pages: a list of segments, and the content or the deltas of those
// that are not zero, one after the other, encoded as a whole.
type Batch struct {
	Segments []Segment
	// Block has the content; Raw is 0 and Payload empty when all is zero.
	Block
}

func (t Batch) head() int {
	n := t.Block.head() + uvarintLen(uint64(len(t.Segments)))
	for _, s := range t.Segments {
		n += s.len()
	}
	return n
}

// Len is the length of the whole frame.
func (t Batch) Len() int { return frameLen(t.head() + len(t.Payload)) }

// AppendHead appends all of the frame that stands before the payload.
func (t Batch) AppendHead(b []byte) []byte {
	b = AppendHeader(b, TypeBatch, t.head()+len(t.Payload))
	b = t.appendFields(b)
	b = binary.AppendUvarint(b, uint64(len(t.Segments)))
	for _, s := range t.Segments {
		b = s.append(b)
	}
	return b
}

// Append appends the whole frame.
func (t Batch) Append(b []byte) []byte { return append(t.AppendHead(b), t.Payload...) }

// Parse parses a body into t, whose Segments it reuses; Payload points into the
// body. A batch that Parse accepts names only whole pages inside the user's
// address space, and what its segments have of the payload adds up to Raw.
func (t *Batch) Parse(body []byte) error {
	segments := t.Segments[:0]
	*t = Batch{Segments: segments}
	r := reader{b: body}
	t.Encoding, t.Sum, t.Raw = r.byte(), r.uint64(), int(r.uvarint(MaxRaw))
	count := int(r.uvarint(MaxSegments))
	content := int64(0)
	for i := 0; i < count && r.err == nil; i++ {
		s := r.segment()
		content += s.Content()
		segments = append(segments, s)
	}
	t.Segments = segments
	t.Payload = r.b
	if r.err == nil && (count == 0 || content != int64(t.Raw) || (t.Raw == 0) != (len(t.Payload) == 0)) {
		r.fail(ErrMalformed)
	}
	if r.err == nil && len(t.Payload) > t.Raw {
		r.fail(ErrLimit)
	}
	if r.err != nil {
		return fmt.Errorf("%v: %w", TypeBatch, r.err)
	}
	return nil
}
