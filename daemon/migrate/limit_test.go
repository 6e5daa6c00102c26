package migrate

import (
	"testing"
	"time"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

func TestABlackoutIsLimitedByWhoSaysSo(t *testing.T) {
	for _, c := range []struct {
		name  string
		asked int64 // ms
		label string
		want  time.Duration
		said  bool
	}{
		{"nobody", 0, "", defaultMaxBlackout, false},
		{"the shard's workload", 0, "120ms", 120 * time.Millisecond, true},
		{"whoever moves it", 500, "", 500 * time.Millisecond, true},
		{"whoever moves it, over its workload", 500, "120ms", 500 * time.Millisecond, true},
		{"a label that says nothing", 0, "soon", defaultMaxBlackout, false},
		{"a label that cannot be", 0, "-1s", defaultMaxBlackout, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			req := &v1.MigrateRequest{Shard: "web-0", Node: "host-2", MaxBlackoutMs: c.asked}
			if err := normalise(req); err != nil {
				t.Fatal(err)
			}
			rec := &runtime.Record{Labels: map[string]string{}}
			if c.label != "" {
				rec.Labels[runtime.LabelMaxBlackout] = c.label
			}
			if got, said := (&outgoing{req: req, rec: rec}).maxBlackout(); got != c.want || said != c.said {
				t.Errorf("%v, %v, want %v, %v", got, said, c.want, c.said)
			}
		})
	}
}
