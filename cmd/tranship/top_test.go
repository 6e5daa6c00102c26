package main

import (
	"math"
	"strings"
	"testing"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func load() control.LoadDocument {
	return control.LoadOf(&v1.LoadResponse{
		Hosts: []*v1.HostLoad{{
			Node: "host-1", Cpus: 2, MemoryTotalBytes: 8 << 30, Rates: map[string]float64{"cpu": 1.25, "working_set": 1 << 30},
			CpuRecent: []float64{0, 1, math.NaN(), 2},
		}},
		Shards: []*v1.ShardLoad{
			{Node: "host-1", Namespace: "default", Name: "idle", Rates: map[string]float64{"cpu": 0.01}},
			{Node: "host-1", Namespace: "k8s.io", Name: "busy", Rates: map[string]float64{"cpu": 1, "receive_bytes": 2500, "round_trip": 0.0021}},
		},
		UnreachableNodes: []string{"host-2"},
	})
}

func TestTopShowsTheBusiestFirstAndWhatIsNotMeasuredAsSuch(t *testing.T) {
	text := topTable(load())
	lines := strings.Split(text, "\n")
	for i, want := range []string{"HOST", "host-1", "host-2 does not answer", "", "SHARD", "k8s.io/busy", "idle"} {
		if !strings.HasPrefix(lines[i], want) {
			t.Errorf("line %d is %q, not %s", i, lines[i], want)
		}
	}
	for _, want := range []string{"1.25 of 2", "1.0GiB of 8.0GiB", "▁▄ █", "2.5kB/s", "2.1ms"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(lines[6], "0B/s") {
		t.Errorf("what is not measured is shown as zero: %s", lines[6])
	}
	if strings.Contains(text, "FORECAST") {
		t.Error("a column of forecasts that nobody made")
	}
	doc := load()
	forecast := 0.75
	doc.Shards[0].CPUForecast = &forecast
	if text := topTable(doc); !strings.Contains(text, "FORECAST") || !strings.Contains(text, "0.75") {
		t.Error(text)
	}
}

func TestTopFitsTheScreen(t *testing.T) {
	text := clip(topTable(load()), 20, 4)
	lines := strings.Split(strings.TrimSuffix(text, "\r\n"), "\r\n")
	if len(lines) != 3 {
		t.Errorf("%d lines on a screen of 4", len(lines))
	}
	for _, l := range lines {
		if n := len([]rune(strings.TrimSuffix(l, "\x1b[K"))); n > 20 {
			t.Errorf("%d columns: %q", n, l)
		}
	}
}

func TestSparkline(t *testing.T) {
	v := func(f float64) *float64 { return &f }
	for _, tt := range []struct {
		name   string
		values []*float64
		top    float64
		want   string
	}{
		{"nothing", nil, 1, ""},
		{"all zero has no highest", []*float64{v(0), v(0)}, 0, "▁▁"},
		{"a gap is a blank", []*float64{v(1), nil, v(1)}, 0, "█ █"},
		{"beyond the top", []*float64{v(9)}, 2, "█"},
		{"half", []*float64{v(1)}, 2, "▄"},
	} {
		if got := sparkline(tt.values, tt.top); got != tt.want {
			t.Errorf("%s: %q instead of %q", tt.name, got, tt.want)
		}
	}
}
