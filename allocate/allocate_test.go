package allocate

import (
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"
)

var t0 = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// spread is a demand of CPU with the given quantiles in every span.
func spread(p10, p50, p90, p95, p99 float32) (d Demand) {
	for i := range d {
		d[i][CPU] = Curve{p10, p50, p90, p95, p99}
	}
	return d
}

func known(cpu, memory float64) (d Demand) {
	for i := range d {
		d[i][CPU], d[i][Memory] = Certain(cpu), Certain(memory)
	}
	return d
}

func shard(id string, priority int, d Demand) Shard {
	return Shard{
		ID: ShardID(id), Workload: Workload(id), Tenant: "t", Priority: priority, Demand: d, Bytes: 1e9,
		Usage: Amount{CPU: float64(d[0][CPU][1]), Memory: float64(d[0][Memory][1])}, SampledAt: t0,
	}
}

func testHost(id string, cpu float64) Host {
	return Host{ID: HostID(id), Capacity: Amount{CPU: cpu, Memory: 64e9}, Link: 1e9, Cost: 1}
}

// listed is a pool of given peers that counts looks.
type listed struct {
	busy, idle []Peer
	looks      int
}

var _ Pool = (*listed)(nil)

func (l *listed) Busy() int          { return len(l.busy) }
func (l *listed) BusyAt(i int) *Peer { l.looks++; return &l.busy[i] }
func (l *listed) Idle() int          { return len(l.idle) }
func (l *listed) IdleAt(i int) *Peer { l.looks++; return &l.idle[i] }

func quiet(n int) *listed {
	l := &listed{}
	for i := range n {
		l.busy = append(l.busy, Peer{Host: testHost(fmt.Sprintf("peer-%d", i), 16), Load: known(1, 1e9), Usage: Amount{CPU: 1, Memory: 1e9}, Shards: 1})
	}
	return l
}

