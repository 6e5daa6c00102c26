package wire

import (
	"bytes"
	"errors"
	"math"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

const page = checkpoint.PageSize

func TestBatch(t *testing.T) {
	full := make([]Segment, MaxSegments)
	for i := range full {
		full[i] = Segment{PID: math.MaxInt32, Addr: MaxAddr - page, Pages: 1, Zero: i >= MaxRaw/page}
	}
	tests := []struct {
		name string
		b    Batch
	}{
		{"of one page", Batch{[]Segment{{PID: 1, Addr: 0x1000, Pages: 1}}, Block{Raw: page, Payload: bytes.Repeat([]byte{7}, page)}}},
		{"of zero pages alone", Batch{[]Segment{{PID: 1, Addr: 0x1000, Pages: 1 << 40, Zero: true}}, Block{Payload: []byte{}}}},
		{"of both", Batch{
			[]Segment{{PID: 1, Addr: 0, Pages: 2}, {PID: 9, Addr: 0x8000, Pages: 5, Zero: true}, {PID: 1, Addr: 0x7fff00000000, Pages: 1}},
			Block{Encoding: 1, Sum: math.MaxUint64, Raw: 3 * page, Payload: []byte{1, 2, 3}},
		}},
		{"of deltas", Batch{
			[]Segment{{PID: 1, Addr: 0x1000, Pages: 3, Delta: 60}, {PID: 1, Addr: 0x9000, Pages: 1}, {PID: 2, Addr: 0x9000, Pages: 1, Delta: 2048}},
			Block{Encoding: 2, Sum: 5, Raw: page + 2108, Payload: []byte{1, 2, 3}},
		}},
		{"of a whole address space", Batch{[]Segment{{PID: 1, Pages: MaxAddr / page, Zero: true}}, Block{Payload: []byte{}}}},
		{"as large as it may be", Batch{full, Block{Raw: MaxRaw, Payload: bytes.Repeat([]byte{1}, 100)}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { conforms(t, TypeBatch, test.b) })
	}
}

func TestTheLargestBatchFitsTheLimitOfItsFrame(t *testing.T) {
	b := Batch{Block: Block{Raw: MaxRaw, Payload: make([]byte, MaxRaw)}}
	for i := range MaxSegments {
		b.Segments = append(b.Segments, Segment{PID: math.MaxInt32, Addr: MaxAddr - page, Pages: 1, Zero: i >= MaxRaw/page})
	}
	_, n, _, err := ParseHeader(b.Append(nil))
	if err != nil || n > MaxBody {
		t.Errorf("body of %d, the limit is %d, %v", n, MaxBody, err)
	}
}

func TestBatchIsRefused(t *testing.T) {
	good := func() Batch {
		return Batch{[]Segment{{PID: 1, Addr: 0x1000, Pages: 1}}, Block{Raw: page, Payload: []byte{1}}}
	}
	tests := []struct {
		name   string
		change func(*Batch)
		want   error
	}{
		{"without segments", func(b *Batch) { b.Segments = nil }, ErrMalformed},
		{"with too many segments", func(b *Batch) {
			for range MaxSegments {
				b.Segments = append(b.Segments, Segment{PID: 1, Pages: 1, Zero: true})
			}
		}, ErrLimit},
		{"with an empty segment", func(b *Batch) { b.Segments[0].Pages = 0 }, ErrMalformed},
		{"with a segment of no process", func(b *Batch) { b.Segments[0].PID = 0 }, ErrMalformed},
		{"with a negative process", func(b *Batch) { b.Segments[0].PID = -1 }, ErrLimit},
		{"with an address outside", func(b *Batch) { b.Segments[0].Addr = MaxAddr + page }, ErrLimit},
		{"with a segment that ends outside", func(b *Batch) { b.Segments[0] = Segment{PID: 1, Addr: page, Pages: MaxAddr / page, Zero: true} }, ErrLimit},
		{"with a segment that wraps around", func(b *Batch) { b.Segments[0].Pages = 1<<52 + 1 }, ErrLimit},
		{"with fewer pages than content", func(b *Batch) { b.Raw = 2 * page }, ErrMalformed},
		{"with more pages than content", func(b *Batch) { b.Segments[0].Pages = 2 }, ErrMalformed},
		{"with more content than a batch may hold", func(b *Batch) { b.Segments[0].Pages, b.Raw = MaxRaw/page+1, MaxRaw+page }, ErrLimit},
		{"with content and no payload", func(b *Batch) { b.Payload = nil }, ErrMalformed},
		{"with a payload and no content", func(b *Batch) { b.Segments[0].Zero, b.Raw = true, 0 }, ErrMalformed},
		{"with fewer bytes of deltas than pages", func(b *Batch) { b.Segments[0].Pages, b.Segments[0].Delta, b.Raw = 10, 9, 9 }, ErrMalformed},
		{"with deltas that are not all of the content", func(b *Batch) { b.Segments[0].Delta, b.Raw = 9, 10 }, ErrMalformed},
		{"with more deltas than a batch may hold", func(b *Batch) { b.Segments[0].Delta, b.Raw = MaxRaw+1, MaxRaw+1 }, ErrLimit},
		{"with a payload larger than its content", func(b *Batch) { b.Payload = make([]byte, page+1) }, ErrLimit},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b := good()
			test.change(&b)
			raw := b.Append(nil)
			_, _, head, err := ParseHeader(raw)
			if err != nil {
				t.Fatal(err)
			}
			var got Batch
			if err := got.Parse(raw[head:]); !errors.Is(err, test.want) {
				t.Errorf("err = %v, want %v", err, test.want)
			}
		})
	}
}

func TestParseReusesTheSegmentsOfTheBatchBefore(t *testing.T) {
	raw := Batch{[]Segment{{PID: 1, Pages: 1, Zero: true}}, Block{}}.Append(nil)
	_, _, head, err := ParseHeader(raw)
	if err != nil {
		t.Fatal(err)
	}
	b := Batch{Segments: make([]Segment, 0, MaxSegments)}
	if n := testing.AllocsPerRun(100, func() {
		if err := b.Parse(raw[head:]); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations a batch", n)
	}
}
