package balance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/predict"
)

// rig is one host by hand: what runs, what is forecast, and what is done to it.
type rig struct {
	t     testing.TB
	name  string
	pool  *fakePool
	b     *Balancer
	spare bool         // it may be emptied
	react bool         // by a threshold on the last sample
	at    atomic.Int64 // unix nanoseconds

	mu      sync.Mutex
	facts   Facts
	shards  map[string]*Shard
	curves  map[string]map[profile.Signal]predict.Quantiles
	refuse  map[string]string // by target: what pre-flight says
	volumes []string          // that are here
	resized []string
	moved   []string
	migrate func(name, node string) (*v1.Migration, error)
}

var (
	_ Host      = (*rig)(nil)
	_ Forecasts = (*rig)(nil)
	_ Peers     = (*link)(nil)
)

// fakePool joins rigs; lies are what hosts answer instead of the truth.
type fakePool struct {
	rigs map[string]*rig
	lies map[string]func(*v1.RoomResponse) *v1.RoomResponse
}

// link is the pool as one of its hosts reaches it.
type link struct {
	self string
	pool *fakePool
}

func (l *link) Peers() (out []Peer) {
	for name := range l.pool.rigs {
		if name != l.self {
			out = append(out, Peer{Name: name})
		}
	}
	return out
}

func (l *link) Room(ctx context.Context, node string, req *v1.RoomRequest) (*v1.RoomResponse, error) {
	m, err := l.pool.rigs[node].b.Room(ctx, l.self, req)
	if lie := l.pool.lies[node]; lie != nil && err == nil {
		m = lie(m)
	}
	return m, err
}

func (l *link) Book(_ context.Context, node string, req *v1.BookRequest) (*v1.BookResponse, error) {
	return l.pool.rigs[node].b.Book(l.self, req)
}

func (l *link) Unbook(_ context.Context, node string, req *v1.UnbookRequest) error {
	_, err := l.pool.rigs[node].b.Unbook(l.self, req)
	return err
}

func newPool() *fakePool {
	return &fakePool{rigs: map[string]*rig{}, lies: map[string]func(*v1.RoomResponse) *v1.RoomResponse{}}
}

