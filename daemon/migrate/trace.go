package migrate

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// traceMigration writes an ended migration as an OpenTelemetry trace:
//
//	migrate
//	├ reserve, prepare, pre-copy, …   the phases
//	│ └ round N                       in the phase in which it ran
//	└ blackout
//	  └ freeze, criu dump, …          its parts, of both hosts, by the source's clock
//
// It is written at the end, from the report: nothing of it is on the road of a page.
func traceMigration(t trace.Tracer, m *v1.Migration) {
	if t == nil {
		return
	}
	started := time.UnixMilli(m.GetStartedAtUnixMs())
	at := func(ms float64) time.Time { return started.Add(duration(ms)) }
	span := func(ctx context.Context, name string, from, to time.Time, attrs ...attribute.KeyValue) (context.Context, trace.Span) {
		ctx, s := t.Start(ctx, name, trace.WithTimestamp(from), trace.WithAttributes(attrs...))
		s.End(trace.WithTimestamp(to))
		return ctx, s
	}
	ctx, root := t.Start(context.Background(), "migrate", trace.WithTimestamp(started), trace.WithAttributes(
		attribute.String("tranship.migration", m.GetId()), attribute.String("tranship.shard", m.GetShard()),
		attribute.String("tranship.namespace", m.GetNamespace()), attribute.String("tranship.from", m.GetFrom()),
		attribute.String("tranship.to", m.GetTo()), attribute.String("tranship.mode", m.GetMode()),
		attribute.String("tranship.outcome", m.GetOutcome()), attribute.Float64("tranship.blackout_ms", m.GetBlackoutMs()),
		attribute.Int64("tranship.pages", m.GetPages()), attribute.Int64("tranship.bytes_raw", m.GetBytesRaw()),
		attribute.Int64("tranship.bytes_sent", m.GetBytesSent())))
	defer root.End(trace.WithTimestamp(at(m.GetTotalMs())))
	if m.GetOutcome() != OutcomeDone {
		root.SetStatus(otelcodes.Error, m.GetReason())
	}
	rounds := m.GetRounds()
	for _, p := range m.GetPhases() {
		end := p.GetAtMs() + p.GetMs()
		pctx, _ := span(ctx, p.GetName(), at(p.GetAtMs()), at(end))
		for ; len(rounds) > 0 && rounds[0].GetAtMs() < end; rounds = rounds[1:] {
			r := rounds[0]
			span(pctx, "round", at(r.GetAtMs()), at(r.GetAtMs()+r.GetMs()), attribute.Int("tranship.round", int(r.GetN())),
				attribute.Int64("tranship.pages", r.GetPages()), attribute.Int64("tranship.bytes_raw", r.GetBytesRaw()),
				attribute.Int64("tranship.bytes_sent", r.GetBytesSent()), attribute.Float64("tranship.throttled_cpus", r.GetThrottledCpus()))
		}
	}
	if m.GetBlackoutMs() <= 0 {
		return
	}
	frozen := m.GetFrozenAtMs()
	bctx, _ := span(ctx, "blackout", at(frozen), at(frozen+m.GetBlackoutMs()), attribute.Float64("tranship.clock_error_ms", m.GetClockErrorMs()))
	within := map[[2]string]context.Context{}
	for _, s := range m.GetBlackout() {
		if s.GetOf() == "" {
			from := frozen + s.GetAtMs()
			within[[2]string{s.GetNode(), s.GetName()}], _ = span(bctx, s.GetName(), at(from), at(from+s.GetMs()), attribute.String("tranship.node", s.GetNode()))
		}
	}
	for _, s := range m.GetBlackout() {
		parent := within[[2]string{s.GetNode(), s.GetOf()}]
		if s.GetOf() == "" || parent == nil || s.GetAtMs() < 0 { // a span needs a time
			continue
		}
		from := frozen + s.GetAtMs()
		span(parent, s.GetName(), at(from), at(from+s.GetMs()), attribute.String("tranship.node", s.GetNode()))
	}
}

func duration(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }
