package predict

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// pulse is a load that jumps to one of a few levels and returns: "as now" is a
// poor forecast of it, which a cold forecaster does not know.
func pulse(rng *rand.Rand, size float64) func(int) float64 {
	return func(int) float64 {
		v := size * (1 + 0.05*rng.NormFloat64())
		if rng.IntN(3) == 0 {
			v *= 3
		}
		return v
	}
}

func TestColdShardBorrowsAndIsBetterThanAlone(t *testing.T) {
	for name, load := range map[string]func(rng *rand.Rand, size float64) func(int) float64{
		"pulses": pulse,
		"a noisy level": func(rng *rand.Rand, size float64) func(int) float64 {
			return func(int) float64 { return size * math.Exp(0.3*rng.NormFloat64()) }
		},
		"a level that wanders and returns": func(rng *rand.Rand, size float64) func(int) float64 {
			x := 0.0
			return func(int) float64 { x = 0.8*x + 0.2*rng.NormFloat64(); return size * math.Exp(x) }
		},
		"a day": func(rng *rand.Rand, size float64) func(int) float64 {
			return func(i int) float64 {
				return size * (2 + math.Sin(2*math.Pi*float64(i)/288) + 0.1*rng.NormFloat64())
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			var siblings []Prior
			for i := range 3 {
				f := mustNew(t, fiveMin)
				feed(f, start, 288*7, load(rand.New(rand.NewPCG(uint64(i), 21)), 10*float64(i+1)))
				siblings = append(siblings, f.Prior())
			}
			alone, helped := coldLoss(t, load, Prior{}), coldLoss(t, load, Pool(siblings...))
			all, most := 0.0, 0.0
			for i := range alone {
				t.Logf("%v %v: alone %.0f, borrowing %.0f", coldHorizons[i/2], Target(i%2), alone[i], helped[i])
				if helped[i] > 1.02*alone[i] {
					t.Errorf("%v %v: borrowing did harm", coldHorizons[i/2], Target(i%2))
				}
				all += helped[i] / alone[i]
				most++
			}
			if all > 0.95*most {
				t.Errorf("borrowing gained too little: %.3f of the loss alone", all/most)
			}
		})
	}
}

var coldHorizons = []time.Duration{5 * time.Minute, 15 * time.Minute, time.Hour}

// coldLoss is the pinball loss of a shard's first four hours, by horizon and
// target, over twenty shards a hundred times as large as their siblings.
func coldLoss(t *testing.T, load func(*rand.Rand, float64) func(int) float64, prior Prior) []float64 {
	const cells = 48
	sums := make([]float64, 2*len(coldHorizons))
	for run := range uint64(20) {
		f := mustNew(t, fiveMin)
		f.Borrow(prior)
		gen := load(rand.New(rand.NewPCG(run, 22)), 1000)
		values := make([]float64, cells+12)
		for i := range values {
			values[i] = gen(i)
		}
		for i, v := range values[:cells] {
			at := start.Add(7*24*time.Hour + time.Duration(i)*fiveMin.Step)
			f.Observe(at, v)
			f.Advance(at.Add(fiveMin.Step * 3 / 4))
			for k, h := range coldHorizons {
				ahead := values[i+1 : i+1+int(h/fiveMin.Step)]
				for _, target := range []Target{Value, Peak} {
					y := ahead[len(ahead)-1]
					if target == Peak {
						y = slices.Max(ahead)
					}
					q := mustForecast(t, f, h, target)
					sums[2*k+int(target)] += pinball(0.5, y-q.P50) + pinball(0.9, y-q.P90) + pinball(0.95, y-q.P95)
				}
			}
		}
	}
	return sums
}