func planner(t testing.TB, cfg Config) *Planner {
	t.Helper()
	p, err := NewPlanner("self", cfg, 7)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func round(t testing.TB, p *Planner, now time.Time, v *View) Plan {
	t.Helper()
	plan, err := p.Round(now, v)
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

func TestChanceOfOverload(t *testing.T) {
	noisy := spread(0, 1, 2, 2.5, 4)
	chance := func(correlation, capacity float64, workloads ...string) float64 {
		var j joint
		j.reset(correlation)
		for _, w := range workloads {
			j.add(&Shard{Workload: Workload(w), Demand: noisy}, 1)
		}
		return j.strain(&Amount{CPU: capacity}).chance[0]
	}
	for _, c := range []struct {
		name     string
		got      float64
		min, max float64
	}{
		{"one shard exceeds its P90 one time in ten", chance(0, 2, "a"), 0.08, 0.12},
		{"and its P99 one time in a hundred", chance(0, 4, "a"), 0, 0.02},
		{"four shards of one workload peak together", chance(0, 8, "a", "a", "a", "a"), 0.08, 0.12},
		{"four workloads that have nothing in common seldom do", chance(0, 8, "a", "b", "c", "d"), 0, 0.03},
		{"fully correlated ones do as one", chance(1, 8, "a", "b", "c", "d"), 0.08, 0.12},
		{"half correlated ones lie between", chance(0.5, 6.5, "a", "b", "c", "d"), 0.03, 0.15},
	} {
		if c.got < c.min || c.got > c.max {
			t.Errorf("%s: %.3f is not in [%v, %v]", c.name, c.got, c.min, c.max)
		}
	}
}

func TestThePeakOfASumIsNotTheSumOfPeaks(t *testing.T) {
	// 1 at the end of the horizon, 2 at some time before, for certain.
	chance := func(correlation, capacity float64, workloads ...string) [Spans]float64 {
		var j joint
		j.reset(correlation)
		for _, w := range workloads {
			j.add(&Shard{Workload: Workload(w), Demand: known(1, 0), Peak: Certain(2)}, 1)
		}
		return j.strain(&Amount{CPU: capacity}).chance
	}
	never, last := [Spans]float64{}, [Spans]float64{Spans - 1: 1}
	for _, c := range []struct {
		name      string
		got, want [Spans]float64
	}{
		{"a shard is at its peak in the last span alone", chance(0, 1.9, "a"), last},
		{"and not beyond it", chance(0, 2, "a"), never},
		{"four shards of one workload come to eight", chance(0, 7.9, "a", "a", "a", "a"), last},
		{"and not beyond it", chance(0, 8, "a", "a", "a", "a"), never},
		{"of four workloads with nothing in common two surge together, as variances add up", chance(0, 5.9, "a", "b", "c", "d"), last},
		{"and no more", chance(0, 6, "a", "b", "c", "d"), never},
		{"those that do everything together come to eight", chance(1, 7.9, "a", "b", "c", "d"), last},
		{"and not beyond it", chance(1, 8, "a", "b", "c", "d"), never},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v, want %v", c.name, c.got, c.want)
		}
	}
}

func TestAPeakThatTheHostCannotCarryMovesShardsInTime(t *testing.T) {
	for _, c := range []struct {
		name  string
		peak  Curve
		moves int
	}{
		{"a load that stays what it is", Certain(1), 0},
		{"a peak that just fits", Certain(2), 0},
		{"a peak beyond the host", Certain(3), 1},
	} {
		p := planner(t, Config{})
		v := &View{Host: testHost("self", 6), Peers: quiet(4)}
		for _, id := range []string{"a", "b", "c"} {
			s := shard(id, 0, known(1, 1e9))
			s.Workload, s.Peak = "w", c.peak
			v.Shards = append(v.Shards, s)
		}
		plan := round(t, p, t0, v)
		for i := 1; len(plan.Moves) == 0 && i < p.cfg.SustainK; i++ {
			plan = round(t, p, t0.Add(time.Duration(i)*time.Minute), v)
		}
		if len(plan.Moves) != c.moves {
			t.Errorf("%s: %d moves, want %d", c.name, len(plan.Moves), c.moves)
		}
		// Others learn of it, and send nothing that would be too much then.
		if top := p.Self(v).Load[Spans-1][CPU][4]; math.Abs(float64(top-3*c.peak[4])) > 1e-5 {
			t.Errorf("%s: a load of %v in the last span is told, want %v", c.name, top, 3*c.peak[4])
		}
	}
}

func TestEveryOrderIsAPermutation(t *testing.T) {
	for m := range ranks {
		for i := range ranks[m] {
			seen := ranks[m][i]
			slices.Sort(seen[:])
			for k := range seen {
				if int(seen[k]) != k {
					t.Fatalf("order %d of mix %d is no permutation", i, m)
				}
			}
		}
	}
}

func TestTakingOutIsTheOppositeOfPuttingIn(t *testing.T) {
	a := Shard{Workload: "a", Demand: spread(0, 1, 2, 3, 4), Peak: Curve{1, 2, 3, 4, 5}}
	b := Shard{Workload: "b", Demand: spread(1, 2, 3, 5, 8), Peak: Curve{1, 3, 4, 6, 9}}
	var both, one joint
	both.reset(0.3)
	one.reset(0.3)
	both.add(&a, 1)
	both.add(&b, 1)
	one.add(&a, 1)
	for c := 0.5; c < 12; c += 0.5 {
		capacity := Amount{CPU: c}
		if got, want := both.strainWith(&b, -1, &capacity), one.strain(&capacity); got.chance != want.chance {
			t.Errorf("without b at %v: %v, want %v", c, got.chance, want.chance)
		}
		if got, want := one.strainWith(&b, 1, &capacity), both.strain(&capacity); got.chance != want.chance {
			t.Errorf("with b at %v: %v, want %v", c, got.chance, want.chance)
		}
	}
}

func TestCorrelationIsMeasured(t *testing.T) {
	for _, c := range []struct {
		name     string
		common   float64
		min, max float64
	}{
		{"independent errors", 0, 0, 0.15},
		{"half of the variance is shared", math.Sqrt(0.5), 0.3, 0.65},
		{"one error for all", 1, 0.9, 1},
	} {
		rng := rand.New(rand.NewPCG(1, 2))
		var k correlation
		for range 2000 {
			shared := rng.NormFloat64()
			errs := make([]float64, 6)
			for i := range errs {
				errs[i] = c.common*shared + math.Sqrt(1-c.common*c.common)*rng.NormFloat64()
			}
			k.learn(errs)
		}
		if v := k.value(); v < c.min || v > c.max {
			t.Errorf("%s: %.2f is not in [%v, %v]", c.name, v, c.min, c.max)
		}
	}
}

func TestCostOfAMove(t *testing.T) {
	for _, c := range []struct {
		name               string
		bytes, dirty, link float64
		sent               float64
		takes, blackout    time.Duration
	}{
		{"memory that rests is sent once", 1e9, 0, 1e8, 1e9, 10200 * time.Millisecond, 200 * time.Millisecond},
		{"what is written meanwhile is sent again", 1e9, 1e7, 1e8, 1.11e9, 11310 * time.Millisecond, 210 * time.Millisecond},
		{"what is written faster than it is sent stops the shard", 1e9, 2e8, 1e8, 2e9, 20200 * time.Millisecond, 10200 * time.Millisecond},
	} {
		got := CostOf(c.bytes, c.dirty, c.link)
		if math.Abs(got.Bytes-c.sent) > 0.02*c.sent || (got.Takes-c.takes).Abs() > 300*time.Millisecond || (got.Blackout-c.blackout).Abs() > 30*time.Millisecond {
			t.Errorf("%s: %+v, want %v bytes, %v, blackout %v", c.name, got, c.sent, c.takes, c.blackout)
		}
	}
	if c := CostOf(1, 0, 0); c.Takes < time.Hour {
		t.Errorf("a move over no link takes %v", c.Takes)
	}
}

func TestOneMoveCuresAHostBeforeItIsOverloaded(t *testing.T) {
	p := planner(t, Config{})
	v := &View{Host: testHost("self", 8), Peers: quiet(20)}
	for i := range 5 {
		s := shard(fmt.Sprint("s", i), 5, known(2, 1e9)) // 10 of 8 cores in 5 minutes, 5 now
		s.Usage[CPU] = 1
		v.Shards = append(v.Shards, s)
	}
	plan := round(t, p, t0, v)
	if len(plan.Moves) != 1 || plan.Overload[0] != 1 {
		t.Fatalf("plan %+v, want one move", plan)
	}
	if m := plan.Moves[0]; m.Reason != Overload || len(m.Targets) == 0 || m.Benefit <= m.Price {
		t.Errorf("move %+v", m)
	}
	// The caller's target granted it: nothing more is to be done.
	p.Started(t0, plan.Moves[0].Shard, plan.Moves[0].Targets[0].Host)
	if next := round(t, p, t0.Add(time.Minute), v); len(next.Moves) != 0 || next.Loss != 0 {
		t.Errorf("while the move is under way: %+v", next)
	}
}

func TestAFarOverloadIsRelievedMoveByMove(t *testing.T) {
	p := planner(t, Config{OutMax: 8})
	v := &View{Host: testHost("self", 8), Peers: quiet(20)}
	for i := range 8 {
		v.Shards = append(v.Shards, shard(fmt.Sprint("s", i), 5, known(2, 1e9))) // twice what it has
	}
	if plan := round(t, p, t0, v); len(plan.Moves) != 4 {
		t.Errorf("%d moves of 2 cores from 16 on 8, want 4", len(plan.Moves))
	}
}

func TestARiskThatOnlyMovesIsNotWorthAMove(t *testing.T) {
	for _, c := range []struct {
		name  string
		load  float64 // of all peers, of 16
		moves int
		not   Reason
	}{
		{"peers with room", 1, 1, ""},
		{"peers that it would put into the same danger", 12, 0, NotWorth},
		{"peers that it would put into more than they accept", 13, 0, NoTarget},
	} {
		p := planner(t, Config{SustainK: 1, SustainN: 1})
		peers := quiet(20)
		for i := range peers.busy {
			peers.busy[i].Load, peers.busy[i].Usage[CPU] = known(c.load, 1e9), 1
		}
		v := &View{Host: testHost("self", 16), Peers: peers}
		v.Shards = []Shard{shard("a", 5, spread(2, 3, 4, 6, 8)), shard("b", 5, known(12, 1e9))}
		v.Shards[1].Pinned = "by its owner"
		plan := round(t, p, t0, v)
		if p := plan.Overload[0]; p <= 0 || p >= 0.2 {
			t.Fatalf("%s: a chance of %v", c.name, p)
		}
		if len(plan.Moves) != c.moves || c.moves == 0 && !slices.ContainsFunc(plan.Not, func(d Decision) bool { return d.Reason == c.not }) {
			t.Errorf("%s: %+v", c.name, plan)
		}
	}
}

func TestWeakSignalsWait(t *testing.T) {
	p := planner(t, Config{})
	v := &View{Host: testHost("self", 8), Peers: quiet(20)}
	v.Shards = []Shard{shard("a", 5, spread(2, 3, 4, 6, 8)), shard("b", 5, spread(2, 3, 4, 4.5, 5))}
	first := round(t, p, t0, v)
	if first.Overload[0] <= 0 || first.Overload[0] >= p.cfg.Urgent {
		t.Fatalf("chance %v is not a weak signal", first.Overload[0])
	}
	if len(first.Moves) != 0 || !slices.ContainsFunc(first.Not, func(d Decision) bool { return d.Reason == NotSustained }) {
		t.Errorf("first round: %+v", first)
	}
	if second := round(t, p, t0.Add(time.Minute), v); len(second.Moves) != 1 {
		t.Errorf("second round: %+v", second)
	}
}

func TestCoolDownAndNoReturn(t *testing.T) {
	v := &View{Host: testHost("self", 8), Peers: quiet(1)}
	v.Shards = []Shard{shard("a", 5, known(5, 1e9)), shard("b", 5, known(5, 1e9))}
	for _, c := range []struct {
		name  string
		since time.Duration
		last  HostID
		moves int
	}{
		{"just moved", 10 * time.Minute, "elsewhere", 0},
		{"the only target is the host it left", 40 * time.Minute, "peer-0", 0},
		{"it came from elsewhere", 40 * time.Minute, "elsewhere", 1},
		{"it left long ago", 2 * time.Hour, "peer-0", 1},
	} {
		for i := range v.Shards {
			v.Shards[i].MovedAt, v.Shards[i].LastHost = t0.Add(-c.since), c.last
		}
		if plan := round(t, planner(t, Config{}), t0, v); len(plan.Moves) != c.moves {
			t.Errorf("%s: %d moves, want %d", c.name, len(plan.Moves), c.moves)
		}
	}
}

func TestAFailedMoveIsNotTriedAgainAtOnce(t *testing.T) {
	p := planner(t, Config{})
	v := &View{Host: testHost("self", 8), Peers: quiet(20)}
	v.Shards = []Shard{shard("a", 5, known(9, 1e9))}
	plan := round(t, p, t0, v)
	if len(plan.Moves) != 1 {
		t.Fatalf("%+v", plan)
	}
	p.Started(t0, "a", "peer-0")
	p.Ended(t0.Add(time.Minute), "a", false)
	if plan := round(t, p, t0.Add(2*time.Minute), v); len(plan.Moves) != 0 {
		t.Errorf("tried again after a minute: %+v", plan.Moves)
	}
	if plan := round(t, p, t0.Add(12*time.Minute), v); len(plan.Moves) != 1 {
		t.Error("never tried again")
	}
}

func TestLimitsGrowInPlaceAndYieldWhereNothingMoves(t *testing.T) {
	s := shard("a", 5, known(3, 1e9))
	s.Limit[CPU] = 2
	v := &View{Host: testHost("self", 8), Peers: quiet(0), Shards: []Shard{s}}
	if plan := round(t, planner(t, Config{}), t0, v); len(plan.Resizes) != 1 || plan.Resizes[0].Reason != Grow || plan.Resizes[0].To < 3 {
		t.Errorf("with room: %+v", plan.Resizes)
	}
	low, high := shard("low", 1, known(6, 1e9)), shard("high", 8, known(4, 1e9))
	low.Request[CPU] = 1
	v.Shards = []Shard{low, high}
	plan := round(t, planner(t, Config{}), t0, v)
	if len(plan.Moves) != 0 || len(plan.Resizes) != 1 || plan.Resizes[0].Shard != "low" || plan.Resizes[0].To < 1 || plan.Resizes[0].To > 4.1 {
		t.Errorf("without a target: %+v", plan)
	}
}

func TestACalmHostIsEmptied(t *testing.T) {
	peers := quiet(20)
	for i := range peers.busy {
		peers.busy[i].Load, peers.busy[i].Usage[CPU] = known(6, 6e9), 6
	}
	v := &View{Host: testHost("self", 8), Peers: peers}
	for i := range 3 {
		v.Shards = append(v.Shards, shard(fmt.Sprint("s", i), 5, known(0.5, 1e9)))
	}
	emptied := func(cfg Config, change func(*View)) int {
		w := *v
		w.Shards = slices.Clone(v.Shards)
		if change != nil {
			change(&w)
		}
		p, gone := planner(t, cfg), map[ShardID]bool{}
		for i := range 40 {
			now := t0.Add(time.Duration(i) * time.Minute)
			for _, m := range round(t, p, now, &w).Moves {
				if m.Reason != Consolidate {
					t.Errorf("move %+v", m)
				}
				gone[m.Shard] = true
				p.Started(now, m.Shard, m.Targets[0].Host)
				p.Ended(now, m.Shard, true)
				w.Shards = slices.DeleteFunc(w.Shards, func(s Shard) bool { return s.ID == m.Shard })
			}
		}
		return len(gone)
	}
	for _, c := range []struct {
		name   string
		cfg    Config
		change func(*View)
		want   int
	}{
		{"allowed and calm", Config{Consolidate: true}, nil, 3},
		{"not allowed", Config{}, nil, 0},
		{"something is promised to it", Config{Consolidate: true}, func(v *View) {
			v.Held = []Reservation{{Request: Request{Shard: shard("x", 5, known(0.1, 1e9))}}}
		}, 0},
		{"a shard is pinned", Config{Consolidate: true}, func(v *View) { v.Shards[1].Pinned = "by its owner" }, 0},
		{"load is above its forecast", Config{Consolidate: true}, func(v *View) { v.Shards[0].Usage[CPU] = 3 }, 0},
		{"all others are dearer", Config{Consolidate: true}, func(v *View) { v.Host.Cost = 0.5 }, 0},
	} {
		if got := emptied(c.cfg, c.change); got != c.want {
			t.Errorf("%s: %d of 3 shards left, want %d", c.name, got, c.want)
		}
	}
}

func TestTheLedgersWord(t *testing.T) {
	host := testHost("self", 8)
	for _, c := range []struct {
		name   string
		change func(o *Own, r *Request)
		want   VetoCode
	}{
		{"there is room", nil, ""},
		{"cordoned", func(o *Own, _ *Request) { o.Host.Cordoned = true }, VetoCordoned},
		{"being emptied", func(o *Own, _ *Request) { o.Leaving = true }, VetoLeaving},
		{"memory does not fit", func(_ *Own, r *Request) { r.Shard.Demand = known(1, 65e9) }, VetoMemory},
		{"it would be overloaded", func(_ *Own, r *Request) { r.Shard.Demand = known(7, 1e9); r.Shard.Usage[CPU] = 1 }, VetoOverload},
		{"it is busy now, whatever is forecast", func(o *Own, _ *Request) { o.Shards[0].Usage[CPU] = 7.5 }, VetoUsage},
		{"too many of the workload", func(o *Own, r *Request) { r.Shard.Workload = "here"; r.Shard.Spread.PerHost = 1 }, VetoSpread},
		{"it avoids what runs here", func(_ *Own, r *Request) { r.Shard.Avoid = []Workload{"here"} }, VetoSpread},
		{"what runs here avoids it", func(o *Own, _ *Request) { o.Shards[0].Avoid = []Workload{"new"} }, VetoSpread},
		{"a demand that is not a number", func(_ *Own, r *Request) { r.Shard.Demand[0][CPU][2] = float32(math.NaN()) }, VetoInvalid},
		{"a negative usage", func(_ *Own, r *Request) { r.Shard.Usage[Memory] = -1 }, VetoInvalid},
		{"an infinite one", func(_ *Own, r *Request) { r.Shard.Usage[Memory] = math.Inf(1) }, VetoInvalid},
		{"a priority beyond all", func(_ *Own, r *Request) { r.Shard.Priority = 1000 }, VetoInvalid},
		{"a negative time", func(_ *Own, r *Request) { r.Takes = -1 }, VetoInvalid},
	} {
		h := host
		own := Own{Host: &h, Shards: []Shard{shard("here", 5, known(2, 1e9))}}
		req := Request{Shard: shard("new", 5, known(2, 1e9)), Takes: time.Second}
		if c.change != nil {
			c.change(&own, &req)
		}
		l := NewLedger(Config{}.Defaults())
		_, veto := l.Reserve(t0, own, req)
		if got := code(veto); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		if held := len(l.Held(t0)); held != 0 && c.want != "" || held != 1 && c.want == "" {
			t.Errorf("%s: %d reservations held", c.name, held)
		}
	}
}

func code(v *Veto) VetoCode {
	if v == nil {
		return ""
	}
	return v.Code
}

func TestReservationsEndByThemselves(t *testing.T) {
	h := testHost("self", 8)
	l := NewLedger(Config{InMax: 8}.Defaults())
	own := Own{Host: &h}
	ask := func(at time.Duration, id string, takes time.Duration) VetoCode {
		_, v := l.Reserve(t0.Add(at), own, Request{Shard: shard(id, 5, known(6, 1e9)), Takes: takes})
		return code(v)
	}
	if got := ask(0, "a", 10*time.Second); got != "" {
		t.Fatal(got)
	}
	if got := ask(time.Second, "b", 0); got == "" {
		t.Error("room was given twice")
	}
	if got := ask(2*time.Second, "a", 10*time.Second); got != "" {
		t.Errorf("asking again for the same shard: %v", got)
	}
	if got := ask(time.Minute, "b", 100*time.Hour); got != "" {
		t.Errorf("after the reservation's end: %v", got)
	}
	if got := ask(2*time.Hour, "c", 0); got != "" {
		t.Errorf("a source that claims a long move blocks the room: %v", got)
	}
	l.Release("c")
	if got := ask(2*time.Hour, "d", 0); got != "" {
		t.Errorf("after release: %v", got)
	}
}

func TestAHerdIsNeverPromisedMoreThanTheRoom(t *testing.T) {
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 3))
		h := testHost("self", 4+12*rng.Float64())
		h.Capacity[Memory] = 1e9 * (4 + 20*rng.Float64())
		own := Own{Host: &h, Correlation: rng.Float64()}
		cpu, memory := 0.0, 0.0
		for i := range rng.IntN(4) {
			s := randomShard(rng, fmt.Sprint("own", i))
			cpu, memory = cpu+s.Usage[CPU], memory+float64(s.Demand[0][Memory][1])
			own.Shards = append(own.Shards, s)
		}
		l := NewLedger(Config{InMax: 1000}.Defaults())
		for i := range 80 {
			s := randomShard(rng, fmt.Sprint("new", i))
			if _, veto := l.Reserve(t0, own, Request{Shard: s, Takes: time.Second, Reason: Overload}); veto == nil {
				cpu, memory = cpu+s.Usage[CPU], memory+float64(s.Demand[0][Memory][1])
				if cpu > h.Capacity[CPU]*(1+1e-6) || memory > h.Capacity[Memory]*(1+1e-4) {
					t.Fatalf("seed %d: request %d was granted beyond the room: %.2f of %.2f cores, %.3g of %.3g bytes",
						seed, i, cpu, h.Capacity[CPU], memory, h.Capacity[Memory])
				}
			}
		}
	}
}

func randomShard(rng *rand.Rand, id string) Shard {
	var d Demand
	base := 3 * rng.Float32()
	for i := range d {
		at := base * (0.7 + 0.6*rng.Float32())
		for q := range d[i][CPU] {
			d[i][CPU][q] = at
			at += rng.Float32() * base / 2
		}
		d[i][Memory] = Certain(1e9 * (0.2 + 3*float64(base)))
	}
	s := shard(id, rng.IntN(MaxPriority+1), d)
	s.Workload, s.Tenant = Workload(fmt.Sprint("w", rng.IntN(6))), Tenant(fmt.Sprint("t", rng.IntN(3)))
	s.Bytes, s.Dirty = 1e9*rng.Float64(), 1e8*rng.Float64()
	s.Usage[CPU] = float64(base) * (0.5 + rng.Float64())
	if rng.IntN(4) == 0 {
		s.Pinned = "by its owner"
	}
	return s
}

func randomView(rng *rand.Rand) *View {
	v := &View{Host: testHost("self", 4+12*rng.Float64()), Dominant: map[Tenant]float64{"t0": rng.Float64(), "t1": rng.Float64()}}
	peers := &listed{}
	for i := range 30 {
		load := 14 * rng.Float64()
		peers.busy = append(peers.busy, Peer{Host: testHost(fmt.Sprint("peer-", i), 16), Load: known(load, 20e9), Usage: Amount{CPU: load, Memory: 20e9}, Shards: 3})
	}
	v.Peers = peers
	for i := range 1 + rng.IntN(12) {
		v.Shards = append(v.Shards, randomShard(rng, fmt.Sprint("s", i)))
	}
	return v
}

func TestPlansOfRandomHosts(t *testing.T) {
	moves := 0
	for seed := range uint64(300) {
		v := randomView(rand.New(rand.NewPCG(seed, 4)))
		p := planner(t, Config{OutMax: 6, SustainK: 1, SustainN: 1})
		plan := round(t, p, t0, v)
		again := round(t, planner(t, Config{OutMax: 6, SustainK: 1, SustainN: 1}), t0, v)
		if !reflect.DeepEqual(plan, again) {
			t.Fatalf("seed %d: two plans from one seed", seed)
		}
		moves += len(plan.Moves)
		checkPlan(t, seed, v, plan)
	}
	if moves < 80 {
		t.Errorf("only %d moves were looked at", moves)
	}
}

// checkPlan rebuilds from scratch what each move was worth when it was chosen.
func checkPlan(t *testing.T, seed uint64, v *View, plan Plan) {
	t.Helper()
	cfg := Config{}.Defaults()
	left := slices.Clone(v.Shards)
	tried := map[ShardID]bool{} // in vain: nobody may take it
	for _, d := range plan.Not {
		tried[d.Shard] = true
	}
	// The planner's sum of the workloads at their prior correlation.
	strainOf := func(shards []Shard) strain {
		var j joint
		j.reset(priorCorrelation)
		for i := range shards {
			j.add(&shards[i], 1)
		}
		return j.strain(&v.Host.Capacity)
	}
	weigh := func(from int) float64 {
		sum, total := 0.0, 0.0
		for _, s := range v.Shards {
			total += float64(s.Demand[0][CPU][1]) + 1e-9
			if s.Priority >= from {
				sum += (float64(s.Demand[0][CPU][1]) + 1e-9) * weight(s.Priority)
			}
		}
		return sum / total
	}
	worth := func(shards []Shard, id ShardID) float64 {
		i := slices.IndexFunc(shards, func(s Shard) bool { return s.ID == id })
		before, after := strainOf(shards).loss, strainOf(slices.Delete(slices.Clone(shards), i, i+1)).loss
		for k := range before {
			before[k] = max(0, before[k]-after[k])
		}
		return cfg.loss(before, weigh(shards[i].Priority))
	}
	for _, m := range plan.Moves {
		i := slices.IndexFunc(left, func(s Shard) bool { return s.ID == m.Shard })
		if i < 0 {
			t.Fatalf("seed %d: %s moves twice", seed, m.Shard)
		}
		s := left[i]
		if s.Pinned != "" || len(m.Targets) == 0 || m.Reason != Overload {
			t.Errorf("seed %d: move %+v of pinned %q", seed, m, s.Pinned)
		}
		// No move without a reason: what it saves its own priority and above
		// exceeds its cost by the margin.
		if saves := worth(left, s.ID); saves < m.Benefit*0.999 || m.Benefit <= cfg.Margin*m.Price {
			t.Errorf("seed %d: move %+v saves %v", seed, m, saves)
		}
		// No higher priority for a lower one: no lower shard that could have
		// moved instead was worth it.
		for _, o := range left {
			if o.Priority >= s.Priority || o.Pinned != "" || tried[o.ID] {
				continue
			}
			c := CostOf(o.Bytes, o.Dirty, v.Host.Link)
			// Less what passes before it has moved, bounded from above.
			late := 1 - min(1, c.Takes.Seconds()/600)
			if late > 0 && worth(left, o.ID)*late > cfg.Margin*cfg.price(c, o.Priority)*1.001 {
				t.Errorf("seed %d: %s of priority %d moves, though %s of %d was worth it", seed, s.ID, s.Priority, o.ID, o.Priority)
			}
		}
		left = slices.Delete(left, i, i+1)
	}
}

func TestWorkDoesNotGrowWithThePool(t *testing.T) {
	looks := func(n int) int {
		peers := quiet(n)
		v := &View{Host: testHost("self", 8), Peers: peers, Shards: []Shard{shard("a", 5, known(5, 1e9)), shard("b", 5, known(5, 1e9))}}
		round(t, planner(t, Config{}), t0, v)
		return peers.looks
	}
	if small, large := looks(20), looks(100_000); large > small+8 || large == 0 {
		t.Errorf("%d looks at 20 peers, %d at 100,000", small, large)
	}
}

func TestPeersThatLieAreNotAsked(t *testing.T) {
	for name, lie := range map[string]func(*Peer){
		"capacity that is no number": func(p *Peer) { p.Capacity[CPU] = math.NaN() },
		"infinite memory":            func(p *Peer) { p.Capacity[Memory] = math.Inf(1) },
		"negative usage":             func(p *Peer) { p.Usage[CPU] = -5 },
		"a falling curve":            func(p *Peer) { p.Load[1][CPU] = Curve{5, 4, 3, 2, 1} },
		"no link":                    func(p *Peer) { p.Link = 0 },
		"it is cordoned":             func(p *Peer) { p.Cordoned = true },
	} {
		peers := quiet(8)
		for i := range peers.busy {
			lie(&peers.busy[i])
		}
		v := &View{Host: testHost("self", 8), Peers: peers, Shards: []Shard{shard("a", 5, known(5, 1e9)), shard("b", 5, known(5, 1e9))}}
		if plan := round(t, planner(t, Config{}), t0, v); len(plan.Moves) != 0 {
			t.Errorf("%s: %+v", name, plan.Moves)
		}
	}
}

