// Package allocate decides which shards of a host to resize or move where. It
// owns the nouns, the chance that a host is overloaded, the worth and cost of
// a move, and the word of the target; it refuses I/O, clocks and goroutines.
//
// A round's way: Planner.Round adds the forecasts of a host's shards to joint
// scenarios (joint.go), turns those over capacity into expected loss, and if
// that is sustained (hysteresis.go) looks for resizes and the fewest moves worth
// their cost (plan.go, cost.go) and for targets among a few sampled peers
// (target.go). The caller asks each target's Ledger (ledger.go), which may
// veto, does what was granted, and tells the Planner by Started and Ended.
package allocate

import (
	"fmt"
	"math"
	"time"

	"github.com/tranship/tranship/predict"
)

// Names, unique in a cluster.
type (
	HostID   string
	ShardID  string
	Workload string
	Tenant   string
)

// Resource is an index into Amount.
type Resource int

const (
	CPU     Resource = iota // cores, or any other unit of work a second
	Memory                  // bytes
	Network                 // bytes/s
	Disk                    // bytes/s
	Resources
)

func (r Resource) String() string {
	return [...]string{"cpu", "memory", "network", "disk"}[r]
}

// Amount of each resource. As a capacity, zero means that it is not limited.
type Amount [Resources]float64

// MaxPriority is the highest priority; the lowest is 0.
const MaxPriority = 9

// weight is what an overloaded second of a priority counts: a step is a step,
// so that ten shards of priority 0 count as one of 9.
func weight(priority int) float64 { return 1 + float64(priority) }

// Spans divide the horizon. Each is judged by one forecast within it.
const Spans = 3

// span of the horizon: the forecast at stands for the time up to until.
type span struct{ at, until time.Duration }

// The horizon is an hour: longer than any move takes that is worth making, and
// the longest for which a forecast of most loads says more than "as now".
var horizon = [Spans]span{{5 * time.Minute, 10 * time.Minute}, {15 * time.Minute, 30 * time.Minute}, {time.Hour, time.Hour}}

// Horizons that a Demand is made of, as a predict.Config wants them.
func Horizons() []time.Duration {
	out := make([]time.Duration, Spans)
	for i, s := range horizon {
		out[i] = s.at
	}
	return out
}

// SpanEnd is until when the i-th span reaches.
func SpanEnd(i int) time.Duration { return horizon[i].until }

// Curve is a quantile function: what a load is below with probability .1, .5,
// .9, .95 and .99.
type Curve [5]float32

// CurveOf makes a curve of a forecast: rising and bounded, whatever it says.
func CurveOf(q predict.Quantiles) (c Curve) {
	last := float32(0)
	for i, v := range [...]float64{q.P10, q.P50, q.P90, q.P95, q.P99} {
		if f := float32(v); f >= last {
			last = min(f, 1e30)
		}
		c[i] = last
	}
	return c
}

// Certain is the curve of a load that is known.
func Certain(v float64) Curve { f := float32(v); return Curve{f, f, f, f, f} }

// AtLeast makes the curve nowhere less than v.
func (c *Curve) AtLeast(v float64) {
	for q := range c {
		c[q] = max(c[q], float32(v))
	}
}

func (c *Curve) flat() bool { return c[0] == c[4] }

// valid: finite, not negative, not falling.
func (c *Curve) valid() bool {
	last := float32(0)
	for _, v := range c {
		if !(v >= last && v <= 1e30) {
			return false
		}
		last = v
	}
	return true
}

// Demand is what a shard will need, by span and resource.
type Demand [Spans][Resources]Curve

// Spread bounds how a workload's shards may pile up. Zero: no bound.
type Spread struct {
	PerHost int
	PerZone int
}

// Data is an image layer or volume that a host may have already.
type Data struct {
	Name   string
	Bytes  float64 // that a host without it has to be sent
	Needed bool    // it cannot be sent: a host that says it has none cannot take the shard
}

