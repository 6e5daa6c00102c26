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
	a := r.a
	x = x[:len(r.b)]
	for i, xi := range x {
		wx := weight * xi
		axpy(a[:i+1], x[:i+1], wx)
		a = a[i+1:]
	}
	axpy(r.b, x, weight*float32(z))
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

// axpy adds c·x to y, four at a time: this is where a forecaster spends most
// of its time.
func axpy(y, x []float32, c float32) {
	for len(x) >= 4 && len(y) >= 4 {
		y[0] += c * x[0]
		y[1] += c * x[1]
		y[2] += c * x[2]
		y[3] += c * x[3]
		x, y = x[4:], y[4:]
	}
	for i, v := range x {
		y[i] += c * v
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
