package predict

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

// seasoned has seen n cells of a daily load with gaps, spikes and a shift.
func seasoned(t testing.TB, cfg Config, n int) *Forecaster {
	f := mustNew(t, cfg)
	rng := rand.New(rand.NewPCG(11, 11))
	feed(f, start, n, func(i int) float64 {
		v := daily(i, rng)
		switch {
		case rng.IntN(50) == 0:
			return math.NaN()
		case rng.IntN(200) == 0:
			return 20 * v
		case i > n*3/4:
			return v + 2000
		}
		return v
	})
	return f
}

func mustMarshal(t testing.TB, f *Forecaster) []byte {
	t.Helper()
	b, err := f.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStateTravels(t *testing.T) {
	five := append(DefaultHorizons(), 7*24*time.Hour)
	for name, c := range map[string]struct {
		cfg Config
		n   int
	}{
		"before the first sample":    {Config{}, 0},
		"after one sample":           {Config{}, 1},
		"at 10 s, full":              {Config{}, 30000},
		"at 5 min, full":             {fiveMin, 12000},
		"with five horizons":         {Config{Step: time.Minute, Horizons: five}, 30000},
		"with one horizon of a cell": {Config{Step: time.Minute, Horizons: []time.Duration{time.Minute}}, 5000},
		"at a step of an hour":       {Config{Step: time.Hour, Horizons: []time.Duration{time.Hour, 24 * time.Hour}}, 3000},
	} {
		t.Run(name, func(t *testing.T) {
			a := seasoned(t, c.cfg, c.n)
			data := mustMarshal(t, a)
			if len(data) > MaxState {
				t.Fatalf("%d bytes, at most %d", len(data), MaxState)
			}
			b := mustNew(t, Config{})
			if err := b.UnmarshalBinary(data); err != nil {
				t.Fatal(err)
			}
			if again := mustMarshal(t, b); string(again) != string(data) {
				t.Fatal("the state changed on its way")
			}
			// And both go on alike.
			rng := rand.New(rand.NewPCG(12, 12))
			at := start.Add(time.Duration(c.n) * a.cfg.Step)
			for i := range 500 {
				v := daily(i, rng)
				a.Observe(at, v)
				b.Observe(at, v)
				at = at.Add(a.cfg.Step)
				if i == 0 {
					continue
				}
				for _, h := range a.cfg.Horizons {
					for _, target := range []Target{Value, Peak} {
						if qa, qb := mustForecast(t, a, h, target), mustForecast(t, b, h, target); qa != qb {
							t.Fatalf("cell %d, %v %v: %+v here, %+v there", i, h, target, qa, qb)
						}
					}
				}
			}
		})
	}
}

func TestFullestStateFits(t *testing.T) {
	hours := func(hs ...int) (out []time.Duration) {
		for _, h := range hs {
			out = append(out, time.Duration(h)*time.Hour)
		}
		return out
	}
	for name, cfg := range map[string]Config{
		"four long horizons": {Horizons: hours(6, 12, 24, 168)},
		"five long horizons": {Horizons: hours(6, 12, 24, 48, 168)},
		"five up to an hour": {Horizons: []time.Duration{10 * time.Minute, 20 * time.Minute, 30 * time.Minute, 45 * time.Minute, time.Hour}},
		"four up to an hour": {Horizons: []time.Duration{10 * time.Minute, 20 * time.Minute, 30 * time.Minute, time.Hour}},
		"five from a minute": {Step: time.Minute, Horizons: append([]time.Duration{time.Minute, 3 * time.Minute}, hours(1, 24, 168)...)},
	} {
		t.Run(name, func(t *testing.T) {
			f := seasoned(t, cfg, 1000)
			for _, l := range f.lanes {
				for i := range l.wait {
					l.fill(&f.hist, f.open-1, &l.wait[i])
				}
				for k := range l.of {
					o := &l.of[k].tails
					for j := range o.seen {
						d := &o.seen[j]
						d.mean, d.weight, d.fresh = d.mean[:0], d.weight[:cap(d.weight)], d.fresh[:cap(d.fresh)]
						for range cap(d.mean) {
							d.mean = append(d.mean, 1)
						}
					}
				}
			}
			n := len(mustMarshal(t, f))
			t.Logf("%d bytes", n)
			if n > MaxState || n < MaxState/2 {
				t.Errorf("%d bytes, at most %d", n, MaxState)
			}
		})
	}
}

func TestStateCutAnywhereIsRefused(t *testing.T) {
	data := mustMarshal(t, seasoned(t, fiveMin, 2000))
	f := mustNew(t, Config{})
	for n := range data {
		if err := f.UnmarshalBinary(data[:n]); !errors.Is(err, ErrState) {
			t.Fatalf("%d of %d bytes: %v", n, len(data), err)
		}
	}
	// Cut and sealed again: the lengths have to notice.
	for n := 5; n < len(data)-4; n += 97 {
		if err := f.UnmarshalBinary(seal(data[:n])); !errors.Is(err, ErrState) {
			t.Fatalf("%d of %d bytes, sealed: %v", n, len(data), err)
		}
	}
	if f.hist.cells != 0 {
		t.Fatal("a refused state changed the forecaster")
	}
}

func TestDamagedStateIsRefused(t *testing.T) {
	good := mustMarshal(t, seasoned(t, fiveMin, 2000))
	for name, change := range map[string]func([]byte) []byte{
		"of another version": func(b []byte) []byte { b[0]++; return seal(b[:len(b)-4]) },
		"with a flipped bit": func(b []byte) []byte { b[len(b)/2] ^= 4; return b },
		"with a longer tail": func(b []byte) []byte { return seal(append(b[:len(b)-4], 0)) },
		"longer than allowed": func(b []byte) []byte {
			return append(b, make([]byte, MaxState)...)
		},
	} {
		t.Run("a state "+name, func(t *testing.T) {
			f := mustNew(t, Config{})
			if err := f.UnmarshalBinary(change(append([]byte(nil), good...))); !errors.Is(err, ErrState) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func seal(b []byte) []byte {
	b = append([]byte(nil), b...)
	return binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
}

// FuzzUnmarshal: a state that is accepted, however it was made, forecasts
// without panic and travels on.
func FuzzUnmarshal(f *testing.F) {
	for _, n := range []int{0, 1, 50, 400} {
		b := mustMarshal(f, seasoned(f, Config{Step: time.Minute, Horizons: []time.Duration{time.Minute, 5 * time.Minute}}, n))
		f.Add(b[:len(b)-4])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		fc := mustNew(t, Config{})
		if err := fc.UnmarshalBinary(seal(body)); err != nil {
			if !errors.Is(err, ErrState) {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		if _, err := fc.MarshalBinary(); err != nil {
			t.Fatal(err)
		}
		at := time.Unix(0, fc.hist.timeOf(fc.open))
		for i := range 30 {
			fc.Observe(at.Add(time.Duration(i)*fc.cfg.Step), float64(i))
			_, _ = fc.Forecast(fc.cfg.Horizons[0], Peak)
		}
	})
}