func TestRulesOfTargets(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(s *Shard, p *Peer)
		ok     bool
	}{
		{"no rule", func(*Shard, *Peer) {}, true},
		{"another zone is wanted", func(s *Shard, p *Peer) { s.Zones = []string{"b"}; p.Zone = "a" }, false},
		{"its zone is wanted", func(s *Shard, p *Peer) { s.Zones = []string{"b", "a"}; p.Zone = "a" }, true},
		{"the zone has enough of it", func(s *Shard, p *Peer) {
			s.Spread.PerZone, s.ZoneMates, p.Zone = 2, map[string]int{"a": 2}, "a"
		}, false},
		{"a label is missing", func(s *Shard, _ *Peer) { s.Labels = map[string]string{"gpu": "yes"} }, false},
		{"it has the label", func(s *Shard, p *Peer) {
			s.Labels = map[string]string{"gpu": "yes"}
			p.Labels = s.Labels
		}, true},
		{"it is full now", func(_ *Shard, p *Peer) { p.Usage[CPU] = 15 }, false},
		{"it will be", func(_ *Shard, p *Peer) { p.Load[1][CPU] = Certain(15) }, false},
		{"an hour from now is far", func(_ *Shard, p *Peer) { p.Load[2][CPU] = Certain(15) }, true},
	} {
		peers := quiet(1)
		s := shard("a", 5, known(9, 1e9))
		c.change(&s, &peers.busy[0])
		v := &View{Host: testHost("self", 8), Peers: peers, Shards: []Shard{s}}
		if plan := round(t, planner(t, Config{}), t0, v); len(plan.Moves) == 1 != c.ok {
			t.Errorf("%s: %+v", c.name, plan)
		}
	}
}

