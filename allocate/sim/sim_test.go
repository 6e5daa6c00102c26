package sim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/tranship/tranship/predict/backtest"
)

var update = flag.Bool("update", false, "rewrite the goldens")

func scenario(t testing.TB, name string) *Scenario {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name+".toml"))
	if err != nil {
		t.Fatal(err)
	}
	sc, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return sc
}

func run(t testing.TB, sc *Scenario, policy string) Report {
	t.Helper()
	r, err := Run(t.Context(), sc, policy, Options{})
	if err != nil {
		t.Fatal(err)
	}
	return *r
}

// runAll simulates every policy, and sees that each leaves every shard on one host
// and every host with what its shards want.
func runAll(t testing.TB, sc *Scenario) map[string]Report {
	t.Helper()
	out := map[string]Report{}
	for _, policy := range Policies() {
		specs, err := sc.loads(rand.New(rand.NewPCG(sc.Seed, 1)))
		if err != nil {
			t.Fatal(err)
		}
		w, err := newWorld(sc, specs, policy)
		if err != nil {
			t.Fatal(err)
		}
		p, err := newPolicy(w, policy, Options{})
		if err != nil {
			t.Fatal(err)
		}
		w.landed = p.landed
		r := &runner{w: w, p: p, rng: rand.New(rand.NewPCG(sc.Seed, 2))}
		if err := r.run(t.Context()); err != nil {
			t.Fatal(err)
		}
		seen := make([]int, len(specs))
		for h := range w.hosts {
			x := &w.hosts[h]
			load, memory := 0.0, 0.0
			for _, i := range x.shards {
				seen[i]++
				load += w.want(i)
				memory += w.memoryOf(i)
			}
			for _, f := range w.flights {
				if f.to == h {
					memory += w.memoryOf(f.shard)
				}
			}
			if diff := load - x.load; diff > 1e-6 || diff < -1e-6 {
				t.Errorf("%s: %s has a load of %v, its shards of %v", policy, x.name, x.load, load)
			}
			if diff := memory - x.used; diff > 1 || diff < -1 || x.used > x.mem {
				t.Errorf("%s: %s has %v of %v bytes in use, its shards %v", policy, x.name, x.used, x.mem, memory)
			}
		}
		for i, n := range seen {
			if n != 1 {
				t.Errorf("%s: shard %d runs %d times", policy, i, n)
			}
		}
		report := w.finish()
		p.finish(report)
		out[policy] = *report
	}
	return out
}

var simulated = map[string]map[string]Report{}

// simulate is runAll of one of testdata's scenarios, once for all tests.
func simulate(t testing.TB, name string) map[string]Report {
	t.Helper()
	if simulated[name] == nil {
		simulated[name] = runAll(t, scenario(t, name))
	}
	return simulated[name]
}

