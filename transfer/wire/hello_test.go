package wire

import (
	"errors"
	"math"
	"strings"
	"testing"
)

func TestHello(t *testing.T) {
	tests := []struct {
		name string
		h    Hello
	}{
		{"of a first connection", Hello{Version: Version, Attempt: 1, Migration: "m"}},
		{"of a later connection", Hello{Version: Version, Session: SessionID{0: 1, 15: 2}, Attempt: 300, Index: MaxConnections - 1, Migration: "m-1"}},
		{"with the longest name", Hello{Version: Version, Attempt: 1 << 62, Migration: strings.Repeat("m", MaxMigration)}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { conforms(t, TypeHello, test.h) })
	}
}

func TestHelloIsRefused(t *testing.T) {
	good := Hello{Version: Version, Attempt: 1, Migration: "m"}
	tests := []struct {
		name   string
		change func(*Hello)
		want   error
	}{
		{"in an older version", func(h *Hello) { h.Version = Version - 1 }, ErrVersion},
		{"in a newer version", func(h *Hello) { h.Version = Version + 1 }, ErrVersion},
		{"without a migration", func(h *Hello) { h.Migration = "" }, ErrMalformed},
		{"with too long a migration", func(h *Hello) { h.Migration = strings.Repeat("m", MaxMigration+1) }, ErrLimit},
		{"with a migration that is not UTF-8", func(h *Hello) { h.Migration = "\xff" }, ErrMalformed},
		{"without an attempt", func(h *Hello) { h.Attempt = 0 }, ErrMalformed},
		{"with an attempt over the limit", func(h *Hello) { h.Attempt = math.MaxUint64 }, ErrLimit},
		{"with too many connections", func(h *Hello) { h.Index = MaxConnections }, ErrLimit},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := good
			test.change(&h)
			_, _, head, err := ParseHeader(h.Append(nil))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ParseHello(h.Append(nil)[head:]); !errors.Is(err, test.want) {
				t.Errorf("err = %v, want %v", err, test.want)
			}
		})
	}
}

func TestAHelloOfAnotherVersionNeedNotLookLikeOurs(t *testing.T) {
	h, err := ParseHello([]byte{Version + 1, 0xff, 0xff})
	if !errors.Is(err, ErrVersion) || h.Version != Version+1 {
		t.Errorf("%+v, %v", h, err)
	}
}