func TestOwnExperienceOutweighsAWrongPrior(t *testing.T) {
	teacher := mustNew(t, fiveMin)
	feed(teacher, start, 288*7, pulse(rand.New(rand.NewPCG(1, 31)), 10))
	alone, misled := mustNew(t, fiveMin), mustNew(t, fiveMin)
	misled.Borrow(teacher.Prior())
	rng := rand.New(rand.NewPCG(2, 32))
	level := 500.0
	gen := func(int) float64 { level += rng.NormFloat64(); return level } // "as now" is best
	series := make([]float64, 288*5)
	for i := range series {
		series[i] = gen(i)
	}
	feed(alone, start, len(series), func(i int) float64 { return series[i] })
	feed(misled, start, len(series), func(i int) float64 { return series[i] })
	a, b := mustForecast(t, alone, time.Hour, Value), mustForecast(t, misled, time.Hour, Value)
	if math.Abs(a.P50-b.P50) > 2 || math.Abs(a.P95-b.P95) > 4 {
		t.Errorf("alone %+v, with a wrong prior five days ago %+v", a, b)
	}
}

func TestNearestPriorCountsFirst(t *testing.T) {
	make7 := func(seed uint64, gen func(*rand.Rand) func(int) float64) Prior {
		f := mustNew(t, fiveMin)
		feed(f, start, 288*7, gen(rand.New(rand.NewPCG(seed, 41))))
		return f.Prior()
	}
	near := make7(1, func(r *rand.Rand) func(int) float64 { return pulse(r, 10) })
	far := make7(2, func(r *rand.Rand) func(int) float64 {
		level := 100.0
		return func(int) float64 { level += r.NormFloat64(); return level }
	})
	one, both := mustNew(t, fiveMin), mustNew(t, fiveMin)
	one.Borrow(near)
	both.Borrow(near, far)
	gen := pulse(rand.New(rand.NewPCG(3, 42)), 50)
	series := []float64{gen(0), gen(1), gen(2)}
	feed(one, start, 3, func(i int) float64 { return series[i] })
	feed(both, start, 3, func(i int) float64 { return series[i] })
	if a, b := mustForecast(t, one, time.Hour, Value), mustForecast(t, both, time.Hour, Value); a != b {
		t.Errorf("a farther prior changed what a full nearer one says: %+v, %+v", a, b)
	}
}

func TestPriorOfAnotherConfigIsIgnored(t *testing.T) {
	teacher := mustNew(t, Config{Step: time.Minute})
	feed(teacher, start, 5000, pulse(rand.New(rand.NewPCG(1, 51)), 10))
	a, b := mustNew(t, fiveMin), mustNew(t, fiveMin)
	b.Borrow(teacher.Prior(), Prior{})
	feed(a, start, 50, func(i int) float64 { return float64(i % 7) })
	feed(b, start, 50, func(i int) float64 { return float64(i % 7) })
	if qa, qb := mustForecast(t, a, time.Hour, Value), mustForecast(t, b, time.Hour, Value); qa != qb {
		t.Errorf("%+v, %+v", qa, qb)
	}
}

func TestBorrowedDayIsScaledToTheOwnLevel(t *testing.T) {
	teacher := mustNew(t, fiveMin)
	rng := rand.New(rand.NewPCG(1, 61))
	feed(teacher, start, 288*7, func(i int) float64 { return daily(i, rng) })
	alone, helped := mustNew(t, fiveMin), mustNew(t, fiveMin)
	helped.Borrow(teacher.Prior())
	// The first day of a shard ten times as large.
	from := start.Add(7 * 24 * time.Hour)
	series := make([]float64, 288)
	for i := range series {
		series[i] = 10 * daily(i, rng)
	}
	miss := func(f *Forecaster) float64 {
		sum := 0.0
		for i, v := range series[:len(series)-12] {
			at := from.Add(time.Duration(i) * fiveMin.Step)
			f.Observe(at, v)
			f.Advance(at.Add(fiveMin.Step * 3 / 4))
			if i >= lentCells {
				sum += math.Abs(series[i+12] - mustForecast(t, f, time.Hour, Value).P50)
			}
		}
		return sum
	}
	a, b := miss(alone), miss(helped)
	t.Logf("error an hour ahead over the first day: alone %.0f, helped %.0f", a, b)
	if b > 0.8*a {
		t.Errorf("a borrowed day helped too little: error %.0f instead of %.0f", b, a)
	}
}
