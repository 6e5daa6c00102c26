package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tranship/tranship/allocate/sim"
)

// simulateWith runs the verb alone and returns stdout, stderr and its error.
func simulateWith(t *testing.T, output string, args ...string) (string, string, error) {
	t.Helper()
	cmd := newSimulateCommand(&globals{output: output})
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	var out, errs bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), errs.String(), err
}

const smallScenario = `
name = "small"
duration = "2h"
[[hosts]]
count = 6
cpu = 4
memory = "8GB"
[[shards]]
count = 18
sizes = [{cpu = 1.3, memory = "1GB"}]
pattern = {kind = "spike", base = 0.3, peak = 2, at = "30m", for = "20m", share = 0.3}
`

func scenarioFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "scenario.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSimulatePrintsTheContractsDocument(t *testing.T) {
	path := scenarioFile(t, smallScenario)
	out, progress, err := simulateWith(t, outputJSON, path, "--seed", "4")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		SchemaVersion int `json:"schema_version"`
		Reports       []struct {
			Scenario, Policy string
			Seed             uint64
			Overload         *float64 `json:"overload_host_minutes"`
			Moves            *int
			Planning         any
			Timeline         []any
		}
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.SchemaVersion == 0 || len(doc.Reports) != 5 {
		t.Fatalf("schema %d, %d reports", doc.SchemaVersion, len(doc.Reports))
	}
	for _, r := range doc.Reports {
		if r.Scenario != "small" || r.Seed != 4 || r.Overload == nil || r.Moves == nil || len(r.Timeline) != 24 || r.Planning != nil {
			t.Errorf("report %+v", r)
		}
	}
	if !strings.Contains(progress, "planning a host's round took") {
		t.Errorf("stderr says nothing of planning: %q", progress)
	}
	again, _, err := simulateWith(t, outputJSON, path, "--seed", "4")
	if err != nil || again != out {
		t.Errorf("a second run of the same seed differs (%v)", err)
	}
	timed, _, err := simulateWith(t, outputJSON, path, "--seed", "4", "--timing", "--policy", "tranship")
	if err != nil {
		t.Fatal(err)
	}
	var measured struct {
		Reports []struct{ Planning sim.Planning }
	}
	if err := json.Unmarshal([]byte(timed), &measured); err != nil {
		t.Fatal(err)
	}
	p := measured.Reports[0].Planning
	if p.Rounds == 0 || p.MeanMS <= 0 || p.MaxMS < p.P99MS || p.CPU == nil || p.CPU.MeanMS <= 0 || p.CPU.MeanMS > p.MeanMS {
		t.Errorf("--timing: %+v, of a processor %+v", p, p.CPU)
	}
}

func TestSimulateDrawsATable(t *testing.T) {
	out, _, err := simulateWith(t, outputTable, scenarioFile(t, smallScenario), "--policy", "none,tranship")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"POLICY", "none", "tranship", "overloaded hosts", "│"} {
		if !strings.Contains(out, want) {
			t.Errorf("the table lacks %q:\n%s", want, out)
		}
	}
}

func TestSimulateSaysWhatToDo(t *testing.T) {
	t.Setenv("TRANSHIP_TRACES", "")
	for _, c := range []struct {
		name string
		args []string
		says string
	}{
		{"a scenario that is not there", []string{"nowhere"}, "planetlab"},
		{"a folder", []string{t.TempDir()}, "not a file"},
		{"an unknown key", []string{scenarioFile(t, "colour = 1\n"+smallScenario)}, `"colour"`},
		{"an impossible size", []string{scenarioFile(t, strings.Replace(smallScenario, "count = 6", "count = 0", 1))}, "count 0"},
		{"shards that fit nowhere", []string{scenarioFile(t, strings.Replace(smallScenario, "cpu = 1.3", "cpu = 99", 1))}, "finds no host"},
		{"no traces", []string{"planetlab"}, "--traces DIR"},
		{"an empty folder of traces", []string{"planetlab", "--traces", t.TempDir()}, "--traces DIR"},
		{"an unknown policy", []string{"herd", "--policy", "best"}, "oracle"},
		{"a policy twice", []string{"herd", "--policy", "none,none"}, "each once"},
	} {
		out, _, err := simulateWith(t, outputJSON, c.args...)
		if exitCode(err) != exitUsage || !strings.Contains(err.Error(), c.says) || out != "" {
			t.Errorf("%s: code %d, error %v, stdout %q; want code %d and %q", c.name, exitCode(err), err, out, exitUsage, c.says)
		}
	}
}
