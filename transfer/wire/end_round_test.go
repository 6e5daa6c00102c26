package wire

import (
	"errors"
	"math"
	"testing"
)

func TestEndRound(t *testing.T) {
	tests := []struct {
		name string
		e    EndRound
	}{
		{"of an idle stream", EndRound{}},
		{"of a busy stream", EndRound{Tally{Batches: 128, Pages: 1 << 20, Zeros: 1 << 62}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { conforms(t, TypeEndRound, test.e) })
	}
}

func TestEndRoundWithACountOverTheLimitIsRefused(t *testing.T) {
	raw := EndRound{Tally{Pages: math.MaxUint64}}.Append(nil)
	if _, err := ParseEndRound(raw[2:]); !errors.Is(err, ErrLimit) {
		t.Error(err)
	}
}
