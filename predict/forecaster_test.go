package predict

import (
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

var start = time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)

func mustNew(t testing.TB, cfg Config) *Forecaster {
	t.Helper()
	f, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func mustForecast(t testing.TB, f *Forecaster, h time.Duration, target Target) Quantiles {
	t.Helper()
	q, err := f.Forecast(h, target)
	if err != nil {
		t.Fatalf("forecast %v %v: %v", h, target, err)
	}
	for _, v := range []float64{q.P10, q.P50, q.P90, q.P95, q.P99} {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			t.Fatalf("forecast %v %v is not finite: %+v", h, target, q)
		}
	}
	if !(q.P10 <= q.P50 && q.P50 <= q.P90 && q.P90 <= q.P95 && q.P95 <= q.P99) {
		t.Fatalf("forecast %v %v: quantiles cross: %+v", h, target, q)
	}
	return q
}

// fiveMin is the grid of most tests.
var fiveMin = Config{Step: 5 * time.Minute}

// feed observes n cells of gen and returns the time after the last.
func feed(f *Forecaster, from time.Time, n int, gen func(i int) float64) time.Time {
	step := f.cfg.Step
	for i := range n {
		f.Observe(from.Add(time.Duration(i)*step), gen(i))
	}
	end := from.Add(time.Duration(n) * step)
	f.Advance(end.Add(-step / 4)) // cells are centred on their samples
	return end
}

func TestConfigIsChecked(t *testing.T) {
	for name, cfg := range map[string]Config{
		"a negative step":                  {Step: -time.Second},
		"a step of two days":               {Step: 48 * time.Hour},
		"no horizons":                      {Horizons: []time.Duration{}},
		"a horizon shorter than the step":  {Step: time.Hour, Horizons: []time.Duration{time.Minute}},
		"horizons that do not ascend":      {Horizons: []time.Duration{time.Hour, time.Minute}},
		"more horizons than there is room": {Horizons: []time.Duration{1e11, 2e11, 3e11, 4e11, 5e11, 6e11}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(cfg); err == nil {
				t.Fatal("accepted")
			}
		})
	}
}

func TestForecastWithoutSamplesOrBeyondTheHorizonIsRefused(t *testing.T) {
	f := mustNew(t, fiveMin)
	if _, err := f.Forecast(time.Hour, Value); !errors.Is(err, ErrNoSamples) {
		t.Fatalf("got %v, want ErrNoSamples", err)
	}
	feed(f, start, 3, func(int) float64 { return 1 })
	for _, h := range []time.Duration{0, -time.Hour, 25 * time.Hour} {
		if _, err := f.Forecast(h, Value); !errors.Is(err, ErrHorizon) {
			t.Fatalf("horizon %v: got %v, want ErrHorizon", h, err)
		}
	}
}

func TestConstantSeriesIsForecastExactly(t *testing.T) {
	for _, v := range []float64{0, 7, -3, 1e12, 1e-9} {
		f := mustNew(t, fiveMin)
		feed(f, start, 2000, func(int) float64 { return v })
		for _, h := range f.cfg.Horizons {
			for _, target := range []Target{Value, Peak} {
				q := mustForecast(t, f, h, target)
				if math.Abs(q.P50-v) > 1e-6*math.Abs(v) || math.Abs(q.P99-v) > 1e-3*math.Abs(v) {
					t.Errorf("constant %g, %v %v: %+v", v, h, target, q)
				}
			}
		}
	}
}

// daily is a load with a day's rhythm.
func daily(i int, rng *rand.Rand) float64 {
	return 50 + 30*math.Sin(2*math.Pi*float64(i)/288) + 2*rng.NormFloat64()
}

