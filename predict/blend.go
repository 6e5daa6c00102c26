package predict

import "math"

// blend weighs members by the inverse tenth power of their recent mean
// absolute error: close to picking the best, but two that are equally good
// share, and the average of two beats either.
type blend struct {
	loss   [members]float64
	weight [members]float32
	n      float64
	due    int
}

// blendMemory settled forecasts decide the weights: a day of 5-minute cells.
const blendMemory = 300

func (b *blend) learn(m *[members]float64, z, scale float64) {
	b.n++
	rate := max(3/(b.n+3), 1.0/blendMemory)
	for i, v := range m {
		b.loss[i] += rate * (math.Abs(z-v)*scale - b.loss[i])
	}
	if b.due--; b.due <= 0 {
		weigh(b.loss[:], b.weight[:])
		b.due = min(1+int(b.n)/16, 8)
	}
}

// weigh turns losses into weights that sum to one.
func weigh(loss []float64, weight []float32) {
	best := math.Inf(1)
	for _, l := range loss {
		best = min(best, l)
	}
	sum := float32(0)
	for i, l := range loss {
		w := 1.0
		if l > best {
			r := best / l
			r2 := r * r
			r4 := r2 * r2
			w = r4 * r4 * r2
		}
		weight[i] = float32(w)
		sum += float32(w)
	}
	for i := range loss {
		weight[i] /= sum
	}
}

// forecast is the weighted mean, "as now" before the first outcome.
func (b *blend) forecast(m *[members]float64) float64 {
	if b.n == 0 {
		return m[0]
	}
	sum := 0.0
	for i, v := range m {
		sum += float64(b.weight[i]) * v
	}
	return sum
}
