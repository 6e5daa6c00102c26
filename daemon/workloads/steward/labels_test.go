package steward

import (
	"reflect"
	"testing"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads"
)

// What a workload says of places goes along with its shards, and is read there.
func TestAShardsLabelsSayWhereItMayRun(t *testing.T) {
	for _, c := range []struct {
		name string
		want workloads.Spec
	}{
		{"nothing is said", workloads.Spec{Name: "web", Namespace: "default"}},
		{"all is said", workloads.Spec{
			Name: "web", Namespace: "default", Size: workloads.Size{CPURequest: 0.25, MemoryRequest: 64 << 20},
			Spread: workloads.Spread{PerHost: 2, PerZone: 3}, Near: []string{"cache", "db"}, Avoid: []string{"batch"},
			Zones: []string{"a", "b"}, Labels: map[string]string{"disk": "ssd", "rack": "7"},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := Rules("default", policyOf(&c.want)); !reflect.DeepEqual(got, &c.want) {
				t.Errorf("%+v\nwant %+v", got, &c.want)
			}
		})
	}
	odd := Rules("default", map[string]string{
		runtime.LabelSpreadHost: "1", runtime.LabelRequestCPUs: "NaN", runtime.LabelRequestMemory: "-5", runtime.LabelZones: " , ",
	})
	if !reflect.DeepEqual(odd, &workloads.Spec{Namespace: "default"}) {
		t.Errorf("labels that mean nothing: %+v", odd)
	}
}
