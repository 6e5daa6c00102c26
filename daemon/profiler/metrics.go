package profiler

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tranship/tranship/ebpf/profile"
)

// metric is one family: the signals that it shows, each with the value of its
// second label, for shards (tranship_shard_…) and the host (tranship_host_…).
type metric struct {
	name, help string
	label      string // "" without a second label
	of         []labelled
}

type labelled struct {
	signal profile.Signal
	value  string
}

var families = []metric{
	{"cpu_seconds_total", "CPU time.", "", []labelled{{profile.CPU, ""}}},
	{"context_switches_total", "Context switches, by whether the task had to wait or had more to do.", "kind", []labelled{{profile.Voluntary, "voluntary"}, {profile.Forced, "forced"}}},
	{"page_faults_total", "Page faults, by whether they needed I/O.", "kind", []labelled{{profile.MinorFaults, "minor"}, {profile.MajorFaults, "major"}}},
	{"block_bytes_total", "Bytes moved by block devices.", "direction", []labelled{{profile.ReadBytes, "read"}, {profile.WriteBytes, "write"}}},
	{"network_bytes_total", "Bytes through the network interfaces, loopback excepted.", "direction", []labelled{{profile.ReceiveBytes, "receive"}, {profile.TransmitBytes, "transmit"}}},
	{"network_packets_total", "Packets through the network interfaces, loopback excepted.", "direction", []labelled{{profile.ReceivePackets, "receive"}, {profile.TransmitPackets, "transmit"}}},
	{"tcp_retransmitted_segments_total", "TCP segments sent again.", "", []labelled{{profile.Retransmits, ""}}},
	{"tcp_connections", "Open TCP connections.", "", []labelled{{profile.Connections, ""}}},
	{"tcp_round_trip_seconds", "Smoothed round-trip time of TCP, the mean over open connections.", "", []labelled{{profile.RoundTrip, ""}}},
	{"cpu_throttled_seconds_total", "Time for which a quota held tasks back.", "", []labelled{{profile.Throttled, ""}}},
	{"memory_bytes", "Memory that counts against the limit.", "", []labelled{{profile.MemoryBytes, ""}}},
	{"memory_working_set_bytes", "Memory without inactive page cache.", "", []labelled{{profile.WorkingSet, ""}}},
	{"pressure_seconds_total", "Time in which some task waited for the resource (PSI).", "resource", []labelled{{profile.CPUPressure, "cpu"}, {profile.MemoryPressure, "memory"}, {profile.IOPressure, "io"}}},
	{"instructions_total", "Instructions executed.", "", []labelled{{profile.Instructions, ""}}},
	{"cache_misses_total", "Misses of the last level cache.", "", []labelled{{profile.CacheMisses, ""}}},
	{"dirty_pages", "Pages written in a second, as last measured.", "", []labelled{{profile.DirtyPages, ""}}},
}

// latency is one histogram of a family, valid with its signal.
type latency struct {
	signal profile.Signal
	value  string
	from   func(*profile.Sample) *profile.Latency
}

// histograms of latencies, native: bucket for bucket what the programs count.
var histograms = []struct {
	name, help string
	label      string
	of         []latency
}{
	{"run_queue_wait_seconds", "How long runnable tasks waited for a CPU.", "", []latency{
		{profile.Wait, "", func(s *profile.Sample) *profile.Latency { return &s.RunQueue }},
	}},
	{"block_latency_seconds", "From a block request's allocation to its completion.", "direction", []latency{
		{profile.ReadOps, "read", func(s *profile.Sample) *profile.Latency { return &s.Reads }},
		{profile.WriteOps, "write", func(s *profile.Sample) *profile.Latency { return &s.Writes }},
	}},
}

// shardLabels bound the series: as many as there are shards on the host. A shard
// outside the namespace "default" is called NAMESPACE/NAME.
var shardLabels = []string{"tenant", "workload", "shard"}

// Collector shows the last sample of everything. Register it with one registry.
type Collector struct {
	p            *Profiler
	shard, host  map[string]*prometheus.Desc
	source       *prometheus.Desc
	gaps         *prometheus.Desc
	missed       *prometheus.Desc
	lost         *prometheus.Desc
	unwatched    *prometheus.Desc
	dropped      *prometheus.Desc
	spent        *prometheus.Desc
	shards       *prometheus.Desc
	cpus         *prometheus.Desc
	memory, link *prometheus.Desc
	since        time.Time
}

var _ prometheus.Collector = (*Collector)(nil)

