package wire

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestAnswer(t *testing.T) {
	tests := []struct {
		name string
		a    Answer
	}{
		{"that all was applied", Answer{Tally: Tally{3, 2, 1, 5, 4}}},
		{"that a blob was read", Answer{Bytes: math.MaxInt64}},
		{"that it was not", Answer{Code: strings.Repeat("c", MaxCode), Text: strings.Repeat("ä", MaxText/2)}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { conforms(t, TypeAnswer, test.a) })
	}
}

func TestAnswerIsRefused(t *testing.T) {
	tests := []struct {
		name string
		a    Answer
		want error
	}{
		{"with too long a code", Answer{Code: strings.Repeat("c", MaxCode+1)}, ErrLimit},
		{"with too long a text", Answer{Code: "c", Text: strings.Repeat("t", MaxText+1)}, ErrLimit},
		{"with text that is not UTF-8", Answer{Code: "c", Text: "\xff"}, ErrMalformed},
		{"with a count over the limit", Answer{Tally: Tally{Batches: math.MaxUint64}}, ErrLimit},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			raw := test.a.Append(nil)
			_, _, head, err := ParseHeader(raw)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseAnswer(raw[head:]); !errors.Is(err, test.want) {
				t.Errorf("err = %v, want %v", err, test.want)
			}
		})
	}
}
