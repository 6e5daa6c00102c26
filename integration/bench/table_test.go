package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the goldens")

// measured makes results in which runc takes 400 ms and a second a GiB, and
// tranship 100 ms and 20 ms a GiB.
func measured() *results {
	r := &results{SchemaVersion: resultsVersion, Machine: machine{Tranship: "tranship v1", CPUs: 2, CPU: "a processor", MemMiB: 24000, Kernel: "6.18", CRIU: "Version: 4.2", Runc: "runc 1.1"}}
	for _, size := range sizes {
		g := group{Name: size.group}
		for _, off := range []float64{0, -10, 10, 5, -5} {
			g.Samples = append(g.Samples,
				sample{Subject: tranship, Values: map[string]float64{blackoutMetric: 100 + 20*size.gib + off/10, totalMetric: 900, bytesMetric: 5 << 20, gapMetric: 130}, Steps: map[string]float64{"last pages": 60 + off, "criu dump": 60, "journal": 1}},
				sample{Subject: stock, Values: map[string]float64{blackoutMetric: 400 + 1000*size.gib + off, totalMetric: 500, bytesMetric: 50 << 20, gapMetric: 480}})
		}
		r.put(g)
	}
	r.put(group{Name: "idle", Samples: []sample{{Subject: stockAlone, Values: map[string]float64{criuMetric: 50}}}})
	r.put(group{Name: "criu-pre-dump", Absent: []absent{{Subject: preDump, Why: "no soft-dirty bits\nand more"}}})
	r.Rows = targets(r)
	return r
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; go test -update, and look at it:\n%s", name, got)
	}
}

func TestTheTable(t *testing.T) {
	var b bytes.Buffer
	if err := printTable(&b, measured()); err != nil {
		t.Fatal(err)
	}
	golden(t, "table.txt", b.Bytes())
}

func TestThePlot(t *testing.T) {
	svg := drawBlackout(measured())
	for dec := xml.NewDecoder(bytes.NewReader(svg)); ; {
		if _, err := dec.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("it is no XML: %v", err)
		}
	}
	golden(t, "blackout.svg", svg)
	if svg := drawBlackout(&results{}); svg != nil {
		t.Errorf("of nothing: %s", svg)
	}
}

func rowOf(t *testing.T, r *results, part string) row {
	t.Helper()
	for _, row := range r.Rows {
		if strings.Contains(row.Name, part) {
			return row
		}
	}
	t.Fatalf("no row %q", part)
	return row{}
}

func TestTargetsAreComputedFromMedians(t *testing.T) {
	r := measured()
	if got := rowOf(t, r, "1 GiB"); got.Value == nil || math.Abs(*got.Value-120.0/1400) > 1e-9 || !got.Pass {
		t.Errorf("1 GiB: %+v", got)
	}
	if got := rowOf(t, r, "4 GiB"); got.Pass != (180.0/4400 <= 0.06) {
		t.Errorf("4 GiB: %+v", got)
	}
	if got := rowOf(t, r, "added by a GiB"); got.Value == nil || math.Abs(*got.Value-0.02) > 1e-9 || !got.Pass {
		t.Errorf("growth: %+v", got)
	}
	// 101 ms of 50 ms: two times CRIU alone is no 1.2.
	if got := rowOf(t, r, "CRIU alone"); got.Pass || !strings.HasPrefix(got.verdict(), "missed: 1.69") {
		t.Errorf("CRIU alone: %+v, %s", got, got.verdict())
	}
	if got := rowOf(t, r, "p99"); got.Value != nil || got.Pass || got.verdict() != "not measured" {
		t.Errorf("what was not measured: %+v, %s", got, got.verdict())
	}
}

func TestTheRowOfMovesCountsWhatWentWrong(t *testing.T) {
	g := group{Name: lineupGroup}
	for i := range 100 {
		v := sample{Subject: tranship, Values: map[string]float64{blackoutMetric: 100, gapMetric: 120}}
		if i == 7 || i == 8 {
			v.Values = map[string]float64{blackoutMetric: 150, gapMetric: 230}
		}
		g.Samples = append(g.Samples, v)
	}
	g.Samples = append(g.Samples, sample{Subject: overall, Values: map[string]float64{errorsMetric: 1, leaksMetric: 0}})
	r := &results{Groups: []group{g}}
	r.Rows = targets(r)
	for part, want := range map[string]float64{"gap beyond": 80, "errors": 1, "leaks": 0, "p99 of the median": 1.5} {
		got := rowOf(t, r, part)
		if got.Value == nil || *got.Value != want || got.Pass != (part == "leaks" || part == "p99 of the median") {
			t.Errorf("%s: %+v", part, got)
		}
	}
}

func TestFewSamplesPassNothing(t *testing.T) {
	r := measured()
	for i := range r.Groups {
		if len(r.Groups[i].Samples) > 8 {
			r.Groups[i].Samples = r.Groups[i].Samples[:8] // four of each
		}
	}
	r.Rows = targets(r)
	if got := rowOf(t, r, "1 GiB"); got.Pass || got.Value == nil || got.verdict() != "fewer samples than 5" {
		t.Errorf("%+v, %s", got, got.verdict())
	}
}

func TestResultsSurviveARoundTrip(t *testing.T) {
	dir := t.TempDir()
	r := measured()
	if err := r.save(dir); err != nil {
		t.Fatal(err)
	}
	again, err := loadResults(dir)
	if err != nil {
		t.Fatal(err)
	}
	a, _ := json.Marshal(r)
	b, _ := json.Marshal(again)
	if !bytes.Equal(a, b) {
		t.Errorf("%s\nbecame\n%s", a, b)
	}
	if r, err := loadResults(t.TempDir()); err != nil || len(r.Groups) != 0 {
		t.Errorf("of an empty directory: %+v, %v", r, err)
	}
	if err := os.WriteFile(filepath.Join(dir, resultsFile), []byte(`{"schema_version":99}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := loadResults(dir); err == nil {
		t.Error("results of another version are taken")
	}
}

func TestFlags(t *testing.T) {
	for _, test := range []struct {
		args        []string
		runs, moves int
		wrong       bool
	}{
		{args: nil, runs: 5, moves: 100},
		{args: []string{"--quick"}, runs: 2, moves: 10},
		{args: []string{"--quick", "--runs", "3"}, runs: 3, moves: 10},
		{args: []string{"--only", "("}, wrong: true},
		{args: []string{"--runs", "-1"}, wrong: true},
		{args: []string{"redis"}, wrong: true},
	} {
		o, err := parse(test.args, io.Discard)
		if (err != nil) != test.wrong {
			t.Errorf("%v: %v", test.args, err)
		}
		if err == nil && (o.runs != test.runs || o.moves != test.moves) {
			t.Errorf("%v: %+v", test.args, o)
		}
	}
}
