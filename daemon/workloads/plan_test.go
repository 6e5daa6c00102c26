package workloads

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func web(change ...func(*Spec)) *Spec {
	s := &Spec{
		Name: "web", Namespace: "default", Image: "i", Shards: 2,
		Size: Size{CPURequest: 0.25, CPULimit: 1, MemoryRequest: 64 << 20, MemoryLimit: 256 << 20},
	}
	for _, f := range change {
		f(s)
	}
	return s
}

func host(name string, shards ...Shard) Host {
	return Host{Name: name, Alive: true, CPUs: 2, MemoryTotal: 8 << 30, MemoryAvailable: 6 << 30, Shards: shards}
}

// is a shard of web as it runs when all is well.
func is(index int, change ...func(*Shard)) Shard {
	w := web()
	s := Shard{
		Namespace: "default", Name: w.Shard(index), Workload: "web", Index: index, Running: true, Image: "i", Digest: w.Digest(),
		CPUs: 1, Memory: 256 << 20, RequestCPUs: 0.25, RequestMemory: 64 << 20, Policy: map[string]string{"tranship.io/priority": "0"},
	}
	for _, f := range change {
		f(&s)
	}
	return s
}

func down(h Host) Host { h.Alive = false; return h }

func TestAPlanIsTheDifference(t *testing.T) {
	two := func(s *Spec) { s.Shards = 2 }
	for _, c := range []struct {
		name    string
		want    *Spec
		hosts   []Host
		begun   []int
		quota   Tenant
		policy  string
		rule    string // a label that is wanted too
		steps   string // joined by "; "
		refused string // a part of it
	}{
		{name: "nothing is there", want: web(), hosts: []Host{host("a"), host("b")}, steps: "+ shard web-0 on a; + shard web-1 on b"},
		{name: "all is there", want: web(), hosts: []Host{host("a", is(0)), host("b", is(1))}, begun: []int{0, 1}},
		{name: "it moved and all is there", want: web(), hosts: []Host{host("a"), host("b", is(0), is(1))}, begun: []int{0, 1}},
		{
			name: "too many are there", want: web(), hosts: []Host{host("a", is(0), is(2)), host("b", is(1), is(3))}, begun: []int{0, 1, 2, 3},
			steps: "- web-2 on a; - web-3 on b",
		},
		{name: "a gap", want: web(), hosts: []Host{host("a"), host("b", is(1))}, begun: []int{0, 1}, steps: "+ shard web-0 on a"},
		{name: "all is to go", hosts: []Host{host("a", is(0)), host("b", is(1))}, steps: "- web-0 on a; - web-1 on b"},
		{
			name: "memory grows", want: web(func(s *Spec) { s.Size.MemoryLimit = 512 << 20 }), hosts: []Host{host("a", is(0), is(1))},
			steps: "~ web-0 memory 256M → 512M in place; ~ web-1 memory 256M → 512M in place",
		},
		{
			name: "a limit is lifted", want: web(func(s *Spec) { s.Size.CPULimit = 0; s.Shards = 1 }), hosts: []Host{host("a", is(0))},
			steps: "~ web-0 cpus 1 → unlimited in place",
		},
		{
			name: "the priority changes", want: web(func(s *Spec) { s.Shards = 1 }), hosts: []Host{host("a", is(0))}, policy: "7",
			steps: "~ web-0 priority 0 → 7 in place",
		},
		{
			name: "another image", want: web(func(s *Spec) { s.Image, s.Shards = "j", 1 }), hosts: []Host{host("a", is(0))},
			steps: "± web-0 on a replaced: image i → j",
		},
		{
			name: "another image on a cordoned host", want: web(func(s *Spec) { s.Image, s.Shards = "j", 1 }), hosts: []Host{{Name: "a", Alive: true, Cordoned: true, CPUs: 2, Shards: []Shard{is(0)}}},
			steps: "± web-0 on a replaced: image i → j", refused: "on a, which is cordoned: tranship uncordon it",
		},
		{
			name: "one has stopped", want: web(two), hosts: []Host{host("a", is(0), is(1, func(s *Shard) { s.Running, s.State = false, "stopped (exit code 1)" }))},
			steps: "± web-1 on a replaced: it is stopped (exit code 1)",
		},
		{name: "containers that joined are left alone", want: web(two), hosts: []Host{host("a", is(0), is(1), is(7, func(s *Shard) { s.Index, s.Name = -1, "old" }))}},
		{
			name: "the same name in another namespace is another workload", want: web(func(s *Spec) { s.Shards = 1 }),
			hosts: []Host{host("a", is(0, func(s *Shard) { s.Namespace = "other" }))}, steps: "+ shard web-0 on a",
		},

		{
			name: "a host that does not answer may have it", want: web(), hosts: []Host{host("a", is(1)), down(host("b"))}, begun: []int{0, 1},
			steps: "+ shard web-0 on a", refused: "web-0 may be on b, which does not answer: bring it back, or",
		},
		{
			name: "what was never begun is on no host that does not answer", want: web(), hosts: []Host{host("a", is(0)), down(host("b"))}, begun: []int{0},
			steps: "+ shard web-1 on a",
		},
		{
			name: "what is to go may be on a host that does not answer", hosts: []Host{host("a", is(0)), down(host("b"))}, begun: []int{0, 1},
			steps: "- web-0 on a", refused: "web-1 may be on b",
		},
		{name: "two copies", want: web(func(s *Spec) { s.Shards = 1 }), hosts: []Host{host("a", is(0)), host("b", is(0))}, refused: "web-0 is on a and on b"},
		{name: "one on its way shows twice", want: web(func(s *Spec) { s.Shards = 1 }), hosts: []Host{host("a", is(0, func(s *Shard) { s.Moving = "m1" })), host("b", is(0, func(s *Shard) { s.Incoming = true }))}},
		{
			name: "one on its way that its old host does not show", want: web(func(s *Spec) { s.Shards = 1 }), hosts: []Host{host("a"), host("b", is(0, func(s *Shard) { s.Incoming = true }))},
			steps: "+ shard web-0 on a", refused: "web-0 is being moved, and its old host does not show it",
		},
		{
			name: "one on its way is not changed", want: web(func(s *Spec) { s.Shards, s.Size.MemoryLimit = 1, 512<<20 }), hosts: []Host{host("a", is(0, func(s *Shard) { s.Moving = "m1" }))},
			refused: "wait for migration m1",
		},
		{name: "one on its way is not removed", hosts: []Host{host("a", is(0, func(s *Shard) { s.Moving = "m1" }))}, refused: "wait for migration m1"},

		{
			name: "less than is in use", want: web(func(s *Spec) { s.Shards, s.Size.MemoryLimit = 1, 64<<20 }), hosts: []Host{host("a", is(0, func(s *Shard) { s.Held = 65 << 20 }))},
			steps: "~ web-0 memory 256M → 64M in place", refused: "web-0 has 65M of memory that it cannot give back, and the limit would be 64M: choose",
		},
		{
			name: "growth beyond the room", want: web(func(s *Spec) { s.Shards, s.Size.MemoryRequest, s.Size.MemoryLimit = 1, 7<<30, 8<<30 }), hosts: []Host{host("a", is(0))},
			steps: "~ web-0 memory 256M → 8G in place", refused: "web-0 cannot grow on a: 7104M more are needed, and 5952M are free; move it",
		},
		{
			name: "more CPUs than there are", want: web(func(s *Spec) { s.Shards, s.Size.CPURequest, s.Size.CPULimit = 3, 1.5, 2 }), hosts: []Host{host("a"), host("b")},
			steps: "+ shard web-0 on a; + shard web-1 on b", refused: "web-2 fits no host: a has 0.50 of 2 CPUs free, and 1.50 are needed; b has 0.50",
		},
		{
			name: "more memory than there is", want: web(func(s *Spec) { s.Shards, s.Size.MemoryRequest, s.Size.MemoryLimit = 1, 6<<30, 0 }), hosts: []Host{host("a")},
			refused: "a has 6016M of memory free, and 6144M are needed; make room, add a host",
		},
		{
			name: "spread", want: web(func(s *Spec) { s.Shards, s.Spread.PerHost = 3, 1 }), hosts: []Host{host("a"), host("b")},
			steps: "+ shard web-0 on a; + shard web-1 on b", refused: "a has 1 of its shards (spread.per_host = 1)",
		},
		{
			name: "cordoned hosts take none", want: web(), hosts: []Host{{Name: "a", Alive: true, Cordoned: true, CPUs: 2, MemoryTotal: 8 << 30, MemoryAvailable: 8 << 30}, host("b")},
			steps: "+ shard web-0 on b; + shard web-1 on b",
		},
		{name: "zones", want: web(func(s *Spec) { s.Zones = []string{"eu"} }), hosts: []Host{host("a")}, refused: `a is in zone "", not in eu`},
		{name: "labels of hosts", want: web(func(s *Spec) { s.Labels = map[string]string{"disk": "ssd"} }), hosts: []Host{host("a")}, refused: "a has not the labels"},
		{
			name: "avoid", want: web(func(s *Spec) { s.Avoid = []string{"batch"} }), hosts: []Host{host("a", Shard{Namespace: "default", Name: "b-0", Workload: "batch"}), host("b")},
			steps: "+ shard web-0 on b; + shard web-1 on b",
		},
		{
			name: "to be avoided", want: web(), hosts: []Host{host("a", Shard{Namespace: "default", Name: "b-0", Workload: "batch", Avoid: []string{"web"}})},
			refused: "a runs b-0, which avoids web",
		},
		{
			name: "near", want: web(func(s *Spec) { s.Near = []string{"cache"} }), hosts: []Host{host("a"), host("b", Shard{Namespace: "default", Name: "cache-0", Workload: "cache"})},
			steps: "+ shard web-0 on b; + shard web-1 on b",
		},
		{name: "near nobody", want: web(func(s *Spec) { s.Near = []string{"cache"} }), hosts: []Host{host("a")}, refused: "a runs no shard of cache"},
		{
			name: "near one that is near it", want: web(func(s *Spec) { s.Near = []string{"loop"} }),
			hosts: []Host{host("a", is(0), is(1), Shard{Namespace: "default", Name: "loop-0", Workload: "loop"})}, refused: "affinity.near: web → loop → web is a cycle",
			rule: "tranship.io/near=loop", steps: "~ web-0 near - → loop in place; ~ web-1 near - → loop in place",
		},
		{
			name: "zones change under a shard", want: web(func(s *Spec) { s.Zones, s.Shards = []string{"eu"}, 1 }), hosts: []Host{host("a", is(0))}, rule: "tranship.io/zones=eu",
			steps: "~ web-0 zones - → eu in place", refused: `web-0 is on a, which is in zone "", not in eu: tranship migrate it`,
		},
		{
			name: "a shard that a person moved out of its zone can be changed", want: web(func(s *Spec) { s.Zones, s.Shards, s.Size.MemoryLimit = []string{"eu"}, 1, 512<<20 }), rule: "tranship.io/zones=eu",
			hosts: []Host{host("a", is(0, func(s *Shard) { s.Policy["tranship.io/zones"] = "eu" }))}, steps: "~ web-0 memory 256M → 512M in place",
		},
		{
			name: "it cannot be started anew there", want: web(func(s *Spec) { s.Zones, s.Shards, s.Image = []string{"eu"}, 1, "j" }), rule: "tranship.io/zones=eu",
			hosts: []Host{host("a", is(0, func(s *Shard) { s.Policy["tranship.io/zones"] = "eu" }))}, steps: "± web-0 on a replaced: image i → j", refused: "web-0 is on a, which is in zone",
		},
		{
			name: "one too many on a host is not started anew there", want: web(func(s *Spec) { s.Spread.PerHost, s.Image = 1, "j" }), hosts: []Host{host("a", is(0), is(1)), host("b")},
			steps: "± web-0 on a replaced: image i → j; ± web-1 on a replaced: image i → j", refused: "web-0 is on a, which has 1 of its shards (spread.per_host = 1)",
		},
		{
			name: "a full host's shard is started anew", want: web(func(s *Spec) { s.Shards, s.Image = 1, "j" }), hosts: []Host{{Name: "a", Alive: true, CPUs: 1, MemoryTotal: 1 << 20, Shards: []Shard{is(0)}}},
			steps: "± web-0 on a replaced: image i → j",
		},
		{
			name: "a foreign container has the name", want: web(func(s *Spec) { s.Shards = 1 }), hosts: []Host{host("a", Shard{Namespace: "default", Name: "web-0", Index: -1})},
			refused: "a has a container web-0 that is not of the workload",
		},

		{
			name: "a quota of CPUs", want: web(func(s *Spec) { s.Tenant, s.Shards = "shop", 4 }), hosts: []Host{host("a"), host("b")}, quota: Tenant{CPUs: 1.2},
			steps:   "+ shard web-0 on a; + shard web-1 on b; + shard web-2 on a; + shard web-3 on b",
			refused: "tenant shop may use 1.2 CPUs and would use 1.5: lower the size",
		},
		{
			name: "a quota that is just met", want: web(func(s *Spec) { s.Tenant = "shop" }), hosts: []Host{host("a"), host("b")}, quota: Tenant{CPUs: 1, Memory: 192 << 20, Shards: 3},
			steps: "+ shard web-0 on a; + shard web-1 on b",
		},
		{
			name: "a quota of memory", want: web(func(s *Spec) { s.Tenant = "shop" }), hosts: []Host{host("a"), host("b")}, quota: Tenant{Memory: 191 << 20},
			steps: "+ shard web-0 on a; + shard web-1 on b", refused: "may use 191M of memory and would use 192M",
		},
		{
			name: "a quota of shards counts those that joined", want: web(func(s *Spec) { s.Tenant = "shop" }), quota: Tenant{Shards: 3},
			hosts: []Host{host("a", Shard{Namespace: "default", Name: "old", Tenant: "shop", Index: -1})},
			steps: "+ shard web-0 on a; + shard web-1 on a", refused: "may have 3 shards and would have 4",
		},
		{
			name: "a size is needed under a quota", want: web(func(s *Spec) { s.Tenant, s.Size = "shop", Size{} }), hosts: []Host{host("a"), host("b")}, quota: Tenant{CPUs: 9},
			steps: "+ shard web-0 on a; + shard web-1 on b", refused: "size.cpus.request has to be said",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := Input{Name: "web", Namespace: "default", Want: c.want, Hosts: c.hosts, Begun: c.begun, Policy: map[string]string{"tranship.io/priority": "0"}}
			if c.policy != "" {
				in.Policy["tranship.io/priority"] = c.policy
			}
			if k, v, some := strings.Cut(c.rule, "="); some {
				in.Policy[k] = v
			}
			in.Tenants = map[string]Tenant{"shop": c.quota}
			in.Others = []*Spec{{Name: "pay", Tenant: "shop", Shards: 1, Size: Size{CPURequest: 0.5, MemoryRequest: 64 << 20}}, {Name: "x", Tenant: "else", Shards: 100}, {Name: "loop", Namespace: "default", Near: []string{"web"}}}
			before := fmt.Sprint(c.hosts)
			plan := Make(in)
			var steps []string
			for _, s := range plan.Steps {
				steps = append(steps, s.String())
			}
			if got := strings.Join(steps, "; "); got != c.steps {
				t.Errorf("steps: %s\nwant:  %s", got, c.steps)
			}
			if got := strings.Join(plan.Refused, "\n"); (c.refused == "") != (got == "") || !strings.Contains(got, c.refused) {
				t.Errorf("refused: %s\nwant: %s", got, c.refused)
			}
			if after := fmt.Sprint(c.hosts); after != before {
				t.Error("the hosts were changed")
			}
			if again := Make(in); again.Fingerprint() != plan.Fingerprint() {
				t.Error("the same plan has two fingerprints")
			}
		})
	}
}

