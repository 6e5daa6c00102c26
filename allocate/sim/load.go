package sim

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/tranship/tranship/predict/backtest"
)

// ErrTraces: the scenario needs trace files, and nobody said where they are.
var ErrTraces = errors.New("the scenario needs traces: give their folder with --traces DIR or dir under [traces]")

// origin is when simulated time begins: any Monday, 00:00 UTC.
var origin = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// spec is a shard as the scenario wants it.
type spec struct {
	id       string
	workload string
	tenant   string
	priority int
	cpu, mem float64
	dirty    float64
	limit    float64
	series   []float32 // share of cpu in use, by step; shared between shards
	shift    int
	scale    float32
}

// at is the CPU that the shard wants in step c.
func (s *spec) at(c int) float64 {
	if s.shift > 0 {
		c = (c + s.shift) % len(s.series)
	}
	c = min(c, len(s.series)-1) // beyond the end nothing changes
	return s.cpu * float64(s.series[c]*s.scale)
}

// loads makes the shards of a scenario.
func (s *Scenario) loads(rng *rand.Rand) ([]spec, error) {
	var out []spec
	files := map[string][][]float32{}
	for gi := range s.Shards {
		g := &s.Shards[gi]
		if g.Pattern != nil {
			out = append(out, s.patterns(g, rng)...)
			continue
		}
		columns, ok := files[g.Trace]
		if !ok {
			var err error
			if columns, err = s.read(g.Trace); err != nil {
				return nil, err
			}
			files[g.Trace] = columns
		}
		n := g.Count
		if n == 0 {
			n = len(columns) * g.PerColumn
		}
		if len(out)+n > maxShards {
			return nil, fmt.Errorf("shards %s: %d are more than %d", g.Name, len(out)+n, maxShards)
		}
		for i := range n {
			column := i / g.PerColumn % len(columns)
			sp := g.shard(i, fmt.Sprintf("%s-%d", g.Name, i/g.PerColumn))
			sp.series = columns[column]
			if g.Shift {
				sp.shift = rng.IntN(len(sp.series))
			} else if len(sp.series) < s.steps() {
				return nil, fmt.Errorf("trace %s has %d steps of %v, the scenario needs %d: shorten warmup or duration", g.Trace, len(sp.series), time.Duration(s.Step), s.steps())
			}
			sp.scale = float32(1 + g.Vary*(2*rng.Float64()-1))
			out = append(out, sp)
		}
	}
	return out, nil
}

func (g *ShardGroup) shard(i int, workload string) spec {
	size := g.Sizes[i%len(g.Sizes)]
	sp := spec{
		id: fmt.Sprintf("%s/%d", g.Name, i), workload: workload, tenant: g.Tenant,
		priority: g.Priorities[i%len(g.Priorities)], cpu: size.CPU, mem: float64(size.Memory), dirty: g.Dirty, limit: g.Limit * size.CPU, scale: 1,
	}
	if sp.tenant == "" {
		sp.tenant = workload
	}
	return sp
}

func (s *Scenario) patterns(g *ShardGroup, rng *rand.Rand) []spec {
	p := g.Pattern
	out := make([]spec, g.Count)
	for i := range out {
		sp := g.shard(i, fmt.Sprintf("%s-%d", g.Name, i/g.PerColumn))
		sp.series = make([]float32, s.steps())
		spikes := rng.Float64() < p.Share
		phase := float64(i/g.PerColumn%p.Phases) / float64(p.Phases)
		for c := range sp.series {
			at := time.Duration(c) * time.Duration(s.Step)
			v := p.Base
			since := at - time.Duration(s.Warmup) - time.Duration(p.At)
			switch {
			case p.Kind == "day":
				turn := float64(at)/float64(p.Period) + phase
				v += (p.Peak - p.Base) * (0.5 - 0.5*math.Cos(2*math.Pi*turn))
			case p.Kind == "spike" && spikes && since >= 0 && (p.For == 0 || since < time.Duration(p.For)):
				v = p.Peak
			}
			if p.Noise > 0 {
				v += p.Noise * rng.NormFloat64()
			}
			sp.series[c] = float32(max(0, v))
		}
		sp.scale = float32(1 + g.Vary*(2*rng.Float64()-1))
		out[i] = sp
	}
	return out
}

// maxTrace bounds a trace file.
const maxTrace = 256 << 20

// read makes a trace's columns regular: means of steps from the file's first
// sample on, as shares. A gap holds the value before it; before a series
// begins it is zero.
func (s *Scenario) read(name string) ([][]float32, error) {
	if s.Traces.Dir == "" {
		return nil, ErrTraces
	}
	path := filepath.Join(s.Traces.Dir, name)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is not there: --traces DIR names the folder that holds %s: %w", path, name, ErrTraces)
	} else if err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > maxTrace {
		return nil, fmt.Errorf("%s is not a file of at most %d MiB", path, maxTrace>>20)
	}
	all, err := backtest.Read(f, path)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(x backtest.Series) bool { return len(x.Times) == 0 || !s.Sample.Includes(&x) })
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no series of sample %q", path, s.Sample)
	}
	from, to := all[0].Times[0], all[0].Times[0]
	for i := range all {
		if t := all[i].Times[0]; t.Before(from) {
			from = t
		}
		if t := all[i].Times[len(all[i].Times)-1]; t.After(to) {
			to = t
		}
	}
	step := time.Duration(s.Step)
	n := int(min(int64(to.Sub(from)/step)+1, maxSteps))
	out := make([][]float32, len(all))
	for i := range all {
		out[i] = regular(&all[i], from, step, n)
	}
	return out, nil
}

func regular(x *backtest.Series, from time.Time, step time.Duration, n int) []float32 {
	sum, count := make([]float64, n), make([]int, n)
	for i, t := range x.Times {
		if c := int(t.Sub(from) / step); c < n {
			sum[c] += max(0, x.Values[i])
			count[c]++
		}
	}
	out := make([]float32, n)
	last := float32(0)
	for c := range out {
		if count[c] > 0 {
			last = float32(min(sum[c]/float64(count[c])/100, 100))
		}
		out[c] = last
	}
	return out
}
