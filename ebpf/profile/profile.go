package profile

import (
	"iter"
	"time"
)

// The steps into which samples are rolled up.
const (
	Second     = time.Second
	DecaSecond = 10 * time.Second
	Minute     = time.Minute
)

// How many points a Profile keeps in memory: two minutes of seconds, an hour of
// ten seconds. Minutes go to the disk.
const (
	keepSeconds = 120
	keepTens    = 360
)

// Point is a step of the wall clock, rolled up.
type Point struct {
	Start time.Time
	Step  time.Duration
	// Covered is how much of the step was measured. A step of which nothing is
	// known has no point.
	Covered time.Duration
	Has     Mask
	// Mean is weighted by time; Peak is the highest interval of about a second.
	Mean, Peak [Signals]float32
}

// Profile rolls up the samples of one shard or host. It is not safe for
// concurrent use.
type Profile struct {
	last    Sample
	started bool
	// Gaps counts why time is missing.
	Gaps map[GapReason]int
	// OnTen, if set, is given each ten seconds that end, from within Observe.
	OnTen func(*Point)

	seconds, tens ring
	second        roller
	ten           roller
	minute        roller
}

// New makes a profile that knows nothing.
func New() *Profile {
	return &Profile{
		Gaps:    map[GapReason]int{},
		seconds: ring{size: keepSeconds}, tens: ring{size: keepTens},
		second: roller{step: Second}, ten: roller{step: DecaSecond}, minute: roller{step: Minute},
	}
}

// Observe takes the next sample and returns the minutes that ended with it: most
// often none. The first sample, and the first after a gap, only begin.
func (p *Profile) Observe(s *Sample) (minutes []Point, gap GapReason) {
	defer func() { p.last, p.started = *s, true }()
	if !p.started {
		return nil, NoGap
	}
	iv, gap := Between(&p.last, s)
	if gap != NoGap {
		p.Gaps[gap]++
		// What was collected of the current steps is all there will be, unless
		// the next sample is still within them.
		return p.passed(s.At.Wall), gap
	}
	if pt, ok := p.second.add(&iv); ok {
		p.seconds.push(pt)
	}
	if pt, ok := p.ten.add(&iv); ok {
		p.ended(&pt)
	}
	if pt, ok := p.minute.add(&iv); ok {
		minutes = append(minutes, pt)
	}
	return append(minutes, p.passed(s.At.Wall)...), NoGap
}

// passed closes the steps that ended before now.
func (p *Profile) passed(now time.Time) []Point {
	if pt, ok := p.second.close(now); ok {
		p.seconds.push(pt)
	}
	if pt, ok := p.ten.close(now); ok {
		p.ended(&pt)
	}
	if pt, ok := p.minute.close(now); ok {
		return []Point{pt}
	}
	return nil
}

// ended files ten seconds.
func (p *Profile) ended(ten *Point) {
	p.tens.push(*ten)
	if p.OnTen != nil {
		p.OnTen(ten)
	}
}

// Flush ends the current minute early, when the shard goes or the daemon stops.
func (p *Profile) Flush() (Point, bool) {
	p.started = false
	return p.minute.flush()
}

// Last is the newest sample; false before the first.
func (p *Profile) Last() (*Sample, bool) { return &p.last, p.started }

// Seconds returns the last points of a second, oldest first.
func (p *Profile) Seconds() []Point { return p.seconds.all() }

// SecondsFrom visits the last points of a second, oldest first, from the one that
// began at from or was the next. They are valid until the next Observe.
func (p *Profile) SecondsFrom(from time.Time) iter.Seq[*Point] { return p.seconds.from(from) }

// Tens returns the last points of ten seconds, oldest first.
func (p *Profile) Tens() []Point { return p.tens.all() }

// roller collects intervals of one step.
type roller struct {
	step  time.Duration
	open  bool
	start time.Time
	span  float64 // seconds
	has   Mask
	// sum of value times seconds, and the seconds in which there was a value.
	sum, of [Signals]float64
	peak    [Signals]float64
}

// add files an interval under the step that holds its middle, and returns the
// step before it when that is over. Steps of a second are thus one interval
// each, give or take the jitter of the sampler.
func (r *roller) add(iv *Interval) (done Point, ok bool) {
	start := iv.Start.Add(iv.Span / 2).Truncate(r.step)
	if r.open && !start.Equal(r.start) {
		done, ok = r.flush()
	}
	if !r.open {
		*r = roller{step: r.step, open: true, start: start}
	}
	w := iv.Span.Seconds()
	r.span += w
	r.has |= iv.Has
	for s := range Signals {
		if !iv.Has.Has(s) {
			continue
		}
		if v := iv.Rates[s]; r.of[s] == 0 || v > r.peak[s] {
			r.peak[s] = v
		}
		r.sum[s] += iv.Rates[s] * w
		r.of[s] += w
	}
	return done, ok
}

// settle is how long after its end a step may still get an interval, whose
// middle lies within it.
const settle = lateAfter / 2

func (r *roller) close(now time.Time) (Point, bool) {
	if !r.open || now.Before(r.start.Add(r.step+settle)) {
		return Point{}, false
	}
	return r.flush()
}

func (r *roller) flush() (Point, bool) {
	if !r.open {
		return Point{}, false
	}
	pt := Point{
		Start: r.start, Step: r.step, Has: r.has,
		Covered: min(r.step, time.Duration(r.span*float64(time.Second))),
	}
	for s := range Signals {
		if r.of[s] > 0 {
			pt.Mean[s] = float32(r.sum[s] / r.of[s])
			pt.Peak[s] = float32(r.peak[s])
		}
	}
	*r = roller{step: r.step}
	return pt, true
}

// ring keeps the newest points.
type ring struct {
	size   int
	points []Point
	next   int
}

func (r *ring) push(p Point) {
	if len(r.points) < r.size {
		r.points = append(r.points, p)
		return
	}
	r.points[r.next] = p
	r.next = (r.next + 1) % r.size
}

func (r *ring) all() []Point {
	out := make([]Point, 0, len(r.points))
	return append(append(out, r.points[r.next:]...), r.points[:r.next]...)
}

// from visits the newest points without a copy: since the last one, oldest first,
// that began before start.
func (r *ring) from(start time.Time) iter.Seq[*Point] {
	return func(yield func(*Point) bool) {
		n := len(r.points)
		at := func(i int) *Point { return &r.points[(r.next+i)%n] }
		first := n
		for first > 0 && !at(first-1).Start.Before(start) {
			first--
		}
		for ; first < n; first++ {
			if !yield(at(first)) {
				return
			}
		}
	}
}
