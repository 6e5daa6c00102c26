// Package tcpcheck checks a byte stream in both directions, from inside a shard
// that is itself the client: the case in which the connection's other end knows
// nothing of containers. Both sides send numbered frames whose content follows
// from the number, and a hash over everything before; a byte that is lost,
// doubled, damaged or out of order breaks the chain.
//
// The sides do not wait for each other, so both kernels' queues are full of
// bytes at any moment, the one of the freeze included.
package tcpcheck

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/tranship/tranship/integration/workload/check"
)

// A frame is magic (4), payload length (4), sequence number (8), hash of all
// payloads and numbers before it (8), the sender's report (24), and the payload.
// A frame without payload is the last one: a FIN that comes without it is the
// kernel's, of a process that died, and an error.
const (
	magic      = 0x54_53_46_31 // "TSF1"
	headerSize = 48
	// MaxPayload bounds a frame.
	MaxPayload = 1 << 20
)

// ErrStream is a frame that is not the next one of its stream.
var ErrStream = errors.New("the stream is broken")

// Peer is what a side says about itself in every frame, so that an error inside
// the shard is known outside.
type Peer struct {
	Errors       uint64
	LongestGapNS uint64
	Frames       uint64 // received by it
}

type stream struct {
	key  uint64
	seq  uint64
	hash uint64
}

// size is that of the payload of frame seq.
func (s *stream) size(limit int) int { return 1 + int(check.Mix(s.key^s.seq)%uint64(limit)) }

func (s *stream) advance(payload []byte) {
	h := s.hash ^ s.seq
	for len(payload) >= 8 {
		h = check.Mix(h ^ binary.LittleEndian.Uint64(payload))
		payload = payload[8:]
	}
	for _, b := range payload {
		h = check.Mix(h ^ uint64(b))
	}
	s.hash = h
	s.seq++
}

// next appends the next frame of the stream to dst.
func (s *stream) next(dst []byte, limit int, p Peer) []byte {
	return s.append(dst, s.size(limit), p)
}

// farewell appends the last frame.
func (s *stream) farewell(dst []byte, p Peer) []byte { return s.append(dst, 0, p) }

func (s *stream) append(dst []byte, n int, p Peer) []byte {
	dst = binary.BigEndian.AppendUint32(dst, magic)
	dst = binary.BigEndian.AppendUint32(dst, uint32(n))
	for _, v := range []uint64{s.seq, s.hash, p.Errors, p.LongestGapNS, p.Frames} {
		dst = binary.BigEndian.AppendUint64(dst, v)
	}
	from := len(dst)
	dst = append(dst, make([]byte, n)...)
	check.Fill(dst[from:], s.key^check.Mix(s.seq))
	s.advance(dst[from:])
	return dst
}

// read reads one frame and compares it with the next one of the stream. scratch
// is used for the payload and may be nil. io.EOF is the last frame.
func (s *stream) read(r *bufio.Reader, scratch []byte) (p Peer, n int, buf []byte, err error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return p, 0, scratch, fmt.Errorf("frame %d: %w", s.seq, unexpected(err))
	}
	size := int(binary.BigEndian.Uint32(head[4:]))
	seq, hash := binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint64(head[16:])
	p = Peer{
		Errors:       binary.BigEndian.Uint64(head[24:]),
		LongestGapNS: binary.BigEndian.Uint64(head[32:]),
		Frames:       binary.BigEndian.Uint64(head[40:]),
	}
	switch {
	case binary.BigEndian.Uint32(head[:]) != magic || size < 0 || size > MaxPayload:
		return p, 0, scratch, fmt.Errorf("%w: where frame %d should begin is % x", ErrStream, s.seq, head[:16])
	case seq != s.seq:
		return p, 0, scratch, fmt.Errorf("%w: frame %d came instead of %d", ErrStream, seq, s.seq)
	case hash != s.hash:
		return p, 0, scratch, fmt.Errorf("%w: frame %d: the sides disagree about what came before", ErrStream, seq)
	}
	if size == 0 {
		return p, 0, scratch, io.EOF
	}
	if cap(scratch) < 2*size {
		scratch = make([]byte, 2*size)
	}
	got, want := scratch[:size], scratch[size:2*size]
	if _, err := io.ReadFull(r, got); err != nil {
		return p, 0, scratch, fmt.Errorf("frame %d: %w", seq, unexpected(err))
	}
	check.Fill(want, s.key^check.Mix(s.seq))
	for i := range got {
		if got[i] != want[i] {
			return p, 0, scratch, fmt.Errorf("%w: frame %d: byte %d of %d is %#x instead of %#x", ErrStream, seq, i, size, got[i], want[i])
		}
	}
	s.advance(got)
	return p, size, scratch, nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
