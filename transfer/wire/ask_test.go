package wire

import (
	"bytes"
	"errors"
	"math"
	"testing"
)

func TestAsk(t *testing.T) {
	for name, a := range map[string]Ask{
		"for nothing":                 {},
		"for as many as there may be": {Seed: math.MaxUint64, Pages: MaxTwins},
	} {
		t.Run(name, func(t *testing.T) { conforms(t, TypeAsk, a) })
	}
	raw := Ask{Pages: MaxTwins + 1}.Append(nil)
	if _, err := ParseAsk(raw[2:]); !errors.Is(err, ErrLimit) {
		t.Errorf("for too many: %v", err)
	}
}

func TestHave(t *testing.T) {
	for name, n := range map[string]int{"one": 1, "as many as a frame has room for": MaxTags} {
		t.Run(name, func(t *testing.T) {
			h := Have{Tags: bytes.Repeat([]byte{1, 2, 3, 4}, n)}
			raw := h.Append(nil)
			_, _, head, err := ParseHeader(raw)
			if err != nil || h.Len() != len(raw) {
				t.Fatalf("%v, Len %d of %d", err, h.Len(), len(raw))
			}
			got, err := ParseHave(raw[head:])
			if err != nil || !bytes.Equal(got.Tags, h.Tags) {
				t.Errorf("%v, %d bytes", err, len(got.Tags))
			}
		})
	}
	for name, tags := range map[string][]byte{"nothing": nil, "half a tag": make([]byte, 6)} {
		t.Run(name, func(t *testing.T) {
			if _, err := ParseHave(tags); !errors.Is(err, ErrMalformed) {
				t.Errorf("%v", err)
			}
		})
	}
	if _, _, _, err := ParseHeader(Have{Tags: make([]byte, TagLen*(MaxTags+1))}.Append(nil)); !errors.Is(err, ErrLimit) {
		t.Errorf("too many: %v", err)
	}
}
