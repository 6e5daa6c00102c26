package profile

import (
	"math"
	"slices"
	"testing"
	"time"
)

// origin is a whole hour, so that minutes are easy to read.
var origin = time.Date(2025, 3, 9, 12, 0, 0, 0, time.UTC)

// clock makes instants of a host that is awake and whose clock nobody sets.
func clock(at time.Duration) Instant {
	return Instant{Wall: origin.Add(at), Monotonic: time.Hour + at, Boot: 2*time.Hour + at}
}

// load feeds a profile with a counter that gains rate a second, and a gauge.
func load(p *Profile, from, to time.Duration, total *float64, rate, gauge float64) (minutes []Point) {
	for at := from; at <= to; at += time.Second {
		s := Sample{At: clock(at)}
		s.Set(CPU, *total)
		s.Set(WorkingSet, gauge)
		*total += rate
		done, _ := p.Observe(&s)
		minutes = append(minutes, done...)
	}
	return minutes
}

func TestASteadyLoadIsTheSameAtEveryStep(t *testing.T) {
	p := New()
	total := 100.0
	minutes := load(p, 0, 3*time.Minute, &total, 0.25, 1<<20)
	if len(minutes) < 2 {
		t.Fatalf("%d minutes after three", len(minutes))
	}
	for _, points := range [][]Point{minutes, p.Seconds(), p.Tens()} {
		for _, pt := range points {
			if pt.Mean[CPU] != 0.25 || pt.Peak[CPU] != 0.25 || pt.Mean[WorkingSet] != 1<<20 {
				t.Errorf("%v at %v: %v %v %v", pt.Step, pt.Start, pt.Mean[CPU], pt.Peak[CPU], pt.Mean[WorkingSet])
			}
			if pt.Covered != pt.Step {
				t.Errorf("%v at %v: only %v covered", pt.Step, pt.Start, pt.Covered)
			}
			if pt.Has.Has(Wait) {
				t.Error("a signal that nobody measured is there")
			}
		}
	}
	if n := len(p.Seconds()); n != keepSeconds {
		t.Errorf("%d seconds are kept, not %d", n, keepSeconds)
	}
}

func TestAPeakOfASecondIsKeptBesideTheMean(t *testing.T) {
	p := New()
	total := 0.0
	load(p, 0, 29*time.Second, &total, 0, 0)
	total += 2 // the 30th second
	minutes := load(p, 30*time.Second, 70*time.Second, &total, 0, 0)
	if len(minutes) != 1 {
		t.Fatalf("%d minutes", len(minutes))
	}
	if m := minutes[0]; math.Abs(float64(m.Mean[CPU])-2.0/60) > 1e-6 || m.Peak[CPU] != 2 {
		t.Errorf("mean %v, peak %v", m.Mean[CPU], m.Peak[CPU])
	}
}

func TestTimeThatIsUnknownIsAGap(t *testing.T) {
	for _, tt := range []struct {
		name string
		// shift of the clocks after the first half minute
		wall, mono, boot time.Duration
		want             GapReason
	}{
		{"a sampler that did not run for 20 s", 20 * time.Second, 20 * time.Second, 20 * time.Second, Late},
		{"ten minutes of suspend", 10 * time.Minute, 0, 10 * time.Minute, Suspended},
		{"a clock that was set forward", time.Hour, 0, 0, Stepped},
		{"a clock that was set back", -time.Hour, 0, 0, Stepped},
		{"a monotonic clock that ran backwards", 0, -30 * time.Minute, 0, Backwards},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := New()
			total := 0.0
			minutes := load(p, 0, 30*time.Second, &total, 0.5, 7)
			// Meanwhile much happened, which must not become a spike.
			total += 1000
			var gaps int
			for at := 31 * time.Second; at <= 3*time.Minute; at += time.Second {
				s := Sample{At: Instant{Wall: origin.Add(at + tt.wall), Monotonic: time.Hour + at + tt.mono, Boot: 2*time.Hour + at + tt.boot}}
				s.Set(CPU, total)
				s.Set(WorkingSet, 7)
				total += 0.5
				done, gap := p.Observe(&s)
				if gap != NoGap {
					gaps++
					if gap != tt.want {
						t.Errorf("gap %q", gap)
					}
				}
				minutes = append(minutes, done...)
			}
			if gaps != 1 || p.Gaps[tt.want] != 1 {
				t.Errorf("%d gaps, counted %v", gaps, p.Gaps)
			}
			covered := time.Duration(0)
			for _, m := range append(minutes, p.Seconds()...) {
				if m.Peak[CPU] > 0.51 || m.Mean[CPU] < 0.49 {
					t.Errorf("%v: mean %v peak %v", m.Start, m.Mean[CPU], m.Peak[CPU])
				}
				if m.Mean[WorkingSet] != 7 {
					t.Errorf("%v: gauge %v", m.Start, m.Mean[WorkingSet])
				}
			}
			for _, m := range minutes {
				covered += m.Covered
			}
			if last, ok := p.Flush(); ok {
				covered += last.Covered
			}
			// 180 s of samples less the second in which it happened.
			if covered > 179*time.Second+time.Millisecond || covered < 170*time.Second {
				t.Errorf("%v covered", covered)
			}
		})
	}
}

