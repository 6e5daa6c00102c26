package backtest

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tranship/tranship/predict"
)

var start = time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)

// series of n cells of 5 minutes; a NaN is a gap.
func series(n int, gen func(i int) float64) Series {
	s := Series{File: "made/up.csv", Column: "load"}
	for i := range n {
		if v := gen(i); v == v {
			s.Times = append(s.Times, start.Add(time.Duration(i)*5*time.Minute))
			s.Values = append(s.Values, v)
		}
	}
	return s
}

func noisyDay(seed uint64) func(int) float64 {
	rng := rand.New(rand.NewPCG(seed, seed))
	return func(i int) float64 {
		v := 50 + 20*math.Sin(2*math.Pi*float64(i)/288) + 3*rng.NormFloat64()
		if rng.IntN(40) == 0 {
			return math.NaN()
		}
		return v
	}
}

func TestReadTakesEveryTimeFormatAndGaps(t *testing.T) {
	for name, times := range map[string][2]string{
		"unix seconds":        {"1375308176", "1375308476"},
		"fractions of them":   {"1375308176.5", "1375308476.5"},
		"RFC 3339":            {"2013-07-31T22:02:56Z", "2013-07-31T22:07:56Z"},
		"a date and a time":   {"2013-07-31 22:02:56", "2013-07-31 22:07:56"},
		"rows out of order":   {"1375308476", "1375308176"},
		"years before 1970":   {"-1375308476", "-1375308176"},
		"seconds from a zero": {"0", "300"},
	} {
		t.Run(name, func(t *testing.T) {
			text := "time,cpu,mem\n" + times[0] + ",1,\n" + times[1] + ",2.5,NaN\n"
			got, err := Read(strings.NewReader(text), "x.csv")
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != 2 || got[0].Column != "cpu" || len(got[0].Values) != 2 || len(got[1].Values) != 0 {
				t.Fatalf("%+v", got)
			}
			if d, err := got[0].Step(); err != nil || d != 5*time.Minute {
				t.Fatalf("step %v, %v", d, err)
			}
		})
	}
}

func TestReadRefusesWhatIsNotASeries(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":             "",
		"a single column":     "time\n1\n",
		"a word for a time":   "time,v\nnoon,1\n",
		"a word for a number": "time,v\n1,much\n",
		"infinity":            "time,v\n1,Inf\n",
		"a ragged row":        "time,v\n1,2,3\n",
		"a time beyond time":  "time,v\n1e18,2\n",
		"a year out of range": "time,v\n0001-01-01T00:00:00Z,2\n",
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := Read(strings.NewReader(text), "x.csv"); err == nil {
				t.Fatalf("read %+v", got)
			}
		})
	}
}

func FuzzRead(f *testing.F) {
	f.Add("time,a,b\n1,2,3\n4,,5\n")
	f.Add("time,a\n2013-07-31 22:02:56,1e300\n2013-07-31T22:02:56Z,-1\n")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := Read(strings.NewReader(text), "x.csv")
		if err != nil {
			return
		}
		for i := range got {
			s := &got[i]
			for j := 1; j < len(s.Times); j++ {
				if s.Times[j].Before(s.Times[j-1]) {
					t.Fatal("times go back")
				}
			}
			if len(s.Values) > 1 && s.Times[len(s.Times)-1].Sub(s.Times[0]) < 1000*time.Hour {
				_, _ = s.grid() // whatever it is, no panic
			}
		}
	})
}

func TestSamplesHalveTheSeriesByName(t *testing.T) {
	held := 0
	for i := range 1000 {
		s := Series{File: "some/where/load.csv", Column: "vm" + strconv.Itoa(i)}
		moved := Series{File: "load.csv", Column: s.Column, Values: []float64{1}}
		if s.Sample() != moved.Sample() {
			t.Fatalf("%s changed its sample with its folder or its values", s.Column)
		}
		if Development.Includes(&s) == Holdout.Includes(&s) || !Everything.Includes(&s) {
			t.Fatalf("%s is in both samples or in neither", s.Column)
		}
		if Holdout.Includes(&s) {
			held++
		}
	}
	if held < 450 || held > 550 {
		t.Errorf("%d of 1000 series are held out", held)
	}
}

