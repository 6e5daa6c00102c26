package balance

import (
	"strings"
	"testing"

	"github.com/tranship/tranship/daemon/runtime"
)

// web is to be near cache: of two shards of cache one stays for it, whatever the
// other does, and web itself stays.
func TestWhatOthersAreNearStays(t *testing.T) {
	p := newPool()
	a, b := p.add(t, "host-1", On), p.add(t, "host-2", On)
	a.run("cache-0", 0.9, runtime.LabelWorkload, "cache")
	a.run("cache-1", 0.9, runtime.LabelWorkload, "cache")
	a.run("web-0", 0.9, runtime.LabelWorkload, "web", runtime.LabelNear, "cache,db")
	p.round(t, b)
	for range 4 {
		p.round(t, a, b)
		a.settle()
	}
	if len(a.moved) != 1 || !strings.HasPrefix(a.moved[0], "cache-1 ") {
		t.Errorf("moved %v", a.moved)
	}
	left, err := a.Shards(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := anchors(left); len(got) != 1 || got[shardID("default", "cache-0")] != "web-0" {
		t.Errorf("who stays for whom: %v", got)
	}
}
