package balance

import (
	"slices"
	"strings"
	"testing"

	"github.com/tranship/tranship/allocate"
	"github.com/tranship/tranship/daemon/runtime"
)

// Two tenants have the same on an overloaded host, and shards that are as good to
// move: who has the lesser weight gives up.
func TestATenantsWeightDecidesBetweenEqualShards(t *testing.T) {
	for _, c := range []struct {
		name    string
		weights map[allocate.Tenant]float64
		moved   string // the tenant of the shard that moves
	}{
		{"shop weighs twice as much", map[allocate.Tenant]float64{"shop": 2, "blog": 1}, "blog"},
		{"blog weighs twice as much", map[allocate.Tenant]float64{"shop": 1, "blog": 2}, "shop"},
		{"who is not named has 1", map[allocate.Tenant]float64{"shop": 0.5}, "shop"},
		{"no weight is 1", map[allocate.Tenant]float64{"shop": 0, "blog": 0.5}, "blog"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPool()
			a, b := p.add(t, "host-1", On), p.add(t, "host-2", On)
			a.b.cfg.Weights = c.weights
			for _, tenant := range []string{"shop", "blog"} {
				for _, name := range []string{tenant + "-0", tenant + "-1"} {
					a.run(name, 0.55, runtime.LabelTenant, tenant)
				}
			}
			p.round(t, b, a)
			a.settle()
			if len(a.moved) == 0 || slices.ContainsFunc(a.moved, func(m string) bool { return !strings.HasPrefix(m, c.moved+"-") }) {
				t.Errorf("moved %v, wanted those of %s", a.moved, c.moved)
			}
		})
	}
}
