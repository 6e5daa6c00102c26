package forecasts

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/predict"
)

var begin = time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)

func open(t *testing.T, path string) *Keeper {
	t.Helper()
	k, err := Open(path, "host-1", slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.Close() })
	return k
}

// used is what a shard uses in its i-th ten seconds: two hours' rhythm, and
// something that is not smooth. It reads no block device.
func used(i int) *profile.Point {
	pt := &profile.Point{Start: begin.Add(time.Duration(i) * step), Step: step, Covered: step}
	pt.Has = pt.Has.With(profile.CPU).With(profile.WorkingSet)
	pt.Mean[profile.CPU] = float32(2 + math.Sin(2*math.Pi*float64(i)/720) + 0.2*float64(i*7919%13)/13)
	pt.Mean[profile.WorkingSet] = float32(1e8 + 1e4*float64(i%360))
	return pt
}

// feedAll gives a shard its ten seconds from, inclusive, to, exclusive, at once.
func feedAll(k *Keeper, key string, l Labels, from, to int) {
	for i := from; i < to; i++ {
		k.Offer(key, l, used(i))
		k.take(<-k.queue)
	}
}

// alone is a forecaster that has seen the CPU of the same, but for a gap.
func alone(t *testing.T, to, gapFrom, gapTo int) *predict.Forecaster {
	t.Helper()
	f := newForecaster()
	for i := range to {
		if i >= gapFrom && i < gapTo {
			continue
		}
		f.Observe(used(i).Start.Add(step/2), float64(used(i).Mean[profile.CPU]))
		f.Advance(used(i).Start.Add(step))
	}
	return f
}

// same checks that the forecasts of the shard web are exactly those of a
// forecaster.
func same(t *testing.T, k *Keeper, f *predict.Forecaster) {
	t.Helper()
	for _, h := range horizons()[:4] {
		for _, target := range []predict.Target{predict.Value, predict.Peak} {
			want, err := f.Forecast(h, target)
			if err != nil {
				t.Fatal(err)
			}
			if have, err := k.Forecast("default", "web", profile.CPU, h, target); err != nil || have != want {
				t.Errorf("%v %v: %v %v, want %v", h, target, have, err, want)
			}
		}
	}
}

func TestForecastsSurviveAKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.db")
	k := open(t, path)
	key, l := "default/web", Labels{"acme", "web"}
	// More than an hour of saves, so that the state is written in between.
	for minute := range 75 {
		feedAll(k, key, l, 6*minute, 6*minute+6)
		k.save()
	}
	feedAll(k, key, l, 450, 455) // the last minute, never saved
	same(t, k, alone(t, 455, 0, 0))
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	k = open(t, path)
	feedAll(k, key, l, 460, 480)
	same(t, k, alone(t, 480, 450, 460))
	// An orderly stop loses nothing.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := errors.Join(k.Run(ctx), k.Close()); err != nil {
		t.Fatal(err)
	}
	k = open(t, path)
	feedAll(k, key, l, 480, 481)
	same(t, k, alone(t, 481, 450, 460))
}