func TestGridAveragesCellsAndKeepsGaps(t *testing.T) {
	s := Series{}
	for _, x := range []struct{ minute, v float64 }{{0, 1}, {5, 2}, {6, 4}, {10, 5}, {25, 7}, {30, 8}, {35, 9}} {
		s.Times = append(s.Times, start.Add(time.Duration(x.minute*float64(time.Minute))))
		s.Values = append(s.Values, x.v)
	}
	g, err := s.grid()
	if err != nil {
		t.Fatal(err)
	}
	want := []float64{1, 3, 5, math.NaN(), math.NaN(), 7, 8, 9}
	if g.step != 5*time.Minute || len(g.v) != len(want) {
		t.Fatalf("%+v", g)
	}
	for i := range want {
		if g.v[i] != want[i] && !(want[i] != want[i] && g.v[i] != g.v[i]) {
			t.Errorf("cell %d: %g, want %g", i, g.v[i], want[i])
		}
	}
}

func TestOutcomesAreThoseAfterTheOrigin(t *testing.T) {
	nan := math.NaN()
	o := newOutcome(0, 3, []float64{9, 1, 2, 3, nan, nan, 4, nan})
	for i, want := range []struct{ value, peak float64 }{{3, 3}, {nan, 3}, {nan, nan}, {4, nan}, {nan, nan}, {nan, nan}, {nan, nan}, {nan, nan}} {
		same := func(a, b float64) bool { return a == b || a != a && b != b }
		if !same(o.value[i], want.value) || !same(o.peak[i], want.peak) {
			t.Errorf("origin %d: value %g peak %g, want %+v", i, o.value[i], o.peak[i], want)
		}
	}
}

func TestScaleIsSeasonalFromFiveDays(t *testing.T) {
	saw := func(i int) float64 { return float64(i % 288) }
	for name, c := range map[string]struct {
		days int
		want float64
	}{
		"six days: as a day ago":   {6, 0},
		"four days: as a step ago": {4, 1.497},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := (&Series{}).grid(); err == nil {
				t.Fatal("an empty series has a grid")
			}
			s := series(288*c.days, saw)
			g, err := s.grid()
			if err != nil {
				t.Fatal(err)
			}
			r := &run{g: g, half: len(g.v) / 2}
			if got := r.scale(); math.Abs(got-c.want) > 0.01 {
				t.Errorf("scale %g, want %g", got, c.want)
			}
		})
	}
}