// add makes a host of 2 CPUs and 8 GiB.
func (p *fakePool) add(t testing.TB, name string, mode Mode) *rig {
	t.Helper()
	r := &rig{
		t: t, name: name, pool: p, shards: map[string]*Shard{},
		curves: map[string]map[profile.Signal]predict.Quantiles{}, refuse: map[string]string{},
		facts: Facts{Name: name, Zone: "a", CPUs: 2, Memory: 8 << 30, Link: 125e6, Arriving: map[allocate.ShardID]bool{}},
	}
	r.pass(time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC).Sub(time.Unix(0, 0)))
	p.rigs[name] = r
	r.open(mode, filepath.Join(t.TempDir(), "balance.db"))
	t.Cleanup(func() {
		r.b.work.Wait()
		if err := r.b.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) open(mode Mode, path string) {
	r.t.Helper()
	var err error
	r.b, err = New(Config{
		Autopilot: mode, Every: 5 * time.Second, Consolidate: r.spare, Reactive: r.react, StorePath: path, Host: r, Forecasts: r, Peers: &link{r.name, r.pool},
		Log: slog.New(slog.DiscardHandler), Now: r.clock,
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// reopen begins anew with what the rig says now.
func (r *rig) reopen() {
	r.t.Helper()
	cfg := r.b.cfg
	if err := r.b.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.open(cfg.Autopilot, cfg.StorePath)
}

// run puts a shard on the host that uses and will use so many CPUs.
func (r *rig) run(name string, cpus float64, labels ...string) *Shard {
	s := &Shard{Namespace: "default", Name: name, Labels: map[string]string{}, Rates: map[string]float64{"cpu": cpus, "working_set": 64 << 20}}
	for i := 0; i < len(labels); i += 2 {
		s.Labels[labels[i]] = labels[i+1]
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.shards[name] = s
	q := func(v float64) predict.Quantiles {
		return predict.Quantiles{P10: v * 0.95, P50: v, P90: v * 1.05, P95: v * 1.07, P99: v * 1.1}
	}
	r.curves[name] = map[profile.Signal]predict.Quantiles{profile.CPU: q(cpus), profile.WorkingSet: q(64 << 20)}
	return s
}

// round lets time pass and every host plan once.
func (p *fakePool) round(t testing.TB, rigs ...*rig) {
	t.Helper()
	for _, r := range rigs {
		r.pass(5 * time.Second)
		r.b.round(t.Context())
	}
}

func (r *rig) clock() time.Time { return time.Unix(0, r.at.Load()).UTC() }

func (r *rig) pass(d time.Duration) { r.at.Add(int64(d)) }

func (r *rig) settle() { r.b.work.Wait() }

func (r *rig) Facts() Facts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.facts
}

func (r *rig) Shards(context.Context) (out []Shard, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.shards {
		out = append(out, *s)
	}
	return out, nil
}

func (r *rig) Resize(_ context.Context, _, name string, cpus float64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.resized = append(r.resized, fmt.Sprintf("%s %.2f", name, cpus))
	r.shards[name].CPULimit = cpus
	return nil
}

func (r *rig) Volumes(_ context.Context, paths []string) []string {
	return slices.DeleteFunc(slices.Clone(paths), func(p string) bool { return !slices.Contains(r.volumes, p) })
}

func (r *rig) Check(_ context.Context, _, _, node string) (string, error) { return r.refuse[node], nil }

// Migrate moves it to the other rig, with what is known of it.
func (r *rig) Migrate(_ context.Context, _, name, node string) (*v1.Migration, error) {
	if r.migrate != nil {
		return r.migrate(name, node)
	}
	r.mu.Lock()
	s, c := r.shards[name], r.curves[name]
	delete(r.shards, name)
	r.moved = append(r.moved, name+" "+node)
	r.mu.Unlock()
	to := r.pool.rigs[node]
	to.mu.Lock()
	defer to.mu.Unlock()
	came := *s
	came.MovedAt, came.LastHost = to.clock(), r.name
	to.shards[name], to.curves[name] = &came, c
	return &v1.Migration{Id: "m-1", Outcome: "done", TotalMs: 900, BlackoutMs: 250, BytesSent: 50 << 20, Rounds: []*v1.Round{
		{N: 1, BytesRaw: 32 << 20, Ms: 400}, {N: 2, BytesRaw: 4 << 20, Ms: 50},
	}}, nil
}

// Newest is that every signal that has a forecast was sampled just now.
func (r *rig) Newest(_, name string, signal profile.Signal) (time.Time, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.curves[name][signal]; !ok {
		return time.Time{}, errors.New("not measured")
	}
	return r.clock().Truncate(10 * time.Second), nil
}

func (r *rig) Outlook(_, name string, signal profile.Signal) (allocate.Outlook, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	q, ok := r.curves[name][signal]
	if !ok {
		return allocate.Outlook{}, errors.New("not measured")
	}
	return allocate.Foresee(always(q))
}

// always is a load of which the same is forecast however far ahead.
type always predict.Quantiles

func (q always) Forecast(time.Duration, predict.Target) (predict.Quantiles, error) {
	return predict.Quantiles(q), nil
}

func (r *rig) plan() *v1.PlanResponse {
	resp, err := (&Handler{r.b}).Plan(r.t.Context(), connect.NewRequest(&v1.PlanRequest{}))
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.Msg
}

func (r *rig) history() []*v1.BalanceDecision {
	resp, err := (&Handler{r.b}).Decisions(r.t.Context(), connect.NewRequest(&v1.DecisionsRequest{}))
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.Msg.GetDecisions()
}

// overloaded is a pool of a host with 2.7 CPUs of work and an empty one.
func overloaded(t *testing.T, mode Mode, labels ...string) (*fakePool, *rig, *rig) {
	t.Helper()
	p := newPool()
	a, b := p.add(t, "host-1", mode), p.add(t, "host-2", mode)
	for _, name := range []string{"web-0", "web-1", "web-2"} {
		a.run(name, 0.9, append([]string{runtime.LabelWorkload, "web"}, labels...)...)
	}
	p.round(t, b) // it has looked at itself
	return p, a, b
}

func TestAdviceIsToldAndNothingMoves(t *testing.T) {
	p, a, b := overloaded(t, Advise)
	for range 3 {
		p.round(t, a, b)
	}
	if len(a.moved)+len(a.resized) > 0 {
		t.Fatalf("it was done: %v %v", a.moved, a.resized)
	}
	plan := a.plan()
	if len(plan.GetDecisions()) == 0 || plan.GetSpans()[0].GetOverload() < 0.99 {
		t.Fatalf("%v", plan)
	}
	d := plan.GetDecisions()[0]
	if d.GetOutcome() != outcomeAdvised || d.GetKind() != kindMove || d.GetTo() != "host-2" || d.GetReason() != string(allocate.Overload) || d.GetRounds() != 3 ||
		!strings.Contains(d.GetWords(), "host-1 is overloaded within") {
		t.Errorf("%v", d)
	}
	if held := b.plan().GetHeld(); len(held) > 0 {
		t.Errorf("advice has room kept: %v", held)
	}
}

func TestAnOverloadedHostMovesAShardWithRoomKeptForIt(t *testing.T) {
	p, a, b := overloaded(t, On)
	held := make(chan []*v1.HeldRoom, 4)
	real := a.Migrate
	a.migrate = func(name, node string) (*v1.Migration, error) {
		held <- b.plan().GetHeld()
		a.migrate = nil
		return real(t.Context(), "default", name, node)
	}
	p.round(t, a)
	a.settle()
	if h := <-held; len(h) != 1 || h[0].GetFrom() != "host-1" || !strings.HasPrefix(h[0].GetShard(), "default/web-") {
		t.Errorf("room at the target while it moves: %v", h)
	}
	if len(a.moved) != 1 {
		t.Fatalf("moved: %v", a.moved)
	}
	p.round(t, b, a)
	if h := b.plan().GetHeld(); len(h) != 0 {
		t.Errorf("room is still kept: %v", h)
	}
	history := a.history()
	d := history[len(history)-1]
	if d.GetOutcome() != outcomeDone || d.GetTo() != "host-2" || d.GetMigrationId() != "m-1" || d.GetReal().GetBlackoutMs() != 250 || d.GetBenefit() <= d.GetPrice() {
		t.Errorf("%v", d)
	}
	// What it cost is what the next is thought to cost: 4 MiB written in 400 ms,
	// half of its memory carried, 80 MiB/s.
	id := shardID("default", strings.Fields(a.moved[0])[0])
	c := a.b.costs
	if dirty, ok := c.dirty(a.clock(), id); !ok || math.Abs(dirty-10*(1<<20)) > 1 || c.share(id) != 0.5 || math.Abs(c.Link-80*(1<<20)) > 1 || c.Fixed != 200*time.Millisecond {
		t.Errorf("costs: %+v", c)
	}
	// The host that it runs on now knows how it writes.
	if dirty, ok := b.b.costs.dirty(b.clock(), id); !ok || math.Abs(dirty-10*(1<<20)) > 1 {
		t.Errorf("the target's costs: %+v", b.b.costs)
	}
	// And it stays there for a while.
	for range 5 {
		p.round(t, a, b)
		a.settle()
	}
	if len(a.moved) != 1 || len(b.moved) != 0 {
		t.Errorf("moved again: %v %v", a.moved, b.moved)
	}
}

func TestATargetWithoutRoomVetoesWhateverItsWordWas(t *testing.T) {
	p, a, b := overloaded(t, On)
	b.run("busy-0", 0.9, runtime.LabelWorkload, "busy")
	b.run("busy-1", 0.9, runtime.LabelWorkload, "busy")
	p.round(t, b)
	p.lies["host-2"] = func(m *v1.RoomResponse) *v1.RoomResponse {
		m.Load, m.Usage, m.Shards = make([]float32, curves), make([]float64, allocate.Resources), 0
		return m
	}
	p.round(t, a)
	a.settle()
	if len(a.moved) != 0 {
		t.Fatalf("moved: %v", a.moved)
	}
	var vetoed *v1.BalanceDecision
	for _, d := range a.history() {
		if d.GetOutcome() == outcomeVetoed {
			vetoed = d
		}
	}
	if vetoed == nil || vetoed.GetAsked()[0].GetCode() != string(allocate.VetoUsage) || !strings.Contains(vetoed.GetDetail(), "host-2 refuses") {
		t.Fatalf("%v", a.history())
	}
	// The same shard is not asked for again at once; the truth gives no target.
	p.lies = nil
	p.round(t, a)
	a.settle()
	last := a.plan().GetDecisions()
	if len(last) == 0 || last[0].GetReason() != string(allocate.NoTarget) || !strings.Contains(last[0].GetWords(), "host-2 has no cpu to spare") {
		t.Errorf("%v", last)
	}
}

func TestWhatPreflightRefusesIsNotMoved(t *testing.T) {
	p, a, b := overloaded(t, On)
	a.refuse["host-2"] = "it uses io_uring"
	for range 4 {
		p.round(t, a, b)
		a.settle()
	}
	if len(a.moved) != 0 {
		t.Fatalf("moved: %v", a.moved)
	}
	h := a.history()
	if d := h[len(h)-1]; d.GetOutcome() != outcomeRefused || !strings.Contains(d.GetDetail(), "io_uring") {
		t.Errorf("%v", d)
	}
	if d := h[0]; d.GetReason() != string(allocate.NotWorth) || !strings.Contains(d.GetWords(), "pre-flight: it uses io_uring") {
		t.Errorf("%v", d)
	}
	if held := b.plan().GetHeld(); len(held) > 0 {
		t.Errorf("room is kept for what cannot come: %v", held)
	}
}

func TestWhoMayNotMoveIsNotMoved(t *testing.T) {
	for name, tt := range map[string]struct {
		labels []string
		change func(*Shard, *rig)
		why    string
	}{
		"pinned":                       {[]string{runtime.LabelPinned, "true"}, nil, "it is pinned"},
		"the workload says off":        {[]string{runtime.LabelAutopilot, "off"}, nil, "its autopilot is off"},
		"the workload wants advice":    {[]string{runtime.LabelAutopilot, "advise"}, nil, ""},
		"outside its windows":          {[]string{runtime.LabelWindows, "02:00-05:00"}, nil, "outside its windows 02:00-05:00"},
		"near another":                 {[]string{runtime.LabelNear, "db"}, nil, "it stays near db"},
		"a label that says nothing":    {[]string{runtime.LabelAutopilot, "yes\x1b[2J"}, nil, "is none of off, advise and on"},
		"a priority that is none":      {[]string{runtime.LabelPriority, "11"}, nil, "not a number from 0 to 9"},
		"another orchestrator's":       {nil, func(s *Shard, _ *rig) { s.Foreign = true }, "belongs to another orchestrator"},
		"migrating":                    {nil, func(s *Shard, _ *rig) { s.Migration = "m-7" }, "migration m-7 has it"},
		"moved a moment ago":           {nil, func(s *Shard, r *rig) { s.MovedAt = r.clock().Add(-time.Minute) }, "it was moved 1m"},
		"its host is being drained":    {nil, func(_ *Shard, r *rig) { r.facts.Draining = true }, "host-1 is being drained"},
		"the only target is cordoned":  {nil, func(_ *Shard, r *rig) { r.pool.rigs["host-2"].facts.Cordoned = true }, "host-2 takes no shards now"},
		"the only target is drained":   {nil, func(_ *Shard, r *rig) { r.pool.rigs["host-2"].facts.Draining = true }, "host-2 takes no shards now"},
		"the only target is elsewhere": {[]string{runtime.LabelZones, "b"}, nil, "host-2 is in another zone"},
		"the spread is full":           {[]string{runtime.LabelSpreadZone, "1", runtime.LabelHostLabels, "disk=ssd"}, nil, "host-2 lacks a label"},
	} {
		t.Run(name, func(t *testing.T) {
			p, a, b := overloaded(t, On, tt.labels...)
			for _, s := range a.shards {
				if tt.change != nil {
					tt.change(s, a)
				}
			}
			p.round(t, b)
			for range 2 {
				p.round(t, a)
				a.settle()
			}
			if len(a.moved) != 0 {
				t.Fatalf("moved: %v", a.moved)
			}
			said := ""
			for _, d := range a.plan().GetDecisions() {
				said += d.GetWords() + "\n"
				if d.GetOutcome() == outcomeVetoed || d.GetOutcome() == outcomeDone {
					t.Errorf("%v", d)
				}
			}
			if !strings.Contains(said, tt.why) || strings.ContainsRune(said, '\x1b') {
				t.Errorf("it says %q, and nothing of %q", said, tt.why)
			}
		})
	}
}

func TestAWorkloadMaySayOnWhereTheHostAdvises(t *testing.T) {
	p, a, b := overloaded(t, Advise)
	a.shards["web-1"].Labels[runtime.LabelAutopilot] = "on"
	for range 2 {
		p.round(t, a, b)
		a.settle()
	}
	if len(a.moved) != 1 || a.moved[0] != "web-1 host-2" {
		t.Errorf("moved: %v", a.moved)
	}
}

func TestOffIsOffForAll(t *testing.T) {
	p, a, b := overloaded(t, Off, runtime.LabelAutopilot, "on")
	p.round(t, a, b)
	a.settle()
	if len(a.moved) != 0 || a.plan().GetAutopilot() != "off" {
		t.Errorf("moved: %v", a.moved)
	}
	for _, d := range a.plan().GetDecisions() {
		if d.GetKind() != kindStay {
			t.Errorf("%v", d)
		}
	}
}

func TestALimitGrowsWithinWhatTheShardMayUse(t *testing.T) {
	for name, tt := range map[string]struct {
		mode    Mode
		most    string
		resized int
		outcome string
	}{
		"on":                      {On, "1.5", 1, outcomeDone},
		"advise":                  {Advise, "1.5", 0, outcomeAdvised},
		"at the most it may have": {On, "0.5", 0, ""},
		"it was given no leeway":  {On, "", 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPool()
			a := p.add(t, "host-1", tt.mode)
			s := a.run("web-0", 0.49, runtime.LabelLimitCPUs, tt.most, runtime.LabelRequestCPUs, "0.2")
			s.CPULimit = 0.5
			s.Rates["throttled"] = 0.3 // it would use more
			p.round(t, a)
			if len(a.resized) != tt.resized {
				t.Fatalf("resized: %v", a.resized)
			}
			if tt.resized > 0 && !(s.CPULimit > 0.6 && s.CPULimit <= 1.5) {
				t.Errorf("to %v", s.CPULimit)
			}
			d := a.plan().GetDecisions()
			if tt.outcome == "" && len(d) > 0 || tt.outcome != "" && (len(d) != 1 || d[0].GetKind() != kindResize || d[0].GetOutcome() != tt.outcome || d[0].GetCpusTo() <= 0.6) {
				t.Errorf("%v", d)
			}
		})
	}
}

func TestAMoveThatFailsIsNotTriedAgainAtOnce(t *testing.T) {
	p, a, b := overloaded(t, On)
	tries := map[string]int{}
	a.migrate = func(name, _ string) (*v1.Migration, error) {
		a.mu.Lock()
		defer a.mu.Unlock()
		tries[name]++
		return &v1.Migration{Id: "m-2", Outcome: "aborted", Code: "link", Reason: "the link was cut"}, nil
	}
	for range 6 {
		p.round(t, a, b)
		a.settle()
	}
	for name, n := range tries {
		if n != 1 {
			t.Errorf("%s was tried %d times", name, n)
		}
	}
	if len(tries) == 0 {
		t.Fatal("nothing was tried")
	}
	if held := b.plan().GetHeld(); len(held) > 0 {
		t.Errorf("room is still kept: %v", held)
	}
	h := a.history()
	if d := h[len(h)-1]; d.GetOutcome() != outcomeFailed || d.GetDetail() != "the link was cut" {
		t.Errorf("%v", d)
	}
}

// BenchmarkRound is a round whose samples are all new, on a host that should shed
// shards, as `tranship_balance_plan_seconds_total` counts it: 10 shards are a
// host's share of 50,000 on 5,000.
func BenchmarkRound(b *testing.B) {
	for _, shards := range []int{10, 100} {
		b.Run(fmt.Sprint(shards), func(b *testing.B) {
			p := newPool()
			a := p.add(b, "host-0", Advise)
			for i := range 12 { // more than are asked
				r := p.add(b, fmt.Sprintf("host-%d", i+1), Advise)
				r.run(fmt.Sprintf("there-%d", i), 1.5)
				p.round(b, r)
			}
			for i := range shards {
				a.run(fmt.Sprintf("web-%d", i), 3/float64(shards), runtime.LabelWorkload, fmt.Sprintf("w-%d", i%7))
			}
			var planned time.Duration
			for b.Loop() {
				a.pass(5 * time.Second) // and as much again in the round: new samples
				before := a.b.counts.planned
				p.round(b, a)
				planned += a.b.counts.planned - before
			}
			if len(a.history()) == 0 {
				b.Error("there was nothing to plan")
			}
			b.ReportMetric(float64(planned.Microseconds())/1e3/float64(b.N), "plan-ms/op")
		})
	}
}

func TestMetricsHaveBoundedLabels(t *testing.T) {
	p, a, b := overloaded(t, On)
	p.round(t, a, b)
	a.settle()
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(a.b.NewCollector())
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, f := range families {
		seen[f.GetName()] = true
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if strings.Contains(l.GetValue(), "web") || strings.Contains(l.GetValue(), "host") {
					t.Errorf("%s has label %v", f.GetName(), l)
				}
			}
		}
	}
	for _, want := range []string{"tranship_balance_decisions_total", "tranship_balance_overload_probability", "tranship_balance_rounds_total"} {
		if !seen[want] {
			t.Errorf("no %s", want)
		}
	}
}

func TestAHostThatCanBeSparedIsEmptiedOnceAndStaysSo(t *testing.T) {
	for name, mode := range map[string]Mode{"on": On, "advise": Advise} {
		t.Run(name, func(t *testing.T) {
			p := newPool()
			a, b := p.add(t, "host-1", mode), p.add(t, "host-2", mode)
			for _, r := range []*rig{a, b} {
				r.spare = true
				r.reopen()
			}
			a.run("small", 0.2)
			b.run("large", 0.6)
			for range 60 {
				p.round(t, b, a)
				a.settle()
				b.settle()
			}
			if mode == Advise {
				d := a.history()
				if len(a.moved)+len(b.moved) > 0 || len(d) == 0 || d[len(d)-1].GetReason() != string(allocate.Consolidate) || d[len(d)-1].GetOutcome() != outcomeAdvised {
					t.Errorf("moved %v %v; %v", a.moved, b.moved, d)
				}
				if v := a.book("host-2", asking("x", 0.1)); v != "" {
					t.Errorf("a host that only advises to empty itself refuses: %s", v)
				}
				return
			}
			if len(a.moved) != 1 || a.moved[0] != "small host-2" || len(b.moved) != 0 {
				t.Errorf("moved %v and %v", a.moved, b.moved)
			}
		})
	}
}

func TestAHostThatIsFullIsTakenToBeWantedMore(t *testing.T) {
	p := newPool()
	a, b := p.add(t, "host-1", On), p.add(t, "host-2", On)
	// Together 1.98 of 2 CPUs, which is what there was, and what comes is as it is.
	for i := range 4 {
		a.run(fmt.Sprintf("web-%d", i), 0.495, runtime.LabelWorkload, "web")
	}
	for _, curves := range a.curves {
		curves[profile.CPU] = predict.Quantiles{P10: 0.495, P50: 0.495, P90: 0.495, P95: 0.495, P99: 0.495}
	}
	p.round(t, b, a)
	a.settle()
	if len(a.moved) != 1 {
		t.Fatalf("moved: %v; %v", a.moved, a.history())
	}
	// With three it is not full, and they are what they are.
	for range 3 {
		p.round(t, b, a)
		a.settle()
	}
	if len(a.moved) != 1 {
		t.Errorf("moved: %v", a.moved)
	}
}

func TestAHostThatIsFullForAMinuteIsOverloadedWhateverIsForecast(t *testing.T) {
	p := newPool()
	a, b := p.add(t, "host-1", On), p.add(t, "host-2", On)
	for i := range 4 {
		a.run(fmt.Sprintf("web-%d", i), 0.495, runtime.LabelWorkload, "web")
	}
	for _, curves := range a.curves { // as if the jump to it was not believed yet
		curves[profile.CPU] = predict.Quantiles{P10: 0.2, P50: 0.2, P90: 0.2, P95: 0.2, P99: 0.2}
	}
	for range 11 {
		p.round(t, b, a)
		a.settle()
	}
	if len(a.moved) != 0 {
		t.Fatalf("within %v: %v", allocate.SeenFor, a.moved)
	}
	for range 4 {
		p.round(t, b, a)
		a.settle()
	}
	if len(a.moved) != 1 {
		t.Errorf("moved: %v; %v", a.moved, a.history())
	}
}

func TestTheReactivePolicyHeedsTheLastSampleAlone(t *testing.T) {
	p := newPool()
	a, b := p.add(t, "host-1", On), p.add(t, "host-2", On)
	for _, r := range []*rig{a, b} {
		r.react = true
		r.reopen()
	}
	web := []*Shard{a.run("web-0", 0.9), a.run("web-1", 0.9), a.run("web-2", 0.9)}
	use := func(cpus float64) {
		a.mu.Lock()
		defer a.mu.Unlock()
		for _, s := range web {
			s.Rates = map[string]float64{"cpu": cpus, "working_set": 64 << 20}
		}
	}
	use(0.3)
	for range 40 {
		p.round(t, b, a)
		a.settle()
	}
	if len(a.moved) > 0 {
		t.Fatalf("moved because of a forecast: %v", a.moved)
	}
	use(0.6)
	p.round(t, b, a)
	a.settle()
	if len(a.moved) != 1 {
		t.Fatalf("moved: %v; %v", a.moved, a.history())
	}
	d := a.history()[0]
	if d.GetOutcome() != outcomeDone || d.GetReason() != string(allocate.Threshold) || !strings.Contains(d.GetWords(), "host-1 used more than 80 % of its CPU in the last sample") {
		t.Errorf("%v", d)
	}
}

func TestAHostThatHasTheImageIsTheBetterTarget(t *testing.T) {
	p, a, b := overloaded(t, On)
	c := p.add(t, "host-3", On)
	b.run("other", 0.1) // the emptier is the better one, if nothing else counts
	for _, s := range a.shards {
		s.Layers = []allocate.Data{{Name: "default/sha256:1", Bytes: 4 << 30}}
	}
	b.facts.Layers = map[string]bool{"default/sha256:1": true}
	p.round(t, b, c)
	a.think(t)
	p.round(t, a)
	a.settle()
	// Moves of a round end in any order: the first is the first that was decided.
	decisions := a.history()
	i := slices.IndexFunc(decisions, func(d *v1.BalanceDecision) bool { return d.GetKind() == "move" && d.GetId() == 1 })
	if i < 0 || decisions[i].GetTo() != "host-2" {
		t.Errorf("decided: %v", decisions)
	}
}

func TestAHostWithoutAVolumeIsNoTarget(t *testing.T) {
	p, a, b := overloaded(t, On)
	c := p.add(t, "host-3", On)
	c.run("other", 0.1) // the emptier is the better one, if nothing else counts
	for _, s := range a.shards {
		s.Volumes = []string{"/srv/web"}
	}
	c.volumes = []string{"/srv", "/srv/web"}
	p.round(t, b, c)
	a.think(t)
	p.round(t, a)
	a.settle()
	if len(a.moved) == 0 {
		t.Fatalf("nothing moved: %v", a.history())
	}
	for _, m := range a.moved {
		if !strings.HasSuffix(m, " host-3") {
			t.Errorf("moved: %v", a.moved)
		}
	}
}

// think looks at the host and does nothing: the first round does not know yet
// what to ask others for.
func (r *rig) think(t *testing.T) {
	t.Helper()
	r.b.askPeers(t.Context())
	shards, err := r.Shards(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r.b.mu.Lock()
	defer r.b.mu.Unlock()
	if _, err := r.b.think(shards); err != nil {
		t.Error(err)
	}
}
