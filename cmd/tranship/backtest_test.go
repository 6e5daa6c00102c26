package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// backtestWith runs the verb alone and returns stdout, stderr and its error.
func backtestWith(t *testing.T, output string, args ...string) (string, string, error) {
	t.Helper()
	cmd := newBacktestCommand(&globals{output: output})
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	var out, errs bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), errs.String(), err
}

func loadFile(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	text.WriteString("time,cpu,constant\n")
	for i := range 288 * 6 {
		fmt.Fprintf(&text, "%d,%.2f,1\n", 1700000000+300*i, 50+20*math.Sin(2*math.Pi*float64(i)/288)+float64(i*7919%13))
	}
	path := filepath.Join(t.TempDir(), "load.csv")
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestBacktestPrintsTheContractsDocument(t *testing.T) {
	out, _, err := backtestWith(t, outputJSON, loadFile(t), "--models", "tranship,naive", "--stride", "7")
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		SchemaVersion int `json:"schema_version"`
		Series        []struct {
			File, Column string
			StepS        float64 `json:"step_s"`
			N            int
			Results      []struct {
				Target, Model     string
				HorizonS          float64 `json:"horizon_s"`
				MAE, MASE         float64
				Pinball, Coverage map[string]float64
			}
		}
		Summary []struct {
			Group, Target, Model string
			HorizonS             float64 `json:"horizon_s"`
			MASE                 float64
		}
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.SchemaVersion == 0 || len(doc.Series) != 2 || doc.Series[0].StepS != 300 || doc.Series[0].N != 288*6 {
		t.Fatalf("%+v", doc)
	}
	if got := len(doc.Series[0].Results); got != 2*2*4 {
		t.Fatalf("%d results of two models, two targets and four horizons", got)
	}
	for _, r := range doc.Series[0].Results {
		if r.MAE <= 0 || r.MASE <= 0 || len(r.Pinball) != 3 || len(r.Coverage) != 2 {
			t.Errorf("%+v", r)
		}
	}
	if len(doc.Series[1].Results) != 0 || len(doc.Summary) != 16 {
		t.Errorf("a constant has %d results, the summary %d rows", len(doc.Series[1].Results), len(doc.Summary))
	}
}

func TestBacktestPrintsATable(t *testing.T) {
	out, errs, err := backtestWith(t, outputTable, loadFile(t), "--models", "tranship", "--horizons", "1h", "--stride", "9", "--group", "column")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, ":cpu") || !strings.Contains(out, "tranship") || !strings.Contains(out, "1h0m0s") {
		t.Errorf("table:\n%s", out)
	}
	if !strings.Contains(errs, "constant") {
		t.Errorf("nothing said of the skipped series: %q", errs)
	}
}

func TestBacktestRefusesWhatItCannotDo(t *testing.T) {
	file := loadFile(t)
	for name, args := range map[string][]string{
		"no file":                {},
		"a horizon of nothing":   {file, "--horizons", "soon"},
		"descending horizons":    {file, "--horizons", "1h,5m"},
		"an unknown model":       {file, "--models", "oracle"},
		"a stride of none":       {file, "--stride", "0"},
		"no jobs":                {file, "--jobs", "0"},
		"an unknown group":       {file, "--group", "moon"},
		"an unknown sample":      {file, "--sample", "easy"},
		"more horizons than fit": {file, "--horizons", "5m,10m,15m,20m,25m,30m"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := backtestWith(t, outputTable, args...); exitCode(err) != exitUsage {
				t.Errorf("exit code %d (%v), want %d", exitCode(err), err, exitUsage)
			}
		})
	}
	if _, _, err := backtestWith(t, outputTable, filepath.Join(t.TempDir(), "none.csv")); exitCode(err) != exitFailed {
		t.Errorf("a missing file: exit code %d (%v)", exitCode(err), err)
	}
}
