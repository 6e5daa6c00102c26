package wire

import (
	"errors"
	"strings"
	"testing"
)

func TestWelcome(t *testing.T) {
	tests := []struct {
		name string
		w    Welcome
	}{
		{"to a new session", Welcome{Version: Version}},
		{"to a session that is known", Welcome{Version: Version, Resumed: true}},
		{"that refuses", Welcome{Version: 900, Code: strings.Repeat("c", MaxCode), Text: strings.Repeat("t", MaxText)}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { conforms(t, TypeWelcome, test.w) })
	}
}

func TestWelcomeIsRefused(t *testing.T) {
	tests := []struct {
		name string
		body []byte
		want error
	}{
		{"with a flag that is neither", []byte{1, 2, 0, 0}, ErrMalformed},
		{"with too long a code", []byte{1, 0, MaxCode + 1}, ErrLimit},
		{"with a string longer than the frame", []byte{1, 0, 5, 'a'}, ErrTruncated},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if _, err := ParseWelcome(test.body); !errors.Is(err, test.want) {
				t.Errorf("err = %v, want %v", err, test.want)
			}
		})
	}
}
