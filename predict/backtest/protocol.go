// Package backtest measures forecasts on recorded series. It runs the very
// predict.Forecaster that production runs, and the standard methods it has to
// beat. It reads series and returns numbers; it refuses to know where they come
// from and where they go.
//
// A series' way: Read, a regular grid at its median step (mean of a cell, a
// gap stays a gap); the first half trains (the forecaster learns, baselines
// are tuned), the second half tests; every origin of it is forecast from what
// was seen up to there, quantiles from settled forecasts alone; losses are
// divided by the training half's seasonal-naive error; medians over series.
package backtest

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/tranship/tranship/predict"
)

// Quantiles that every model forecasts; the first is the point forecast.
var Quantiles = [...]float64{0.5, 0.9, 0.95}

type quantiles [len(Quantiles)]float64

// Tranship is the name of the forecaster among the models.
const Tranship = "tranship"

// Models in the order of tables: the forecaster, then the baselines.
func Models() []string { return append([]string{Tranship}, baselines...) }

// Options of a run.
type Options struct {
	Horizons []time.Duration // ascending; default predict.DefaultHorizons
	Stride   int             // forecast every so many-th origin; default 1
	Models   []string        // default Models()
}

// Result of one model for one horizon and target. Units: MAE is the series'
// own, the rest is divided by the scale of SeriesReport.
type Result struct {
	Target   string             `json:"target"`
	HorizonS float64            `json:"horizon_s"`
	Model    string             `json:"model"`
	Origins  int                `json:"origins"`
	MAE      float64            `json:"mae"`
	MASE     float64            `json:"mase"`
	Pinball  map[string]float64 `json:"pinball"`
	Coverage map[string]float64 `json:"coverage"`
}

// SeriesReport is what a run found on one series.
type SeriesReport struct {
	File    string   `json:"file"`
	Column  string   `json:"column"`
	StepS   float64  `json:"step_s"`
	N       int      `json:"n"`     // cells of the grid
	Scale   float64  `json:"scale"` // MASE's denominator
	Skipped string   `json:"skipped,omitempty"`
	Results []Result `json:"results"`
}

const (
	// seasonalFrom: with fewer days a day's rhythm was seen twice at most in
	// the training half, and the one-step naive is the yardstick instead.
	seasonalFrom = 5 * 24 * time.Hour
	// peakSeen: a peak counts as observed with half of its cells.
	peakSeen = 2
)

// Run backtests one series. A series on which nothing can be measured is
// reported with Skipped set. Errors: unknown models, impossible options, and
// ctx's.
func Run(ctx context.Context, s Series, o Options) (SeriesReport, error) {
	if o.Horizons == nil {
		o.Horizons = predict.DefaultHorizons()
	}
	o.Stride = max(1, o.Stride)
	if o.Models == nil {
		o.Models = Models()
	}
	report := SeriesReport{File: s.File, Column: s.Column, Results: []Result{}}
	g, err := s.grid()
	if err != nil {
		report.Skipped = err.Error()
		return report, nil
	}
	r := &run{ctx: ctx, g: g, half: len(g.v) / 2, stride: o.Stride}
	report.StepS, report.N = g.step.Seconds(), len(g.v)
	for _, h := range o.Horizons {
		cells := int(math.Round(float64(h) / float64(g.step)))
		if h >= g.step && r.half+cells < len(g.v) && len(r.lanes) < predict.MaxHorizons {
			r.lanes = append(r.lanes, newOutcome(h, cells, g.v))
		}
	}
	report.Scale = r.scale()
	switch {
	case len(r.lanes) == 0:
		report.Skipped = "too short for any horizon"
	case !(report.Scale > 0):
		report.Skipped = "constant in its training half"
	}
	if report.Skipped != "" {
		return report, nil
	}
	for _, name := range o.Models {
		scores := make([][2]score, len(r.lanes))
		judge := func(lane, target, origin int, f quantiles) {
			if y := r.lanes[lane].of(target)[origin]; y == y {
				scores[lane][target].add(y, f)
			}
		}
		if name == Tranship {
			err = r.forecaster(judge)
		} else {
			err = r.baseline(name, judge)
		}
		if err != nil {
			return report, fmt.Errorf("%s: column %s: %w", s.File, s.Column, err)
		}
		for i := range scores {
			for t, target := range []predict.Target{predict.Value, predict.Peak} {
				if sc := &scores[i][t]; sc.n > 0 {
					report.Results = append(report.Results, sc.result(name, target, r.lanes[i].h, report.Scale))
				}
			}
		}
	}
	return report, nil
}

