package allocate

import (
	"math"
	"time"
)

// MoveCost is what a move of a shard takes over a link.
type MoveCost struct {
	Bytes    float64
	Takes    time.Duration
	Blackout time.Duration
}

const (
	// baseBlackout is what freezing and starting take however little is left to
	// send (measured: 82 ms frozen and 120 ms to start a small shard).
	baseBlackout = 200 * time.Millisecond
	// preCopyRounds: the stop rule of a migration seldom gains after more.
	preCopyRounds = 5
	// lastRound is what a migration stops at.
	lastRound = 50 * time.Millisecond
)

// CostOf is what pre-copying bytes of memory, of which dirty bytes/s are
// written again, takes over link bytes/s: each round sends what was written
// during the one before (Clark et al., NSDI 2005).
func CostOf(bytes, dirty, link float64) MoveCost { return costOf(bytes, dirty, link, baseBlackout) }

// cost of moving s away from the host.
func (h *Host) cost(s *Shard) MoveCost {
	if h.Blackout > 0 {
		return costOf(s.Bytes, s.Dirty, h.Link, h.Blackout)
	}
	return CostOf(s.Bytes, s.Dirty, h.Link)
}

func costOf(bytes, dirty, link float64, base time.Duration) MoveCost {
	if link <= 0 {
		return MoveCost{Bytes: bytes, Takes: math.MaxInt64, Blackout: math.MaxInt64}
	}
	left, sent, took := bytes, 0.0, 0.0
	for range preCopyRounds {
		d := left / link
		sent, took = sent+left, took+d
		next := math.Min(dirty*d, bytes)
		if next >= left {
			break // it writes faster than the link carries
		}
		if left = next; left/link <= lastRound.Seconds() {
			break
		}
	}
	last := math.Min(left, bytes)
	if took*dirty == 0 {
		last = 0
	}
	blackout := base.Seconds() + last/link
	return MoveCost{Bytes: sent + last, Takes: seconds(took + blackout), Blackout: seconds(blackout)}
}

func seconds(s float64) time.Duration {
	return time.Duration(math.Min(s*1e9, math.MaxInt64/2))
}

// price is a move's cost in weighted seconds: what the shard itself does not
// run, what copying takes from it and from its neighbours at both ends, and
// what any move risks.
func (c *Config) price(m MoveCost, priority int) float64 {
	return weight(priority) * (m.Blackout.Seconds() + 2*c.Interference*m.Takes.Seconds() + c.Risk.Seconds())
}

// loss is the expected weighted seconds of overload.
func (c *Config) loss(p [Spans]float64, w float64) float64 {
	sum, from := 0.0, 0.0
	for i := range p {
		until := horizon[i].until.Seconds()
		sum += p[i] * (until - from) * c.Discount[i]
		from = until
	}
	return sum * w
}
