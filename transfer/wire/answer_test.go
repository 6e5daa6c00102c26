package wire

import (
	"bytes"
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
		{"that all was applied", Answer{Tally: Tally{3, 2, 1, 5, 0}}},
		{"that copies were missed", Answer{Tally: Tally{3, 2, 1, 5, 4}, Missing: []byte{0x81, 0, 0x41}}},
		{"that as many as may be were missed", Answer{Tally: Tally{Missed: 8 * MaxMissing}, Missing: bytes.Repeat([]byte{0xff}, MaxMissing)}},
		{"that pages were told of", Answer{Bytes: MaxTwins}},
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
		{"with missed copies that it does not name", Answer{Tally: Tally{Missed: 2}, Missing: []byte{1}}, ErrMalformed},
		{"with names of copies that it did not miss", Answer{Missing: []byte{1}}, ErrMalformed},
		{"with names that end in nothing", Answer{Tally: Tally{Missed: 1}, Missing: []byte{1, 0}}, ErrMalformed},
		{"with too many names", Answer{Tally: Tally{Missed: 8 * (MaxMissing + 1)}, Missing: bytes.Repeat([]byte{0xff}, MaxMissing+1)}, ErrLimit},
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