// TestGoldens holds what every policy does to small pools. A change of the
// allocator shows in them: look whether it is what was wanted, then -update.
func TestGoldens(t *testing.T) {
	for _, c := range []struct {
		scenario string
		check    func(t *testing.T, r map[string]Report)
	}{
		{"morning", func(t *testing.T, r map[string]Report) {
			c, ok := Compare([]Report{r[Reactive], r[Tranship], r[Oracle]})
			if !ok || c.AvoidedShare < 0.6 || c.MovesRatio > 0.7 {
				t.Errorf("comparison %+v, %v", c, ok)
			}
		}},
		{"spare", func(t *testing.T, r map[string]Report) {
			if r[Tranship].HostHours > 0.6*r[None].HostHours {
				t.Errorf("%v of %v host-hours in a pool twice as large as it must be", r[Tranship].HostHours, r[None].HostHours)
			}
			if r[Tranship].OverloadHostMinutes > 0 {
				t.Errorf("hosts were emptied into overload: %v min", r[Tranship].OverloadHostMinutes)
			}
		}},
		{"stampede", func(t *testing.T, r map[string]Report) {
			if x := r[Tranship]; x.Moves == 0 || x.OverloadHostMinutes > 0.5*r[None].OverloadHostMinutes {
				t.Errorf("%d moves, %v of %v overloaded minutes", x.Moves, x.OverloadHostMinutes, r[None].OverloadHostMinutes)
			}
			// What nobody foresees is seen as soon as by a threshold.
			if got, most := r[Tranship].OverloadHostMinutes, 1.2*r[Reactive].OverloadHostMinutes; got > most {
				t.Errorf("%v overloaded minutes, more than %v", got, most)
			}
		}},
		{"failure", func(t *testing.T, r map[string]Report) {
			for name, x := range r {
				// Noticed after 15 s, in the next round: at most 1 min for each shard of three hosts.
				if x.DownShardMinutes <= 0 || x.DownShardMinutes > 15 {
					t.Errorf("%s: shards were down for %v min", name, x.DownShardMinutes)
				}
			}
		}},
	} {
		t.Run(c.scenario, func(t *testing.T) {
			r := simulate(t, c.scenario)
			c.check(t, r)
			for _, p := range []string{Tranship, Oracle} {
				if r[p].BeyondRoom != 0 {
					t.Errorf("%s: a target accepted %d moves beyond its room", p, r[p].BeyondRoom)
				}
				if r[p].ThrashShare > 0.01 {
					t.Errorf("%s: thrash is %.1f %% of %d moves", p, 100*r[p].ThrashShare, r[p].Moves)
				}
			}
			var b bytes.Buffer
			var list []Report
			for _, p := range Policies() {
				x := r[p]
				list = append(list, x)
				fmt.Fprintf(&b, "%s: overload %.1f min, under-served %.1f min, moves %d, thrash %d, moved %.1f GB, blackout %.2f s, host-hours %.1f, vetoed %d of %d, beyond room %d\n",
					p, x.OverloadHostMinutes, sum(x.UnderServed), x.Moves, x.Thrash, x.BytesMoved/1e9, x.BlackoutS, x.HostHours, x.Vetoed, x.Asked, x.BeyondRoom)
			}
			b.WriteString(Plot(list, 60))
			golden(t, filepath.Join("testdata", c.scenario+".golden"), b.Bytes())
		})
	}
}

func sum(m map[string]float64) (s float64) {
	for p := '0'; p <= '9'; p++ {
		s += m[string(p)]
	}
	return s
}

func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if runtime.GOARCH != "amd64" {
		return // others fuse multiplications and additions, and round once
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; got:\n%s\nwant:\n%s", path, got, want)
	}
}

func TestEqualSeedsGiveEqualBytes(t *testing.T) {
	sc, first := scenario(t, "stampede"), simulate(t, "stampede")
	for _, p := range Policies() {
		a, _ := json.Marshal(first[p])
		b, _ := json.Marshal(run(t, sc, p))
		if !bytes.Equal(a, b) {
			t.Errorf("%s: two reports from one seed", p)
		}
	}
	a := first[Tranship]
	b, err := Run(t.Context(), sc, Tranship, Options{Seed: 99})
	if err != nil {
		t.Fatal(err)
	}
	if a.Moves == b.Moves && a.BytesMoved == b.BytesMoved {
		t.Error("another seed gives the same report")
	}
}

func TestAHostIsAccountedForAsItWas(t *testing.T) {
	// One host of 4 cores, two shards that want 1 and, for 10 of 60 minutes, 3 each.
	sc, err := Parse([]byte(`
step = "5m"
duration = "1h"
[[hosts]]
count = 1
cpu = 4
memory = "8GB"
power = "g4"
[[shards]]
count = 2
sizes = [{cpu = 2, memory = "1GB"}]
priorities = [0, 9]
pattern = {kind = "spike", base = 0.5, peak = 1.5, at = "20m", for = "10m"}
`))
	if err != nil {
		t.Fatal(err)
	}
	r := run(t, sc, None)
	if r.OverloadHostMinutes != 10 || r.HostHours != 1 || r.Cost != 1 {
		t.Errorf("overload %v min, %v host-hours, cost %v; want 10, 1, 1", r.OverloadHostMinutes, r.HostHours, r.Cost)
	}
	// Weights 1 and 10: the shard of priority 9 gets its 3 cores, the other 1.
	if r.UnderServed["0"] != 10 || r.UnderServed["9"] != 0 {
		t.Errorf("under-served %v", r.UnderServed)
	}
	// Half loaded for 50 minutes at 102 W, full for 10 at 117.
	if want := (102*50 + 117*10) / 60e3; r.EnergyKWh < want*0.999 || r.EnergyKWh > want*1.001 {
		t.Errorf("%v kWh, want %v", r.EnergyKWh, want)
	}
	if want := 10.0 / 60; r.SLATAH < want*0.999 || r.SLATAH > want*1.001 || r.SLAV != 0 {
		t.Errorf("SLATAH %v, SLAV %v; want %v, 0", r.SLATAH, r.SLAV, want)
	}
}

