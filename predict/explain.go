package predict

import (
	"cmp"
	"slices"
	"time"
)

// Explanation says what a forecast rests on.
type Explanation struct {
	Samples  int64         // observed cells
	Step     time.Duration // of the grid
	Season   time.Duration // 24 h where the members that know the time of day are believed, else 0
	Shifted  bool          // a run outside everything remembered is going on
	Horizons []HorizonExplanation
}

// HorizonExplanation is the part of one horizon and target.
type HorizonExplanation struct {
	Horizon  time.Duration
	Target   Target
	Settled  int64   // forecasts whose outcome is known
	Error    float64 // recent mean absolute error, in the unit of the samples
	Members  []Weight
	Ways     []Weight // to the 95 % quantile
	Cover90  float64  // recent share of outcomes below the quantile as issued
	Cover95  float64
	AsNow    bool // nothing did better: the median is the last value, a far peak's that of the last h
	seasonal float64
}

// Weight of something in a forecast; weights of one kind sum to one.
type Weight struct {
	Name   string
	Weight float64
}

// seasonalMembers know the time of day.
var seasonalMembers = [2][]int{{7, 8, 10, 11, 12, 13, 15}, {7, 10, 11, 12, 13}}

var wayNames = [ways]string{"residuals", "scaled-residuals", "outcomes", "level"}

// Samples is how many cells were observed.
func (f *Forecaster) Samples() int64 { return f.hist.cells }

// Settled is how many forecasts of a configured horizon have met their outcome;
// 0 for another horizon.
func (f *Forecaster) Settled(h time.Duration) int64 {
	for _, l := range f.lanes {
		if l.h == h {
			return int64(l.of[Value].n)
		}
	}
	return 0
}

// Held95 is the recent share of outcomes of a configured horizon below the 95 %
// bound as issued; 0 for another horizon.
func (f *Forecaster) Held95(h time.Duration, t Target) float64 {
	for _, l := range f.lanes {
		if l.h == h {
			return l.half(t).cover95
		}
	}
	return 0
}

// Explain describes the current state. It allocates.
func (f *Forecaster) Explain() Explanation {
	x := Explanation{Samples: f.hist.cells, Step: f.cfg.Step, Shifted: f.hist.run > 0}
	seasonal, n := 0.0, 0.0
	for _, l := range f.lanes {
		for t := Value; t <= Peak; t++ {
			h := l.half(t)
			he := HorizonExplanation{
				Horizon: l.h, Target: t, Settled: int64(h.n), Error: h.errSlow,
				Cover90: h.cover90, Cover95: h.cover95, AsNow: h.guarded(l.h, t) || l.far(t) && h.earned() == 0,
			}
			if h.n > 0 {
				for i, w := range h.members.mix[:h.members.count] {
					he.Members = append(he.Members, Weight{memberNames[t][i], float64(w)})
				}
				for j, w := range h.tails.weight[2] {
					he.Ways = append(he.Ways, Weight{wayNames[j], float64(w)})
				}
				for _, i := range seasonalMembers[t] {
					he.seasonal += float64(h.members.mix[i])
				}
				// The stack knows the time of day as well; its share follows
				// from what the others show.
				if stack := float64(h.members.mix[9]); stack < 1 {
					he.seasonal /= 1 - stack
				}
				if l.h >= 15*time.Minute {
					seasonal += he.seasonal
					n++
				}
			}
			order := func(a, b Weight) int { return cmp.Compare(b.Weight, a.Weight) }
			slices.SortStableFunc(he.Members, order)
			slices.SortStableFunc(he.Ways, order)
			x.Horizons = append(x.Horizons, he)
		}
	}
	if n > 0 && seasonal/n > 0.5 {
		x.Season = 24 * time.Hour
	}
	return x
}
