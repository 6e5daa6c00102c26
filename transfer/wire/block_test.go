package wire

import (
	"errors"
	"testing"
)

func TestBlock(t *testing.T) {
	tests := []struct {
		name string
		k    Block
	}{
		{"of one byte", Block{Raw: 1, Payload: []byte{9}}},
		{"that shrank", Block{Encoding: 1, Sum: 1 << 63, Raw: MaxRaw, Payload: []byte{1, 2}}},
		{"as large as it may be", Block{Encoding: 0xff, Raw: MaxRaw, Payload: make([]byte, MaxRaw)}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if len(test.k.Payload) < 1024 { // it cuts at every byte
				conforms(t, TypeBlock, test.k)
				return
			}
			raw := test.k.Append(nil)
			_, n, head, err := ParseHeader(raw)
			if err != nil || head+n != len(raw) {
				t.Fatalf("%d + %d of %d, %v", head, n, len(raw), err)
			}
			if _, err := ParseBlock(raw[head:]); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestBlockIsRefused(t *testing.T) {
	tests := []struct {
		name string
		k    Block
		want error
	}{
		{"when it is empty", Block{}, ErrMalformed},
		{"without a payload", Block{Raw: 3}, ErrMalformed},
		{"that grew", Block{Raw: 3, Payload: []byte("four")}, ErrLimit},
		{"over the limit", Block{Raw: MaxRaw + 1, Payload: []byte("x")}, ErrLimit},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			raw := test.k.Append(nil)
			_, _, head, err := ParseHeader(raw)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseBlock(raw[head:]); !errors.Is(err, test.want) {
				t.Errorf("err = %v, want %v", err, test.want)
			}
		})
	}
}
