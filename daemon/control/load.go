package control

import (
	"math"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// LoadDocument is what `tranship top -o json` prints. Rates are by signal, the
// mean of the last ten seconds, in base units; a signal that is not measured is
// missing.
type LoadDocument struct {
	Document
	Hosts            []HostLoad  `json:"hosts"`
	Shards           []ShardLoad `json:"shards"`
	UnreachableNodes []string    `json:"unreachable_nodes"`
}

// HostLoad is one host with all that runs on it.
type HostLoad struct {
	Node               string             `json:"node"`
	CPUs               uint32             `json:"cpus"`
	MemoryTotalBytes   int64              `json:"memory_total_bytes"`
	LinkBytesPerSecond float64            `json:"link_bytes_per_second"`
	Rates              map[string]float64 `json:"rates"`
	CPURecent          []*float64         `json:"cpu_recent"`
	Sources            []SignalSource     `json:"sources"`
}

// SignalSource says where a signal comes from.
type SignalSource struct {
	Signal string `json:"signal"`
	From   string `json:"from"`
	Why    string `json:"why,omitempty"`
}

// ShardLoad is one shard.
type ShardLoad struct {
	Node                string             `json:"node"`
	Namespace           string             `json:"namespace"`
	Name                string             `json:"name"`
	Tenant              string             `json:"tenant"`
	Workload            string             `json:"workload"`
	Rates               map[string]float64 `json:"rates"`
	CPURecent           []*float64         `json:"cpu_recent"`
	CPUForecast         *float64           `json:"cpu_forecast,omitempty"`
	DirtyPagesPerSecond *float64           `json:"dirty_pages_per_second,omitempty"`
	// Absent are signals that this shard lacks and others of its host have, and why.
	Absent map[string]string `json:"absent,omitempty"`
}

// LoadOf converts a message.
func LoadOf(m *v1.LoadResponse) LoadDocument {
	doc := LoadDocument{
		Document: NewDocument(), Hosts: []HostLoad{}, Shards: []ShardLoad{},
		UnreachableNodes: append([]string{}, m.GetUnreachableNodes()...),
	}
	for _, h := range m.GetHosts() {
		host := HostLoad{
			Node: h.GetNode(), CPUs: h.GetCpus(), MemoryTotalBytes: h.GetMemoryTotalBytes(), LinkBytesPerSecond: h.GetLinkBytesPerSecond(),
			Rates: ratesOf(h.GetRates()), CPURecent: recentOf(h.GetCpuRecent()), Sources: []SignalSource{},
		}
		for _, s := range h.GetSources() {
			host.Sources = append(host.Sources, SignalSource{Signal: s.GetSignal(), From: s.GetFrom(), Why: s.GetWhy()})
		}
		doc.Hosts = append(doc.Hosts, host)
	}
	for _, s := range m.GetShards() {
		doc.Shards = append(doc.Shards, ShardLoad{
			Node: s.GetNode(), Namespace: s.GetNamespace(), Name: s.GetName(), Tenant: s.GetTenant(), Workload: s.GetWorkload(),
			Rates: ratesOf(s.GetRates()), CPURecent: recentOf(s.GetCpuRecent()),
			CPUForecast: s.CpuForecast, DirtyPagesPerSecond: s.DirtyPagesPerSecond, Absent: s.GetAbsent(),
		})
	}
	return doc
}

func ratesOf(m map[string]float64) map[string]float64 {
	if m == nil {
		return map[string]float64{}
	}
	return m
}

// recentOf makes gaps null, which JSON has and NaN it has not.
func recentOf(values []float64) []*float64 {
	out := make([]*float64, len(values))
	for i, v := range values {
		if !math.IsNaN(v) {
			out[i] = &v
		}
	}
	return out
}