func TestDailyRhythmIsLearnt(t *testing.T) {
	f := mustNew(t, fiveMin)
	rng := rand.New(rand.NewPCG(1, 1))
	feed(f, start, 288*7, func(i int) float64 { return daily(i, rng) })
	for _, hours := range []int{1, 24} {
		h := time.Duration(hours) * time.Hour
		want := 50 + 30*math.Sin(2*math.Pi*float64(288*7-1+12*hours)/288)
		if q := mustForecast(t, f, h, Value); math.Abs(q.P50-want) > 4 || q.P95-q.P50 > 12 {
			t.Errorf("%v ahead: %+v, want about %.1f", h, q, want)
		}
	}
	if q := mustForecast(t, f, 24*time.Hour, Peak); q.P50 < 78 || q.P50 > 92 {
		t.Errorf("peak of a day: %+v, want 80 to 90", q)
	}
	if x := f.Explain(); x.Season != 24*time.Hour {
		t.Errorf("season found: %v, want 24h", x.Season)
	}
}

func TestWeeklyRhythmIsLearnt(t *testing.T) {
	f := mustNew(t, fiveMin)
	rng := rand.New(rand.NewPCG(6, 6))
	const days = 5 * 7
	off, n := 0.0, 0.0
	load := func(i int) float64 {
		swing := -math.Cos(2 * math.Pi * float64(i) / 288)
		if d := i / 288 % 7; d == 5 || d == 6 { // start is a Monday
			return 30 + 10*swing
		}
		return 60 + 40*swing
	}
	for i := range 288 * days {
		if i >= 288*28 && i+288 < 288*days {
			off += math.Abs(load(i+287) - mustForecast(t, f, 24*time.Hour, Value).P50)
			n++
		}
		at := start.Add(time.Duration(i) * 5 * time.Minute)
		f.Observe(at, load(i)+4*rng.Float64()-2)
		f.Advance(at.Add(151 * time.Second))
	}
	// The regression alone, which knows last week too, is off by 1.1.
	if off/n > 0.95 {
		t.Errorf("a day ahead the median is off by %.1f", off/n)
	}
}

func TestBoundsHoldTheirShareOfOutcomes(t *testing.T) {
	// Skewed noise whose width follows the level: what a Gaussian formula gets wrong.
	f := mustNew(t, fiveMin)
	rng := rand.New(rand.NewPCG(2, 2))
	n := 288 * 14
	series := make([]float64, n)
	for i := range series {
		level := 20 + 15*math.Sin(2*math.Pi*float64(i)/288)
		series[i] = level * (1 + 0.1*rng.ExpFloat64())
	}
	below, all := 0, 0
	var bound []float64
	for i, v := range series {
		if i >= 288*7+12 {
			all++
			if v <= bound[i-12] {
				below++
			}
		}
		f.Observe(start.Add(time.Duration(i)*f.cfg.Step), v)
		f.Advance(start.Add(time.Duration(i)*f.cfg.Step + f.cfg.Step*3/4))
		bound = append(bound, mustForecast(t, f, time.Hour, Value).P95)
	}
	if c := float64(below) / float64(all); c < 0.93 || c > 0.97 {
		t.Errorf("%.3f of the outcomes below the 95 %% bound", c)
	}
	for _, h := range f.Explain().Horizons {
		if h.Horizon == time.Hour && h.Target == Value && (h.Cover95 < 0.9 || h.Cover95 > 0.99) {
			t.Errorf("explained coverage %.3f", h.Cover95)
		}
	}
}

func TestIntervalRecoversWithinAnHourOfALevelShift(t *testing.T) {
	const noise = 5.0
	for name, level := range map[string]float64{"upwards": 500, "downwards": 20} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(10) {
				f := mustNew(t, fiveMin)
				rng := rand.New(rand.NewPCG(3, seed))
				end := feed(f, start, 288*5, func(int) float64 { return 100 + noise*rng.NormFloat64() })
				feed(f, end, 12, func(int) float64 { return level + noise*rng.NormFloat64() })
				for _, h := range []time.Duration{5 * time.Minute, 15 * time.Minute, time.Hour} {
					q := mustForecast(t, f, h, Value)
					if math.Abs(q.P50-level) > 1.5*noise {
						t.Errorf("seed %d, %v: median %.1f an hour after the shift to %.1f", seed, h, q.P50, level)
					}
					// 1.64 deviations would be right.
					if up := (q.P95 - q.P50) / noise; up < 0.8 || up > 4 {
						t.Errorf("seed %d, %v: %+v an hour after the shift to %.1f", seed, h, q, level)
					}
				}
			}
		})
	}
}

