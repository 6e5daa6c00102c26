package migrate

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tranship/tranship/checkpoint"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/transfer"
)

// Metrics are the migration metrics of one host. Labels are bounded: outcomes
// and codes are fixed sets.
type Metrics struct {
	ends     *prometheus.CounterVec
	blackout prometheus.Histogram
	total    prometheus.Histogram
	pages    prometheus.Counter
	raw      prometheus.Counter
	sent     prometheus.Counter
	rounds   prometheus.Counter
	as       *prometheus.CounterVec
}

// NewMetrics makes and registers the metrics.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	native := func(name, help string) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: name, Help: help,
			// Classic buckets for those who scrape without native histograms:
			// 10 ms to 41 s, which spans blackouts and whole migrations.
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 13),
			// 10 % resolution; 160 buckets span six decades.
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160,
			NativeHistogramMinResetDuration: time.Hour,
		})
	}
	m := &Metrics{
		ends: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tranship_migrations_total", Help: "Migrations from this host that ended, by outcome and cause.",
		}, []string{"outcome", "code"}),
		blackout: native("tranship_migration_blackout_seconds", "Time from the first frozen task on the source to the first running task on the destination."),
		total:    native("tranship_migration_duration_seconds", "Time of a whole migration."),
		pages:    prometheus.NewCounter(prometheus.CounterOpts{Name: "tranship_migration_pages_total", Help: "Pages of memory read for migrations."}),
		raw:      prometheus.NewCounter(prometheus.CounterOpts{Name: "tranship_migration_raw_bytes_total", Help: "Bytes of memory read for migrations."}),
		sent:     prometheus.NewCounter(prometheus.CounterOpts{Name: "tranship_migration_sent_bytes_total", Help: "Bytes sent to other hosts for migrations."}),
		rounds:   prometheus.NewCounter(prometheus.CounterOpts{Name: "tranship_migration_rounds_total", Help: "Pre-copy rounds."}),
		as: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tranship_migration_pages_sent_total", Help: "Pages with content, by how they went over the wire: unchanged ones did not.",
		}, []string{"as"}),
	}
	reg.MustRegister(m.ends, m.blackout, m.total, m.pages, m.raw, m.sent, m.rounds, m.as)
	return m
}

func (m *Metrics) round(RoundResult) { m.rounds.Inc() }

// went counts the pages of a round, pre-copy's or the last.
func (m *Metrics) went(stats transfer.RoundStats) {
	for as, n := range map[string]checkpoint.Pages{
		"unchanged": stats.Unchanged, "raw": stats.Raw, "s2": stats.S2, "zstd": stats.Zstd, "delta": stats.Deltas, "copy": stats.Copies, "twin": stats.Twins,
	} {
		m.as.WithLabelValues(as).Add(float64(n))
	}
}

func (m *Metrics) ended(r *v1.Migration) {
	m.ends.WithLabelValues(r.GetOutcome(), r.GetCode()).Inc()
	m.pages.Add(float64(r.GetPages()))
	m.raw.Add(float64(r.GetBytesRaw()))
	m.sent.Add(float64(r.GetBytesSent()))
	m.total.Observe(r.GetTotalMs() / 1000)
	if r.GetOutcome() == OutcomeDone {
		m.blackout.Observe(r.GetBlackoutMs() / 1000)
	}
}
