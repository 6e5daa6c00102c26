// Package wire is the language of a page session: every frame that the two
// ends write into their QUIC streams, parsed and appended without any I/O of its
// own but ReadFrame's. It refuses whatever is longer, larger or more than the
// limits below before it allocates for it, and numbers that are not in their
// shortest form, so that every frame has one encoding.
//
// A session's first stream carries Hello and is answered by Welcome. A stream
// of a round carries OpenRound, Batch… or Copies…, EndRound and is answered by Answer; a
// stream of a blob OpenBlob, Block…, EndBlob, Answer. A stream with Ask is answered by
// Have… and Answer.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"unicode/utf8"

	"github.com/tranship/tranship/checkpoint"
)

// Version is the protocol's version. Two hosts must speak the same one: both
// run the same release while a shard moves.
const Version = 6

// Type is the first byte of a frame.
type Type byte

// The frames. A number is never given a second meaning.
const (
	TypeHello     Type = 0x01
	TypeWelcome   Type = 0x02
	TypeOpenRound Type = 0x03
	TypeBatch     Type = 0x04
	TypeEndRound  Type = 0x05
	TypeOpenBlob  Type = 0x06
	TypeBlock     Type = 0x07
	TypeEndBlob   Type = 0x08
	TypeAnswer    Type = 0x09
	TypeCopies    Type = 0x0a
	TypeAsk       Type = 0x0b
	TypeHave      Type = 0x0c
)

func (t Type) String() string {
	if info, ok := frames[t]; ok {
		return info.name
	}
	return fmt.Sprintf("frame %#02x", byte(t))
}

// Limits of what a frame may say.
const (
	// MaxRaw is the size of a batch or block before encoding: large enough for
	// the cost of a frame to vanish, small enough that a dozen of them are
	// nothing and that s2 keeps its tables in the cache.
	MaxRaw = 256 << 10
	// MaxSegments bounds the runs of a batch: every page of it alone, and as
	// many runs of zero pages between them, four times over.
	MaxSegments = 4 * 2 * MaxRaw / checkpoint.PageSize
	// MaxAddr is the end of the largest user address space (x86-64 with five
	// levels of page tables).
	MaxAddr = 1 << 56

	MaxMigration = 128
	MaxKind      = 32
	MaxName      = 4096 // PATH_MAX
	MaxCode      = 64
	MaxText      = 4096

	// maxSegmentLen is a segment's pid, page number, length and bytes of deltas.
	maxSegmentLen  = 5 + 7 + 7 + 3
	maxBlockHeader = 1 + 8 + 4
	// maxSmall bounds the frames without a payload.
	maxSmall = 16 << 10
	// MaxBody is the size of the largest frame's body, and so of the buffer
	// that reads any frame.
	MaxBody = maxBlockHeader + 3 + MaxSegments*maxSegmentLen + MaxRaw
)

var frames = map[Type]struct {
	name string
	max  int
}{
	TypeHello:     {"hello", maxSmall},
	TypeWelcome:   {"welcome", maxSmall},
	TypeOpenRound: {"open round", maxSmall},
	TypeBatch:     {"batch", MaxBody},
	TypeEndRound:  {"end of round", maxSmall},
	TypeOpenBlob:  {"open blob", maxSmall},
	TypeBlock:     {"block", maxBlockHeader + MaxRaw},
	TypeEndBlob:   {"end of blob", maxSmall},
	TypeAnswer:    {"answer", maxSmall + MaxMissing},
	TypeCopies:    {"copies", 8 + 3 + MaxCopies*(2*(5+7)+3+sumLen)},
	TypeAsk:       {"ask", maxSmall},
	TypeHave:      {"have", MaxTags * TagLen},
}

var (
	// ErrTruncated says that the bytes end before the frame does.
	ErrTruncated = errors.New("truncated")
	// ErrLimit says that a frame declares more than it may.
	ErrLimit = errors.New("over the limit")
	// ErrMalformed says that a frame contradicts itself or the protocol.
	ErrMalformed = errors.New("malformed")
)

