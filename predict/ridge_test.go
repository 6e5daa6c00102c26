package predict

import (
	"math"
	"math/rand/v2"
	"testing"
)

func TestSquareAddsEveryProductOnceAndInTheSameOrder(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for n := 1; n <= 2*valueFeatures; n++ {
		r := newRidge(n)
		want := make([]float32, len(r.a))
		x := make([]float32, n)
		for range 20 {
			for i := range x {
				x[i] = float32(rng.NormFloat64())
			}
			w := rng.Float32()
			r.square(x, w)
			for i, k := 0, 0; i < n; i++ {
				for j := range i + 1 {
					want[k] += w * x[i] * x[j]
					k++
				}
			}
		}
		for k, v := range want {
			if math.Float32bits(v) != math.Float32bits(r.a[k]) {
				t.Fatalf("%d features: entry %d is %g, want %g", n, k, r.a[k], v)
			}
		}
	}
}
