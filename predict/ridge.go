package predict

import "math"

// ridge is a weighted least-squares regression that forgets. It keeps the
// normal equations rather than an inverse covariance: the ridge term is then
// in every solution, features that never move cannot wind anything up, and the
// evidence of two shards adds up by adding their equations (see Prior).
type ridge struct {
	a    []float32 // packed lower triangle of Σ w·x·xᵀ
	b    []float32 // Σ w·x·z
	beta []float32 // solution in use
	unit float64   // weight of the next sample: it grows by 1/forget, instead of a and b shrinking
	seen int       // samples
	due  int       // samples until the next solution
}

// solveEvery samples at the latest: a fortieth of what the memory holds.
const solveEvery = 44

func newRidge(n int) ridge {
	return ridge{a: make([]float32, n*(n+1)/2), b: make([]float32, n), beta: make([]float32, n), unit: 1}
}

func ridgeWork(n int) int { return n*(n+1)/2 + n }

func (r *ridge) predict(x []float32) float64 {
	beta := r.beta
	x = x[:len(beta)]
	var even, odd float32
	i := 0
	for ; i+1 < len(beta); i += 2 {
		even += beta[i] * x[i]
		odd += beta[i+1] * x[i+1]
	}
	if i < len(beta) {
		even += beta[i] * x[i]
	}
	return float64(even + odd)
}

// add takes the outcome z of x with weight w. forget in (0,1] is the factor by
// which everything older fades; shrink is the ridge term in samples.
func (r *ridge) add(x []float32, z, w, forget, shrink float64, work []float64) {
	r.unit /= forget
	weight := float32(w * r.unit)
	x = x[:len(r.b)]
	r.square(x, weight)
	y := r.b[:len(x)]
	wz := weight * float32(z)
	for i, v := range x {
		y[i] += wz * v
	}
	r.seen++
	if r.due--; r.due <= 0 {
		r.solve(shrink, work)
		// A sixteenth more evidence hardly moves the solution: solving then
		// keeps the mean cost of a sample small and constant.
		r.due = min(1+r.seen/16, solveEvery)
	}
	if r.unit > 1e6 {
		u := float32(1 / r.unit)
		for i := range r.a {
			r.a[i] *= u
		}
		for i := range r.b {
			r.b[i] *= u
		}
		r.unit = 1
	}
}

// square adds w·x·xᵀ to a, four rows at a time: rows are short, and alone each
// would cost more to begin and end than to add.
func (r *ridge) square(x []float32, w float32) {
	a := r.a
	i := 0
	for ; i < len(x)%4; i++ {
		wx := w * x[i]
		row := a[:i+1]
		for j, v := range x[:i+1] {
			row[j] += wx * v
		}
		a = a[i+1:]
	}
	for ; i+4 <= len(x); i += 4 {
		four := (*[4]float32)(x[i:])
		w0, w1, w2, w3 := w*four[0], w*four[1], w*four[2], w*four[3]
		left := x[:i]
		row0, row1, row2, row3 := a[:i], a[i+1:], a[2*i+3:], a[3*i+6:]
		row1, row2, row3 = row1[:len(left)], row2[:len(left)], row3[:len(left)]
		for j, v := range left {
			row0[j] += w0 * v
			row1[j] += w1 * v
			row2[j] += w2 * v
			row3[j] += w3 * v
		}
		// The triangle where the four rows end.
		end := a[i : 4*i+10]
		end[0] += w0 * four[0]
		two := (*[2]float32)(end[i+1:])
		two[0] += w1 * four[0]
		two[1] += w1 * four[1]
		three := (*[3]float32)(end[2*i+3:])
		three[0] += w2 * four[0]
		three[1] += w2 * four[1]
		three[2] += w2 * four[2]
		all := (*[4]float32)(end[3*i+6:])
		all[0] += w3 * four[0]
		all[1] += w3 * four[1]
		all[2] += w3 * four[2]
		all[3] += w3 * four[3]
		a = a[4*i+10:]
	}
}

// solve finds beta by Cholesky's decomposition of a + shrink·I in work. If
// rounding makes the matrix indefinite or the result infinite, the last
// solution stays.
func (r *ridge) solve(shrink float64, work []float64) {
	n := len(r.b)
	l, y := work[:len(r.a)], work[len(r.a):len(r.a)+n]
	lambda := shrink * r.unit
	k := 0
	for i := range n {
		row := l[k : k+i+1]
		kj := 0
		for j := range i {
			rj := l[kj : kj+j+1]
			sum := float64(r.a[k+j])
			for m, v := range row[:j] {
				sum -= v * rj[m]
			}
			row[j] = sum * rj[j] // the diagonal holds reciprocals
			kj += j + 1
		}
		d := float64(r.a[k+i]) + lambda
		sum := float64(r.b[i])
		for m, v := range row[:i] {
			d -= v * v
			sum -= v * y[m]
		}
		if !(d > 1e-7*lambda) {
			return
		}
		row[i] = 1 / math.Sqrt(d)
		y[i] = sum * row[i]
		k += i + 1
	}
	for i := n - 1; i >= 0; i-- {
		sum := y[i]
		for m := i + 1; m < n; m++ {
			sum -= l[m*(m+1)/2+i] * y[m]
		}
		y[i] = sum * l[i*(i+1)/2+i]
		if !(math.Abs(y[i]) < 1e6) {
			return
		}
	}
	for i, v := range y {
		r.beta[i] = float32(v)
	}
}
