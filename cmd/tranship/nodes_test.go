package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/tranship/tranship/daemon/control"
)

func TestNodesShowWhatIsSaidOfThem(t *testing.T) {
	show := func(nodes ...control.Node) string {
		var out bytes.Buffer
		if err := printNodes(&out, nodes); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	load := 0.424
	a := control.Node{Name: "a", Self: true, State: control.NodeAlive, Zone: "east", CPUs: 2, CPULoad: &load, Cordoned: true}
	b := control.Node{Name: "b", State: "unreachable", Membership: control.MemberSuspected, Error: "no answer"}
	plain := show(a, b)
	for _, want := range []string{"a *", "alive, cordoned", "east", "42%", "unreachable, suspected", "no answer"} {
		if !strings.Contains(plain, want) {
			t.Errorf("no %q in\n%s", want, plain)
		}
	}
	if strings.Contains(plain, "LABELS") || strings.Contains(plain, "COST") {
		t.Errorf("columns of nothing:\n%s", plain)
	}
	b.CostPerHour, a.Labels = 0.125, map[string]string{"rack": "7", "disk": "ssd"}
	full := show(a, b)
	for _, want := range []string{"COST/H", "0.125", "LABELS", "disk=ssd,rack=7"} {
		if !strings.Contains(full, want) {
			t.Errorf("no %q in\n%s", want, full)
		}
	}
}
