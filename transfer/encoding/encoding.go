// Package encoding makes batches of memory smaller and whole again. It owns the
// numbers that name an encoding on the wire, the test for zero pages, and the
// decision whether compressing is worth its time, which it takes batch by batch
// from what the batches before were worth. It refuses to decode to any length
// but the declared one, and to allocate while it decodes.
package encoding

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/klauspost/compress/s2"
)

// Kind names an encoding on the wire. A number is never given a second meaning;
// delta, zstd and references by hash have theirs still to get.
type Kind byte

const (
	// Raw is the content as it is.
	Raw Kind = 0
	// S2 is one block of klauspost's s2, a superset of snappy's block format.
	S2 Kind = 1
)

// ErrCorrupt says that encoded bytes do not decode to what was declared.
var ErrCorrupt = errors.New("corrupt")

// IsZero says whether b is all zeros.
func IsZero(b []byte) bool {
	// Nearly every page that is not zero differs within its first bytes; the
	// comparison of the rest is vectorised.
	for _, c := range b[:min(len(b), 16)] {
		if c != 0 {
			return false
		}
	}
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

var zeros [4096]byte

const (
	// A batch that shrinks by less than a sixteenth is sent raw: at QUIC's 4 to 6
	// CPU seconds a gigabyte, against 0.5 to 0.75 of s2, less than an eighth
	// would be a loss on a fast link, but on a slow one it still saves time.
	minSaving = 16
	// sampleSize and samples are the part of a batch that is tried first.
	sampleSize = 4 << 10
	samples    = 4
	// maxSkip bounds how many batches in a row go out untried: memory changes
	// its character every few megabytes (heap, mapped file, picture cache).
	maxSkip = 16
)

// Encoder encodes batches for one stream. It is not for several goroutines.
type Encoder struct {
	// Off sends everything raw.
	Off bool

	skip int // batches still to go out untried
	back int // what skip is set to after the next failure
	out  []byte
}

// Reset forgets what the batches so far were worth, and keeps the buffer.
func (e *Encoder) Reset() { e.skip, e.back = 0, 0 }

// Encode returns an encoding of raw that is never longer than raw. The result
// is raw itself or the encoder's buffer, which the next call overwrites.
func (e *Encoder) Encode(raw []byte) (Kind, []byte) {
	if e.Off || len(raw) == 0 {
		return Raw, raw
	}
	if e.skip > 0 {
		e.skip--
		return Raw, raw
	}
	if need := s2.MaxEncodedLen(len(raw)); cap(e.out) < need {
		e.out = make([]byte, need)
	}
	if !e.promising(raw) {
		e.miss()
		return Raw, raw
	}
	block := s2.Encode(e.out[:cap(e.out)], raw)
	if !worth(len(block), len(raw)) {
		e.miss()
		return Raw, raw
	}
	e.back = 0
	return S2, block
}

// promising tries a few spread pieces of a batch that is large enough for the
// answer to be cheaper than the question.
func (e *Encoder) promising(raw []byte) bool {
	if len(raw) < 4*samples*sampleSize {
		return true
	}
	encoded := 0
	for i := range samples {
		at := i * (len(raw) - sampleSize) / (samples - 1)
		encoded += len(s2.Encode(e.out[:cap(e.out)], raw[at:at+sampleSize]))
	}
	return worth(encoded, samples*sampleSize)
}

func worth(encoded, raw int) bool { return encoded <= raw-raw/minSaving }

func (e *Encoder) miss() {
	e.back = min(max(1, 2*e.back), maxSkip)
	e.skip = e.back
}

// Decode returns the raw bytes of an encoding whose declared length is raw. The
// result is payload itself or lies in dst, which must have room for raw bytes;
// Decode never allocates for what a peer declares.
func Decode(dst []byte, kind Kind, raw int, payload []byte) ([]byte, error) {
	switch kind {
	case Raw:
		if len(payload) != raw {
			return nil, fmt.Errorf("%d raw bytes, declared %d: %w", len(payload), raw, ErrCorrupt)
		}
		return payload, nil
	case S2:
		n, err := s2.DecodedLen(payload)
		if err != nil || n != raw {
			return nil, fmt.Errorf("s2 block of %d bytes, declared %d: %w", n, raw, ErrCorrupt)
		}
		if cap(dst) < raw {
			return nil, fmt.Errorf("s2 block of %d bytes for a buffer of %d: %w", raw, cap(dst), ErrCorrupt)
		}
		out, err := s2.Decode(dst[:raw], payload)
		if err != nil {
			return nil, fmt.Errorf("s2 block of %d bytes (%w): %w", raw, err, ErrCorrupt)
		}
		return out, nil
	}
	return nil, fmt.Errorf("encoding %d: unknown: %w", kind, ErrCorrupt)
}