// tell runs one model over a series and returns its forecasts by origin.
func forecasts(t *testing.T, s Series, model string) map[[3]int]quantiles {
	t.Helper()
	g, err := s.grid()
	if err != nil {
		t.Fatal(err)
	}
	r := &run{ctx: context.Background(), g: g, half: len(g.v) / 2, stride: 1}
	for _, h := range predict.DefaultHorizons() {
		r.lanes = append(r.lanes, newOutcome(h, int(h/g.step), g.v))
	}
	out := map[[3]int]quantiles{}
	keep := func(lane, target, origin int, f quantiles) { out[[3]int{lane, target, origin}] = f }
	if model == Tranship {
		err = r.forecaster(keep)
	} else {
		err = r.baseline(model, keep)
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPlantedFutureChangesNoForecastBeforeIt(t *testing.T) {
	const n, planted = 288 * 8, 288 * 6
	plain := series(n, noisyDay(3))
	changed := Series{File: plain.File, Column: plain.Column, Times: plain.Times, Values: append([]float64(nil), plain.Values...)}
	for i, at := range changed.Times {
		if !at.Before(start.Add(planted * 5 * time.Minute)) {
			changed.Values[i] = 1e6 + float64(i)
		}
	}
	for _, model := range Models() {
		t.Run(model, func(t *testing.T) {
			a, b := forecasts(t, plain, model), forecasts(t, changed, model)
			before, after := 0, 0
			for k, f := range a {
				if k[2] < planted {
					if before++; b[k] != f {
						t.Fatalf("lane %d target %d origin %d: %v became %v", k[0], k[1], k[2], f, b[k])
					}
				} else if b[k] != f {
					after++
				}
			}
			if before == 0 || after == 0 {
				t.Fatalf("%d forecasts before the planted future, %d changed after it: the test tests nothing", before, after)
			}
		})
	}
}

func TestEveryModelIsMeasuredAndTheForecasterIsNoWorse(t *testing.T) {
	type key struct {
		target  string
		horizon float64
		model   string
	}
	// Five test days have five daily peaks: one series says little of them.
	const seeds = 8
	mase := map[key]float64{}
	var reports []SeriesReport
	for seed := range uint64(seeds) {
		report, err := Run(context.Background(), series(288*10, noisyDay(seed)), Options{Stride: 3})
		if err != nil || report.Skipped != "" {
			t.Fatal(err, report.Skipped)
		}
		if want := len(Models()) * 4 * 2; len(report.Results) != want {
			t.Fatalf("%d results, want %d", len(report.Results), want)
		}
		for _, r := range report.Results {
			if r.Origins == 0 || r.MASE <= 0 || r.Pinball["0.95"] <= 0 {
				t.Errorf("%s %s %v: %+v", r.Model, r.Target, r.HorizonS, r)
			}
			mase[key{r.Target, r.HorizonS, r.Model}] += r.MASE / seeds
		}
		reports = append(reports, report)
	}
	for k, own := range mase {
		if k.model != Tranship {
			continue
		}
		// The best of seven is the best by some luck too.
		for _, model := range baselines {
			if other := mase[key{k.target, k.horizon, model}]; own > 1.1*other {
				t.Errorf("%s %v: %.3f, %s %.3f", k.target, k.horizon, own, model, other)
			}
		}
	}
	sum := Summarise(reports, func(*SeriesReport) string { return "g" })
	if len(sum) != len(reports[0].Results) || sum[0].Model != Tranship || sum[0].Target != "value" || sum[0].Series != seeds {
		t.Errorf("summary: %d rows, first %+v", len(sum), sum[0])
	}
}

func TestWhatCannotBeMeasuredIsSkipped(t *testing.T) {
	for name, s := range map[string]Series{
		"one sample":          series(1, func(int) float64 { return 1 }),
		"a constant":          series(3000, func(int) float64 { return 1 }),
		"two cells":           series(2, func(i int) float64 { return float64(i) }),
		"samples at one time": {Times: []time.Time{start, start}, Values: []float64{1, 2}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := Run(context.Background(), s, Options{})
			if err != nil || r.Skipped == "" || r.Results == nil {
				t.Fatalf("%+v, %v", r, err)
			}
		})
	}
}

func TestCancellationIsAnError(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Run(ctx, series(3000, noisyDay(1)), Options{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
}

func TestUnknownModelIsAnError(t *testing.T) {
	if _, err := Run(context.Background(), series(3000, noisyDay(1)), Options{Models: []string{"oracle"}}); err == nil {
		t.Fatal("ran")
	}
}

// traces is the folder with recorded loads, which are not part of the project.
func traces(t *testing.T) string {
	dir := os.Getenv("TRANSHIP_TRACES")
	if dir == "" {
		dir = "../../../shared/traces"
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skipf("needs the recorded loads: set TRANSHIP_TRACES (%v)", err)
	}
	return dir
}

func TestRecordedLoadsAreForecastBetterThanByEveryBaseline(t *testing.T) {
	dir := traces(t)
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	// The smallest folder stands for all here; `tranship backtest` measures
	// the rest.
	files, err := filepath.Glob(filepath.Join(dir, "nab", "*.csv"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no files in %s: %v", dir, err)
	}
	var reports []SeriesReport
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		all, err := Read(f, file)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			r, err := Run(context.Background(), s, Options{Horizons: []time.Duration{5 * time.Minute, 15 * time.Minute, time.Hour}})
			if err != nil {
				t.Fatal(err)
			}
			reports = append(reports, r)
			var own, naive float64
			for _, x := range r.Results {
				if x.Target == "value" && x.HorizonS == 300 {
					switch x.Model {
					case Tranship:
						own = x.MAE
					case "naive":
						naive = x.MAE
					}
				}
			}
			if own > 1.1*naive {
				t.Errorf("%s: mean absolute error %g, that of \"as now\" %g", file, own, naive)
			}
		}
	}
	own := map[float64]Summary{}
	for _, s := range Summarise(reports, func(*SeriesReport) string { return "nab" }) {
		if s.Target != "value" {
			continue
		}
		if s.Model == Tranship {
			own[s.HorizonS] = s
			if c := s.Coverage["0.95"]; c < 0.93 || c > 0.97 {
				t.Errorf("%v s: %.3f of the outcomes below the 95 %% bound", s.HorizonS, c)
			}
			continue
		}
		if o := own[s.HorizonS]; o.MASE > s.MASE {
			t.Errorf("%v s: MASE %.3f, %s has %.3f", s.HorizonS, o.MASE, s.Model, s.MASE)
		}
	}
}
