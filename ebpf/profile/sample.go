package profile

import "time"

// Instant is one moment on three clocks, because each knows something that the
// others do not.
type Instant struct {
	// Wall is CLOCK_REALTIME: what points are filed under. It can be set.
	Wall time.Time
	// Monotonic is CLOCK_MONOTONIC: it stands still while the host is suspended.
	Monotonic time.Duration
	// Boot is CLOCK_BOOTTIME: Monotonic and the time in suspend.
	Boot time.Duration
}

// Latency is how a kind of waiting was distributed, cumulative.
type Latency struct {
	Buckets Histogram
	Seconds float64
}

// Sample is what one shard or host had used at a moment.
type Sample struct {
	At  Instant
	Has Mask
	// Values by Signal: running totals for counters, in base units.
	Values [Signals]float64
	// RunQueue, Reads and Writes are valid with Wait, ReadOps and WriteOps.
	RunQueue, Reads, Writes Latency
}

// Set records one signal.
func (s *Sample) Set(sig Signal, v float64) {
	s.Values[sig] = v
	s.Has = s.Has.With(sig)
}

// Clear makes a signal absent.
func (s *Sample) Clear(sig Signal) { s.Values[sig], s.Has = 0, s.Has&^(1<<sig) }

// Get returns a signal and whether it was measured.
func (s *Sample) Get(sig Signal) (float64, bool) { return s.Values[sig], s.Has.Has(sig) }

// GapReason says why the time between two samples is unknown.
type GapReason string

// The reasons, which are also labels of a metric.
const (
	NoGap GapReason = ""
	// Late: the sampler did not come to run.
	Late GapReason = "late"
	// Suspended: the host slept.
	Suspended GapReason = "suspended"
	// Stepped: somebody set the clock.
	Stepped GapReason = "clock_step"
	// Backwards: the monotonic clock ran backwards, as after a restore of a
	// whole virtual machine, or a reboot.
	Backwards GapReason = "backwards"
)

const (
	// lateAfter: two missed samples. What happened meanwhile is known in sum but
	// not when, and a mean over it would hide a peak.
	lateAfter = 3500 * time.Millisecond
	// stepTolerance is above what NTP slews in a second (0.5 ms) and above the
	// time between two readings of two clocks on a busy host.
	stepTolerance = 250 * time.Millisecond
)

// Elapsed is the time between two samples and whether it counts. With a reason
// the duration is what the wall clock would show without it, for the record.
func Elapsed(from, to Instant) (time.Duration, GapReason) {
	mono := to.Monotonic - from.Monotonic
	boot := to.Boot - from.Boot
	wall := to.Wall.Round(0).Sub(from.Wall.Round(0)) // without Go's own monotonic reading
	switch {
	case mono <= 0 || boot <= 0:
		return 0, Backwards
	case boot-mono > stepTolerance:
		return boot, Suspended
	case wall-boot > stepTolerance || boot-wall > stepTolerance:
		return mono, Stepped
	case mono > lateAfter:
		return mono, Late
	}
	return mono, NoGap
}

// Interval is what two samples say about the time between them.
type Interval struct {
	// Start is the wall clock's time at the first sample.
	Start time.Time
	Span  time.Duration
	Has   Mask
	// Rates a second for counters, values at the end for the others.
	Rates [Signals]float64
}

// maxGain bounds what a counter can plausibly gain in a second; beyond is an
// error of the source, and would be the only thing that a chart shows.
const maxGain = 1e13

// Between makes an Interval of two samples. A signal that one of them lacks, or
// whose total went down (somebody began anew), is absent.
func Between(from, to *Sample) (Interval, GapReason) {
	span, gap := Elapsed(from.At, to.At)
	if gap != NoGap {
		return Interval{Start: from.At.Wall, Span: span}, gap
	}
	iv := Interval{Start: from.At.Wall, Span: span}
	for s := range Signals {
		v, ok := to.Get(s)
		if !ok {
			continue
		}
		if s.Counter() {
			earlier, ok := from.Get(s)
			if !ok || v < earlier {
				continue
			}
			if v = (v - earlier) / span.Seconds(); v > maxGain {
				continue
			}
		}
		iv.Rates[s] = v
		iv.Has = iv.Has.With(s)
	}
	return iv, NoGap
}
