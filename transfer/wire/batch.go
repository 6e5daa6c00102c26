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
}

// End is the address after the segment's last byte.
func (s Segment) End() uint64 { return s.Addr + uint64(s.Pages)*checkpoint.PageSize }

func (s Segment) run() uint64 {
	run := uint64(s.Pages) << 1
	if s.Zero {
		run |= 1
	}
	return run
}

func (s Segment) len() int {
	return uvarintLen(uint64(s.PID)) + uvarintLen(s.Addr/checkpoint.PageSize) + uvarintLen(s.run())
}

// Batch carries pages: a list of segments, and the content of those that are
// not zero, one after the other, encoded as a whole.
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
		b = binary.AppendUvarint(b, uint64(s.PID))
		b = binary.AppendUvarint(b, s.Addr/checkpoint.PageSize)
		b = binary.AppendUvarint(b, s.run())
	}
	return b
}

// Append appends the whole frame.
func (t Batch) Append(b []byte) []byte { return append(t.AppendHead(b), t.Payload...) }

// Parse parses a body into t, whose Segments it reuses; Payload points into the
// body. A batch that Parse accepts names only whole pages inside the user's
// address space, and its segments with content add up to Raw.
func (t *Batch) Parse(body []byte) error {
	segments := t.Segments[:0]
	*t = Batch{Segments: segments}
	r := reader{b: body}
	t.Encoding, t.Sum, t.Raw = r.byte(), r.uint64(), int(r.uvarint(MaxRaw))
	count := int(r.uvarint(MaxSegments))
	var content checkpoint.Pages
	for i := 0; i < count && r.err == nil; i++ {
		s := Segment{
			PID:  checkpoint.PID(r.uvarint(math.MaxInt32)),
			Addr: r.uvarint(MaxAddr/checkpoint.PageSize) * checkpoint.PageSize,
		}
		run := r.uvarint(2*MaxAddr/checkpoint.PageSize | 1)
		s.Pages, s.Zero = checkpoint.Pages(run>>1), run&1 == 1
		if r.err == nil && (s.PID == 0 || s.Pages == 0) {
			r.fail(ErrMalformed)
		}
		if r.err == nil && s.End() > MaxAddr {
			r.fail(ErrLimit)
		}
		if !s.Zero {
			content += s.Pages
		}
		segments = append(segments, s)
	}
	t.Segments = segments
	t.Payload = r.b
	if r.err == nil && (count == 0 || int64(content.Bytes()) != int64(t.Raw) || (t.Raw == 0) != (len(t.Payload) == 0)) {
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
