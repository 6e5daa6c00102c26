package balance

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// counts are what metrics show. Labels are fixed sets.
type counts struct {
	rounds          uint64
	looked, planned time.Duration
	decisions       map[[3]string]float64 // kind, reason, outcome
	vetoes          map[allocate.VetoCode]float64
	granted         float64
	expired         float64
	idle            time.Duration
	garbage, faults float64
}

func (c *counts) decided(d *v1.BalanceDecision) {
	c.decisions[[3]string{d.GetKind(), d.GetReason(), d.GetOutcome()}]++
}

// Collector shows what the loop does. Register it with one registry.
type Collector struct {
	b                                                  *Balancer
	rounds, looked, planned, decisions, overload, loss *prometheus.Desc
	held, granted, vetoes, expired, idle               *prometheus.Desc
	garbage, faults, arm                               *prometheus.Desc
}

var _ prometheus.Collector = (*Collector)(nil)

// NewCollector makes the collector.
func (b *Balancer) NewCollector() *Collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("tranship_balance_"+name, help, labels, nil)
	}
	return &Collector{
		b:         b,
		rounds:    desc("rounds_total", "Planning rounds."),
		looked:    desc("look_seconds_total", "Time for listing shards and asking peers."),
		planned:   desc("plan_seconds_total", "Time for planning itself."),
		decisions: desc("decisions_total", "Decisions, taken or not, by what they were about, why, and how they ended.", "kind", "reason", "outcome"),
		overload:  desc("overload_probability", "Probability that this host is overloaded, by how far ahead.", "within"),
		loss:      desc("expected_loss_seconds", "Overload that is expected within the hour, weighted by priority."),
		held:      desc("reservations", "Shards of other hosts that room is kept for."),
		granted:   desc("reservations_granted_total", "Reservations that this host granted."),
		vetoes:    desc("vetoes_total", "Reservations that this host refused.", "code"),
		expired:   desc("reservations_expired_total", "Reservations that ran out without a shard."),
		idle:      desc("reservations_idle_seconds_total", "Time for which room was kept for shards that were not on their way."),
		garbage:   desc("refused_requests_total", "Requests for room that could not be computed with."),
		faults:    desc("peer_faults_total", "Answers of peers that could not be used, or did not come."),
		arm:       desc("autopilot", "1 for the mode of shards that do not say it themselves.", "mode"),
	}
}

// Describe sends the descriptions.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.rounds, c.looked, c.planned, c.decisions, c.overload, c.loss, c.held, c.granted, c.vetoes, c.expired, c.idle, c.garbage, c.faults, c.arm} {
		ch <- d
	}
}

// Collect shows the newest numbers.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	b := c.b
	b.mu.Lock()
	defer b.mu.Unlock()
	counter := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	n := &b.counts
	counter(c.rounds, float64(n.rounds))
	counter(c.looked, n.looked.Seconds())
	counter(c.planned, n.planned.Seconds())
	for k, v := range n.decisions {
		counter(c.decisions, v, k[0], k[1], k[2])
	}
	for i, p := range b.plan.Overload {
		gauge(c.overload, p, within(i))
	}
	gauge(c.loss, b.plan.Loss)
	gauge(c.held, float64(len(b.ledger.Held(b.now()))))
	counter(c.granted, n.granted)
	for code, v := range n.vetoes {
		counter(c.vetoes, v, string(code))
	}
	counter(c.expired, n.expired)
	counter(c.idle, n.idle.Seconds())
	counter(c.garbage, n.garbage)
	counter(c.faults, n.faults)
	gauge(c.arm, 1, string(b.cfg.Autopilot))
}