func TestDataThatIsThereAlreadyDraws(t *testing.T) {
	peers := quiet(6)
	peers.busy[3].Data = map[string]bool{"layer": true}
	s := shard("a", 5, known(9, 1e9))
	s.Data = []Data{{Name: "layer", Bytes: 500e9}}
	v := &View{Host: testHost("self", 8), Peers: peers, Shards: []Shard{s}}
	plan := round(t, planner(t, Config{Peers: 32}), t0, v)
	if len(plan.Moves) != 1 || plan.Moves[0].Targets[0].Host != "peer-3" {
		t.Errorf("%+v", plan.Moves)
	}
}

// A volume cannot be sent: whoever says that he has none takes no shard that
// needs it, and whoever was not asked may.
func TestWhoeverHasNotAVolumeIsNoTarget(t *testing.T) {
	for _, c := range []struct {
		name string
		data map[string]bool
		ok   bool
	}{
		{"not there", map[string]bool{"/srv": false}, false},
		{"there", map[string]bool{"/srv": true}, true},
		{"not asked", nil, true},
		{"a layer that is not there", map[string]bool{"layer": false}, true},
	} {
		peers := quiet(1)
		peers.busy[0].Data = c.data
		s := shard("a", 5, known(9, 1e9))
		s.Data = []Data{{Name: "layer", Bytes: 1}, {Name: "/srv", Needed: true}}
		v := &View{Host: testHost("self", 8), Peers: peers, Shards: []Shard{s}}
		p := planner(t, Config{})
		if plan := round(t, p, t0, v); len(plan.Moves) == 1 != c.ok {
			t.Errorf("%s: %+v", c.name, plan)
		}
		if refused := p.Refusals(t0, &s, Overload); (len(refused) == 0) != c.ok {
			t.Errorf("%s: %v", c.name, refused)
		}
	}
}

