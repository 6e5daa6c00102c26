package allocate

import (
	"fmt"
	"slices"
	"time"
)

// Config of a Planner and a Ledger; the zero value of a field means its
// default. All hosts of a cluster should have the same.
type Config struct {
	// Peers sampled a round. Eight: the best of eight is among the best fifth
	// of a pool with probability .83.
	Peers int
	// Ask so many targets before giving up until the next round.
	Ask int
	// SustainK of the last SustainN rounds must show a loss worth a move; a
	// chance of overload in the nearest span above Urgent needs no second look.
	SustainK, SustainN int
	Urgent             float64
	// CoolDown of a shard after a move; NoReturn to the host it left.
	CoolDown, NoReturn time.Duration
	// OutMax, InMax: moves under way from and to a host.
	OutMax, InMax int
	// Margin that a benefit must exceed a cost by.
	Margin float64
	// Accept: a target takes nothing that makes its overload likelier than
	// this in any span but the last.
	Accept float64
	// Discount of later spans: rounds to come decide again, knowing more. What is
	// counted of the last one is its peak, which seldom fills it.
	Discount [Spans]float64
	// Interference is the share of a second's work that copying takes at each end.
	Interference float64
	// Risk of any move, seconds of its shard.
	Risk time.Duration
	// Hold is how long a reservation lasts beyond the move's expected time.
	Hold time.Duration

	// Threshold, a share of the CPU, turns a Planner into the reactive policy, which
	// nothing but the last sample counts for (reactive.go). 0: it plans by forecasts.
	Threshold float64

	// Consolidate allows hosts to be emptied. CalmRounds in a row without a
	// chance of overload come first; Calm bounds what an emptying host's shards
	// may do to targets; HostHour is what an hour of a host of cost 1 is worth, in
	// weighted seconds of overload.
	Consolidate bool
	CalmRounds  int
	Calm        float64
	HostHour    float64
	// SpareHours that an emptied host is expected to stay so: what comes after
	// the forecasts' horizon is not known, but most loads' calm lasts for hours.
	SpareHours float64
}

// Defaults fills the zero fields in.
func (c Config) Defaults() Config {
	def(&c.Peers, 8)
	def(&c.Ask, 3)
	def(&c.SustainK, 2)
	def(&c.SustainN, 3)
	def(&c.Urgent, 0.25)
	def(&c.CoolDown, 30*time.Minute)
	def(&c.NoReturn, time.Hour)
	def(&c.OutMax, 2)
	def(&c.InMax, 2)
	def(&c.Margin, 2)
	def(&c.Accept, 0.1)
	if c.Discount == ([Spans]float64{}) {
		c.Discount = [Spans]float64{1, 0.3, 0.05}
	}
	def(&c.Interference, 0.1)
	def(&c.Risk, 10*time.Second)
	def(&c.Hold, 30*time.Second)
	def(&c.CalmRounds, 3)
	def(&c.Calm, 0.05)
	def(&c.HostHour, 600)
	def(&c.SpareHours, 6)
	return c
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Check names the first impossible value.
func (c Config) Check() error {
	switch {
	case c.Peers < 1 || c.Peers > 64:
		return fmt.Errorf("peers %d: want 1 to 64", c.Peers)
	case c.Ask < 1 || c.Ask > c.Peers+idlePeers:
		return fmt.Errorf("ask %d: want 1 to %d", c.Ask, c.Peers+idlePeers)
	case c.SustainN < 1 || c.SustainN > 64 || c.SustainK < 1 || c.SustainK > c.SustainN:
		return fmt.Errorf("sustain %d of %d: want k of n with 1 ≤ k ≤ n ≤ 64", c.SustainK, c.SustainN)
	case c.OutMax < 1 || c.InMax < 1:
		return fmt.Errorf("moves under way: %d out, %d in: want at least 1", c.OutMax, c.InMax)
	case !(c.Margin >= 1):
		return fmt.Errorf("margin %v: want at least 1", c.Margin)
	case !(c.Accept > 0 && c.Accept < 1) || !(c.Calm > 0 && c.Calm < 1) || !(c.Urgent > 0 && c.Urgent <= 1):
		return fmt.Errorf("accept %v, calm %v, urgent %v: want probabilities", c.Accept, c.Calm, c.Urgent)
	case !(c.Threshold >= 0 && c.Threshold <= 1):
		return fmt.Errorf("threshold %v: want a share of the CPU, or 0", c.Threshold)
	case c.Threshold > 0 && c.Consolidate:
		return fmt.Errorf("threshold %v: hosts are spared by forecasts alone", c.Threshold)
	case c.CoolDown < 0 || c.NoReturn < 0 || c.Risk < 0 || c.Hold < 0:
		return fmt.Errorf("cool-down %v, no return %v, risk %v, hold %v: want none below zero", c.CoolDown, c.NoReturn, c.Risk, c.Hold)
	}
	return nil
}

// limit of a target's chance of overload.
func (c *Config) limit(why Reason) float64 {
	if why == Consolidate {
		return c.Calm
	}
	return c.Accept
}

// worst is the chance that limit bounds. A shard that flees from overload may go
// where the last span is not calm: there is time to move again. One that moves
// to spare a host may not.
func (c *Config) worst(chance [Spans]float64, why Reason) float64 {
	if why == Consolidate {
		return slices.Max(chance[:])
	}
	return slices.Max(chance[:Spans-1])
}
