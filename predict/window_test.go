package predict

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestWindowKeepsTheLatestInOrder(t *testing.T) {
	for _, size := range []int{1, 2, 3, 64, 256} {
		w := newWindow(size)
		rng := rand.New(rand.NewPCG(uint64(size), 1))
		var all []float32
		for i := range 5 * size {
			v := float32(rng.IntN(20)) // with many equals
			w.add(v)
			all = append(all, v)
			last := slices.Clone(all[max(0, len(all)-size):])
			slices.Sort(last)
			for j, k := range w.order {
				if w.ring[k] != last[j] {
					t.Fatalf("size %d, after %d: place %d holds %g, want %g", size, i+1, j, w.ring[k], last[j])
				}
			}
			slots := slices.Clone(w.order)
			slices.Sort(slots)
			for j, k := range slots {
				if int(k) != j {
					t.Fatalf("size %d, after %d: the order holds %v", size, i+1, slots)
				}
			}
		}
	}
}

func TestConformalRankIsOneInNPlusOne(t *testing.T) {
	w := newWindow(256)
	for i := range 99 {
		w.add(float32(99 - i))
	}
	for q, want := range map[float64]float64{0.01: 1, 0.5: 50, 0.9: 90, 0.95: 95, 0.99: 99, 0.999: 99, 0.0001: 1, 0.905: 90.5} {
		if got := w.quantile(q); got < want-1e-9 || got > want+1e-9 {
			t.Errorf("quantile %g of 1 to 99: %g, want %g", q, got, want)
		}
	}
}

func TestLatestForgetsTheOthers(t *testing.T) {
	for n := 1; n < 30; n++ {
		w := newWindow(8)
		for i := range n {
			w.add(float32(i))
		}
		w.latest(3)
		for i := n; i < n+2; i++ {
			w.add(float32(i))
		}
		var want []float32
		for i := max(0, n-3); i < n+2; i++ {
			want = append(want, float32(i))
		}
		got := slices.Clone(w.ring)
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("after %d: %v, want %v", n, got, want)
		}
	}
}

func TestRollingMaximumIsExactFromOrigins(t *testing.T) {
	for _, c := range []struct{ steps, stride int64 }{{1, 1}, {3, 1}, {12, 1}, {30, 2}, {90, 4}, {288, 12}, {25, 2}} {
		r := newRollingMax(c.steps, c.stride)
		rng := rand.New(rand.NewPCG(uint64(c.steps), 2))
		var v []float64
		for i := range 5 * c.steps {
			v = append(v, rng.Float64())
			r.push(i, float64(float32(v[i])))
			if o := i - c.steps; o >= 0 && o%c.stride == 0 {
				want := float64(float32(slices.Max(v[o+1 : i+1])))
				if got, ok := r.over(i); !ok || got != want {
					t.Fatalf("%d cells by %d, origin %d: %g %v, want %g", c.steps, c.stride, o, got, ok, want)
				}
			}
		}
	}
}

func TestRidgeFindsTheCoefficients(t *testing.T) {
	r := newRidge(4)
	work := make([]float64, ridgeWork(4))
	rng := rand.New(rand.NewPCG(3, 3))
	want := []float32{0.5, -2, 1, 0}
	for range 5000 {
		x := []float32{1, float32(rng.NormFloat64()), float32(rng.NormFloat64()), float32(rng.NormFloat64())}
		z := 0.1 * rng.NormFloat64()
		for i := range x {
			z += float64(want[i] * x[i])
		}
		r.add(x, z, 1, 1-1.0/3000, 1, work)
	}
	for i := range want {
		if d := r.beta[i] - want[i]; d < -0.02 || d > 0.02 {
			t.Errorf("coefficient %d: %g, want %g", i, r.beta[i], want[i])
		}
	}
}