func TestForecastsTravelWithAShard(t *testing.T) {
	source := open(t, filepath.Join(t.TempDir(), "f.db"))
	target := open(t, filepath.Join(t.TempDir(), "f.db"))
	key, l := "default/web", Labels{"acme", "web"}
	feedAll(source, key, l, 0, 400)
	source.take(gone{key})
	// The destination has had it for a while before it asks, and saved some.
	feedAll(target, key, l, 402, 420)
	target.save()
	feedAll(target, key, l, 420, 423)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- target.Run(ctx) }()
	state, err := source.State(key)
	if err != nil || state == nil || len(state) > maxShard {
		t.Fatalf("%d bytes, %v", len(state), err)
	}
	if err := target.Adopt(ctx, key, state); err != nil {
		t.Fatal(err)
	}
	same(t, target, alone(t, 423, 400, 402))
	// Asked again, as after a restart of the destination: nothing gets worse.
	if err := target.Adopt(ctx, key, state); err != nil {
		t.Fatal(err)
	}
	if err := target.Adopt(ctx, key, state[:len(state)/2]); !errors.Is(err, errState) {
		t.Errorf("half a state: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	same(t, target, alone(t, 423, 400, 402))
	// From the source's disk too, after it was saved and has left the memory.
	source.save()
	if _, err := source.Forecast("default", "web", profile.CPU, time.Hour, predict.Peak); !errors.Is(err, ErrUnknown) {
		t.Errorf("a shard that left is forecast: %v", err)
	}
	if again, err := source.State(key); err != nil || !slices.Equal(again, state) {
		t.Errorf("%d bytes of state on disk, %d before: %v", len(again), len(state), err)
	}
}

func TestAShardThatWasTaughtKnowsItsPast(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.db")
	key, l := "default/web", Labels{"acme", "web"}
	past := func(order ...int) iter.Seq[*profile.Point] {
		return func(yield func(*profile.Point) bool) {
			for _, i := range order {
				if !yield(used(i)) {
					return
				}
			}
		}
	}
	var all []int
	for i := range 480 {
		all = append(all, i)
	}
	if err := Teach(path, key, l, past(all...)); err != nil {
		t.Fatal(err)
	}
	k := open(t, path)
	feedAll(k, key, l, 480, 481)
	same(t, k, alone(t, 481, 0, 0))
	if err := k.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Teach(path, key, l, past(2, 1)); err == nil {
		t.Error("a past that runs backwards")
	}
	if err := Teach(path, key, l, past()); err == nil {
		t.Error("no past at all")
	}
	// What was refused has changed nothing.
	k = open(t, path)
	feedAll(k, key, l, 480, 481)
	same(t, k, alone(t, 481, 0, 0))
}

// TestAShortLifeTravelsToo: of one that moves in its first minutes the samples do.
func TestPlansAreMadeOfWhatTheForecastersSay(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "forecasts.db"))
	feedAll(k, "default/a", Labels{}, 0, 1500)
	want, err := allocate.Foresee(alone(t, 1500, 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.Outlook("default", "a", profile.CPU)
	if err != nil || got != want || want.Peak[1] <= want.Spans[allocate.Spans-1][1] {
		t.Errorf("%+v, %v, want %+v with a peak beyond the value", got, err, want)
	}
	if at, err := k.Newest("default", "a", profile.CPU); err != nil || !at.Equal(begin.Add(1500*step)) {
		t.Errorf("newest %v, %v", at, err)
	}
	for _, c := range []struct {
		name   string
		signal profile.Signal
		want   error
	}{{"b", profile.CPU, ErrUnknown}, {"a", profile.ReadBytes, ErrSignal}} {
		_, none := k.Outlook("default", c.name, c.signal)
		_, never := k.Newest("default", c.name, c.signal)
		if !errors.Is(none, c.want) || !errors.Is(never, c.want) {
			t.Errorf("%v of %s: %v, %v; want %v", c.signal, c.name, none, never, c.want)
		}
	}
}

func TestAShortLifeTravelsToo(t *testing.T) {
	source := open(t, filepath.Join(t.TempDir(), "f.db"))
	key, l := "default/web", Labels{"acme", "web"}
	feedAll(source, key, l, 0, 4)
	source.save()
	feedAll(source, key, l, 4, 7)
	source.take(gone{key})
	early, err := source.State(key)
	if err != nil {
		t.Fatal(err)
	}
	source.save()
	if n := len(source.alive()); n != 0 {
		t.Errorf("%d shards are in memory", n)
	}
	late, err := source.State(key)
	if err != nil || !slices.Equal(early, late) {
		t.Errorf("%d bytes before it was saved, %d after, %v", len(early), len(late), err)
	}
	target := open(t, filepath.Join(t.TempDir(), "f.db"))
	feedAll(target, key, l, 9, 10)
	if err := target.adopt(key, late); err != nil {
		t.Fatal(err)
	}
	same(t, target, alone(t, 10, 7, 9))
	// Back where it was, before and after that host has saved.
	feedAll(source, key, l, 9, 10)
	same(t, source, alone(t, 10, 7, 9))
	source.take(gone{key})
	feedAll(source, key, l, 10, 11)
	same(t, source, alone(t, 11, 7, 9))
}

func TestAColdShardBorrows(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	for i := range 3 {
		feedAll(k, fmt.Sprintf("default/web-%d", i), Labels{"acme", "web"}, 0, 4320)
	}
	feedAll(k, "default/other", Labels{"else", "db"}, 0, 4320)
	for _, c := range []struct {
		name string
		l    Labels
		from string
	}{
		{"sibling", Labels{"acme", "web"}, scopeWorkload},
		{"cousin", Labels{"acme", "api"}, scopeTenant},
		{"stranger", Labels{}, scopePool},
		// The name of a workload means something to its tenant only.
		{"namesake", Labels{"third", "web"}, scopePool},
	} {
		feedAll(k, "default/"+c.name, c.l, 4320, 4324)
		resp, err := k.Answer(&v1.ForecastRequest{Namespace: "default", Shard: c.name, Signal: "cpu"})
		if err != nil || resp.GetBorrowed() != c.from {
			t.Fatalf("%s borrows from %q, %v", c.name, resp.GetBorrowed(), err)
		}
	}
	// What borrowing is worth: the bound of the hour's peak, all over the rhythm,
	// against that of a shard which knows four samples and nothing else.
	alone, lent := 0.0, 0.0
	for i := 4320; i < 4320+720; i += 40 {
		peak := 0.0
		for j := i + 4; j < i+4+360; j++ {
			peak = max(peak, float64(used(j).Mean[profile.CPU]))
		}
		cold := newForecaster()
		for j := i; j < i+4; j++ {
			cold.Observe(used(j).Start.Add(step/2), float64(used(j).Mean[profile.CPU]))
		}
		cold.Advance(used(i + 4).Start)
		own, err := cold.Forecast(time.Hour, predict.Peak)
		if err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprint("sibling-", i)
		feedAll(k, "default/"+name, Labels{"acme", "web"}, i, i+4)
		q, err := k.Forecast("default", name, profile.CPU, time.Hour, predict.Peak)
		if err != nil {
			t.Fatal(err)
		}
		alone += pinball(own.P95, peak)
		lent += pinball(q.P95, peak)
	}
	t.Logf("loss of the 95 %% bound: alone %.2f, with what siblings lent %.2f", alone, lent)
	if lent > 0.9*alone {
		t.Errorf("loss of the 95 %% bound: alone %.2f, with what siblings lent %.2f", alone, lent)
	}
}

func pinball(q, v float64) float64 { return max(0.95*(v-q), 0.05*(q-v)) }

func TestWhatEndsIsForgotten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f.db")
	k := open(t, path)
	feedAll(k, "default/brief", Labels{}, 0, shortLife-1)
	k.save()
	feedAll(k, "default/long", Labels{}, 0, shortLife)
	feedAll(k, "default/silent", Labels{}, 0, shortLife)
	k.take(gone{"default/brief"})
	k.take(gone{"default/long"})
	k.take(gone{"default/unknown"})
	for range idleSaves + 2 {
		k.save()
	}
	if n := len(k.alive()); n != 0 {
		t.Errorf("%d shards are in memory", n)
	}
	left := func() (out []string) {
		for _, key := range []string{"default/brief", "default/long", "default/silent"} {
			if state, cells, err := k.store.read(key); err != nil {
				t.Fatal(err)
			} else if state != nil || cells != nil {
				out = append(out, key)
			}
		}
		return out
	}
	if have := left(); len(have) != 3 {
		t.Errorf("on disk are %v", have)
	}
	if state, cells, err := k.store.read("default/brief"); err != nil || state != nil || len(cells) != shortLife-1 {
		t.Errorf("of a short life are left %d bytes and %d samples, %v", len(state), len(cells), err)
	}
	for _, c := range []struct {
		after time.Duration
		alive map[string]bool
		want  int
	}{{time.Hour, nil, 3}, {25 * time.Hour, map[string]bool{"default/long": true}, 1}, {25 * time.Hour, nil, 0}} {
		if err := k.store.prune(begin.Add(c.after), c.alive); err != nil {
			t.Fatal(err)
		}
		if have := left(); len(have) != c.want {
			t.Errorf("after %v %v are left", c.after, have)
		}
	}
}