func TestBoundsHoldAfterALongRest(t *testing.T) {
	rests := map[string]float64{"of nothing": 0, "of little": 0.01}
	for name, load := range map[string]struct {
		mean  func(i int) float64 // of the i-th cell after the rest
		noise float64
	}{
		"noise":               {func(int) float64 { return 50 }, 10},
		"every other hour":    {func(i int) float64 { return float64(i / 12 % 2 * 50) }, 0},
		"every third hour":    {func(i int) float64 { return float64(i / 12 % 3 / 2 * 50) }, 0},
		"three hours in six":  {func(i int) float64 { return float64(i / 36 % 2 * 50) }, 0},
		"a climb":             {func(i int) float64 { return float64(i + 1) }, 0.1},
		"a climb within days": {func(i int) float64 { return float64(i+1) / 72 }, 0.1},
	} {
		for rest, little := range rests {
			t.Run(name+" after a rest "+rest, func(t *testing.T) {
				f := mustNew(t, fiveMin)
				rng := rand.New(rand.NewPCG(4, 5))
				at := feed(f, start, 5*288, func(int) float64 { return little * (10 + rng.NormFloat64()) })
				v := make([]float64, 3*288)
				drift := 0.0 // noise that lasts an hour, as that of loads does
				for i := range v {
					drift = 0.9*drift + 0.436*load.noise*rng.NormFloat64()
					v[i] = load.mean(i) + drift + little*(10+rng.NormFloat64())
				}
				held, n := 0, 0
				for i := range v[:len(v)-12] {
					at = feed(f, at, 1, func(int) float64 { return v[i] })
					if i < 288 {
						continue // the first day of it is new
					}
					n++
					bound := mustForecast(t, f, time.Hour, Peak).P95
					if slices.Max(v[i+1:i+13]) <= bound {
						held++
					}
					if so := slices.Max(v[:i+1]); bound > 2*so {
						t.Fatalf("%.1f may come within an hour, of a load that has been %.1f at most", bound, so)
					}
				}
				if share := float64(held) / float64(n); share < 0.9 {
					t.Errorf("the 95 %% bound held %.3f of the peaks of an hour", share)
				}
			})
		}
	}
}

func TestSpikesAreNotTakenForTheLevel(t *testing.T) {
	f := mustNew(t, fiveMin)
	feed(f, start, 288*4, func(i int) float64 {
		if i%97 == 0 {
			return 1000
		}
		return 10
	})
	if q := mustForecast(t, f, time.Hour, Value); q.P50 < 9 || q.P50 > 12 {
		t.Errorf("median %g, want about 10", q.P50)
	}
	if q := mustForecast(t, f, 24*time.Hour, Peak); q.P95 < 900 {
		t.Errorf("peak of the day %+v, want 1000", q)
	}
}

func TestOneEarlyFaultDoesNotSetEveryBound(t *testing.T) {
	f := mustNew(t, Config{Step: time.Minute})
	rng := rand.New(rand.NewPCG(3, 5))
	at, fault := start, 0.0
	for i := range 12 * 60 {
		v := 10 + rng.Float64()
		if i >= 100 && i < 105 {
			v = 200
			fault = v
		}
		f.Observe(at, v)
		at = at.Add(time.Minute)
	}
	// One of twelve hours, a third of a day ago: a bound that remembers each of
	// its settled forecasts alike still says 196.
	for h, room := range map[time.Duration]float64{15 * time.Minute: 13, time.Hour: fault / 2} {
		if q := mustForecast(t, f, h, Peak); q.P95 > room || q.P95 < 10.9 {
			t.Errorf("%v ahead: 95 %% of peaks below %.1f, %.0f at most", h, q.P95, room)
		}
	}
}

