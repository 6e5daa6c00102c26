package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrVersion says that the other end speaks another version. The rest of its
// hello was not looked at.
var ErrVersion = errors.New("another version of the transfer protocol")

// MaxConnections bounds the QUIC connections of one session.
const MaxConnections = 16

// SessionID names a session: what the sender remembers of the pages it sent is
// worth something only to a receiver that still knows this number.
type SessionID [16]byte

// Hello opens a connection of a session.
type Hello struct {
	// Version comes first in every version of this frame.
	Version uint64
	Session SessionID
	// Attempt counts the times that the session was connected, from 1. A
	// receiver takes a later attempt as the end of the earlier ones.
	Attempt uint64
	// Index is this connection's number within the attempt; 0 comes first and
	// the others join it.
	Index     uint64
	Migration string
}

func (h Hello) body() int {
	return uvarintLen(h.Version) + len(h.Session) + uvarintLen(h.Attempt) + uvarintLen(h.Index) + stringLen(h.Migration)
}

// Len is the length of the whole frame.
func (h Hello) Len() int { return frameLen(h.body()) }

// Append appends the whole frame.
func (h Hello) Append(b []byte) []byte {
	b = AppendHeader(b, TypeHello, h.body())
	b = binary.AppendUvarint(b, h.Version)
	b = append(b, h.Session[:]...)
	b = binary.AppendUvarint(b, h.Attempt)
	b = binary.AppendUvarint(b, h.Index)
	return appendString(b, h.Migration)
}

// ParseHello parses a hello's body. With ErrVersion, Version is the other end's.
func ParseHello(body []byte) (Hello, error) {
	r := reader{b: body}
	var h Hello
	h.Version = r.uvarint(1 << 62)
	if r.err == nil && h.Version != Version {
		return h, fmt.Errorf("%v: version %d, want %d: %w", TypeHello, h.Version, Version, ErrVersion)
	}
	for i := range h.Session {
		h.Session[i] = r.byte()
	}
	h.Attempt = r.uvarint(1 << 62)
	h.Index = r.uvarint(MaxConnections - 1)
	h.Migration = r.string(MaxMigration)
	if r.err == nil && (h.Attempt == 0 || h.Migration == "") {
		r.fail(ErrMalformed)
	}
	if err := r.end(TypeHello); err != nil {
		return Hello{}, err
	}
	return h, nil
}