const valid = `
[[hosts]]
count = 2
cpu = 4
memory = "8GB"
[[shards]]
count = 2
sizes = [{cpu = 2, memory = "1GB"}]
pattern = {kind = "flat", base = 0.5}
`

func TestScenariosThatCannotBe(t *testing.T) {
	if _, err := Parse([]byte(valid)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, from, to, says string }{
		{"an unknown key", "count = 2\ncpu", "cuont = 2\ncpu", "cuont"},
		{"no TOML", "[[hosts]]", "[[hosts", "line 2"},
		{"no hosts", "count = 2\ncpu = 4", "count = 0\ncpu = 4", "count 0"},
		{"too many hosts", "count = 2\ncpu = 4", "count = 2000000\ncpu = 4", "count 2000000"},
		{"too many shards", "count = 2\nsizes", "count = 2000000\nsizes", "count 2000000"},
		{"negative CPU", "cpu = 4", "cpu = -4", "cpu -4"},
		{"CPU that is no number", "cpu = 4", "cpu = nan", "cpu NaN"},
		{"infinite CPU", "cpu = 4", "cpu = inf", "cpu +Inf"},
		{"memory without a unit", `"8GB"`, `"8"`, "like 870MB"},
		{"no memory", `"8GB"`, `"0GB"`, "0GB"},
		{"an unknown pattern", `"flat"`, `"sine"`, "sine"},
		{"a negative load", "base = 0.5", "base = -0.5", "base -0.5"},
		{"neither trace nor pattern", `pattern = {kind = "flat", base = 0.5}`, "", "trace or pattern"},
		{"a trace outside the folder", `pattern = {kind = "flat", base = 0.5}`, `trace = "../../etc/passwd"`, "not below"},
		{"a priority of ten", "count = 2\nsizes", "priorities = [10]\ncount = 2\nsizes", "priority 10"},
		{"a step of an hour", "[[hosts]]", "step = \"1h\"\n[[hosts]]", "step 1h"},
		{"rounds that do not divide a step", "[[hosts]]", "round = \"7s\"\n[[hosts]]", "round 7s"},
		{"a year", "[[hosts]]", "duration = \"9000h\"\n[[hosts]]", "duration"},
		{"negative time", "[[hosts]]", "duration = \"-1h\"\n[[hosts]]", "-1h"},
		{"more hosts fail than there are", "[[hosts]]", "[[failures]]\nat = \"1h\"\nhosts = 3\n[[hosts]]", "failure of 3"},
		{"an unknown sample", "[[hosts]]", "sample = \"best\"\n[[hosts]]", "best"},
	} {
		text := strings.Replace(valid, c.from, c.to, 1)
		if text == valid {
			t.Fatalf("%s: nothing was changed", c.name)
		}
		_, err := Parse([]byte(text))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error %v, want one that says %q", c.name, err, c.says)
		}
	}
}

