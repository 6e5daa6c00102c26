// Package encoding makes batches of memory smaller and whole again. It owns the
// numbers that name an encoding on the wire, the test for zero pages, and the
// decision which encoding is worth its time, which it takes batch by batch from
// what the batches before were worth and what the link takes. It refuses to
// decode to any length but the declared one, and to allocate for what a peer
// declares.
package encoding

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// Kind names an encoding on the wire. A number is never given a second meaning.
type Kind byte

const (
	// Raw is the content as it is.
	Raw Kind = 0
	// S2 is one block of klauspost's s2, a superset of snappy's block format.
	S2 Kind = 1
	// Zstd is one zstd frame (RFC 8878) that declares its content's size.
	Zstd Kind = 2
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
	// Choice says what to try; nil is always s2.
	Choice *Choice
	// Time runs work and returns the processor time that it took; it is asked
	// for with a Choice alone.
	Time func(work func()) time.Duration

	good bool // the last batch shrank
	skip int  // batches still to go out untried
	back int  // what skip is set to after the next failure
	out  []byte
	zstd *zstd.Encoder // half a megabyte, made when it is first chosen
}

// Reset forgets what the batches so far were worth, and keeps the buffers.
func (e *Encoder) Reset() { e.good, e.skip, e.back = false, 0, 0 }

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
	kind := S2
	if e.Choice != nil {
		kind = e.Choice.kind()
	}
	if kind == Raw {
		return Raw, raw
	}
	if need := s2.MaxEncodedLen(len(raw)); cap(e.out) < need {
		e.out = make([]byte, need)
	}
	// What follows content that shrank mostly does too, and samples of it would cost
	// a twelfth of s2. zstd makes something of letters and digits that s2 finds no
	// repetition in, and passes over noise as fast as the samples would.
	if kind == S2 && !e.good && !e.promising(raw) {
		e.miss()
		return Raw, raw
	}
	var out []byte
	work := func() { out = e.with(kind, raw) }
	if e.Choice == nil {
		work()
	} else if took := e.Time(work); worth(len(out), len(raw)) {
		e.Choice.saw(kind, len(raw), len(out), took)
	}
	if !worth(len(out), len(raw)) {
		e.miss()
		return Raw, raw
	}
	e.good, e.back = true, 0
	return kind, out
}

// with encodes raw, which may become longer.
func (e *Encoder) with(kind Kind, raw []byte) []byte {
	if kind == S2 {
		return s2.Encode(e.out[:cap(e.out)], raw)
	}
	if e.zstd == nil {
		e.zstd = newZstdEncoder()
	}
	return e.zstd.EncodeAll(raw, e.out[:0])
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
	e.good = false
	e.back = min(max(1, 2*e.back), maxSkip)
	e.skip = e.back
}

// Decoder decodes for one stream. It is not for several goroutines; the zero
// value is ready.
type Decoder struct{ zstd *zstd.Decoder }

// Decode returns the raw bytes of an encoding whose declared length is raw. The
// result is payload itself or lies in dst, which must have room for raw bytes;
// Decode never allocates for what a peer declares.
func (d *Decoder) Decode(dst []byte, kind Kind, raw int, payload []byte) ([]byte, error) {
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
	case Zstd:
		return d.unzstd(dst, raw, payload)
	}
	return nil, fmt.Errorf("encoding %d: unknown: %w", kind, ErrCorrupt)
}