func TestACounterThatBeginsAnewIsAbsentForOneInterval(t *testing.T) {
	a, b := Sample{At: clock(0)}, Sample{At: clock(time.Second)}
	a.Set(CPU, 100)
	b.Set(CPU, 3)
	a.Set(ReadBytes, 5)
	b.Set(ReadBytes, 9)
	iv, gap := Between(&a, &b)
	if gap != NoGap || iv.Has.Has(CPU) || !iv.Has.Has(ReadBytes) || iv.Rates[ReadBytes] != 4 {
		t.Errorf("%+v %v", iv, gap)
	}
}

func TestAnAbsentSignalIsNotZero(t *testing.T) {
	p := New()
	for at := time.Duration(0); at <= 70*time.Second; at += time.Second {
		s := Sample{At: clock(at)}
		s.Set(CPU, at.Seconds())
		if at < 30*time.Second {
			s.Set(Connections, 10) // then its source is lost
		}
		if done, _ := p.Observe(&s); len(done) > 0 {
			if m := done[0]; m.Mean[Connections] != 10 || !m.Has.Has(Connections) || math.Abs(float64(m.Mean[CPU])-1) > 1e-6 {
				t.Errorf("%v %v", m.Mean[Connections], m.Mean[CPU])
			}
			return
		}
	}
	t.Error("no minute came")
}

func TestHistogram(t *testing.T) {
	var h Histogram
	if h.Quantile(0.5) != 0 {
		t.Error("an empty histogram has a quantile")
	}
	h[0], h[10], h[23] = 50, 49, 1
	if h.Count() != 100 || h.Quantile(0.5) != UpperBound(0) || h.Quantile(0.99) != UpperBound(10) || h.Quantile(1) != 8 {
		t.Error(h.Quantile(0.5), h.Quantile(0.99), h.Quantile(1))
	}
	if UpperBound(20) != 1 || UpperBound(0) != 1.0/(1<<20) {
		t.Error(UpperBound(20), UpperBound(0))
	}
	for b := range Buckets {
		if got := math.Ldexp(1, NativeIndex(b)); got != UpperBound(b) {
			t.Errorf("bucket %d ends at %v, its native index says %v", b, UpperBound(b), got)
		}
	}
	later := h
	later[10]++
	if d, ok := later.Since(&h); !ok || d.Count() != 1 || d[10] != 1 {
		t.Error(d, ok)
	}
	if _, ok := h.Since(&later); ok {
		t.Error("a histogram that shrank is a continuation")
	}
}

func TestSignalsHaveNames(t *testing.T) {
	seen := map[string]bool{}
	for s := range Signals {
		if s.String() == "" || seen[s.String()] {
			t.Errorf("signal %d has no name of its own", s)
		}
		seen[s.String()] = true
		if got, ok := SignalNamed(s.String()); !ok || got != s {
			t.Errorf("%v is not found by its name", s)
		}
	}
}

func TestTheNewestSecondsAreVisitedInOrder(t *testing.T) {
	for _, length := range []time.Duration{0, time.Second, 30 * time.Second, 5 * time.Minute} {
		p := New()
		total := 0.0
		load(p, 0, length, &total, 1, 0)
		all := p.Seconds()
		for _, back := range []time.Duration{-time.Second, 0, time.Second, 11 * time.Second, time.Hour} {
			from := origin.Add(length - back)
			var want, have []time.Time
			for _, pt := range all {
				if !pt.Start.Before(from) {
					want = append(want, pt.Start)
				}
			}
			for pt := range p.SecondsFrom(from) {
				have = append(have, pt.Start)
			}
			if !slices.Equal(have, want) {
				t.Errorf("of %v, from %v before its end: %v, not %v", length, back, have, want)
			}
			for range p.SecondsFrom(from) {
				break
			}
		}
	}
}