func TestLoadThatTookToSteppingIsForecastAsNow(t *testing.T) {
	var own, asNow float64
	for seed := range uint64(20) {
		f := mustNew(t, fiveMin)
		rng := rand.New(rand.NewPCG(4, seed))
		at, v, median := start, 0.0, 0.0
		for i := range 288 {
			before := v
			switch {
			case i >= 144: // a coin that is turned at times: as now is the median
				if v != 2 && v != 0 || rng.Float64() < 0.3 {
					v = 2 - min(v, 2)
				}
			case rng.Float64() < 0.1: // as now errs twice
				v = 20
			default:
				v = 2 * float64(rng.IntN(3)/2)
			}
			if i >= 144 {
				own += math.Abs(v - median)
				asNow += math.Abs(v - before)
			}
			f.Observe(at, v)
			f.Advance(at.Add(151 * time.Second))
			at = at.Add(5 * time.Minute)
			median = mustForecast(t, f, 5*time.Minute, Value).P50
		}
	}
	if own > 1.25*asNow {
		t.Errorf("absolute errors of %.0f, as now %.0f", own, asNow)
	}
}

func TestDaysPeakIsAsTheDayBeforeUntilMembersProveBetter(t *testing.T) {
	var late, latePast float64
	for seed := range uint64(10) {
		f := mustNew(t, fiveMin)
		rng := rand.New(rand.NewPCG(5, seed))
		at, height := start, 0.0
		for day := range 40 {
			before := height
			var q Quantiles
			if day > 0 {
				q = mustForecast(t, f, 24*time.Hour, Peak)
			}
			switch {
			case day < 3:
				height = 100 - 40*rng.Float64()
			case day%2 == 0: // what was usual errs half as much as the day before
				height = 100
			default:
				height = 60
			}
			for i := range 288 {
				v := 10 + rng.Float64()
				if i%100 < 5 { // three times a day, too short for a new level
					v = height
				}
				f.Observe(at, v)
				f.Advance(at.Add(151 * time.Second))
				at = at.Add(5 * time.Minute)
			}
			switch want := max(q.P10, min(before, q.P90)); {
			case day == 2 && math.Abs(q.P50-want) > 1e-4*want:
				t.Errorf("after a peak of %.1f, %+v", before, q)
			case day >= 20:
				late += math.Abs(height - q.P50)
				latePast += math.Abs(height - before)
			}
		}
	}
	if late > 0.75*latePast {
		t.Errorf("after twenty days, errors of %.0f where the day before has %.0f", late, latePast)
	}
}

func TestBadInputIsIgnored(t *testing.T) {
	clean, dirty := mustNew(t, fiveMin), mustNew(t, fiveMin)
	for i := range 600 {
		at := start.Add(time.Duration(i) * 5 * time.Minute)
		v := float64(i % 17)
		clean.Observe(at, v)
		dirty.Observe(at, math.NaN())
		dirty.Observe(at, v)
		dirty.Observe(at, math.Inf(1))
		dirty.Observe(at, -1e31)
		if i > 0 {
			dirty.Observe(at.Add(-time.Hour), 1e6) // late by an hour
		}
	}
	for _, h := range clean.cfg.Horizons {
		if a, b := mustForecast(t, clean, h, Value), mustForecast(t, dirty, h, Value); a != b {
			t.Errorf("%v: %+v became %+v", h, a, b)
		}
	}
}

func TestNonNegativeLoadsAreNotForecastBelowZero(t *testing.T) {
	f := mustNew(t, fiveMin)
	rng := rand.New(rand.NewPCG(4, 4))
	for i := range 1000 {
		v := 0.0
		if rng.IntN(4) == 0 {
			v = rng.ExpFloat64()
		}
		f.Observe(start.Add(time.Duration(i)*5*time.Minute), v)
		if i > 0 {
			if q := mustForecast(t, f, time.Hour, Value); q.P10 < 0 {
				t.Fatalf("cell %d: %+v", i, q)
			}
		}
	}
}

