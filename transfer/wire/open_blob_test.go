package wire

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestOpenBlob(t *testing.T) {
	tests := []struct {
		name string
		o    OpenBlob
	}{
		{"of an unknown size", OpenBlob{Kind: "layer", Size: -1}},
		{"of nothing", OpenBlob{Kind: "log", Name: "dump.log"}},
		{"as large as it may be", OpenBlob{Kind: strings.Repeat("k", MaxKind), Name: strings.Repeat("n", MaxName), Size: math.MaxInt64 - 1}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { conforms(t, TypeOpenBlob, test.o) })
	}
}

func TestOpenBlobIsRefused(t *testing.T) {
	tests := []struct {
		name string
		o    OpenBlob
		want error
	}{
		{"without a kind", OpenBlob{Name: "x"}, ErrMalformed},
		{"with too long a kind", OpenBlob{Kind: strings.Repeat("k", MaxKind+1)}, ErrLimit},
		{"with too long a name", OpenBlob{Kind: "k", Name: strings.Repeat("n", MaxName+1)}, ErrLimit},
		{"with a size below unknown", OpenBlob{Kind: "k", Size: -2}, ErrLimit},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			raw := test.o.Append(nil)
			_, _, head, err := ParseHeader(raw)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseOpenBlob(raw[head:]); !errors.Is(err, test.want) {
				t.Errorf("err = %v, want %v", err, test.want)
			}
		})
	}
}
