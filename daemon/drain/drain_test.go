package drain

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// pool is a Mover whose hosts take shards until they are full.
type pool struct {
	shards []Shard
	hosts  []Host
	// fail is how a move ends, by "shard host"; "" is well.
	fail map[string]Moved
	// unfit is why a shard may not run on a host.
	unfit func(s Shard, host string) string
	// during runs in a move.
	during func(Shard)
	moves  []string
	listed error
}

var _ Mover = (*pool)(nil)

func (p *pool) Shards(context.Context) ([]Shard, error) { return slices.Clone(p.shards), p.listed }
func (p *pool) Hosts(_ context.Context, s Shard) []Host {
	hosts := slices.Clone(p.hosts)
	for i := range hosts {
		if p.unfit != nil {
			hosts[i].Unfit = p.unfit(s, hosts[i].Name)
		}
	}
	return hosts
}

func (p *pool) Move(ctx context.Context, s Shard, to string) Moved {
	p.moves = append(p.moves, s.Name+" "+to)
	if p.during != nil {
		p.during(s)
	}
	if m, ok := p.fail[s.Name+" "+to]; ok {
		return m
	}
	if ctx.Err() != nil {
		return Moved{Code: CodeCancelled, Reason: "cancelled"}
	}
	p.shards = slices.DeleteFunc(p.shards, func(o Shard) bool { return o.key() == s.key() })
	for i := range p.hosts {
		if p.hosts[i].Name == to {
			p.hosts[i].Shards++
			p.hosts[i].MemoryAvailable -= s.Memory
		}
	}
	return Moved{ID: "m", BlackoutMs: 100}
}

const gib = 1 << 30

func shard(name string, memory int64) Shard {
	return Shard{Namespace: "default", Name: name, Memory: memory}
}

func host(name string) Host {
	return Host{Name: name, Alive: true, CPUs: 4, MemoryTotal: 16 * gib, MemoryAvailable: 12 * gib}
}

func run(t *testing.T, ctx context.Context, p *pool) Result {
	t.Helper()
	res, err := Run(ctx, p, func(Progress) {})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestADrainSpreadsShardsOverTheHostsThatHaveRoom(t *testing.T) {
	p := &pool{hosts: []Host{host("a"), host("b"), host("c")}}
	p.hosts[2].MemoryAvailable = gib
	for i := range 6 {
		p.shards = append(p.shards, shard(fmt.Sprint("s", i), gib))
	}
	res := run(t, t.Context(), p)
	if res.Outcome != OutcomeDone || len(res.Moved) != 6 || len(res.Stayed) != 0 {
		t.Fatalf("%+v", res)
	}
	count := map[string]int{}
	for _, s := range res.Moved {
		count[s.To]++
	}
	if count["a"] != 3 || count["b"] != 3 {
		t.Errorf("moved to %v", count)
	}
}

func TestChoose(t *testing.T) {
	with := func(f func(*Host)) Host { h := host("b"); f(&h); return h }
	tests := []struct {
		name  string
		hosts []Host
		tried []string
		want  string
		why   string
	}{
		{"the emptier one", []Host{with(func(h *Host) { h.CPULoad = 0.9 }), host("c")}, nil, "c", ""},
		{"memory counts as the CPU does", []Host{with(func(h *Host) { h.MemoryAvailable = 3 * gib }), host("c")}, nil, "c", ""},
		{"fewer shards when all else is equal", []Host{with(func(h *Host) { h.Shards = 5 }), host("c")}, nil, "c", ""},
		{"one that is cordoned", []Host{with(func(h *Host) { h.Cordoned = true })}, nil, "", "b is cordoned"},
		{"one that is down", []Host{with(func(h *Host) { h.Alive = false })}, nil, "", "b does not answer"},
		{"one without room", []Host{with(func(h *Host) { h.MemoryAvailable = gib })}, nil, "", "1152 are needed"},
		{"one that says nothing of its memory", []Host{with(func(h *Host) { h.MemoryTotal = 0 })}, nil, "", "available"},
		{"one where its workload does not let it run", []Host{with(func(h *Host) { h.Unfit = `is in zone "x", not in y` }), with(func(h *Host) { h.Name, h.CPULoad = "c", 0.9 })}, nil, "c", ""},
		{"none where its workload lets it run", []Host{with(func(h *Host) { h.Unfit = `is in zone "x", not in y` })}, nil, "", `b is in zone "x", not in y`},
		{"one that was tried", []Host{host("b")}, []string{"b"}, "", "no other host"},
		{"none at all", nil, nil, "", "no other host"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, why := Choose(shard("s", gib), test.hosts, test.tried)
			if got != test.want || !strings.Contains(why, test.why) {
				t.Errorf("%q because %q", got, why)
			}
		})
	}
}

