package profiler

import (
	"testing"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/ebpf/profile"
)

// TestAShardOnTheHostsNetworkSaysWhatItLacks: absent with a reason, not zero.
func TestAShardOnTheHostsNetworkSaysWhatItLacks(t *testing.T) {
	p, f := running(t, nil)
	c, err := startContainer("shared")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.stop(); err != nil {
			t.Error(err)
		}
	}()
	f.say(c.task, false)
	eventually(t, "its CPU is measured", func() bool {
		resp := (&Handler{P: p}).Local(&v1.LoadRequest{})
		return len(resp.GetShards()) == 1 && resp.GetShards()[0].GetRates()[profile.CPU.String()] > 0
	})
	shard := (&Handler{P: p}).Local(&v1.LoadRequest{}).GetShards()[0]
	for _, s := range network {
		if shard.GetAbsent()[s.String()] != sharedNetwork {
			t.Errorf("%v: %q", s, shard.GetAbsent()[s.String()])
		}
		if v, ok := shard.GetRates()[s.String()]; ok {
			t.Errorf("%v is %v", s, v)
		}
	}
}
