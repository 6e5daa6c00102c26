package backtest

import (
	"context"
	"fmt"
	"math"
	"time"
)

var baselines = []string{"naive", "seasonal-naive", "moving-average", "ses", "holt-winters", "vpa-p95", "n-sigma"}

// tuneOrigins of the training half are enough to choose a setting.
const tuneOrigins = 2000

// settings are what the training half chooses among, for each horizon and
// target by itself: the baselines get every advantage.
func (r *run) settings(name string) ([]func() baseline, error) {
	day := max(2, int(math.Round(float64(24*time.Hour)/float64(r.g.step))))
	hs := make([]int, len(r.lanes))
	for i := range hs {
		hs[i] = r.lanes[i].cells
	}
	var out []func() baseline
	add := func(f func() baseline) { out = append(out, f) }
	windows := []int{day, 7 * day}
	for _, w := range []int{2, 3, 6, 12, 24, 48, 96, 288, 1440} {
		if w < r.half {
			windows = append(windows, w)
		}
	}
	switch name {
	case "naive":
		add(func() baseline { return newNaive(hs) })
	case "seasonal-naive":
		add(func() baseline { return newSeasonalNaive(day, hs) })
	case "moving-average":
		for _, w := range windows {
			add(func() baseline { return &movingAverage{n: w} })
		}
	case "ses":
		for _, a := range []float64{0.003, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9} {
			add(func() baseline { return &ses{alpha: a} })
		}
	case "holt-winters":
		for _, a := range []float64{0.02, 0.1, 0.3, 0.6, 0.9} {
			for _, c := range []float64{0.05, 0.2} {
				for _, b := range []float64{0.01, 0.1} {
					add(func() baseline { return &holtWinters{alpha: a, beta: b, phi: 0.95, gamma: c, day: day} })
				}
			}
		}
	case "vpa-p95":
		top := 0.0
		for _, v := range r.g.v[:r.half] {
			if v > top {
				top = v
			}
		}
		for _, hours := range []float64{1, 6, 24, 72, 168} { // 24 h is the VPA's own
			halfLife := hours * 3600 / r.g.step.Seconds()
			add(func() baseline { return newVPA(halfLife, math.Max(top/1000, 1e-12), hs) })
		}
	case "n-sigma":
		for _, w := range windows {
			add(func() baseline { return &nSigma{movingAverage: movingAverage{n: w}, n: map[sigmaKey]float64{}} })
		}
	default:
		return nil, fmt.Errorf("unknown model %q, there are %v", name, Models())
	}
	return out, nil
}

// baseline tunes a method by its pinball loss on the training half and tells
// its forecasts of the test half.
func (r *run) baseline(name string, tell judge) error {
	settings, err := r.settings(name)
	if err != nil {
		return err
	}
	best := make([][2]int, len(r.lanes))
	if len(settings) > 1 {
		lowest := make([][2]float64, len(r.lanes))
		stride := max(r.stride, r.half/tuneOrigins)
		for i, method := range settings {
			sc := make([][2]score, len(r.lanes))
			// The first quarter of it fills windows and seasons.
			if err := r.pass(method(), r.g.v[:r.half], r.half/4, stride, func(lane, target, origin int, f quantiles) {
				if y := r.lanes[lane].of(target)[origin]; y == y && origin+r.lanes[lane].cells < r.half {
					sc[lane][target].add(y, f)
				}
			}); err != nil {
				return err
			}
			for k := range sc {
				for t := range sc[k] {
					s := &sc[k][t]
					if loss := (s.pinball[0] + s.pinball[1] + s.pinball[2]) / s.n; i == 0 || loss < lowest[k][t] {
						lowest[k][t], best[k][t] = loss, i
					}
				}
			}
		}
	}
	for i, method := range settings {
		used := false
		for k := range best {
			used = used || best[k][0] == i || best[k][1] == i
		}
		if !used {
			continue
		}
		if err := r.pass(method(), r.g.v, r.half, r.stride, func(lane, target, origin int, f quantiles) {
			if best[lane][target] == i {
				tell(lane, target, origin, f)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

// pass feeds v to m and tells its forecasts of every stride-th origin from the
// cell from on. Residuals come from settled forecasts alone.
func (r *run) pass(m baseline, v []float64, from, stride int, tell judge) error {
	own, _ := m.(quantiler)
	if s, ok := m.(*nSigma); ok {
		r.tuneSigma(s)
	}
	past := make([][2]sample, len(r.lanes))
	points := make([][2][]float64, len(r.lanes))
	for k := range points {
		for t := range points[k] {
			points[k][t] = make([]float64, len(v))
		}
	}
	for i := range v {
		if i%1024 == 0 && r.ctx.Err() != nil {
			return context.Cause(r.ctx)
		}
		m.push(v[i])
		for k := range r.lanes {
			h := r.lanes[k].cells
			for t := range 2 {
				if own == nil {
					if o := i - h; o >= 0 && (o-from)%stride == 0 {
						if y := r.lanes[k].of(t)[o]; y == y {
							past[k][t].add(y - points[k][t][o])
						}
					}
				}
				if (i-from)%stride != 0 {
					continue
				}
				point := m.point(h, t == 1)
				points[k][t][i] = point
				if i < from {
					continue
				}
				f := quantiles{point}
				for j := 1; j < len(f); j++ {
					if own != nil {
						f[j] = own.quantile(h, t == 1, Quantiles[j])
					} else {
						f[j] = point + past[k][t].quantile(Quantiles[j])
					}
				}
				tell(k, t, i, f)
			}
		}
	}
	return nil
}

// tuneSigma sets n to what would have held each quantile on the training half.
func (r *run) tuneSigma(m *nSigma) {
	train := &nSigma{movingAverage: movingAverage{n: m.movingAverage.n}}
	z := make([][2]sample, len(r.lanes))
	stride := max(1, r.half/tuneOrigins)
	for i := range r.half {
		train.push(r.g.v[i])
		sd := train.sigma()
		if i%stride != 0 || sd == 0 {
			continue
		}
		mean := train.movingAverage.point(0, false)
		for k := range r.lanes {
			if i+r.lanes[k].cells >= r.half {
				continue
			}
			for t := range 2 {
				if y := r.lanes[k].of(t)[i]; y == y {
					z[k][t].add((y - mean) / sd)
				}
			}
		}
	}
	for k := range r.lanes {
		for t := range 2 {
			for _, q := range Quantiles {
				m.n[sigmaKey{r.lanes[k].cells, t == 1, q}] = z[k][t].quantile(q)
			}
		}
	}
}
