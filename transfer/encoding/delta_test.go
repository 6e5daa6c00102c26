package encoding

import (
	"bytes"
	"errors"
	"testing"
)

func TestADeltaMakesTheNewPageOfTheOld(t *testing.T) {
	old := noise(pageSize, 20)
	tests := []struct {
		name   string
		change func(p []byte)
		most   int // bytes of the delta
	}{
		{"of nothing", func([]byte) {}, MinDelta},
		{"of the first byte", func(p []byte) { p[0]++ }, MinDelta + 2 + 8},
		{"of the last byte", func(p []byte) { p[pageSize-1]++ }, MinDelta + 4 + 8},
		{"of a counter that crosses words", func(p []byte) { p[1023]++; p[1024]++ }, MinDelta + 4 + 16},
		{"of ten places", func(p []byte) {
			for i := range 10 {
				p[400*i]++
			}
		}, MinDelta + 10*(3+8)},
		{"of a third", func(p []byte) { copy(p[1000:], noise(pageSize/3, 21)) }, pageSize/3 + 40},
		{"of half, which is too much", func(p []byte) { copy(p, noise(pageSize/2, 22)) }, 0},
		{"of all", func(p []byte) { copy(p, noise(pageSize, 23)) }, 0},
		{"of every second word", func(p []byte) {
			for i := 0; i < pageSize; i += 16 {
				p[i]++
			}
		}, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			now := bytes.Clone(old)
			test.change(now)
			out, ok := AppendDelta([]byte("before"), old, now)
			if !bytes.HasPrefix(out, []byte("before")) {
				t.Fatal("what was there is gone")
			}
			delta := out[len("before"):]
			if ok != (test.most > 0) || len(delta) > test.most {
				t.Fatalf("%d bytes, %v, want at most %d", len(delta), ok, test.most)
			}
			if !ok {
				return
			}
			page := bytes.Clone(old)
			rest, err := ApplyDelta(page, append(bytes.Clone(delta), "after"...))
			if err != nil || string(rest) != "after" || !bytes.Equal(page, now) {
				t.Fatalf("rest %q, %v", rest, err)
			}
			for cut := range delta {
				if _, err := ApplyDelta(bytes.Clone(old), delta[:cut]); !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrBase) {
					t.Fatalf("cut at %d of %d: %v", cut, len(delta), err)
				}
			}
			other := bytes.Clone(old)
			other[2048] ^= 1 // no case above changes it
			if test.most > MinDelta+200 {
				other[8] ^= 1
			}
			if _, err := ApplyDelta(other, delta); !errors.Is(err, ErrBase) {
				t.Fatalf("applied to another page: %v", err)
			}
		})
	}
}

func FuzzApplyDelta(f *testing.F) {
	old := noise(pageSize, 24)
	now := bytes.Clone(old)
	now[77]++
	delta, _ := AppendDelta(nil, old, now)
	f.Add(delta)
	f.Add(append(bytes.Clone(delta[:8]), 1, 0xff, 0xff, 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		page := bytes.Clone(old)
		if rest, err := ApplyDelta(page, b); err == nil && len(rest) > len(b)-MinDelta {
			t.Fatal("a delta of nothing")
		} else if err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrBase) {
			t.Fatal(err)
		}
	})
}

func FuzzDelta(f *testing.F) {
	f.Add(uint64(1), []byte("change"), uint16(100))
	f.Fuzz(func(t *testing.T, seed uint64, change []byte, at uint16) {
		old := noise(pageSize, seed)
		now := bytes.Clone(old)
		copy(now[int(at)%pageSize:], change)
		delta, ok := AppendDelta(nil, old, now)
		if !ok {
			return
		}
		if len(delta) > MaxDelta {
			t.Fatalf("%d bytes", len(delta))
		}
		page := bytes.Clone(old)
		if rest, err := ApplyDelta(page, delta); err != nil || len(rest) > 0 || !bytes.Equal(page, now) {
			t.Fatalf("%d bytes are left, %v", len(rest), err)
		}
	})
}

func BenchmarkDelta(b *testing.B) {
	old := noise(pageSize, 25)
	few, all := bytes.Clone(old), noise(pageSize, 26)
	for i := range 5 {
		few[800*i]++
	}
	for name, now := range map[string][]byte{"few": few, "all": all} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(pageSize)
			buf := make([]byte, 0, pageSize)
			for b.Loop() {
				AppendDelta(buf, old, now)
			}
		})
	}
}