func TestDominantSharesDecideTies(t *testing.T) {
	a, b := shard("a", 5, known(5, 1e9)), shard("b", 5, known(5, 1e9))
	a.Tenant, b.Tenant = "small", "large"
	v := &View{Host: testHost("self", 8), Peers: quiet(9), Shards: []Shard{a, b}, Dominant: map[Tenant]float64{"small": 0.1, "large": 0.4}}
	if plan := round(t, planner(t, Config{}), t0, v); len(plan.Moves) != 1 || plan.Moves[0].Shard != "b" {
		t.Errorf("%+v", plan.Moves)
	}
}

func TestShardsThatCannotBeComputedWithAreAnError(t *testing.T) {
	s := shard("a", 5, known(5, 1e9))
	s.Demand[1][CPU][0] = float32(math.NaN())
	if _, err := planner(t, Config{}).Round(t0, &View{Host: testHost("self", 8), Peers: quiet(1), Shards: []Shard{s}}); err == nil {
		t.Error("no error")
	}
	if _, err := NewPlanner("x", Config{SustainK: 5, SustainN: 3}, 1); err == nil {
		t.Error("5 of 3 was accepted")
	}
}

func BenchmarkRound(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 4))
	v := randomView(rng)
	for i := len(v.Shards); i < 10; i++ {
		v.Shards = append(v.Shards, randomShard(rng, fmt.Sprint("more", i)))
	}
	p := planner(b, Config{})
	now := t0
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(5 * time.Second)
		for i := range v.Shards {
			v.Shards[i].SampledAt = now
		}
		round(b, p, now, v)
		p.Self(v)
	}
}