func TestTheDiskIsBounded(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	states := map[string][]byte{}
	for i := range maxEnded + 20 {
		states[fmt.Sprintf("default/s%03d", i)] = encodeShard(&shard{until: begin.Add(time.Duration(i) * time.Second)})
	}
	if err := k.store.write(states, nil); err != nil {
		t.Fatal(err)
	}
	if err := k.store.prune(begin.Add(time.Hour), map[string]bool{"default/s000": true}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"s000": true, "s001": false, "s019": false, "s020": true, "s275": true} {
		if state, _, err := k.store.read("default/" + name); err != nil || (state != nil) != want {
			t.Errorf("%s: %v, %v", name, state != nil, err)
		}
	}
}

func TestAShardOfAnotherWorkloadBeginsAnew(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	feedAll(k, "default/web", Labels{"acme", "web"}, 0, 100)
	k.take(gone{"default/web"})
	feedAll(k, "default/web", Labels{"acme", "web"}, 110, 120) // restarted
	if n := k.shards["default/web"].samples(); n != 110 {
		t.Errorf("%d samples after a restart", n)
	}
	k.take(gone{"default/web"})
	k.save()
	feedAll(k, "default/web", Labels{"acme", "db"}, 130, 140)
	if n := k.shards["default/web"].samples(); n != 10 {
		t.Errorf("%d samples of another workload", n)
	}
}

