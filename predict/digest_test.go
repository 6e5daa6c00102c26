package predict

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func (d *digest) at(q float64) float64 {
	at := []float64{q}
	d.quantiles(at, at)
	return at[0]
}

func TestDigestOfFewValuesIsConformalRank(t *testing.T) {
	d := newDigest(digestSize, 1e9, 0)
	for i := range 39 {
		d.add(float32(39 - i))
	}
	for q, want := range map[float64]float64{0.025: 1, 0.5: 20, 0.9: 36, 0.95: 38, 0.99: 39, 0.0001: 1, 0.9125: 36.5} {
		if got := d.at(q); math.Abs(got-want) > 0.02 {
			t.Errorf("quantile %g of 1 to 39: %g, want %g", q, got, want)
		}
	}
}

func TestDigestOfManyValuesIsCloseToTheirQuantiles(t *testing.T) {
	for name, draw := range map[string]func(*rand.Rand) float64{
		"normal":      func(r *rand.Rand) float64 { return r.NormFloat64() },
		"exponential": func(r *rand.Rand) float64 { return r.ExpFloat64() },
		"far away":    func(r *rand.Rand) float64 { return 1000 + r.Float64() },
		"heavy tails": func(r *rand.Rand) float64 { return math.Exp(2 * r.NormFloat64()) },
	} {
		t.Run(name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, 81))
			d := newDigest(digestSize, 1e9, 0)
			var all []float64
			for range 20000 {
				v := draw(rng)
				d.add(float32(v))
				all = append(all, v)
			}
			if n := d.size(); math.Abs(n-20000) > 20 {
				t.Errorf("weighs %g of 20000", n)
			}
			slices.Sort(all)
			for _, q := range levels {
				// In ranks: a 14th of what one draw of a thing that happens with
				// probability q varies by.
				i, _ := slices.BinarySearch(all, d.at(q))
				if got, room := float64(i)/20000, 0.07*math.Sqrt(q*(1-q)); math.Abs(got-q) > room {
					t.Errorf("the %g quantile lies at %.4f", q, got)
				}
			}
		})
	}
}

func TestDigestKeepsWhatComesAgainAndAgainExactly(t *testing.T) {
	d := newDigest(digestSize, 2000, 0)
	rng := rand.New(rand.NewPCG(2, 82))
	for range 5000 {
		v := float32(7)
		if rng.IntN(10) == 0 {
			v = 7 + float32(rng.NormFloat64())
		}
		d.add(v)
	}
	if got := d.at(0.5); got != 7 {
		t.Errorf("median %g, want 7", got)
	}
}

func TestDigestForgets(t *testing.T) {
	d := newDigest(digestSize, 500, 0)
	for range 5000 {
		d.add(1)
	}
	for range 1000 {
		d.add(2)
	}
	// e⁻² of what it knows is older than two memories.
	if q := d.at(0.05); q != 1 {
		t.Errorf("the 5 %% quantile is %g, want 1", q)
	}
	if q := d.at(0.30); q != 2 {
		t.Errorf("the 30 %% quantile is %g, want 2", q)
	}
	if n := d.size(); n < 450 || n > 550 {
		t.Errorf("weighs %g, want about 500", n)
	}
}

func TestDigestTakesBackTheLatest(t *testing.T) {
	// At every fill of the buffer, right after a merge too.
	for n := 40; n < 40+2*freshSize; n++ {
		d, want := newDigest(digestSize, 1e9, 0), newDigest(digestSize, 1e9, 0)
		for i := range n {
			d.add(float32(i % 13))
			want.add(float32(i % 13))
		}
		for range shiftRun {
			d.add(1e6)
		}
		d.drop(shiftRun)
		if got := d.at(1); got != 12 {
			t.Fatalf("after %d values: %g is still there", n, got)
		}
		if a, b := d.size(), want.size(); math.Abs(a-b) > 1e-3*b {
			t.Fatalf("after %d values: weighs %g, want %g", n, a, b)
		}
	}
}

func TestDigestStaysInItsSize(t *testing.T) {
	d := newDigest(digestSize, 1e6, 0)
	rng := rand.New(rand.NewPCG(3, 83))
	most := 0
	for i := range 200000 {
		// Ever larger, both sides: every value is a new extreme for a while.
		d.add(float32(rng.NormFloat64() * math.Sqrt(float64(i))))
		most = max(most, len(d.mean))
		if len(d.mean) > digestSize || len(d.fresh) > freshSize {
			t.Fatalf("%d centroids, %d fresh", len(d.mean), len(d.fresh))
		}
	}
	if most < digestSize/2 {
		t.Errorf("at most %d of %d centroids were used", most, digestSize)
	}
	if !slices.IsSorted(d.mean) {
		t.Error("centroids are out of order")
	}
}
