package wire

import (
	"errors"
	"math"
	"testing"
)

func TestEndBlob(t *testing.T) {
	for name, e := range map[string]EndBlob{"of nothing": {}, "of the largest blob": {Bytes: math.MaxInt64}} {
		t.Run(name, func(t *testing.T) { conforms(t, TypeEndBlob, e) })
	}
}

func TestEndBlobOverTheLimitIsRefused(t *testing.T) {
	raw := EndBlob{Bytes: math.MaxInt64 + 1}.Append(nil)
	if _, err := ParseEndBlob(raw[2:]); !errors.Is(err, ErrLimit) {
		t.Error(err)
	}
}
