package main

import (
	"strings"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/bench/closedloop"
	"github.com/tranship/tranship/integration/workload/workcheck"
)

// ran is a run of a policy with so many late requests.
func ran(policy closedloop.Policy, late int) sample {
	return sampleOf(&closedloop.Result{
		Policy: policy, Counts: workcheck.Counts{Requests: 1000, Late: late},
		Moves: []closedloop.Move{{Shard: "a", At: -20 * time.Second, Blackout: 200 * time.Millisecond}},
	})
}

func TestPoliciesTakeTurns(t *testing.T) {
	g := &group{}
	var order []string
	for {
		p, ok := nextPolicy(g, 3)
		if !ok {
			break
		}
		order = append(order, string(p))
		g.Samples = append(g.Samples, ran(p, 1))
	}
	if got := strings.Join(order, " "); got != "tranship reactive reactive tranship tranship reactive none" {
		t.Error(got)
	}
}

func TestTheClosedLoopsRow(t *testing.T) {
	r := &results{}
	if rows := closedLoopRows(r); len(rows) != 0 {
		t.Errorf("of nothing: %v", rows)
	}
	g := group{Name: closedLoopGroup}
	for i, late := range []int{30, 10, 20} {
		g.Samples = append(g.Samples, ran(closedloop.Tranship, late), ran(closedloop.None, 900))
		if i < 2 {
			g.Samples = append(g.Samples, ran(closedloop.Reactive, 100))
		}
	}
	r.put(g)
	row := closedLoopRows(r)[0]
	if row.Value == nil || *row.Value != 0.2 || row.Pass || row.Few != leastDays {
		t.Errorf("with two runs of reactive: %+v", row)
	}
	g.Samples = append(g.Samples, ran(closedloop.Reactive, 100))
	r.put(g)
	row = closedLoopRows(r)[0]
	if !row.Pass || row.Few != 0 || !strings.Contains(row.Note, "20 late of 100 under reactive, 900 with the autopilot off; moves 1 of 1, the first -20 s and -20 s") {
		t.Errorf("%+v", row)
	}
}