func TestCounterBecomesARate(t *testing.T) {
	f := mustNew(t, Config{Step: 10 * time.Second})
	total := 1e9
	for i := range 400 {
		if i == 200 {
			total = 0 // the process restarted
		}
		total += 10 * 250 // 250 a second
		f.ObserveCounter(start.Add(time.Duration(i)*10*time.Second), total)
	}
	q := mustForecast(t, f, 5*time.Minute, Value)
	if math.Abs(q.P50-250) > 1 || q.P99 > 300 {
		t.Errorf("%+v, want 250", q)
	}
}

func TestCounterGapIsNotARate(t *testing.T) {
	f := mustNew(t, Config{Step: 10 * time.Second})
	at := start
	for i := range 100 {
		f.ObserveCounter(at, float64(i)*1000)
		at = at.Add(10 * time.Second)
	}
	before := f.hist.cells
	f.ObserveCounter(at.Add(24*time.Hour), 1e12)
	f.Advance(at.Add(25 * time.Hour))
	if got := f.hist.cells; got > before+1 {
		t.Errorf("a day without the counter became %d cells", got-before)
	}
	if q := mustForecast(t, f, 5*time.Minute, Value); q.P50 > 200 {
		t.Errorf("%+v, want 100", q)
	}
}

func TestGapsSlowerSamplingAndClockStepsAreSurvived(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	load := func() float64 { return 40 + rng.NormFloat64() }
	near := func(t *testing.T, f *Forecaster) {
		t.Helper()
		for _, h := range []time.Duration{5 * time.Minute, time.Hour, 24 * time.Hour} {
			if q := mustForecast(t, f, h, Value); q.P50 < 37 || q.P50 > 43 || q.P95 > 60 {
				t.Errorf("%v: %+v, want about 40", h, q)
			}
		}
	}
	t.Run("a gap of a day", func(t *testing.T) {
		f := mustNew(t, fiveMin)
		end := feed(f, start, 600, func(int) float64 { return load() })
		feed(f, end.Add(24*time.Hour), 20, func(int) float64 { return load() })
		near(t, f)
	})
	t.Run("a gap of a century", func(t *testing.T) {
		f := mustNew(t, fiveMin)
		end := feed(f, start, 600, func(int) float64 { return load() })
		feed(f, end.AddDate(100, 0, 0), 20, func(int) float64 { return load() })
		near(t, f)
	})
	t.Run("sampling six times slower", func(t *testing.T) {
		f := mustNew(t, Config{Step: 10 * time.Second})
		end := feed(f, start, 3000, func(int) float64 { return load() })
		for i := range 2000 {
			f.Observe(end.Add(time.Duration(i)*time.Minute), load())
		}
		near(t, f)
	})
	t.Run("sampling six times faster", func(t *testing.T) {
		f := mustNew(t, Config{Step: time.Minute})
		end := feed(f, start, 1500, func(int) float64 { return load() })
		for i := range 9000 {
			f.Observe(end.Add(time.Duration(i)*10*time.Second), load())
		}
		near(t, f)
	})
	t.Run("a clock set back by a week", func(t *testing.T) {
		f := mustNew(t, fiveMin)
		end := feed(f, start, 600, func(int) float64 { return load() })
		cells := f.hist.cells
		feed(f, end.Add(-7*24*time.Hour), 600, func(int) float64 { return load() })
		if got := f.hist.cells - cells; got < 580 {
			t.Errorf("%d of 600 samples were taken after the clock went back", got)
		}
		near(t, f)
	})
}

func TestForecastBetweenHorizonsLiesBetweenThem(t *testing.T) {
	f := mustNew(t, fiveMin)
	rng := rand.New(rand.NewPCG(6, 6))
	level := 100.0
	feed(f, start, 2000, func(int) float64 { level += rng.NormFloat64(); return level })
	a, m, b := mustForecast(t, f, time.Hour, Value), mustForecast(t, f, 5*time.Hour, Value), mustForecast(t, f, 24*time.Hour, Value)
	if lo, hi := min(a.P95, b.P95), max(a.P95, b.P95); m.P95 < lo || m.P95 > hi {
		t.Errorf("95 %% bounds %g, %g, %g", a.P95, m.P95, b.P95)
	}
}