// NewCollector makes the collector.
func (p *Profiler) NewCollector() *Collector {
	c := &Collector{
		p: p, shard: map[string]*prometheus.Desc{}, host: map[string]*prometheus.Desc{}, since: time.Now(),
		source:    prometheus.NewDesc("tranship_profile_source_info", "Where a signal comes from on this host.", []string{"signal", "source"}, nil),
		gaps:      prometheus.NewDesc("tranship_profile_gaps_total", "Intervals that could not be measured, by reason.", []string{"reason"}, nil),
		missed:    prometheus.NewDesc("tranship_profile_missed_events_total", "Events for which a program did not run, because it interrupted itself.", nil, nil),
		lost:      prometheus.NewDesc("tranship_profile_lost_connections_total", "TCP connections for which the map had no place.", nil, nil),
		unwatched: prometheus.NewDesc("tranship_profile_unseen_shards_total", "Shards that ended before they could be profiled, and of which no count was found.", nil, nil),
		dropped:   prometheus.NewDesc("tranship_profile_dropped_batches_total", "Batches of minutes that the disk was too slow for.", nil, nil),
		spent:     prometheus.NewDesc("tranship_profile_sampling_seconds_total", "Time spent taking samples.", nil, nil),
		shards:    prometheus.NewDesc("tranship_profile_shards", "Shards that are profiled.", nil, nil),
		cpus:      prometheus.NewDesc("tranship_host_cpus", "CPUs of the host.", nil, nil),
		memory:    prometheus.NewDesc("tranship_host_memory_total_bytes", "Memory of the host.", nil, nil),
		link:      prometheus.NewDesc("tranship_host_link_speed_bytes", "Bytes a second that the host's links carry, as far as they say.", nil, nil),
	}
	for _, f := range families {
		c.describe(f.name, f.help, f.label)
	}
	for _, f := range histograms {
		c.describe(f.name, f.help, f.label)
	}
	return c
}

func (c *Collector) describe(name, help, label string) {
	var extra []string
	if label != "" {
		extra = []string{label}
	}
	labels := append(append([]string{}, shardLabels...), extra...)
	c.shard[name] = prometheus.NewDesc("tranship_shard_"+name, help+" Of a shard.", labels, nil)
	c.host[name] = prometheus.NewDesc("tranship_host_"+name, help+" Of the host with its shards.", extra, nil)
}

// Describe says nothing: which families there are depends on the kernel.
func (c *Collector) Describe(chan<- *prometheus.Desc) {}

// Collect shows the last sample.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	p := c.p
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.subjects {
		shard := s.key
		if s.namespace == "default" {
			shard = s.name
		}
		last, ok := s.profile.Last()
		if !ok {
			continue
		}
		sm := *last
		if s.dirtyKnown {
			sm.Set(profile.DirtyPages, s.dirty)
		}
		c.sample(ch, c.shard, &sm, s.since, s.tenant, s.workload, shard)
	}
	if last, ok := p.host.profile.Last(); ok {
		c.sample(ch, c.host, last, c.since)
	}
	for _, s := range p.sources {
		ch <- prometheus.MustNewConstMetric(c.source, prometheus.GaugeValue, 1, s.Signal.String(), s.From)
	}
	for _, reason := range []profile.GapReason{profile.Late, profile.Suspended, profile.Stepped, profile.Backwards} {
		ch <- prometheus.MustNewConstMetric(c.gaps, prometheus.CounterValue, p.gaps[reason], string(reason))
	}
	for _, m := range []struct {
		desc *prometheus.Desc
		kind prometheus.ValueType
		v    float64
	}{
		{c.unwatched, prometheus.CounterValue, float64(p.unwatch)},
		{c.dropped, prometheus.CounterValue, float64(p.dropped)},
		{c.spent, prometheus.CounterValue, p.spent.Seconds()},
		{c.shards, prometheus.GaugeValue, float64(len(p.subjects))},
		{c.cpus, prometheus.GaugeValue, float64(cpus())},
		{c.memory, prometheus.GaugeValue, p.host.memory},
		{c.link, prometheus.GaugeValue, p.host.linkBytes},
	} {
		ch <- prometheus.MustNewConstMetric(m.desc, m.kind, m.v)
	}
	if p.probe == nil {
		return
	}
	st, err := p.probe.Stats()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.missed, err)
		return
	}
	ch <- prometheus.MustNewConstMetric(c.missed, prometheus.CounterValue, float64(st.Missed))
	ch <- prometheus.MustNewConstMetric(c.lost, prometheus.CounterValue, float64(st.ConnectionsLost))
}

func (c *Collector) sample(ch chan<- prometheus.Metric, descs map[string]*prometheus.Desc, s *profile.Sample, since time.Time, labels ...string) {
	with := func(label, value string) []string {
		if label == "" {
			return labels
		}
		return append(append([]string{}, labels...), value)
	}
	for _, f := range families {
		for _, of := range f.of {
			v, ok := s.Get(of.signal)
			if !ok {
				continue
			}
			kind := prometheus.GaugeValue
			if of.signal.Counter() {
				kind = prometheus.CounterValue
			}
			m, err := prometheus.NewConstMetric(descs[f.name], kind, v, with(f.label, of.value)...)
			if err != nil {
				m = prometheus.NewInvalidMetric(descs[f.name], err)
			}
			ch <- m
		}
	}
	for _, f := range histograms {
		for _, of := range f.of {
			if !s.Has.Has(of.signal) {
				continue
			}
			l := of.from(s)
			buckets := map[int]int64{}
			for b, n := range l.Buckets {
				if n > 0 {
					buckets[profile.NativeIndex(b)] = int64(n)
				}
			}
			m, err := prometheus.NewConstNativeHistogram(descs[f.name], l.Buckets.Count(), l.Seconds, buckets, nil, 0, 0,
				prometheus.DefNativeHistogramZeroThreshold, since, with(f.label, of.value)...)
			if err != nil {
				m = prometheus.NewInvalidMetric(descs[f.name], err)
			}
			ch <- m
		}
	}
}
