package migrate

import (
	"context"
	"testing"
	"time"

	otelcodes "go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func TestAMigrationBecomesATrace(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	started := time.UnixMilli(1_700_000_000_000)
	traceMigration(provider.Tracer("test"), &v1.Migration{
		Id: "m1", Outcome: OutcomeDone, StartedAtUnixMs: started.UnixMilli(), TotalMs: 1000, BlackoutMs: 200, FrozenAtMs: 700,
		Phases: []*v1.Phase{{Name: "pre-copy", AtMs: 100, Ms: 590}, {Name: "stop-and-copy", AtMs: 690, Ms: 100}},
		Rounds: []*v1.Round{{N: 1, AtMs: 110, Ms: 500}, {N: 2, AtMs: 710, Ms: 20}},
		Blackout: []*v1.Phase{
			{Name: "journal", Node: "host-1", AtMs: 90, Ms: 1},
			{Name: "criu dump", Node: "host-1", AtMs: 1, Ms: 80},
			{Name: "seize tasks", Of: "criu dump", Node: "host-1", AtMs: 1, Ms: 30},
			{Name: "journal", Node: "host-2", AtMs: 195, Ms: 1},
			{Name: "restore", Of: "criu restore", Node: "host-2", AtMs: -1, Ms: 50},
		},
	})
	traceMigration(provider.Tracer("test"), &v1.Migration{Id: "m2", Outcome: OutcomeAborted, Reason: "the link is cut", StartedAtUnixMs: started.UnixMilli(), TotalMs: 5})
	traceMigration(nil, &v1.Migration{})
	if err := provider.ForceFlush(context.Background()); err != nil {
		t.Fatal(err)
	}
	type row struct {
		parent   string
		at, took time.Duration
	}
	names := map[string]string{}
	for _, s := range spans.GetSpans() {
		names[s.SpanContext.SpanID().String()] = s.Name
	}
	got := map[string][]row{}
	for _, s := range spans.GetSpans() {
		got[s.Name] = append(got[s.Name], row{names[s.Parent.SpanID().String()], s.StartTime.Sub(started), s.EndTime.Sub(s.StartTime)})
		if s.Name == "migrate" && s.EndTime.Sub(s.StartTime) == 5*time.Millisecond && (s.Status.Code != otelcodes.Error || s.Status.Description != "the link is cut") {
			t.Errorf("%+v", s.Status)
		}
	}
	ms := time.Millisecond
	for name, want := range map[string][]row{
		"migrate":       {{"", 0, 1000 * ms}, {"", 0, 5 * ms}},
		"pre-copy":      {{"migrate", 100 * ms, 590 * ms}},
		"stop-and-copy": {{"migrate", 690 * ms, 100 * ms}},
		"round":         {{"pre-copy", 110 * ms, 500 * ms}, {"stop-and-copy", 710 * ms, 20 * ms}},
		"blackout":      {{"migrate", 700 * ms, 200 * ms}},
		"journal":       {{"blackout", 790 * ms, ms}, {"blackout", 895 * ms, ms}},
		"criu dump":     {{"blackout", 701 * ms, 80 * ms}},
		"seize tasks":   {{"criu dump", 701 * ms, 30 * ms}},
	} {
		if len(got[name]) != len(want) {
			t.Errorf("%s: %v, want %v", name, got[name], want)
			continue
		}
		for i := range want {
			if got[name][i] != want[i] {
				t.Errorf("%s: %v, want %v", name, got[name][i], want[i])
			}
		}
	}
	if len(names) != 11 {
		t.Errorf("%d spans: %v", len(names), names)
	}
}
