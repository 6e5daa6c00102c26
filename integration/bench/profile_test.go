package main

import (
	"strings"
	"testing"

	"github.com/tranship/tranship/integration/bench/profile"
)

func TestRowsOfProfilesKeepTheirVerdict(t *testing.T) {
	r := &results{Groups: []group{{Name: profileGroup, Found: []profile.Row{
		{Name: "programs and daemon", Value: 1.2, Unit: "%", Target: "< 1", Detail: "why"},
		{Name: "for comparison: a poller", Value: 3, Unit: "%", Met: true},
		{Name: "pipe", Value: 0.98, Unit: "ratio", Target: ">= 0.97"}, // reached by luck only
		{Name: "redis", Value: 0.999, Unit: "ratio", Target: ">= 0.995", Met: true},
	}}}}
	rows := profileRows(r)
	if len(rows) != 3 {
		t.Fatalf("%+v", rows)
	}
	for i, want := range []struct {
		target float64
		least  bool
		pass   bool
	}{{1, false, false}, {0.97, true, false}, {0.995, true, true}} {
		if row := rows[i]; row.Target != want.target || row.AtLeast != want.least || row.Pass != want.pass {
			t.Errorf("%+v", row)
		}
	}
	if !strings.Contains(rows[0].Note, "why; a poller: 3") {
		t.Errorf("%q", rows[0].Note)
	}
	if rows := profileRows(&results{}); rows != nil {
		t.Errorf("%+v", rows)
	}
}