func TestWhatStaysIsSaidWithItsReason(t *testing.T) {
	refused := Moved{Code: CodeRefused, Reason: "uses io_uring"}
	tests := []struct {
		name    string
		fail    map[string]Moved
		shards  []Shard
		outcome string
		moves   string
		reason  string
	}{
		{"refused everywhere", map[string]Moved{"s a": refused, "s b": refused}, []Shard{shard("s", 1)}, OutcomeRefused, "s a,s b", "a: uses io_uring; b: uses io_uring"},
		{"refused by one", map[string]Moved{"s a": refused}, []Shard{shard("s", 1)}, OutcomeDone, "s a,s b", ""},
		{"failed everywhere", map[string]Moved{"s a": {Code: "link", Reason: "cut"}, "s b": {Code: "restore", Reason: "no"}}, []Shard{shard("s", 1)}, OutcomeFailed, "s a,s b", "a: cut; b: no"},
		{"in doubt is not tried again", map[string]Moved{"s a": {Code: CodeInDoubt, Reason: "who knows"}}, []Shard{shard("s", 1)}, OutcomeInDoubt, "s a", "who knows"},
		{"no room anywhere", nil, []Shard{shard("s", 100*gib)}, OutcomeRefused, "", "MiB"},
		{"another orchestrator's", nil, []Shard{{Namespace: "k8s.io", Name: "s", Stays: "is foreign", StaysCode: "foreign-namespace"}}, OutcomeRefused, "", "is foreign"},
		{"one stays, the other goes", map[string]Moved{"s a": refused, "s b": refused}, []Shard{shard("s", 2), shard("t", 1)}, OutcomeRefused, "s a,s b,t a", "io_uring"},
		{"nothing is there", nil, nil, OutcomeDone, "", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := &pool{hosts: []Host{host("a"), host("b")}, fail: test.fail, shards: test.shards}
			res := run(t, t.Context(), p)
			if res.Outcome != test.outcome || strings.Join(p.moves, ",") != test.moves {
				t.Errorf("%s after %v", res.Outcome, p.moves)
			}
			var reasons []string
			for _, s := range res.Stayed {
				reasons = append(reasons, s.Reason)
			}
			if !strings.Contains(strings.Join(reasons, ","), test.reason) || test.reason == "" && len(reasons) > 0 {
				t.Errorf("stayed because %q", reasons)
			}
			if len(res.Moved)+len(res.Stayed) != len(test.shards) {
				t.Errorf("%d moved and %d stayed, of %d", len(res.Moved), len(res.Stayed), len(test.shards))
			}
		})
	}
}

func TestADrainThatIsStoppedSaysWhatStayed(t *testing.T) {
	for cause, want := range map[error]string{ErrStopped: OutcomeCancelled, ErrDeadline: OutcomeDeadline} {
		ctx, stop := context.WithCancelCause(t.Context())
		p := &pool{hosts: []Host{host("a")}, shards: []Shard{shard("s3", 3), shard("s2", 2), shard("s1", 1)}}
		p.during = func(s Shard) {
			if s.Name == "s2" {
				stop(cause)
			}
		}
		res := run(t, ctx, p)
		if res.Outcome != want || len(res.Moved) != 1 || len(res.Stayed) != 2 || len(p.moves) != 2 {
			t.Errorf("%v: %+v after %v", cause, res, p.moves)
		}
	}
}

func TestAMoveThatCouldNoLongerBeCancelledCounts(t *testing.T) {
	ctx, stop := context.WithCancelCause(t.Context())
	p := &pool{hosts: []Host{host("a")}, shards: []Shard{shard("s", 1)}, fail: map[string]Moved{"s a": {}}}
	p.during = func(Shard) { stop(ErrStopped); p.shards = nil }
	res := run(t, ctx, p)
	if len(res.Moved) != 1 || len(res.Stayed) != 0 {
		t.Errorf("%+v", res)
	}
}

func TestAShardThatArrivesMeanwhileGoesToo(t *testing.T) {
	p := &pool{hosts: []Host{host("a")}, shards: []Shard{shard("s", 1)}}
	p.during = func(s Shard) {
		if s.Name == "s" {
			p.shards = append(p.shards, shard("late", 1))
		}
	}
	if res := run(t, t.Context(), p); len(res.Moved) != 2 || res.Outcome != OutcomeDone {
		t.Errorf("%+v", res)
	}
}

func TestAListThatCannotBeReadIsAnError(t *testing.T) {
	p := &pool{listed: errors.New("containerd is down")}
	if _, err := Run(t.Context(), p, func(Progress) {}); err == nil || !strings.Contains(err.Error(), "containerd is down") {
		t.Errorf("err = %v", err)
	}
}

// web is to run beside cache: it goes where cache went, and is not tried before.
func TestShardsThatAreNearOthersFollowThem(t *testing.T) {
	web, cache := shard("web", 4*gib), shard("cache", gib)
	web.Near = true
	p := &pool{hosts: []Host{host("a"), host("b")}, shards: []Shard{web, cache}}
	p.hosts[0].CPULoad = 0.9 // cache goes to b, which a would be emptier than then
	p.unfit = func(s Shard, host string) string {
		if s.Near && !slices.Contains(p.moves, "cache "+host) {
			return "runs no shard of cache"
		}
		return ""
	}
	res := run(t, t.Context(), p)
	if res.Outcome != OutcomeDone || strings.Join(p.moves, ",") != "cache b,web b" {
		t.Errorf("%v %+v", p.moves, res)
	}
}
