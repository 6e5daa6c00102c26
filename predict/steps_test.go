package predict

import (
	"math/rand/v2"
	"testing"
	"time"
)

// stepped feeds a week of tens of seconds in which the load triples for an hour a
// day, within a minute, and goes on until after begins on the last day.
func stepped(t *testing.T, begin time.Time, after time.Duration) *Forecaster {
	f := mustNew(t, Config{Horizons: append(DefaultHorizons(), 7*24*time.Hour)})
	rng := rand.New(rand.NewPCG(uint64(begin.Second()+60*begin.Minute()), 2))
	const step, day = 10 * time.Second, 24 * time.Hour
	for at := begin.Add(-7 * day); at.Before(begin.Add(after)); at = at.Add(step) {
		v := 0.034 + 0.003*rng.NormFloat64()
		if in := (at.Sub(begin)%day + day) % day; in < time.Hour {
			v = 0.034 + 0.058*min(1, (in.Seconds()+5)/60) + 0.006*rng.NormFloat64()
		}
		f.Observe(at.Add(step/2), v)
		f.Advance(at.Add(step))
	}
	return f
}

func TestDailyStepIsForeseenAndBelievedWhereverInItsBinItComes(t *testing.T) {
	for off := time.Duration(0); off < 5*time.Minute; off += 40 * time.Second {
		begin := time.Date(2026, 11, 23, 7, 10, 0, 0, time.UTC).Add(off)
		before := stepped(t, begin, -time.Minute)
		if q := mustForecast(t, before, 15*time.Minute, Peak); q.P50 < 0.095 {
			t.Errorf("%v: a minute before the step the peak within 15 min is %+v, want about 0.105", off, q)
		}
		after := stepped(t, begin, 80*time.Second)
		if q := mustForecast(t, after, 5*time.Minute, Value); q.P50 < 0.07 {
			t.Errorf("%v: 80 s after the step the value in 5 min is %+v, want about 0.092", off, q)
		}
		if q := mustForecast(t, after, 5*time.Minute, Peak); q.P50 < 0.085 {
			t.Errorf("%v: 80 s after the step the peak within 5 min is %+v, want about 0.105", off, q)
		}
	}
}

func TestPeakCountsTheRestOfTheOriginsBin(t *testing.T) {
	// Every day a burst of a minute, three minutes into a bin, and the origin in
	// the same bin before it.
	f := mustNew(t, Config{})
	rng := rand.New(rand.NewPCG(1, 1))
	burst := time.Date(2026, 3, 9, 7, 13, 0, 0, time.UTC)
	for at := burst.Add(-6 * 24 * time.Hour); at.Before(burst.Add(-time.Minute)); at = at.Add(10 * time.Second) {
		v := 1 + 2*rng.Float64()
		if in := at.Sub(burst) % (24 * time.Hour); in > -24*time.Hour && in < -24*time.Hour+time.Minute || in == 0 {
			v = 9
		}
		f.Observe(at.Add(5*time.Second), v)
		f.Advance(at.Add(10 * time.Second))
	}
	l := f.lanes[0]
	var e entry
	l.fill(&f.hist, f.open-1, &e)
	for name, x := range map[string]float32{"profile": e.x[fProfilePeak], "yesterday": e.x[fYesterdayPeak]} {
		if top := e.anchor + e.scale*float64(x); top < 5 {
			t.Errorf("%s: the peak within 5 min is %.1f, want 9", name, top)
		}
	}
}
