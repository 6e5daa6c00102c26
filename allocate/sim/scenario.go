package sim

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/tranship/tranship/predict/backtest"
)

// Scenario is a pool, its loads and what happens to it. Sizes are written like
// 4GB or 870MB (powers of two), rates like 1gbit, times like 5m.
type Scenario struct {
	Name        string          `toml:"name"`
	Seed        uint64          `toml:"seed"`
	Step        Duration        `toml:"step"`        // between samples; default 5m
	Round       Duration        `toml:"round"`       // between planning rounds; default 1m
	Warmup      Duration        `toml:"warmup"`      // of the load that is history when the simulation begins
	Duration    Duration        `toml:"duration"`    // after that
	OverloadAt  float64         `toml:"overload_at"` // share of a host's CPU; default 1
	Overcommit  float64         `toml:"overcommit"`  // CPU requested over CPU there, at the first placement; default 1
	Placement   string          `toml:"placement"`   // first placement: spread (default) or pack
	Memory      string          `toml:"memory"`      // enforced (default) or ignored
	Consolidate bool            `toml:"consolidate"` // hosts that run nothing are off, and policies may empty hosts
	LinkShare   float64         `toml:"link_share"`  // of a link that moves may use; default 0.5
	Sample      backtest.Sample `toml:"sample"`      // of the traces' series: all (default), development, holdout
	Traces      Traces          `toml:"traces"`
	Hosts       []HostGroup     `toml:"hosts"`
	Shards      []ShardGroup    `toml:"shards"`
	Failures    []Failure       `toml:"failures"`
}

// Traces says where trace files are.
type Traces struct {
	Dir string `toml:"dir"`
}

// HostGroup is count equal hosts.
type HostGroup struct {
	Name   string  `toml:"name"`
	Count  int     `toml:"count"`
	CPU    float64 `toml:"cpu"` // any unit, the same as the shards'
	Memory Size    `toml:"memory"`
	Link   Rate    `toml:"link"`
	Zone   string  `toml:"zone"`
	Cost   float64 `toml:"cost"`  // an hour; default 1
	Power  string  `toml:"power"` // g4 or g5, for energy
}

// ShardGroup is shards whose loads come from the columns of a trace, or from a
// pattern. Sizes and priorities are given in turn.
type ShardGroup struct {
	Name       string   `toml:"name"`
	Count      int      `toml:"count"`      // 0: one a column
	Trace      string   `toml:"trace"`      // a file below the traces' folder: percent of the size in use
	PerColumn  int      `toml:"per_column"` // shards of one workload that share a column; default 1
	Shift      bool     `toml:"shift"`      // each shard's load begins at another time of its trace
	Vary       float64  `toml:"vary"`       // shards of a column differ in size of load by up to this share
	Pattern    *Pattern `toml:"pattern"`
	Sizes      []Shape  `toml:"sizes"`
	Priorities []int    `toml:"priorities"` // default 5
	Tenant     string   `toml:"tenant"`
	Dirty      float64  `toml:"dirty"` // share of its memory that a shard at full load writes a second; default 0.005
	Limit      float64  `toml:"limit"` // of its size, on CPU; 0: none
}

// Shape of a shard: what it asks for.
type Shape struct {
	CPU    float64 `toml:"cpu"`
	Memory Size    `toml:"memory"`
}

// Pattern is a made load, as shares of a shard's size.
type Pattern struct {
	Kind   string   `toml:"kind"` // flat, day (a sine), spike
	Base   float64  `toml:"base"`
	Peak   float64  `toml:"peak"`
	Noise  float64  `toml:"noise"`  // standard deviation
	Period Duration `toml:"period"` // of day; default 24h
	Phases int      `toml:"phases"` // of day: shards in turn are so many parts of the period apart; default 1
	At     Duration `toml:"at"`     // of spike, after the warm-up
	For    Duration `toml:"for"`
	Share  float64  `toml:"share"` // of shards that spike; default 1
}

// Failure of hosts: their shards are down until the policy has found them a
// place.
type Failure struct {
	At    Duration `toml:"at"`
	For   Duration `toml:"for"`
	Hosts int      `toml:"hosts"` // chosen by the seed
}

// Duration, Size and Rate are written with units.
type (
	Duration time.Duration
	Size     float64 // bytes
	Rate     float64 // bytes/s
)

func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil || v < 0 {
		return fmt.Errorf("time %q: write it like 30s, 5m or 24h", text)
	}
	*d = Duration(v)
	return nil
}