// run is one series under test.
type run struct {
	ctx    context.Context
	g      grid
	half   int // first cell of the test half
	stride int
	lanes  []outcome
}

// judge takes a forecast: lane and target by index, the origin's cell.
type judge func(lane, target, origin int, f quantiles)

// outcome is what a horizon's forecasts are measured against, by origin. NaN
// is not scored.
type outcome struct {
	h     time.Duration
	cells int
	value []float64
	peak  []float64
}

func (o *outcome) of(target int) []float64 {
	if target == int(predict.Peak) {
		return o.peak
	}
	return o.value
}

func newOutcome(h time.Duration, cells int, v []float64) outcome {
	o := outcome{h: h, cells: cells, value: make([]float64, len(v)), peak: make([]float64, len(v))}
	for i := range v {
		o.value[i], o.peak[i] = math.NaN(), math.NaN()
	}
	top := rollingMax{n: cells}
	seen := 0
	for i := range v {
		top.push(v[i])
		if v[i] == v[i] {
			seen++
		}
		origin := i - cells
		if origin < 0 {
			continue
		}
		if v[origin] == v[origin] {
			seen--
		}
		o.value[origin] = v[i]
		if peakSeen*seen >= cells {
			o.peak[origin] = top.max()
		}
	}
	return o
}

// scale is the training half's mean absolute error of the 24 h seasonal naive,
// or of the one-step naive for a series shorter than seasonalFrom.
func (r *run) scale() float64 {
	lag := max(1, int(math.Round(float64(24*time.Hour)/float64(r.g.step))))
	if time.Duration(len(r.g.v))*r.g.step < seasonalFrom {
		lag = 1
	}
	sum, n := 0.0, 0.0
	for i := lag; i < r.half; i++ {
		if d := math.Abs(r.g.v[i] - r.g.v[i-lag]); d == d {
			sum += d
			n++
		}
	}
	return sum / n
}

// forecaster runs predict's over the series.
func (r *run) forecaster(tell judge) error {
	cfg := predict.Config{Step: r.g.step}
	for _, l := range r.lanes {
		cfg.Horizons = append(cfg.Horizons, l.h)
	}
	f, err := predict.New(cfg)
	if err != nil {
		return err
	}
	for i, v := range r.g.v {
		if i%1024 == 0 && r.ctx.Err() != nil {
			return context.Cause(r.ctx)
		}
		// The cell closes halfway to the next sample; nothing later is known.
		at := r.g.start.Add(time.Duration(i) * r.g.step)
		if v == v {
			f.Observe(at, v)
		}
		f.Advance(at.Add(r.g.step/2 + 1))
		if i < r.half || (i-r.half)%r.stride != 0 {
			continue
		}
		for k := range r.lanes {
			for t, target := range []predict.Target{predict.Value, predict.Peak} {
				q, err := f.Forecast(r.lanes[k].h, target)
				if err != nil {
					return fmt.Errorf("cell %d: forecast %v: %w", i, r.lanes[k].h, err)
				}
				tell(k, t, i, quantiles{q.P50, q.P90, q.P95})
			}
		}
	}
	return nil
}

// score adds up losses.
type score struct {
	n       float64
	abs     float64
	pinball quantiles
	below   quantiles
}

func (s *score) add(y float64, f quantiles) {
	s.n++
	s.abs += math.Abs(y - f[0])
	for i, q := range Quantiles {
		if y >= f[i] {
			s.pinball[i] += q * (y - f[i])
		} else {
			s.pinball[i] += (1 - q) * (f[i] - y)
		}
		// A bound equal to the outcome holds it, rounding aside.
		if y <= f[i]+1e-9*math.Abs(f[i]) {
			s.below[i]++
		}
	}
}

func (s *score) result(model string, target predict.Target, h time.Duration, scale float64) Result {
	r := Result{
		Target: target.String(), HorizonS: h.Seconds(), Model: model, Origins: int(s.n),
		MAE: s.abs / s.n, MASE: s.abs / s.n / scale, Pinball: map[string]float64{}, Coverage: map[string]float64{},
	}
	for i, name := range []string{"0.5", "0.9", "0.95"} {
		r.Pinball[name] = s.pinball[i] / s.n / scale
		if i > 0 {
			r.Coverage[name] = s.below[i] / s.n
		}
	}
	return r
}
