package predict

import "math"

const (
	// digestSize centroids at most: with 36 or 68, losses differ by what they vary
	// by anyway.
	digestSize = 48
	// digestFew, where a fifth lane has to fit into MaxState.
	digestFew = 31
	// digestGrain: a centroid at quantile q may hold 4·digestGrain·q(1-q)/size
	// of everything, and 2/size at most: about size/2 of them lie in the middle
	// and size/24·ln n on each side, the outermost holding single values.
	digestGrain = 6
	// digestRipe values on, those not yet merged are too few to matter.
	digestRipe = 10 * freshSize
	// freshSize values wait to be merged together, which costs as much as
	// merging one.
	freshSize = 32
	// freshKept of them stay apart: a level shift may take back shiftRun.
	freshKept = 8
	// mergedSize are merged when there is no room for another.
	mergedSize = freshSize - freshKept
)

// digest is a distribution that forgets: values in order, merged into
// centroids where they lie dense (Dunning & Ertl 2019, with fading weights). A
// value that keeps coming stays exactly that value.
type digest struct {
	mean   []float32 // ascending
	weight []float32 // of each, in units of a value that comes now
	fresh  []float32 // not yet merged, in order of arrival
	seen   float32   // values merged so far
	ageing float64   // a value that was the i-th of n weighs (i/n)^ageing at most, see newOffset
	merged float32   // sum of weight
	fade   float32   // share of an old value's weight that the next mergedSize leave it
	widest float32   // share of merged that compress let different values become
}

func newDigest(size int, memory, ageing float64) digest {
	keep := float32(1 - 1/max(memory, 2)) // of it, by the next value
	return digest{
		mean:   make([]float32, 0, size),
		weight: make([]float32, 0, size),
		fresh:  make([]float32, 0, freshSize),
		ageing: ageing,
		fade:   float32(math.Pow(float64(keep), mergedSize)),
	}
}

// size is how many values of now it weighs.
func (d *digest) size() float64 {
	return float64(d.merged) + float64(len(d.fresh))
}

func (d *digest) weigh() {
	d.merged = 0
	for _, w := range d.weight {
		d.merged += w
	}
}

func (d *digest) add(v float32) {
	if len(d.fresh) == freshSize {
		d.merge()
	}
	d.fresh = append(d.fresh, v)
}

// drop takes back the latest k values.
func (d *digest) drop(k int) {
	d.fresh = d.fresh[:len(d.fresh)-min(k, len(d.fresh))]
}

func (d *digest) clear() {
	d.mean, d.weight, d.fresh, d.merged = d.mean[:0], d.weight[:0], d.fresh[:0], 0
	d.seen = 0
}

// centroids are what a merge or a quantile walks over.
type centroids struct {
	fresh        [freshSize]float32
	mean, weight [digestSize + freshSize]float32
	n            int
	total        float32
}

// gather puts the centroids and the n oldest fresh values in order.
func (d *digest) gather(c *centroids, n int) {
	fresh := c.fresh[:copy(c.fresh[:], d.fresh[:n])]
	for i := 1; i < len(fresh); i++ { // few, and faster than slices.Sort
		v, j := fresh[i], i
		for ; j > 0 && fresh[j-1] > v; j-- {
			fresh[j] = fresh[j-1]
		}
		fresh[j] = v
	}
	i, k, total := 0, 0, float32(0)
	mean, weight := d.mean, d.weight[:len(d.mean)]
	for _, v := range fresh {
		for i < len(mean) && mean[i] <= v {
			c.mean[k], c.weight[k] = mean[i], weight[i]
			total += weight[i]
			i++
			k++
		}
		c.mean[k], c.weight[k] = v, 1
		total++
		k++
	}
	for ; i < len(mean); i++ {
		c.mean[k], c.weight[k] = mean[i], weight[i]
		total += weight[i]
		k++
	}
	c.n, c.total = k, total
}

// merge turns the mergedSize oldest fresh values into centroids.
func (d *digest) merge() {
	d.seen = min(d.seen+mergedSize, 1e6)
	fade := d.fade
	if d.ageing > 0 {
		fade = min(fade, float32(math.Pow(float64(1-mergedSize/d.seen), d.ageing)))
	}
	for i := range d.weight {
		d.weight[i] *= fade
	}
	var c centroids
	d.gather(&c, mergedSize)
	for coarse := 1 / float32(cap(d.mean)); !d.compress(&c, coarse); coarse *= 1.25 {
	}
	d.fresh = d.fresh[:copy(d.fresh, d.fresh[mergedSize:])]
}

// compress writes c into d, coarse times as coarsely as digestGrain says; false
// if that does not fit.
func (d *digest) compress(c *centroids, coarse float32) bool {
	d.widest = 2 * coarse
	total := c.total
	steep, flat := 4*digestGrain*coarse/total, d.widest*total
	done := float32(0)
	into, heavy := d.mean[:cap(d.mean)], d.weight[:cap(d.mean)]
	k, last := 0, len(into)-1
	mean, weight := c.mean[0], c.weight[0]
	from := c.weight[:c.n]
	for i := 1; i < len(from); i++ {
		m, w := c.mean[i], from[i]
		both := weight + w
		if m == mean {
			weight = both
			continue
		}
		middle := done + both/2
		if both <= flat && both <= steep*middle*(total-middle) {
			mean += (m - mean) * w / both
			weight = both
			continue
		}
		if k >= last {
			return false
		}
		into[k], heavy[k] = mean, weight
		k++
		done += weight
		mean, weight = m, w
	}
	into[k], heavy[k] = mean, weight
	d.mean, d.weight, d.merged = into[:k+1], heavy[:k+1], done+weight
	return true
}

// quantiles sets at to those of q, which ascends. They are conformal (Vovk et
// al. 2005): of n exchangeable values the ⌈(n+1)q⌉-th smallest bounds the next
// with probability q; between two values it interpolates.
func (d *digest) quantiles(q []float64, at []float64) {
	mean, weight, total := d.mean, d.weight, d.merged
	if total < digestRipe {
		var c centroids
		d.gather(&c, len(d.fresh))
		mean, weight, total = c.mean[:c.n], c.weight[:c.n], c.total
	}
	if len(mean) == 0 {
		clear(at)
		return
	}
	// A centroid heavier than compress let different values become is one
	// value, again and again: it stands for all of its ranks.
	single := 1.005 * d.widest * total
	ranks := func(w float32) (first, last float32) {
		if w > single {
			return min(w, 1), w
		}
		return (w + 1) / 2, (w + 1) / 2
	}
	i, done, before := 0, float32(0), float32(0) // before: the last rank of the centroid before i
	first, last := ranks(weight[0])
	for k := range q {
		want := float32(q[k]) * (total + 1)
		for last < want && i+1 < len(mean) {
			before = last
			done += weight[i]
			i++
			first, last = ranks(weight[i])
			first, last = done+first, done+last
		}
		if i == 0 || first <= want {
			at[k] = float64(mean[i])
			continue
		}
		f := (want - before) / (first - before)
		at[k] = float64(mean[i-1] + f*(mean[i]-mean[i-1]))
	}
}