func (s *Size) UnmarshalText(text []byte) error {
	v, err := withUnit(string(text), map[string]float64{"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40})
	if err != nil {
		return fmt.Errorf("size %q: write it like 870MB or 4GB", text)
	}
	*s = Size(v)
	return nil
}

func (r *Rate) UnmarshalText(text []byte) error {
	v, err := withUnit(string(text), map[string]float64{"mbit": 1e6 / 8, "gbit": 1e9 / 8})
	if err != nil {
		return fmt.Errorf("rate %q: write it like 500mbit or 1gbit", text)
	}
	*r = Rate(v)
	return nil
}

func withUnit(text string, units map[string]float64) (float64, error) {
	text = strings.ToLower(strings.TrimSpace(text))
	for suffix, scale := range units {
		if number, ok := strings.CutSuffix(text, suffix); ok && number != "" && strings.Trim(number, "0123456789.") == "" {
			v, err := strconv.ParseFloat(number, 64)
			if err == nil && v > 0 && v < 1e9 {
				return v * scale, nil
			}
		}
	}
	return 0, strconv.ErrSyntax
}

const (
	// maxHosts and maxShards bound what a scenario makes Run allocate.
	maxHosts  = 20_000
	maxShards = 400_000
	// maxSteps is two months of five minutes.
	maxSteps = 20_000
	// maxLoads is shards times steps: 400 MB of patterns.
	maxLoads = 100_000_000
)

// Parse reads a scenario. Unknown keys and impossible values are errors that
// say what to change.
func Parse(text []byte) (*Scenario, error) {
	s := &Scenario{}
	dec := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := dec.Decode(s); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			row, _ := strict.Errors[0].Position()
			return nil, fmt.Errorf("line %d: unknown key %q", row, strings.Join(strict.Errors[0].Key(), "."))
		}
		var bad *toml.DecodeError
		if errors.As(err, &bad) {
			row, _ := bad.Position()
			return nil, fmt.Errorf("line %d: %w", row, err)
		}
		return nil, err
	}
	s.defaults()
	return s, s.check()
}

