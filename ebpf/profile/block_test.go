package profile

import (
	"bytes"
	"errors"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// busy is an hour in which every signal of a real host changes every minute:
// the worst case of the store but for signals that nobody has.
func busy(seed uint64, hour time.Time) *Block {
	r := rand.New(rand.NewPCG(seed, 1))
	b := &Block{Hour: hour}
	for m := range 60 {
		p := Point{Start: hour.Add(time.Duration(m) * Minute), Step: Minute, Covered: Minute}
		for s := range Signals {
			if s == Instructions || s == CacheMisses || s == DirtyPages {
				continue
			}
			scale := math.Pow(10, float64(s%7))
			p.Mean[s] = float32(scale * (1 + 0.3*r.NormFloat64()))
			p.Peak[s] = p.Mean[s] * float32(1+r.Float64())
			p.Has = p.Has.With(s)
		}
		b.Put(p)
	}
	return b
}

func TestABlockComesBack(t *testing.T) {
	want := busy(1, origin)
	want.Points[7], want.Points[59] = nil, nil
	want.Points[8].Covered = 17 * time.Second
	want.Points[9].Has &^= 1 << Connections
	got, err := ParseBlock(want.Append(nil))
	if err != nil {
		t.Fatal(err)
	}
	if !got.Hour.Equal(want.Hour) {
		t.Error(got.Hour)
	}
	for m := range want.Points {
		w, g := want.Points[m], got.Points[m]
		if (w == nil) != (g == nil) {
			t.Fatalf("minute %d", m)
		}
		if w == nil {
			continue
		}
		if !g.Start.Equal(w.Start) || g.Has != w.Has || (g.Covered-w.Covered).Abs() > 130*time.Millisecond {
			t.Errorf("minute %d: %v %b %v", m, g.Start, g.Has, g.Covered)
		}
		for s := range Signals {
			if !w.Has.Has(s) {
				continue
			}
			near(t, s, g.Mean[s], w.Mean[s])
			if signals[s].peaked {
				near(t, s, g.Peak[s], w.Peak[s])
			}
		}
	}
	if again := got.Append(nil); !bytes.Equal(again, want.Append(nil)) {
		// Precision is lost once, not at every rewrite.
		second, err := ParseBlock(again)
		if err != nil || !bytes.Equal(second.Append(nil), again) {
			t.Error("a rewritten block changes")
		}
	}
}

func near(t *testing.T, s Signal, got, want float32) {
	t.Helper()
	if math.Abs(float64(got-want)) > math.Abs(float64(want))/2000 {
		t.Errorf("%v: %v instead of %v", s, got, want)
	}
}

func TestAWeekOfAShardIsBelowAMebibyte(t *testing.T) {
	total := 0
	for h := range 7 * 24 {
		total += len(busy(uint64(h), origin.Add(time.Duration(h)*time.Hour)).Append(nil))
	}
	t.Logf("%d KiB", total>>10)
	if total > 1<<20 {
		t.Errorf("%d bytes", total)
	}
}

func TestTheFullerOfTwoPointsStays(t *testing.T) {
	b := &Block{Hour: origin}
	p := Point{Start: origin, Step: Minute, Covered: 40 * time.Second}
	p.Mean[CPU] = 1
	b.Put(p)
	p.Covered, p.Mean[CPU] = 10*time.Second, 2
	b.Put(p)
	if b.Points[0].Mean[CPU] != 1 {
		t.Error("a scrap replaced a minute")
	}
	p.Start = origin.Add(time.Hour)
	if b.Put(p) {
		t.Error("it took a point of another hour")
	}
	p.Start, p.Step = origin, Second
	if b.Put(p) {
		t.Error("it took a point of another step")
	}
}

func TestNumbersThatAreNoneBecomeZero(t *testing.T) {
	b := &Block{Hour: origin}
	p := Point{Start: origin, Step: Minute, Covered: Minute, Has: 1<<CPU | 1<<Wait | 1<<ReadBytes}
	p.Mean[CPU], p.Mean[Wait], p.Mean[ReadBytes] = float32(math.NaN()), float32(math.Inf(1)), math.MaxFloat32
	b.Put(p)
	got, err := ParseBlock(b.Append(nil))
	if err != nil {
		t.Fatal(err)
	}
	m := got.Points[0].Mean
	if m[CPU] != 0 || m[Wait] != 0 || math.IsInf(float64(m[ReadBytes]), 0) {
		t.Error(m[CPU], m[Wait], m[ReadBytes])
	}
}

func TestACutBlockIsRefused(t *testing.T) {
	raw := busy(3, origin).Append(nil)
	for n := range raw {
		if _, err := ParseBlock(raw[:n]); !errors.Is(err, ErrBlock) {
			t.Fatalf("%d of %d bytes: %v", n, len(raw), err)
		}
	}
	if _, err := ParseBlock(make([]byte, MaxBlock+1)); !errors.Is(err, ErrBlock) {
		t.Error("an oversized block was taken")
	}
}

func FuzzParseBlock(f *testing.F) {
	f.Add(busy(4, origin).Append(nil))
	f.Add((&Block{Hour: origin}).Append(nil))
	f.Fuzz(func(t *testing.T, raw []byte) {
		b, err := ParseBlock(raw)
		if err != nil {
			return
		}
		again, err := ParseBlock(b.Append(nil))
		if err != nil {
			t.Fatalf("what was parsed does not parse again: %v", err)
		}
		if !again.Hour.Equal(b.Hour) || len(again.Minutes()) != len(b.Minutes()) {
			t.Error("a block changed")
		}
	})
}
