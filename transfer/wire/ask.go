package wire

import (
	"encoding/binary"
	"fmt"
)

// MaxTwins bounds what a receiver tells of the pages of other shards: those of a
// gigabyte.
const MaxTwins = 1 << 18

// Ask asks which pages the receiver has of shards like the one that comes. It is
// answered by Have… and an Answer with the number of pages.
type Ask struct {
	// Seed is that of the hashes.
	Seed uint64
	// Pages is how many pages to look at, at most MaxTwins.
	Pages uint64
}

func (a Ask) body() int { return 8 + uvarintLen(a.Pages) }

// Len is the length of the whole frame.
func (a Ask) Len() int { return frameLen(a.body()) }

// Append appends the whole frame.
func (a Ask) Append(b []byte) []byte {
	b = AppendHeader(b, TypeAsk, a.body())
	b = binary.BigEndian.AppendUint64(b, a.Seed)
	return binary.AppendUvarint(b, a.Pages)
}

// ParseAsk parses the body.
func ParseAsk(body []byte) (Ask, error) {
	r := reader{b: body}
	a := Ask{Seed: r.uint64(), Pages: r.uvarint(MaxTwins)}
	if err := r.end(TypeAsk); err != nil {
		return Ask{}, err
	}
	return a, nil
}

const (
	// MaxTags bounds the pages of a Have frame.
	MaxTags = 16 << 10
	// TagLen is a tag's length: with as many pages as may be told of, one in 16,384
	// others has a tag that is among them. It then costs a question.
	TagLen = 4
)

// Have tells of pages that the receiver has.
type Have struct {
	// Tags are the lowest 32 bits of each page's hash, big-endian; parsed, a part of
	// the body.
	Tags []byte
}

// Len is the length of the whole frame.
func (h Have) Len() int { return frameLen(len(h.Tags)) }

// Append appends the whole frame.
func (h Have) Append(b []byte) []byte {
	return append(AppendHeader(b, TypeHave, len(h.Tags)), h.Tags...)
}

// ParseHave parses the body.
func ParseHave(body []byte) (Have, error) {
	if len(body) == 0 || len(body)%TagLen != 0 {
		return Have{}, fmt.Errorf("%v: %d bytes of tags: %w", TypeHave, len(body), ErrMalformed)
	}
	return Have{Tags: body}, nil
}
