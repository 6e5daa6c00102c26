package wire

import (
	"errors"
	"testing"
)

func TestOpenRound(t *testing.T) {
	tests := []struct {
		name string
		o    OpenRound
	}{
		{"of the first round", OpenRound{Epoch: 1}},
		{"of a late round", OpenRound{Epoch: 1 << 62, Round: 1 << 31}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { conforms(t, TypeOpenRound, test.o) })
	}
}

func TestOpenRoundWithoutAnEpochIsRefused(t *testing.T) {
	if _, err := ParseOpenRound([]byte{0, 1}); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}
