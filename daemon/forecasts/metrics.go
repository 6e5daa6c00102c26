package forecasts

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/predict"
)

// shown horizons of the peak: what a plan for room asks.
var (
	shownHorizons = []struct {
		name string
		h    time.Duration
	}{{"5m", 5 * time.Minute}, {"1h", time.Hour}, {"24h", 24 * time.Hour}}
	shownSignals = [signals]struct{ family, direction string }{
		{"cpu_cores", ""},
		{"working_set_bytes", ""},
		{"network_bytes_per_second", "receive"},
		{"network_bytes_per_second", "transmit"},
		{"block_bytes_per_second", "read"},
		{"block_bytes_per_second", "write"},
	}
)

// Collector shows the forecasts of all shards, 36 series each at most, and how
// the keeper does. Register it with one registry.
type Collector struct {
	k        *Keeper
	shard    map[string]*prometheus.Desc
	held     *prometheus.Desc
	count    *prometheus.Desc
	cells    *prometheus.Desc
	dropped  *prometheus.Desc
	borrowed *prometheus.Desc
	adopted  *prometheus.Desc
	lost     *prometheus.Desc
}

var _ prometheus.Collector = (*Collector)(nil)

// NewCollector makes the collector.
func (k *Keeper) NewCollector() *Collector {
	c := &Collector{
		k: k, shard: map[string]*prometheus.Desc{},
		held:     prometheus.NewDesc("tranship_forecast_held_ratio", "Recent share of peaks below the 95 % bound, the mean over shards' CPU forecasts.", []string{"horizon"}, nil),
		count:    prometheus.NewDesc("tranship_forecast_shards", "Shards that are forecast.", nil, nil),
		cells:    prometheus.NewDesc("tranship_forecast_samples_total", "Ten seconds of a shard that forecasters were given.", nil, nil),
		dropped:  prometheus.NewDesc("tranship_forecast_dropped_samples_total", "Ten seconds of a shard that found the queue full.", nil, nil),
		borrowed: prometheus.NewDesc("tranship_forecast_borrowed_total", "Cold shards that began with what others knew, by who the nearest lenders were.", []string{"from"}, nil),
		adopted:  prometheus.NewDesc("tranship_forecast_adopted_total", "Shards whose forecasters came with them from another host.", nil, nil),
		lost:     prometheus.NewDesc("tranship_forecast_lost_states_total", "States on disk that could not be read.", nil, nil),
	}
	for _, s := range shownSignals {
		labels := []string{"tenant", "workload", "shard", "horizon", "probability"}
		if s.direction != "" {
			labels = append(labels, "direction")
		}
		c.shard[s.family] = prometheus.NewDesc("tranship_shard_forecast_"+s.family, "What the peak up to the horizon stays below with this probability. Of a shard.", labels, nil)
	}
	return c
}

// Describe says nothing: which signals there are depends on the kernel.
func (c *Collector) Describe(chan<- *prometheus.Desc) {}

// Collect shows the newest forecasts.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	k := c.k
	k.mu.Lock()
	defer k.mu.Unlock()
	held, of, n := map[string]float64{}, map[string]float64{}, 0
	for key, sh := range k.shards {
		if sh.ended {
			continue
		}
		n++
		labels := []string{sh.labels.Tenant, sh.labels.Workload, strings.TrimPrefix(key, "default/")}
		for i, f := range sh.series {
			if f != nil {
				c.forecasts(ch, i, f, labels)
			}
		}
		if f := sh.series[0]; f != nil && Signals[0] == profile.CPU {
			for _, h := range shownHorizons {
				if f.Settled(h.h) > 0 {
					held[h.name] += f.Held95(h.h, predict.Peak)
					of[h.name]++
				}
			}
		}
	}
	for name, n := range of {
		ch <- prometheus.MustNewConstMetric(c.held, prometheus.GaugeValue, held[name]/n, name)
	}
	ch <- prometheus.MustNewConstMetric(c.count, prometheus.GaugeValue, float64(n))
	ch <- prometheus.MustNewConstMetric(c.cells, prometheus.CounterValue, k.counts.cells)
	ch <- prometheus.MustNewConstMetric(c.dropped, prometheus.CounterValue, k.counts.dropped)
	ch <- prometheus.MustNewConstMetric(c.adopted, prometheus.CounterValue, k.counts.adopted)
	ch <- prometheus.MustNewConstMetric(c.lost, prometheus.CounterValue, k.counts.lost)
	for _, from := range []string{scopeWorkload, scopeTenant, scopePool} {
		ch <- prometheus.MustNewConstMetric(c.borrowed, prometheus.CounterValue, k.counts.borrowed[from], from)
	}
}

func (c *Collector) forecasts(ch chan<- prometheus.Metric, signal int, f *predict.Forecaster, labels []string) {
	s := shownSignals[signal]
	for _, h := range shownHorizons {
		q, err := f.Forecast(h.h, predict.Peak)
		if err != nil {
			continue // nothing was observed yet
		}
		for _, of := range []struct {
			name string
			v    float64
		}{{"0.5", q.P50}, {"0.95", q.P95}} {
			with := append(append([]string{}, labels...), h.name, of.name)
			if s.direction != "" {
				with = append(with, s.direction)
			}
			m, err := prometheus.NewConstMetric(c.shard[s.family], prometheus.GaugeValue, of.v, with...)
			if err != nil {
				m = prometheus.NewInvalidMetric(c.shard[s.family], err)
			}
			ch <- m
		}
	}
}