func TestAWeekAheadNeedsMoreThanAWeek(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	ask := func(ahead time.Duration) (*v1.ForecastResponse, error) {
		return k.Answer(&v1.ForecastRequest{Namespace: "default", Shard: "web", Signal: "cpu", AheadMs: ahead.Milliseconds(), Points: 10})
	}
	feedAll(k, "default/web", Labels{}, 0, 100)
	resp, err := ask(24 * time.Hour)
	if err != nil || len(resp.GetHorizons()) != 8 || len(resp.GetPath()) != 10 {
		t.Fatalf("%v %v", resp, err)
	}
	if _, err := ask(week); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("a week ahead from a quarter of an hour: %v", err)
	}
	feedAll(k, "default/web", Labels{}, 100, 9*8640)
	resp, err = ask(week)
	if err != nil || len(resp.GetHorizons()) != 10 {
		t.Fatalf("%v %v", resp, err)
	}
	// It repeats every two hours, and a week is a multiple of that.
	last := resp.GetPath()[9]
	want := float64(used(9*8640 - 1).Mean[profile.CPU])
	if q := last.GetQuantiles(); math.Abs(q.GetP50()-want) > 0.5 || q.GetP95() < want-0.2 {
		t.Errorf("in a week %v, want about %.2f", q, want)
	}
}

func TestQuestionsThatHaveNoAnswer(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	feedAll(k, "default/web", Labels{}, 0, 10)
	for name, c := range map[string]struct {
		req  *v1.ForecastRequest
		code connect.Code
	}{
		"an unknown shard":           {&v1.ForecastRequest{Namespace: "default", Shard: "db", Signal: "cpu"}, connect.CodeNotFound},
		"another namespace":          {&v1.ForecastRequest{Namespace: "other", Shard: "web", Signal: "cpu"}, connect.CodeNotFound},
		"a signal of no name":        {&v1.ForecastRequest{Namespace: "default", Shard: "web", Signal: "joy"}, connect.CodeInvalidArgument},
		"one that nobody forecasts":  {&v1.ForecastRequest{Namespace: "default", Shard: "web", Signal: "round_trip"}, connect.CodeInvalidArgument},
		"one that was not measured":  {&v1.ForecastRequest{Namespace: "default", Shard: "web", Signal: "read_bytes"}, connect.CodeFailedPrecondition},
		"a month ahead":              {&v1.ForecastRequest{Namespace: "default", Shard: "web", Signal: "cpu", AheadMs: 30 * 86400e3}, connect.CodeInvalidArgument},
		"the past":                   {&v1.ForecastRequest{Namespace: "default", Shard: "web", Signal: "cpu", AheadMs: -1}, connect.CodeInvalidArgument},
		"more points than are drawn": {&v1.ForecastRequest{Namespace: "default", Shard: "web", Signal: "cpu", Points: 1 << 30}, connect.CodeInvalidArgument},
	} {
		if _, err := k.Answer(c.req); connect.CodeOf(err) != c.code {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMetricsAreWellNamedAndBounded(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	feedAll(k, "default/web", Labels{"acme", "web"}, 0, 1000)
	feedAll(k, "other/web", Labels{"acme", "web"}, 0, 10)
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(k.NewCollector())
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if problems, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
	series := map[string]int{}
	for _, f := range families {
		series[f.GetName()] = len(f.GetMetric())
	}
	// Two shards, three horizons, two quantiles.
	if series["tranship_shard_forecast_cpu_cores"] != 12 || series["tranship_forecast_held_ratio"] != 2 {
		t.Errorf("%v", series)
	}
}

func TestAQueueThatIsFullLosesAndSaysSo(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	for i := range queueLength + 3 {
		k.Offer("default/web", Labels{}, used(i))
	}
	k.End("default/web")
	if k.counts.dropped != 3 {
		t.Errorf("%v dropped", k.counts.dropped)
	}
}

// TestManyAtOnce is for the race detector.
func TestManyAtOnce(t *testing.T) {
	k := open(t, filepath.Join(t.TempDir(), "f.db"))
	reg := prometheus.NewRegistry()
	reg.MustRegister(k.NewCollector())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	var wg sync.WaitGroup
	for s := range 4 {
		key := fmt.Sprintf("default/s%d", s)
		wg.Go(func() {
			for i := range 200 {
				k.Offer(key, Labels{}, used(i))
			}
		})
		wg.Go(func() {
			for range 20 {
				_, _ = k.Forecast("default", strings.TrimPrefix(key, "default/"), profile.CPU, time.Hour, predict.Peak)
				if _, err := reg.Gather(); err != nil {
					t.Error(err)
				}
				if _, err := k.State(key); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for s := range 4 {
		if n := k.shards[fmt.Sprintf("default/s%d", s)].samples(); n != 200 {
			t.Errorf("shard %d has %d samples", s, n)
		}
	}
}