// Shard as its host knows it.
type Shard struct {
	ID       ShardID
	Workload Workload
	Tenant   Tenant
	Priority int

	Demand    Demand
	Peak      Curve  // the most CPU within the horizon; no less than the last span's Demand counts
	Usage     Amount // the last sample
	SampledAt time.Time
	Request   Amount // what it may count on; resizes never go below it
	Limit     Amount // of CPU alone; zero: none

	Bytes float64 // memory that a move has to carry
	Dirty float64 // bytes/s written

	Pinned    string // why it may not move now (pinned, outside its window); empty: it may
	Zones     []string
	Labels    map[string]string // that its host must have
	Avoid     []Workload        // that its host must not run
	Spread    Spread
	ZoneMates map[string]int // shards of its workload by zone, as far as Spread.PerZone needs it
	Data      []Data

	MovedAt  time.Time // zero: never; travels with the shard
	LastHost HostID    // that it left at MovedAt
}

// Host as its peers know it.
type Host struct {
	ID       HostID
	Zone     string
	Labels   map[string]string
	Capacity Amount
	Cost     float64       // an hour, in any currency
	Link     float64       // bytes/s for moves
	Blackout time.Duration // of moves from here, without their last pages; zero: as where it was measured first
	Cordoned bool
	Data     map[string]bool // by Data.Name, of what it was asked for: whether it has it
}

// Peer is what another host tells of itself. It may be old or wrong: only a
// target's Ledger knows.
type Peer struct {
	Host
	Load    Demand // quantiles of the sum over its shards and reservations, at its peak in the last span
	Usage   Amount // the last sample of that sum
	Shards  int
	Leaving bool // it is being emptied
}

// valid says whether a peer's claims can be computed with.
func (p *Peer) valid() bool {
	for r := range Resources {
		if !(p.Capacity[r] >= 0 && p.Capacity[r] <= 1e30 && p.Usage[r] >= 0 && p.Usage[r] <= 1e30) {
			return false
		}
		for i := range p.Load {
			if !p.Load[i][r].valid() {
				return false
			}
		}
	}
	return p.Link > 0 && p.Link <= 1e30 && p.Cost >= 0 && p.Cost <= 1e30
}

// Reason codes of moves and of decisions not to move.
type Reason string

const (
	Overload    Reason = "overload"    // the expected loss is worth the move
	Consolidate Reason = "consolidate" // its host can be spared
	Threshold   Reason = "threshold"   // its host used more than Config.Threshold in the last sample
	Grow        Reason = "grow"        // its limit is below its demand
	Yield       Reason = "yield"       // it makes room for higher priorities in place

	NotSustained Reason = "not-sustained" // loss in too few of the last rounds
	NotWorth     Reason = "not-worth"     // no move saves more than its cost and what it adds elsewhere
	NoTarget     Reason = "no-target"     // no sampled peer may take it
	InFlight     Reason = "in-flight"     // as many moves as allowed are under way
	Vetoed       Reason = "vetoed"        // the targets refused
)

// Candidate is a target that may be asked, best first.
type Candidate struct {
	Host  HostID
	Score float64 // expected loss and cost there, weighted seconds
}

// Move of a shard. Benefit, Cost: weighted seconds of overload.
type Move struct {
	Shard    ShardID
	Priority int
	From     HostID
	Targets  []Candidate // ask them in this order
	Reason   Reason
	Benefit  float64 // expected loss that it saves
	Price    float64 // what it costs, without the margin
	Bytes    float64
	Takes    time.Duration
	Blackout time.Duration
}