func def[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func (s *Scenario) defaults() {
	def(&s.Step, Duration(5*time.Minute))
	def(&s.Round, Duration(time.Minute))
	def(&s.Duration, Duration(24*time.Hour))
	def(&s.OverloadAt, 1)
	def(&s.Overcommit, 1)
	def(&s.Placement, "spread")
	def(&s.Memory, "enforced")
	def(&s.LinkShare, 0.5)
	def(&s.Sample, backtest.Everything)
	for i := range s.Hosts {
		def(&s.Hosts[i].Cost, 1)
		def(&s.Hosts[i].Name, "host")
		def(&s.Hosts[i].Link, Rate(1e9/8))
	}
	for i := range s.Shards {
		g := &s.Shards[i]
		def(&g.Name, fmt.Sprintf("group%d", i))
		def(&g.PerColumn, 1)
		def(&g.Dirty, 0.005)
		if g.Priorities == nil {
			g.Priorities = []int{5}
		}
		if p := g.Pattern; p != nil {
			def(&p.Period, Duration(24*time.Hour))
			def(&p.Phases, 1)
			def(&p.Share, 1)
		}
	}
}

func (s *Scenario) check() error {
	step, round := time.Duration(s.Step), time.Duration(s.Round)
	switch {
	case step < time.Second || step > 5*time.Minute:
		return fmt.Errorf("step %v: want 1s to 5m, the nearest horizon of a plan", step)
	case round < time.Second || round > step || step%round != 0:
		return fmt.Errorf("round %v: want at least 1s, and a whole number of rounds in a step of %v", round, step)
	case s.Duration < s.Step || s.steps() > maxSteps:
		return fmt.Errorf("duration %v after a warm-up of %v: want 1 to %d steps of %v", time.Duration(s.Duration), time.Duration(s.Warmup), maxSteps, step)
	case !(s.OverloadAt > 0 && s.OverloadAt <= 1) || !(s.LinkShare > 0 && s.LinkShare <= 1):
		return fmt.Errorf("overload_at %v, link_share %v: want shares above 0 and up to 1", s.OverloadAt, s.LinkShare)
	case !(s.Overcommit > 0 && s.Overcommit <= 100):
		return fmt.Errorf("overcommit %v: want above 0 and up to 100", s.Overcommit)
	case s.Placement != "spread" && s.Placement != "pack":
		return fmt.Errorf("placement %q: use spread or pack", s.Placement)
	case s.Memory != "enforced" && s.Memory != "ignored":
		return fmt.Errorf("memory %q: use enforced or ignored", s.Memory)
	case s.Sample != backtest.Everything && s.Sample != backtest.Development && s.Sample != backtest.Holdout:
		return fmt.Errorf("sample %q: use all, development or holdout", s.Sample)
	case len(s.Hosts) == 0 || len(s.Shards) == 0:
		return errors.New("no [[hosts]] or no [[shards]]")
	}
	hosts, shards := 0, 0
	for i := range s.Hosts {
		if err := s.Hosts[i].check(); err != nil {
			return fmt.Errorf("hosts %s: %w", s.Hosts[i].Name, err)
		}
		hosts += s.Hosts[i].Count
	}
	for i := range s.Shards {
		g := &s.Shards[i]
		if err := g.check(); err != nil {
			return fmt.Errorf("shards %s: %w", g.Name, err)
		}
		shards += g.Count
	}
	if hosts > maxHosts || shards > maxShards || shards*s.steps() > maxLoads {
		return fmt.Errorf("%d hosts, %d shards, %d steps: want at most %d, %d, and %d shards times steps", hosts, shards, s.steps(), maxHosts, maxShards, maxLoads)
	}
	for _, f := range s.Failures {
		if f.Hosts < 1 || f.Hosts > hosts || f.At >= s.Duration {
			return fmt.Errorf("failure of %d hosts at %v: want 1 to %d hosts, before %v", f.Hosts, time.Duration(f.At), hosts, time.Duration(s.Duration))
		}
	}
	return nil
}

func (g *HostGroup) check() error {
	switch {
	case g.Count < 1 || g.Count > maxHosts:
		return fmt.Errorf("count %d: want 1 to %d", g.Count, maxHosts)
	case !amount(g.CPU) || g.Memory <= 0:
		return fmt.Errorf("cpu %v, memory %v: want both above zero", g.CPU, float64(g.Memory))
	case !(g.Cost >= 0 && g.Cost < 1e9):
		return fmt.Errorf("cost %v: want zero or more", g.Cost)
	case g.Power != "" && g.Power != "g4" && g.Power != "g5":
		return fmt.Errorf("power %q: g4 and g5 are known", g.Power)
	}
	return nil
}

func (g *ShardGroup) check() error {
	switch {
	case (g.Trace == "") == (g.Pattern == nil):
		return errors.New("give either trace or pattern")
	case g.Trace != "" && !filepath.IsLocal(g.Trace):
		return fmt.Errorf("trace %q is not below the traces' folder", g.Trace)
	case g.Pattern != nil && g.Count < 1 || g.Count < 0 || g.Count > maxShards:
		return fmt.Errorf("count %d: want 1 to %d (0 with a trace: one a column)", g.Count, maxShards)
	case g.PerColumn < 1 || g.PerColumn > 1000:
		return fmt.Errorf("per_column %d: want 1 to 1000", g.PerColumn)
	case len(g.Sizes) == 0:
		return errors.New("no sizes")
	case !(g.Dirty >= 0 && g.Dirty <= 1) || !(g.Limit >= 0 && g.Limit <= 100) || !(g.Vary >= 0 && g.Vary < 1):
		return fmt.Errorf("dirty %v, limit %v, vary %v: want shares", g.Dirty, g.Limit, g.Vary)
	}
	for _, size := range g.Sizes {
		if !amount(size.CPU) || size.Memory <= 0 {
			return fmt.Errorf("size of cpu %v and memory %v: want both above zero", size.CPU, float64(size.Memory))
		}
	}
	for _, p := range g.Priorities {
		if p < 0 || p > 9 {
			return fmt.Errorf("priority %d: want 0 to 9", p)
		}
	}
	if g.Pattern != nil {
		return g.Pattern.check()
	}
	return nil
}

func (p *Pattern) check() error {
	switch {
	case p.Kind != "flat" && p.Kind != "day" && p.Kind != "spike":
		return fmt.Errorf("pattern %q: use flat, day or spike", p.Kind)
	case !(p.Base >= 0 && p.Base <= 100) || !(p.Peak >= 0 && p.Peak <= 100) || !(p.Noise >= 0 && p.Noise <= 10):
		return fmt.Errorf("pattern of base %v, peak %v, noise %v: want shares of a shard's size", p.Base, p.Peak, p.Noise)
	case !(p.Share > 0 && p.Share <= 1) || p.Phases < 1 || p.Phases > 1000 || p.Period < Duration(time.Minute):
		return fmt.Errorf("pattern of share %v, %d phases, period %v: want a share, 1 to 1000, at least 1m", p.Share, p.Phases, time.Duration(p.Period))
	}
	return nil
}

func amount(v float64) bool { return v > 0 && v < 1e12 && !math.IsNaN(v) }

// steps of warm-up and simulation.
func (s *Scenario) steps() int { return int((s.Warmup + s.Duration) / s.Step) }

func (s *Scenario) warm() int { return int(s.Warmup / s.Step) }