// ParseHeader reads a frame's type and the length of its body, and says how
// many bytes the header took.
func ParseHeader(b []byte) (t Type, body, n int, err error) {
	if len(b) == 0 {
		return 0, 0, 0, ErrTruncated
	}
	t = Type(b[0])
	info, ok := frames[t]
	if !ok {
		return 0, 0, 0, fmt.Errorf("%v: unknown: %w", t, ErrMalformed)
	}
	r := reader{b: b[1:]}
	length := r.uvarint(uint64(info.max))
	if r.err != nil {
		return 0, 0, 0, fmt.Errorf("length of %v: %w", t, r.err)
	}
	return t, int(length), len(b) - len(r.b), nil
}

// AppendHeader appends the header of a frame whose body has the given length.
func AppendHeader(b []byte, t Type, body int) []byte {
	return binary.AppendUvarint(append(b, byte(t)), uint64(body))
}

// Reader is what ReadFrame reads from: a bufio.Reader.
type Reader interface {
	io.Reader
	io.ByteReader
}

// ReadFrame reads one frame and returns its body in buf, which it grows up to
// MaxBody and returns for the next call. It answers io.EOF when the stream ends
// before the first byte of a frame, and io.ErrUnexpectedEOF inside one.
func ReadFrame(r Reader, buf []byte) (t Type, body, grown []byte, err error) {
	var header [1 + binary.MaxVarintLen32]byte
	n := 0
	for {
		c, err := r.ReadByte()
		if err != nil {
			if n > 0 {
				err = unexpected(err)
			}
			return 0, nil, buf, err
		}
		header[n] = c
		n++
		if n > 1 && c < 0x80 || n == len(header) {
			break
		}
		if _, ok := frames[Type(header[0])]; !ok {
			break // do not wait for the length of something unknown
		}
	}
	t, length, _, err := ParseHeader(header[:n])
	if err != nil {
		return 0, nil, buf, err
	}
	buf = slices.Grow(buf[:0], length)[:length]
	if _, err := io.ReadFull(r, buf); err != nil {
		return 0, nil, buf, fmt.Errorf("body of %v: %w", t, unexpected(err))
	}
	return t, buf, buf, nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// reader takes a frame's body apart. After the first error it answers zeros.
type reader struct {
	b   []byte
	err error
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err, r.b = err, nil
	}
}

// uvarint reads a number of at most limit in its shortest form.
func (r *reader) uvarint(limit uint64) uint64 {
	v, n := binary.Uvarint(r.b)
	switch {
	case r.err != nil:
		return 0
	case n == 0:
		r.fail(ErrTruncated)
		return 0
	case n < 0 || v > limit:
		r.fail(ErrLimit)
		return 0
	case n != uvarintLen(v):
		r.fail(ErrMalformed)
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.fail(ErrTruncated)
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *reader) uint64() uint64 {
	if len(r.b) < 8 {
		r.fail(ErrTruncated)
		return 0
	}
	v := binary.BigEndian.Uint64(r.b)
	r.b = r.b[8:]
	return v
}

// bytes reads a length of at most limit and as many bytes; nil if there are none.
func (r *reader) bytes(limit int) []byte {
	n := int(r.uvarint(uint64(limit)))
	if r.err == nil && len(r.b) < n {
		r.fail(ErrTruncated)
	}
	if r.err != nil || n == 0 {
		return nil
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b
}

func (r *reader) string(limit int) string {
	s := string(r.bytes(limit))
	if !utf8.ValidString(s) {
		r.fail(ErrMalformed)
		return ""
	}
	return s
}

// end returns the error of a frame that must be used up.
func (r *reader) end(t Type) error {
	if r.err == nil && len(r.b) > 0 {
		r.err = fmt.Errorf("%d bytes after the end: %w", len(r.b), ErrMalformed)
	}
	if r.err != nil {
		return fmt.Errorf("%v: %w", t, r.err)
	}
	return nil
}

func uvarintLen(v uint64) int { return (bits.Len64(v|1) + 6) / 7 }

func stringLen(s string) int { return uvarintLen(uint64(len(s))) + len(s) }

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// frameLen is the length of a whole frame.
func frameLen(body int) int { return 1 + uvarintLen(uint64(body)) + body }

// Clip shortens s to at most limit bytes of valid UTF-8: an error's text must
// never be the reason why the error cannot be told.
func Clip(s string, limit int) string {
	if !utf8.ValidString(s) {
		s = string([]rune(s)) // each invalid byte becomes U+FFFD
	}
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit]
}