func (m Move) String() string {
	if m.Reason == Consolidate {
		return fmt.Sprintf("move %s from %s to %s: its host can be spared; costs %.0f s, %.0f MB, blackout %v",
			m.Shard, m.From, m.Targets[0].Host, m.Price, m.Bytes/1e6, m.Blackout.Round(time.Millisecond))
	}
	return fmt.Sprintf("move %s from %s to %s: saves %.0f weighted seconds of overload within the hour for %.0f; %.0f MB, blackout %v",
		m.Shard, m.From, m.Targets[0].Host, m.Benefit, m.Price, m.Bytes/1e6, m.Blackout.Round(time.Millisecond))
}

// Resize of a shard's CPU limit in place.
type Resize struct {
	Shard    ShardID
	From, To float64 // cores
	Reason   Reason
}

func (r Resize) String() string {
	why := "its demand will exceed it"
	if r.Reason == Yield {
		why = "higher priorities need the room and nothing can move"
	}
	return fmt.Sprintf("limit of %s from %.2f to %.2f cores: %s", r.Shard, r.From, r.To, why)
}

// Decision that was not to act.
type Decision struct {
	Shard  ShardID // empty: of the host
	Reason Reason
}

// Plan of one round.
type Plan struct {
	At       time.Time
	Host     HostID
	Overload [Spans]float64 // probability
	Loss     float64        // expected, weighted seconds
	Resizes  []Resize
	Moves    []Move
	Not      []Decision
}

// Request asks a target to keep room for a shard.
type Request struct {
	Shard  Shard
	From   HostID
	Reason Reason
	Takes  time.Duration // as the source expects
}

// Reservation is room kept until Expires.
type Reservation struct {
	Request
	Expires time.Time
}

// Veto is a target's refusal.
type Veto struct {
	Host  HostID
	Code  VetoCode
	Value float64 // a probability for VetoOverload, else what is missing
}

// VetoCode is stable across versions.
type VetoCode string

const (
	VetoInvalid  VetoCode = "invalid"   // the request cannot be computed with
	VetoCordoned VetoCode = "cordoned"  // takes no shards
	VetoLeaving  VetoCode = "leaving"   // is being emptied
	VetoMemory   VetoCode = "memory"    // does not fit
	VetoUsage    VetoCode = "usage"     // as measured, does not fit
	VetoOverload VetoCode = "overload"  // would be overloaded too likely
	VetoSpread   VetoCode = "spread"    // too many of the workload, or one to avoid
	VetoInFlight VetoCode = "in-flight" // its link is busy with moves
)

func (v *Veto) Error() string {
	switch v.Code {
	case VetoOverload:
		return fmt.Sprintf("%s refuses: it would be overloaded with probability %.2f", v.Host, v.Value)
	case VetoMemory, VetoUsage:
		return fmt.Sprintf("%s refuses: %s is short of %.3g", v.Host, v.Code, v.Value)
	}
	return fmt.Sprintf("%s refuses: %s", v.Host, v.Code)
}

// checkShard says what makes a shard impossible to compute with.
func checkShard(s *Shard) error {
	switch {
	case s.ID == "":
		return fmt.Errorf("a shard without a name")
	case s.Priority < 0 || s.Priority > MaxPriority:
		return fmt.Errorf("priority %d of %s is not between 0 and %d", s.Priority, s.ID, MaxPriority)
	case !finite(s.Bytes) || !finite(s.Dirty):
		return fmt.Errorf("memory or dirty rate of %s is negative or not a number", s.ID)
	}
	if !s.Peak.valid() {
		return fmt.Errorf("forecast of the peak of %s is not a rising curve of loads", s.ID)
	}
	for r := range Resources {
		if !finite(s.Usage[r]) || !finite(s.Request[r]) || !finite(s.Limit[r]) {
			return fmt.Errorf("%v of %s is negative or not a number", r, s.ID)
		}
		for i := range s.Demand {
			if !s.Demand[i][r].valid() {
				return fmt.Errorf("forecast of %v of %s is not a rising curve of loads", r, s.ID)
			}
		}
	}
	return nil
}

func finite(v float64) bool { return v >= 0 && v <= 1e30 && !math.IsNaN(v) }
