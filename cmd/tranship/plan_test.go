package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func somePlan() *v1.PlanResponse {
	return &v1.PlanResponse{
		Node: "host-1", AtUnixMs: 1700000000000, Autopilot: "advise", EveryMs: 5000, Shards: 3, Loss: 2282,
		Spans: []*v1.PlanSpan{{UntilMs: 600000, Overload: 0.98}, {UntilMs: 1800000, Overload: 0.9}, {UntilMs: 3600000, Overload: 0.5}},
		Decisions: []*v1.BalanceDecision{{
			Id: 7, AtUnixMs: 1700000000000, LastUnixMs: 1700000005000, Rounds: 2, Kind: "move", Namespace: "default", Name: "web-1", Reason: "overload",
			Words: "move web-1 to host-2: because", From: "host-1", To: "host-2", Outcome: "done", Real: &v1.BalanceCost{Bytes: 1 << 20, TookMs: 900, BlackoutMs: 250},
			Asked: []*v1.AskedTarget{{Node: "host-3", Code: "overload", Words: "host-3 refuses"}, {Node: "host-2"}},
		}},
		Held:   []*v1.HeldRoom{{Shard: "default/db-0", From: "host-4", Reason: "overload", ExpiresUnixMs: 1700000030000}},
		Faults: []*v1.PeerFault{{Node: "host-5", Why: "says of itself what cannot be"}},
	}
}

func TestAPlanIsShownInWords(t *testing.T) {
	doc := control.PlanOf(somePlan())
	var out bytes.Buffer
	printPlan(&out, &doc)
	for _, want := range []string{
		"host-1: 3 shards, autopilot advise, a round every 5s", "0.98 within 10m, 0.90 within 30m, 0.50 within 1h", "[done] move web-1 to host-2: because",
		"room is kept for default/db-0 from host-4 (overload)", "host-5 says of itself what cannot be",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q lacks %q", out.String(), want)
		}
	}
	out.Reset()
	if err := printHistory(&out, doc.Decisions); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "really 1.0MiB in 0.9s, blackout 250ms") {
		t.Errorf("%q", out.String())
	}
}

func TestAPlanIsADocument(t *testing.T) {
	raw, err := json.Marshal(control.PlanOf(somePlan()))
	if err != nil {
		t.Fatal(err)
	}
	var doc map[string]any
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	for _, key := range strings.Fields("schema_version node at autopilot every_s shards overload loss decisions held faults trouble") {
		if _, ok := doc[key]; !ok {
			t.Errorf("the document lacks %s", key)
		}
	}
	d := doc["decisions"].([]any)[0].(map[string]any)
	for _, key := range strings.Fields("id at last rounds kind namespace shard reason words from to outcome detail benefit price overload real asked migration_id") {
		if _, ok := d[key]; !ok {
			t.Errorf("a decision lacks %s", key)
		}
	}
	// Before the first round there are lists all the same, and no time.
	raw, err = json.Marshal(control.PlanOf(&v1.PlanResponse{}))
	if err != nil || !bytes.Contains(raw, []byte(`"decisions":[]`)) || !bytes.Contains(raw, []byte(`"at":null`)) {
		t.Errorf("%s, %v", raw, err)
	}
}

func TestPlanSaysWhatItIsUsedWrongly(t *testing.T) {
	d := startDaemon(t)
	for _, args := range [][]string{{"plan", "--since", "1h"}, {"plan", "--history", "--since", "-1h"}, {"plan", "web"}} {
		if code, _, stderr := d.tranship(t, t.Context(), args...); code != exitUsage {
			t.Errorf("%v: exit code %d, %q", args, code, stderr)
		}
	}
	// This daemon has no plans to tell.
	code, _, stderr := d.tranship(t, t.Context(), "plan")
	if code != exitFailed || !strings.Contains(stderr, "plans nothing") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
}