func TestShardsAreSpreadEvenly(t *testing.T) {
	hosts := []Host{host("a"), host("b"), host("c")}
	hosts[2].MemoryAvailable = 2 << 30 // fuller, and still has its share
	plan := Make(Input{Name: "web", Namespace: "default", Want: web(func(s *Spec) { s.Shards, s.Spread.PerHost = 6, 2 }), Hosts: hosts})
	on := map[string]int{}
	for _, s := range plan.Steps {
		on[s.Node]++
	}
	if fmt.Sprint(on) != "map[a:2 b:2 c:2]" || len(plan.Refused) > 0 {
		t.Errorf("%v %v", on, plan.Refused)
	}
	zones := []Host{host("a"), host("b"), host("c")}
	zones[0].Zone, zones[1].Zone, zones[2].Zone = "east", "east", "west"
	plan = Make(Input{Name: "web", Namespace: "default", Want: web(func(s *Spec) { s.Shards, s.Spread.PerZone = 4, 2 }), Hosts: zones})
	var at []string
	for _, s := range plan.Steps {
		at = append(at, s.Node)
	}
	slices.Sort(at)
	if fmt.Sprint(at) != "[a b c c]" || len(plan.Refused) > 0 {
		t.Errorf("%v %v", at, plan.Refused)
	}
}

