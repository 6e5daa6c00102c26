package steward

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads"
)

// policyOf are the labels of a workload's shards. What is not said is no label.
func policyOf(s *workloads.Spec) map[string]string {
	out := map[string]string{runtime.LabelWorkload: s.Name, runtime.LabelPriority: strconv.Itoa(s.Priority)}
	set := func(key, value string) {
		if value != "" && value != "0" {
			out[key] = value
		}
	}
	cpus := func(c float64) string { return strconv.FormatFloat(c, 'g', -1, 64) }
	set(runtime.LabelTenant, s.Tenant)
	set(runtime.LabelRequestCPUs, cpus(s.Size.CPURequest))
	set(runtime.LabelLimitCPUs, cpus(s.Size.CPULimit))
	set(runtime.LabelRequestMemory, strconv.FormatInt(s.Size.MemoryRequest, 10))
	set(runtime.LabelLimitMemory, strconv.FormatInt(s.Size.MemoryLimit, 10))
	if s.Pinned {
		out[runtime.LabelPinned] = "true"
	}
	set(runtime.LabelWindows, strings.Join(s.Windows, ","))
	if s.MaxBlackout > 0 {
		out[runtime.LabelMaxBlackout] = s.MaxBlackout.String()
	}
	set(runtime.LabelAutopilot, s.Autopilot)
	set(runtime.LabelSpreadHost, strconv.Itoa(s.Spread.PerHost))
	set(runtime.LabelSpreadZone, strconv.Itoa(s.Spread.PerZone))
	set(runtime.LabelZones, strings.Join(s.Zones, ","))
	var labels []string
	for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
		labels = append(labels, k+"="+s.Labels[k])
	}
	set(runtime.LabelHostLabels, strings.Join(labels, ","))
	set(runtime.LabelAvoid, strings.Join(s.Avoid, ","))
	set(runtime.LabelNear, strings.Join(s.Near, ","))
	return out
}

// Rules is what a shard's labels say of where it may run and what it counts on:
// enough of a spec for workloads.Unfit. What nobody could have meant is left out.
func Rules(namespace string, labels map[string]string) *workloads.Spec {
	words := func(key string) (out []string) {
		for _, w := range strings.Split(labels[key], ",") {
			if w = strings.TrimSpace(w); w != "" {
				out = append(out, w)
			}
		}
		return out
	}
	out := &workloads.Spec{
		Name: labels[runtime.LabelWorkload], Namespace: namespace,
		Avoid: words(runtime.LabelAvoid), Near: words(runtime.LabelNear), Zones: words(runtime.LabelZones),
	}
	for _, kv := range words(runtime.LabelHostLabels) {
		if out.Labels == nil {
			out.Labels = map[string]string{}
		}
		k, v, _ := strings.Cut(kv, "=")
		out.Labels[k] = v
	}
	out.Size.CPURequest, out.Size.MemoryRequest = requestsOf(labels)
	if out.Name != "" { // of nothing there are no others
		out.Spread.PerHost, _ = strconv.Atoi(labels[runtime.LabelSpreadHost])
		out.Spread.PerZone, _ = strconv.Atoi(labels[runtime.LabelSpreadZone])
	}
	return out
}

// requestsOf reads what a shard counts on. A label that somebody made up counts
// as none.
func requestsOf(labels map[string]string) (cpus float64, memory int64) {
	if v, err := strconv.ParseFloat(labels[runtime.LabelRequestCPUs], 64); err == nil && v >= 0 && v < 1e6 {
		cpus = v
	}
	if v, err := strconv.ParseInt(labels[runtime.LabelRequestMemory], 10, 64); err == nil && v >= 0 && v < 1<<50 {
		memory = v
	}
	return cpus, memory
}

// shardOf reads a shard's message.
func shardOf(m *v1.Shard) workloads.Shard {
	labels := m.GetLabels()
	s := workloads.Shard{
		Namespace: m.GetNamespace(), Name: m.GetName(), Workload: labels[runtime.LabelWorkload], Tenant: labels[runtime.LabelTenant],
		Index: -1, Running: m.GetStatus() == runtime.StatusRunning || m.GetStatus() == runtime.StatusPaused,
		State: m.GetStatus(), Moving: m.GetMigrationId(), Image: m.GetImage(),
		CPUs: m.GetCpus(), Memory: m.GetMemoryLimitBytes(), Used: m.GetMemoryUsedBytes(), Held: m.GetMemoryHeldBytes(), Digest: labels[runtime.LabelSpec],
		Policy: map[string]string{},
	}
	if s.State == runtime.StatusStopped {
		s.State = fmt.Sprintf("stopped (exit code %d)", m.GetExitCode())
	}
	if id := labels[runtime.LabelIncoming]; id != "" {
		s.Incoming, s.Moving = true, id
	}
	if i, err := strconv.Atoi(labels[runtime.LabelIndex]); err == nil && i >= 0 {
		s.Index = i
	}
	s.RequestCPUs, s.RequestMemory = requestsOf(labels)
	if v := labels[runtime.LabelAvoid]; v != "" {
		s.Avoid = strings.Split(v, ",")
	}
	for k, v := range labels {
		if runtime.IsPolicy(k) {
			s.Policy[k] = v
		}
	}
	return s
}

// HostOf reads what a host said.
func HostOf(st control.NodeStatus) workloads.Host {
	n := st.Node
	h := workloads.Host{
		Name: n.GetName(), Zone: n.GetZone(), Labels: n.GetLabels(), Alive: n.GetState() == control.NodeAlive, Cordoned: n.GetCordoned(),
		CPUs: int(n.GetCpus()), CPULoad: n.GetCpuLoad(), MemoryTotal: n.GetMemoryTotalBytes(), MemoryAvailable: n.GetMemoryAvailableBytes(),
	}
	for _, s := range st.Shards {
		h.Shards = append(h.Shards, shardOf(s))
	}
	return h
}
