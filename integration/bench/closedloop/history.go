package closedloop

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"time"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/forecasts"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/integration/workload/workcheck"
)

const (
	recordNight = 50 * time.Second
	recordDay   = 50 * time.Second
	// settle after a shard's start, and after the rise, is in neither.
	settle = 10 * time.Second
	// past that every shard is given: what a forecaster remembers of a shape.
	past = 7 * 24 * time.Hour
)

// Means of ten seconds of a shard, by signal's name.
type Means map[string]float64

// Recording is what shards used while the load was on them, by where in the day.
type Recording struct {
	Night []Means   `json:"night"`
	Rise  [][]Means `json:"rise"` // by tens of seconds since its begin
	Day   []Means   `json:"day"`
}

// add files what a shard used.
func (r *Recording) add(points []*v1.LoadPoint, day *workcheck.Pattern) {
	if r.Rise == nil {
		r.Rise = make([][]Means, ramp/grid)
	}
	for _, pt := range points {
		from := time.UnixMilli(pt.GetStartUnixMs())
		to := from.Add(grid)
		switch in := from.Sub(day.Begin); {
		case pt.GetCovered() < 0.9 || from.Before(day.Start.Add(settle)) || to.After(day.End):
		case in < 0:
			r.Night = append(r.Night, pt.GetMean())
		case in < ramp:
			r.Rise[in/grid] = append(r.Rise[in/grid], pt.GetMean())
		case in >= ramp+settle:
			r.Day = append(r.Day, pt.GetMean())
		}
	}
}

// check says what is missing.
func (r *Recording) check() error {
	if len(r.Night) < shards || len(r.Day) < shards || len(r.Rise) != int(ramp/grid) {
		return fmt.Errorf("a recording of %d tens of seconds of night and %d of day: too little", len(r.Night), len(r.Day))
	}
	for i, list := range r.Rise {
		if len(list) == 0 {
			return fmt.Errorf("a recording without the rise after %v", time.Duration(i)*grid)
		}
	}
	return nil
}

// CPU is what a shard used at night and by day, on the average.
func (r *Recording) CPU() (night, day float64) {
	mean := func(list []Means) (sum float64) {
		for _, m := range list {
			sum += m[profile.CPU.String()] / float64(len(list))
		}
		return sum
	}
	return mean(r.Night), mean(r.Day)
}

// days is a shard's past until now in which the load rose daily at the time of
// begin: recorded tens of seconds of that part of the day, of any shard, for all
// got the same load.
func (r *Recording) days(begin, now time.Time, seed uint64) iter.Seq[*profile.Point] {
	rng := rand.New(rand.NewPCG(seed, 11))
	one := func(list []Means) Means { return list[rng.IntN(len(list))] }
	return func(yield func(*profile.Point) bool) {
		for at := now.Add(-past).Truncate(grid); at.Add(grid).Before(now); at = at.Add(grid) {
			in := (at.Sub(begin)%(24*time.Hour) + 24*time.Hour) % (24 * time.Hour)
			var m Means
			switch {
			case in < ramp:
				m = one(r.Rise[in/grid])
			case in < dayLasts:
				m = one(r.Day)
			default:
				m = one(r.Night)
			}
			if !yield(pointOf(at, m)) {
				return
			}
		}
	}
}

func pointOf(at time.Time, m Means) *profile.Point {
	pt := &profile.Point{Start: at, Step: grid, Covered: grid}
	for name, v := range m {
		if s, ok := profile.SignalNamed(name); ok {
			pt.Has = pt.Has.With(s)
			pt.Mean[s] = float32(v)
		}
	}
	return pt
}

// teach gives the forecasters of a shard that past.
func (r *Recording) teach(path, key string, begin, now time.Time, seed uint64) error {
	if err := forecasts.Teach(path, key, forecasts.Labels{Workload: workload}, r.days(begin, now, seed)); err != nil {
		return fmt.Errorf("the past of %s: %w", key, err)
	}
	return nil
}
