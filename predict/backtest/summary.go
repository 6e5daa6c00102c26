package backtest

import (
	"cmp"
	"slices"
)

// Summary is the median over a group's series.
type Summary struct {
	Group    string             `json:"group"`
	Target   string             `json:"target"`
	HorizonS float64            `json:"horizon_s"`
	Model    string             `json:"model"`
	Series   int                `json:"series"`
	MAE      float64            `json:"mae"`
	MASE     float64            `json:"mase"`
	Pinball  map[string]float64 `json:"pinball"`
	Coverage map[string]float64 `json:"coverage"`
}

// Summarise takes medians over the reports of each group. Order: group as
// first met, value before peak, horizon, model as in Models.
func Summarise(reports []SeriesReport, group func(*SeriesReport) string) []Summary {
	type key struct {
		group, target int
		horizon       float64
		model         int
	}
	models := Models()
	var groups []string
	found := map[key][]*Result{}
	for i := range reports {
		name := group(&reports[i])
		g := slices.Index(groups, name)
		if g < 0 && len(reports[i].Results) > 0 {
			g = len(groups)
			groups = append(groups, name)
		}
		for j := range reports[i].Results {
			r := &reports[i].Results[j]
			target := 0
			if r.Target == "peak" {
				target = 1
			}
			k := key{g, target, r.HorizonS, slices.Index(models, r.Model)}
			found[k] = append(found[k], r)
		}
	}
	keys := make([]key, 0, len(found))
	for k := range found {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int {
		return cmp.Or(a.group-b.group, a.target-b.target, cmp.Compare(a.horizon, b.horizon), a.model-b.model)
	})
	out := make([]Summary, 0, len(keys))
	for _, k := range keys {
		rs := found[k]
		of := func(f func(*Result) float64) float64 {
			v := make([]float64, len(rs))
			for i, r := range rs {
				v[i] = f(r)
			}
			return median(v)
		}
		s := Summary{
			Group: groups[k.group], Target: rs[0].Target, HorizonS: k.horizon, Model: rs[0].Model, Series: len(rs),
			MAE: of(func(r *Result) float64 { return r.MAE }), MASE: of(func(r *Result) float64 { return r.MASE }),
			Pinball: map[string]float64{}, Coverage: map[string]float64{},
		}
		for _, q := range []string{"0.5", "0.9", "0.95"} {
			s.Pinball[q] = of(func(r *Result) float64 { return r.Pinball[q] })
			if q != "0.5" {
				s.Coverage[q] = of(func(r *Result) float64 { return r.Coverage[q] })
			}
		}
		out = append(out, s)
	}
	return out
}

func median(v []float64) float64 {
	slices.Sort(v)
	n := len(v)
	if n%2 == 1 {
		return v[n/2]
	}
	return (v[n/2-1] + v[n/2]) / 2
}
