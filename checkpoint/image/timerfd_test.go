package image

import (
	"bytes"
	"errors"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// timerImage is a files.img with a regular file's type and one timerfd.
func timerImage(t *testing.T, ticks, vsec, vnsec, isec, insec uint64) []byte {
	t.Helper()
	var timer []byte
	for num, v := range map[protowire.Number]uint64{1: 7, 2: 0, 4: 1, 5: ticks, 6: 0, 7: vsec, 8: vnsec, 9: isec, 10: insec} {
		timer = appendVarint(timer, num, v)
	}
	timer = protowire.AppendBytes(protowire.AppendTag(timer, 3, protowire.BytesType), []byte{8, 0})
	other := appendVarint(appendVarint(nil, 1, 9), 2, 3)
	entry := appendVarint(appendVarint(nil, 1, timerfdType), 2, 7)
	entry = protowire.AppendBytes(protowire.AppendTag(entry, fileEntryTimer, protowire.BytesType), timer)
	var b bytes.Buffer
	img, err := newImage(&b, filesMagic)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range [][]byte{other, entry} {
		if err := img.entry(e); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// remaining reads the timer's value back.
func remaining(t *testing.T, raw []byte) (vsec, vnsec uint64) {
	t.Helper()
	img, err := openImage(bytes.NewReader(raw), filesMagic)
	if err != nil {
		t.Fatal(err)
	}
	entries := 0
	err = img.each(func(raw []byte) error {
		entries++
		return fields(raw, func(f field) error {
			if f.num != fileEntryTimer {
				return nil
			}
			return fields(f.bytes, func(f field) error {
				switch f.num {
				case timerVSec:
					vsec = f.value
				case timerVNsec:
					vnsec = f.value
				}
				return nil
			})
		})
	})
	if err != nil || entries != 2 {
		t.Fatalf("%d entries, %v", entries, err)
	}
	return vsec, vnsec
}

func TestRearmTimers(t *testing.T) {
	tests := []struct {
		name                           string
		ticks, vsec, vnsec, isec, nsec uint64
		wantSec, wantNsec              uint64
		wantN                          int
	}{
		{"an expired periodic timer fires again after its interval", 1, 0, 0, 2, 5, 2, 5, 1},
		{"an interval below a second", 3, 0, 0, 0, 5_000_000, 0, 5_000_000, 1},
		{"a running periodic timer is left alone", 0, 1, 2, 3, 4, 1, 2, 0},
		{"an unread timer that is armed is left alone", 1, 0, 2, 3, 4, 0, 2, 0},
		{"an expired one-shot timer stays expired", 1, 0, 0, 0, 0, 0, 0, 0},
		{"a periodic timer that was disarmed stays so", 0, 0, 0, 3, 4, 0, 0, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			in := timerImage(t, tt.ticks, tt.vsec, tt.vnsec, tt.isec, tt.nsec)
			var out bytes.Buffer
			n, err := RearmTimers(&out, bytes.NewReader(in))
			if err != nil || n != tt.wantN {
				t.Fatalf("%d timers, %v", n, err)
			}
			if sec, nsec := remaining(t, out.Bytes()); sec != tt.wantSec || nsec != tt.wantNsec {
				t.Errorf("fires in %d s %d ns, want %d s %d ns", sec, nsec, tt.wantSec, tt.wantNsec)
			}
			if n == 0 && !bytes.Equal(in, out.Bytes()) {
				t.Error("an image without such timers changed")
			}
		})
	}
}

func TestRearmTimersRefusesACutImage(t *testing.T) {
	in := timerImage(t, 1, 0, 0, 2, 5)
	whole := 0
	for cut := range len(in) {
		if _, err := RearmTimers(&bytes.Buffer{}, bytes.NewReader(in[:cut])); err == nil {
			whole++ // exactly between two entries, which only the archive's digest sees
		} else if !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrMagic) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
	if whole > 2 {
		t.Errorf("%d cuts went unnoticed", whole)
	}
}

func FuzzRearmTimers(f *testing.F) {
	f.Add([]byte{0x19, 0x43, 0x56, 0x54, 0x38, 0x31, 0x30, 0x56, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		if _, err := RearmTimers(&out, bytes.NewReader(b)); err != nil {
			return
		}
		if n, err := RearmTimers(&bytes.Buffer{}, bytes.NewReader(out.Bytes())); err != nil || n != 0 {
			t.Errorf("what was written has %d such timers left, %v", n, err)
		}
	})
}