// Loads change between the plan that is shown and the one that is done.
func TestANewShardGoesWhereItWasShown(t *testing.T) {
	in := Input{Name: "web", Namespace: "default", Want: web(func(s *Spec) { s.Shards = 3 }), Hosts: []Host{host("a"), host("b"), host("c")}}
	shown := Make(in)
	in.Prefer = map[string]string{}
	for _, s := range shown.Steps {
		in.Prefer[s.Shard] = s.Node
	}
	for i, load := range []float64{0.9, 0.5, 0.1} {
		in.Hosts[i].CPULoad = load
	}
	if again := Make(in); again.Fingerprint() != shown.Fingerprint() {
		t.Errorf("%v\n%v", again.Steps, shown.Steps)
	}
	in.Hosts[0].Cordoned = true
	if again := Make(in); again.Fingerprint() == shown.Fingerprint() || len(again.Refused) > 0 {
		t.Error(again)
	}
}

// The autopilot's limit, between request and limit, is not the file's to undo.
func TestTheAutopilotsLimitStays(t *testing.T) {
	s := is(0, func(s *Shard) {
		s.CPUs = 0.5
		s.Policy = map[string]string{"tranship.io/autopilot": "on", "tranship.io/limit-cpus": "1"}
	})
	in := Input{
		Name: "web", Namespace: "default", Want: web(func(s *Spec) { s.Shards = 1 }), Hosts: []Host{host("a", s)},
		Policy: map[string]string{"tranship.io/autopilot": "on", "tranship.io/limit-cpus": "1"},
	}
	if plan := Make(in); len(plan.Steps) > 0 {
		t.Error(plan.Steps)
	}
	in.Want.Size.CPULimit = 2
	in.Policy["tranship.io/limit-cpus"] = "2"
	if plan := Make(in); len(plan.Steps) != 1 || plan.Steps[0].String() != "~ web-0 cpus 0.5 → 2 in place" {
		t.Error(plan.Steps)
	}
}
