// Package predict forecasts what a shard will need: quantiles of a load's
// value at t+h and of its peak over (t, t+h]. It owns the models and their
// small state; it refuses I/O, clocks, goroutines and Gaussian formulas.
//
// A sample's way: Observe puts it into a cell of a regular grid; a closed cell
// settles the forecasts that were made for it (lane.settle: residuals, members'
// losses, regression), enters the history (levels, days, profile), and becomes
// the origin of new forecasts (lane.issue). Forecast reads the newest one.
package predict

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
)

// Target says what of the load is forecast.
type Target int

const (
	Value Target = iota // the mean over the cell at t+h
	Peak                // the largest cell in (t, t+h]
)

func (t Target) String() string {
	if t == Peak {
		return "peak"
	}
	return "value"
}

// Quantiles of a forecast, in the unit of the samples and never decreasing.
type Quantiles struct {
	P10, P50, P90, P95, P99 float64
}

// Config of a Forecaster; the zero value of a field means its default.
type Config struct {
	// Step is the grid's cell. Default 10 s, the profiler's interval.
	Step time.Duration
	// Horizons, ascending, at most MaxHorizons, each at least one Step.
	// Default 5 min, 15 min, 1 h, 24 h.
	Horizons []time.Duration
}

// MaxHorizons keeps a forecaster's state below MaxState.
const MaxHorizons = 5

// DefaultHorizons: two for the balancer's next decisions, one for a
// migration's worth of certainty, one for the day.
func DefaultHorizons() []time.Duration {
	return []time.Duration{5 * time.Minute, 15 * time.Minute, time.Hour, 24 * time.Hour}
}

var (
	// ErrNoSamples: nothing has been observed yet.
	ErrNoSamples = errors.New("no samples yet")
	// ErrHorizon: the horizon is zero, negative or beyond the longest configured.
	ErrHorizon = errors.New("horizon out of range")
)

// Forecaster forecasts one series. It is not safe for concurrent use and, once
// made, allocates nothing while it observes and forecasts.
type Forecaster struct {
	cfg   Config
	hist  history
	lanes []*lane

	begun bool
	open  int64   // index of the cell being filled
	sum   float64 // of its samples
	n     float64
	late  int // samples in a row that were older than the open cell

	counter   float64 // last total given to ObserveCounter
	counterAt int64
	counting  bool

	work []float64 // scratch of the regressions
}

// New makes a forecaster that has seen nothing.
func New(cfg Config) (*Forecaster, error) {
	if cfg.Step == 0 {
		cfg.Step = 10 * time.Second
	}
	if cfg.Horizons == nil {
		cfg.Horizons = DefaultHorizons()
	}
	cfg.Horizons = slices.Clone(cfg.Horizons)
	switch {
	case cfg.Step < time.Millisecond || cfg.Step > 24*time.Hour:
		return nil, fmt.Errorf("step %v is not between 1ms and 24h", cfg.Step)
	case len(cfg.Horizons) == 0 || len(cfg.Horizons) > MaxHorizons:
		return nil, fmt.Errorf("%d horizons, want 1 to %d", len(cfg.Horizons), MaxHorizons)
	}
	for i, h := range cfg.Horizons {
		if h < cfg.Step || h > 31*24*time.Hour || i > 0 && h <= cfg.Horizons[i-1] {
			return nil, fmt.Errorf("horizon %v: want ascending values between the step %v and 31 days", h, cfg.Step)
		}
	}
	f := &Forecaster{cfg: cfg, work: make([]float64, ridgeWork(valueFeatures))}
	f.hist.init(int64(cfg.Step))
	for _, h := range cfg.Horizons {
		f.lanes = append(f.lanes, newLane(h, int64(cfg.Step), len(cfg.Horizons)))
	}
	return f, nil
}

// Config returns the configuration with its defaults filled in.
func (f *Forecaster) Config() Config {
	c := f.cfg
	c.Horizons = slices.Clone(c.Horizons)
	return c
}

// biggest bounds input: beyond it float32 state would overflow. Nothing that a
// host can measure comes near.
const biggest = 1e30

// lateLimit: so many samples in a row older than what was already seen mean
// that the clock was set back, not that a few samples were delayed.
const lateLimit = 16