func TestObservingAllocatesNothing(t *testing.T) {
	f := mustNew(t, Config{Step: 10 * time.Second})
	rng := rand.New(rand.NewPCG(7, 7))
	at := start
	sample := func() {
		f.Observe(at, 10+rng.Float64())
		at = at.Add(10 * time.Second)
		for _, h := range f.cfg.Horizons {
			_, _ = f.Forecast(h, Value)
			_, _ = f.Forecast(h, Peak)
		}
	}
	for range 20000 {
		sample()
	}
	if n := testing.AllocsPerRun(1000, sample); n != 0 {
		t.Errorf("%v allocations a sample", n)
	}
}

func BenchmarkSample(b *testing.B) {
	for _, step := range []time.Duration{10 * time.Second, time.Minute, 5 * time.Minute} {
		b.Run(step.String(), func(b *testing.B) {
			f := mustNew(b, Config{Step: step})
			rng := rand.New(rand.NewPCG(8, 8))
			series := make([]float64, 1<<14)
			for i := range series {
				series[i] = daily(i, rng)
			}
			at := start
			sample := func(i int) {
				f.Observe(at, series[i&(1<<14-1)])
				at = at.Add(step)
				for _, h := range f.cfg.Horizons {
					_, _ = f.Forecast(h, Value)
					_, _ = f.Forecast(h, Peak)
				}
			}
			for i := range len(series) {
				sample(i)
			}
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				sample(i)
			}
		})
	}
}

// BenchmarkHost is a host's forecasters in turn, as the daemon feeds them: what
// each knows has left the caches before its next sample.
func BenchmarkHost(b *testing.B) {
	const series, step = 1000, 10 * time.Second
	rng := rand.New(rand.NewPCG(9, 9))
	fs := make([]*Forecaster, series)
	for i := range fs {
		fs[i] = mustNew(b, Config{Step: step})
		feed(fs[i], start, 2000, func(i int) float64 { return daily(i, rng) })
	}
	loads := make([]float64, 1<<14)
	for i := range loads {
		loads[i] = daily(i, rng)
	}
	at := start.Add(2000 * step)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		f := fs[i%series]
		f.Observe(at, loads[i&(1<<14-1)])
		for _, h := range f.cfg.Horizons {
			_, _ = f.Forecast(h, Value)
			_, _ = f.Forecast(h, Peak)
		}
		if i%series == series-1 {
			at = at.Add(step)
		}
	}
	b.ReportMetric(100*b.Elapsed().Seconds()/float64(b.N)*series/step.Seconds(), "%core/1000-series")
}

// FuzzObserve: whatever comes, in whatever order, forecasts stay finite and
// ordered.
func FuzzObserve(f *testing.F) {
	f.Add(uint64(1), []byte{0, 1, 2, 3, 250, 9, 9, 9})
	f.Add(uint64(9), []byte("\xff\x00\xff\x00\x80\x80\x80\x80 to and fro"))
	f.Fuzz(func(t *testing.T, seed uint64, ops []byte) {
		fc := mustNew(t, Config{Step: time.Minute, Horizons: []time.Duration{time.Minute, 5 * time.Minute, time.Hour}})
		rng := rand.New(rand.NewPCG(seed, 1))
		at, scale := start, 1.0
		for _, op := range ops {
			switch op % 8 {
			case 0:
				at = at.Add(time.Duration(int64(rng.Uint64() % uint64(1e15))))
			case 1:
				at = at.Add(-time.Duration(int64(rng.Uint64() % uint64(1e14))))
			case 2:
				scale = math.Pow(10, rng.Float64()*60-30)
			case 3:
				fc.Observe(at, math.Float64frombits(rng.Uint64()))
			case 4:
				fc.ObserveCounter(at, scale*rng.Float64())
			default:
				for range int(op) {
					at = at.Add(time.Minute)
					fc.Observe(at, scale*rng.NormFloat64())
				}
			}
			fc.Advance(at)
			if fc.hist.cells == 0 {
				continue
			}
			for _, h := range fc.cfg.Horizons {
				mustForecast(t, fc, h, Value)
				mustForecast(t, fc, h, Peak)
			}
		}
	})
}