func TestShardsThatFitNowhere(t *testing.T) {
	sc, err := Parse([]byte(strings.Replace(valid, "cpu = 2,", "cpu = 5,", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Run(t.Context(), sc, None, Options{}); err == nil || !strings.Contains(err.Error(), "finds no host") {
		t.Errorf("error %v", err)
	}
	if _, err := Run(t.Context(), sc, "magic", Options{}); err == nil {
		t.Error("a policy that does not exist ran")
	}
}

func TestTracesAreReadOnTheirGrid(t *testing.T) {
	dir := t.TempDir()
	text := "time,a,b\n0,10,\n300,20,\n400,40,50\n900,80,100\n"
	if err := os.WriteFile(filepath.Join(dir, "x.csv"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	sc, err := Parse([]byte(strings.Replace(valid, `pattern = {kind = "flat", base = 0.5}`, `trace = "x.csv"`, 1) + "[traces]\ndir = \"" + dir + "\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := sc.read("x.csv")
	if err != nil {
		t.Fatal(err)
	}
	if want := "[[0.1 0.3 0.3 0.8] [0 0.5 0.5 1]]"; fmt.Sprint(got) != want {
		t.Errorf("%v, want %v", got, want)
	}
	if _, err := Run(t.Context(), sc, None, Options{}); err == nil || !strings.Contains(err.Error(), "4 steps") {
		t.Errorf("a trace of 20 minutes for a day: %v", err)
	}
	sc.Traces.Dir = ""
	if _, err := Run(t.Context(), sc, None, Options{}); !errors.Is(err, ErrTraces) {
		t.Errorf("no folder: %v", err)
	}
	sc.Traces.Dir = filepath.Join(dir, "nowhere")
	if _, err := Run(t.Context(), sc, None, Options{}); !errors.Is(err, ErrTraces) {
		t.Errorf("a folder that is not there: %v", err)
	}
	sc.Traces.Dir = dir
	n := 0
	for _, sample := range []backtest.Sample{backtest.Holdout, backtest.Development} {
		sc.Sample = sample
		all, _ := sc.read("x.csv") // an error: none of two
		n += len(all)
	}
	if n != 2 {
		t.Errorf("the halves have %d series together", n)
	}
}

func TestBuiltinsParse(t *testing.T) {
	for _, name := range Builtins() {
		text, ok := Builtin(name)
		if !ok {
			t.Fatalf("%s is listed and not there", name)
		}
		sc, err := Parse(text)
		if err != nil || sc.Name != name {
			t.Errorf("%s: %v, %v", name, sc.Name, err)
		}
	}
	if _, ok := Builtin("../scenario"); ok {
		t.Error("a path is a builtin")
	}
}

func TestARunEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, scenario(t, "spare"), None, Options{}); err == nil {
		t.Error("a cancelled run succeeded")
	}
}

// TestTargets needs the traces: TRANSHIP_TRACES names their folder. It is the
// holdout half of the Google jobs, on a pool a sixth of the builtin's.
func TestTargets(t *testing.T) {
	dir := os.Getenv("TRANSHIP_TRACES")
	if dir == "" || testing.Short() {
		t.Skip("TRANSHIP_TRACES names the folder of the traces, which are not here")
	}
	text, _ := Builtin("google")
	sc, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	sc.Traces.Dir, sc.Sample = dir, backtest.Holdout
	sc.Warmup, sc.Duration = Duration(120*time.Hour), Duration(48*time.Hour)
	sc.Hosts[0].Count, sc.Shards[0].PerColumn = 23, 4
	r := runAll(t, sc)
	c, ok := Compare([]Report{r[Reactive], r[Tranship], r[Oracle]})
	if !ok || c.AvoidedShare < 0.6 || c.MovesRatio > 0.7 || r[Tranship].ThrashShare > 0.01 || r[Tranship].BeyondRoom > 0 {
		t.Errorf("comparison %+v (%v), thrash %v, beyond room %d", c, ok, r[Tranship].ThrashShare, r[Tranship].BeyondRoom)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(valid))
	for _, name := range Builtins() {
		text, _ := Builtin(name)
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		sc, err := Parse(text)
		if err != nil {
			return
		}
		hosts, shards := 0, 0
		for _, g := range sc.Hosts {
			hosts += g.Count
		}
		for _, g := range sc.Shards {
			shards += g.Count
		}
		if hosts < 1 || hosts > maxHosts || shards > maxShards || sc.steps() < 1 || shards*sc.steps() > maxLoads {
			t.Fatalf("accepted: %d hosts, %d shards, %d steps", hosts, shards, sc.steps())
		}
		// What is accepted and small runs, or says why not.
		if hosts > 20 || shards > 40 || sc.steps() > 50 || sc.Step/sc.Round > 20 {
			return
		}
		sc.Traces.Dir = ""
		for _, p := range Policies() {
			if r, err := Run(t.Context(), sc, p, Options{}); err == nil && !(r.OverloadHostMinutes >= 0) {
				t.Fatalf("%s: %v overloaded minutes", p, r.OverloadHostMinutes)
			}
		}
	})
}
