package predict

import "math"

// blend weighs members by a power of the inverse of their recent mean absolute
// error. A high power is close to picking the best; a low one averages members
// that are about equally good, and the average of two that err differently
// beats either. Which of it a load rewards is learnt as well.
type blend struct {
	loss   [members]float64
	weight [tiers][members]float32
	mix    [members]float32 // of the tiers' weights, by share
	tier   [tiers]float64   // loss of each power
	n      float64
	due    int
	count  int  // of the members there are
	far    bool // too few independent outcomes to learn a power from
}

const (
	// blendMemory settled forecasts decide the weights: a day of 5-minute cells.
	// With 1,000, losses on the development series are a little higher.
	blendMemory = 300
	// tiers of powers: 5, 20 and 80.
	tiers = 3
	// tierEvery so many forecasts judge between them: they differ by little.
	tierEvery = 4
)

func (b *blend) learn(cell int64, m *[members]float64, z, scale float64) {
	b.n++
	rate := max(3/(b.n+3), 1.0/blendMemory)
	if b.n > 1 && (b.n < youth || dice(cell, tierEvery)) {
		rate := rate
		if b.n >= youth {
			rate *= tierEvery
		}
		for k, v := range b.byTier(m) {
			b.tier[k] += rate * (math.Abs(z-v)*scale - b.tier[k])
		}
	}
	loss := b.loss[:b.count]
	for i, v := range m[:len(loss)] {
		loss[i] += rate * (math.Abs(z-v)*scale - loss[i])
	}
	if b.due--; b.due <= 0 {
		b.weigh()
		b.due = min(1+int(b.n)/16, 8)
	}
}

func (b *blend) weigh() {
	weigh(b.loss[:b.count], b.weight[0][:], b.weight[1][:], b.weight[2][:])
	share := b.share()
	for i := range b.mix {
		b.mix[i] = share[0]*b.weight[0][i] + share[1]*b.weight[1][i] + share[2]*b.weight[2][i]
	}
}

// share of each tier.
func (b *blend) share() [tiers]float32 {
	share := [tiers]float32{0.5, 0.5, 0}
	if !b.far {
		var flat, steep [tiers]float32
		weigh(b.tier[:], flat[:], share[:], steep[:])
	}
	return share
}

// aside is what the members lose in one kind of origins that are not calm: few,
// and where a load's usual best member is wrong.
type aside struct {
	loss [members]float32
	mix  [members]float32
	n    float64
}

// asideDoubt forecasts are the belief that the members rank here as elsewhere;
// with 10, losses on the development series are the same.
const asideDoubt = 30

// learn is blend's, with the powers that b has learnt and, while there are few
// outcomes, its ranking of the members.
func (a *aside) learn(b *blend, m *[members]float64, z, scale float64) {
	a.n = min(a.n+1, blendMemory)
	rate := max(3/(a.n+3), 1.0/blendMemory)
	own, usual := 0.0, 0.0
	for i, v := range m[:b.count] {
		a.loss[i] += float32(rate * (math.Abs(z-v)*scale - float64(a.loss[i])))
		own += float64(a.loss[i])
		usual += b.loss[i]
	}
	share := 0.0
	if usual > 0 {
		share = asideDoubt / (a.n + 1) * own / usual
	}
	var loss [members]float64
	for i := range b.count {
		loss[i] = float64(a.loss[i]) + share*b.loss[i]
	}
	var w [tiers][members]float32
	weigh(loss[:b.count], w[0][:], w[1][:], w[2][:])
	s := b.share()
	for i := range a.mix {
		a.mix[i] = s[0]*w[0][i] + s[1]*w[1][i] + s[2]*w[2][i]
	}
}

// weigh turns losses into weights that sum to one, by the inverse of their
// fifth, twentieth and eightieth power.
func weigh(loss []float64, by5, by20, by80 []float32) {
	best := math.Inf(1)
	for _, l := range loss {
		if l < best {
			best = l
		}
	}
	by5, by20, by80 = by5[:len(loss)], by20[:len(loss)], by80[:len(loss)]
	var sum5, sum20, sum80 float32
	for i, l := range loss {
		r := float32(1)
		if l > best {
			r = float32(best / l)
		}
		r2 := r * r
		r5 := r2 * r2 * r
		r10 := r5 * r5
		r20 := r10 * r10
		r40 := r20 * r20
		r80 := r40 * r40
		by5[i], by20[i], by80[i] = r5, r20, r80
		sum5 += r5
		sum20 += r20
		sum80 += r80
	}
	for i := range by5 {
		by5[i] /= sum5
		by20[i] /= sum20
		by80[i] /= sum80
	}
}

// byTier is the forecast of each tier.
func (b *blend) byTier(m *[members]float64) (f [tiers]float64) {
	for i, v := range m {
		f[0] += float64(b.weight[0][i]) * v
		f[1] += float64(b.weight[1][i]) * v
		f[2] += float64(b.weight[2][i]) * v
	}
	return f
}

func dot(w *[members]float32, m *[members]float64) float64 {
	sum := 0.0
	for i, v := range m {
		sum += float64(w[i]) * v
	}
	return sum
}

// forecast is the weighted mean, "as now" before the first outcome.
func (b *blend) forecast(m *[members]float64) float64 {
	if b.n == 0 {
		return m[0]
	}
	return dot(&b.mix, m)
}