// Observe takes the sample v at time t. Samples of one cell are averaged. NaN,
// infinities and samples older than the open cell are ignored.
func (f *Forecaster) Observe(t time.Time, v float64) {
	if !(math.Abs(v) <= biggest) {
		return
	}
	at := t.UnixNano()
	if !f.begun {
		f.begun = true
		// The first sample sits in the middle of its cell, so that jitter to
		// either side does not put two into one cell and none into the next.
		f.hist.origin = at - f.hist.step/2
	}
	c := f.hist.cellOf(at)
	if c < f.open {
		if f.late++; f.late < lateLimit {
			return
		}
		f.rewind(at)
		c = f.open
	}
	f.late = 0
	f.closeUntil(c)
	f.sum += v
	f.n++
}

// ObserveCounter takes a cumulative count (bytes, CPU nanoseconds) and
// observes its rate per second since the previous one. A count that fell was
// reset to zero in between.
func (f *Forecaster) ObserveCounter(t time.Time, total float64) {
	if !(math.Abs(total) <= biggest) {
		return
	}
	at := t.UnixNano()
	before, since, ok := f.counter, at-f.counterAt, f.counting
	f.counter, f.counterAt, f.counting = total, at, true
	// A rate over a long silence would put one mean where a whole history
	// was: it is a gap instead.
	if !ok || since <= 0 || since > max(10*f.hist.step, int64(10*time.Minute)) {
		return
	}
	if total < before {
		before = 0
	}
	f.Observe(t, (total-before)/(float64(since)/1e9))
}

// Advance closes every cell that ended at or before now, so that Forecast
// starts from there even if no sample came since.
func (f *Forecaster) Advance(now time.Time) {
	if f.begun {
		f.closeUntil(f.hist.cellOf(now.UnixNano()))
	}
}

func (f *Forecaster) closeUntil(c int64) {
	for f.open < c {
		// In a silence longer than every horizon nothing is left to settle.
		if last := f.lanes[len(f.lanes)-1]; f.n == 0 && (f.hist.cells == 0 || f.open-f.hist.lastCell > 2*last.steps) {
			f.open = c
			return
		}
		f.closeCell()
	}
}

func (f *Forecaster) closeCell() {
	c := f.open
	if f.n > 0 {
		v := f.sum / f.n
		if f.hist.opens(v) {
			for _, l := range f.lanes {
				l.keep()
			}
		}
		for _, l := range f.lanes {
			l.peaks.push(c, v)
			l.settle(&f.hist, c, v, f.work)
		}
		if f.hist.push(c, v) {
			for _, l := range f.lanes {
				l.shifted()
			}
		}
	}
	f.open++
	f.sum, f.n = 0, 0
	if f.hist.cells == 0 {
		return
	}
	for _, l := range f.lanes {
		if c%l.stride == 0 {
			l.issue(&f.hist, c)
		}
	}
}

// rewind continues after the clock was set back to at: the cells go on where
// they were, under other times. What was learnt stays, what was remembered by
// date goes.
func (f *Forecaster) rewind(at int64) {
	f.hist.origin += at - f.hist.timeOf(f.open)
	f.hist.forgetDays()
}

// Forecast returns the quantiles h after the last closed cell. A horizon
// between two configured ones is interpolated on a logarithmic scale, one
// below the shortest is that of the shortest.
func (f *Forecaster) Forecast(h time.Duration, target Target) (Quantiles, error) {
	if h <= 0 || h > f.cfg.Horizons[len(f.cfg.Horizons)-1] {
		return Quantiles{}, ErrHorizon
	}
	if f.hist.cells == 0 {
		return Quantiles{}, ErrNoSamples
	}
	for i, l := range f.lanes {
		if h > l.h {
			continue
		}
		q := f.read(l, target)
		if h == l.h || i == 0 {
			return q, nil
		}
		below := f.lanes[i-1]
		w := math.Log(float64(h)/float64(below.h)) / math.Log(float64(l.h)/float64(below.h))
		b := f.read(below, target)
		mix := func(a, b float64) float64 { return a*w + b*(1-w) }
		return Quantiles{mix(q.P10, b.P10), mix(q.P50, b.P50), mix(q.P90, b.P90), mix(q.P95, b.P95), mix(q.P99, b.P99)}, nil
	}
	return Quantiles{}, ErrHorizon
}

func (f *Forecaster) read(l *lane, target Target) Quantiles {
	q := l.quantiles(&f.hist, f.open-1, target)
	return Quantiles{q[0], q[1], q[2], q[3], q[4]}
}
