package peers

import (
	"math"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func TestWhatAPeerInventsOfItselfStaysPossible(t *testing.T) {
	many := map[string]string{}
	for i := range 1000 {
		many[strings.Repeat("k", i+1)] = "v"
	}
	n := sane(&v1.Node{
		Zone: "\x1b[2J" + strings.Repeat("z", 1<<16), Labels: many, Cpus: math.MaxUint32, CpuLoad: proto.Float64(math.NaN()), CostPerHour: math.Inf(1),
		MemoryTotalBytes: -1, MemoryAvailableBytes: math.MaxInt64, Membership: "alive", Versions: &v1.Versions{Kernel: "6\r\n\u009b31m"},
	})
	if n.GetZone() != "[2J"+strings.Repeat("z", maxText-4) || len(n.GetLabels()) > maxLabels || n.GetCpus() != maxCPUs || n.CpuLoad != nil || n.GetCostPerHour() != 0 {
		t.Errorf("%v", n)
	}
	if n.GetMemoryTotalBytes() != 0 || n.GetMemoryAvailableBytes() != 0 || n.GetMembership() != "" || n.GetVersions().GetKernel() != "631m" {
		t.Errorf("%v", n)
	}
	for load, want := range map[float64]float64{-1: 0, 0.5: 0.5, 1e9: 1, math.Inf(1): 1} {
		if got := sane(&v1.Node{CpuLoad: &load}).GetCpuLoad(); got != want {
			t.Errorf("a load of %v is shown as %v", load, got)
		}
	}
	if sane(nil) == nil {
		t.Error("a peer that says nothing is nil")
	}
}

func TestWhatAPeerInventsOfItsShardsStaysPossible(t *testing.T) {
	true1 := &v1.Shard{
		Name: "web-0", Namespace: "default", Node: "b", Status: "running", Cpus: 0.5, MemoryUsedBytes: 1 << 20, MemoryLimitBytes: 1 << 30,
		Labels: map[string]string{"tranship.io/avoid": strings.Repeat("batch,", 100)}, Command: []string{"redis-server"},
	}
	lie := &v1.Shard{
		Name: "web\x1b]0;-1\a", Namespace: "def\nault", Node: "a", Cpus: math.NaN(), MemoryUsedBytes: -1, MemoryHeldBytes: math.MaxInt64, MemoryLimitBytes: math.MinInt64,
		Labels: map[string]string{"tranship.io/work\x00load": "w\x1beb"}, Note: "\x1b[31mrun this", Command: []string{"\x1b[H"},
	}
	got := saneShards("b", []*v1.Shard{true1, lie, {Namespace: "default"}, nil})
	if len(got) != 2 || !proto.Equal(got[0], true1) {
		t.Fatalf("%v", got)
	}
	want := &v1.Shard{
		Name: "web]0;-1", Namespace: "default", Node: "b", MemoryHeldBytes: maxMemory,
		Labels: map[string]string{"tranship.io/workload": "web"}, Note: "[31mrun this", Command: []string{"[H"},
	}
	if !proto.Equal(got[1], want) {
		t.Errorf("%v\nwant %v", got[1], want)
	}
	crowd := make([]*v1.Shard, maxShards+5)
	for i := range crowd {
		crowd[i] = &v1.Shard{Name: "x"}
	}
	if got := saneShards("b", crowd); len(got) != maxShards {
		t.Errorf("%d shards", len(got))
	}
}
