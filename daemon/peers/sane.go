package peers

import (
	"math"
	"strings"

	"google.golang.org/protobuf/proto"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// Bounds of what a peer may say of itself: far beyond use, far below harm.
const (
	maxText   = 256
	maxLabels = 64
	maxCPUs   = 1 << 16
	maxMemory = 1 << 50
	maxCost   = 1e9
	maxShards = 10_000
)

// sane is what a peer says of itself, brought within bounds: nothing that it
// invents makes a number impossible or a table unreadable. Never nil.
func sane(n *v1.Node) *v1.Node {
	if n == nil {
		return &v1.Node{}
	}
	n = proto.CloneOf(n)
	for _, s := range []*string{&n.Id, &n.Zone, &n.Tracker, &n.Error} {
		*s = text(*s)
	}
	if v := n.GetVersions(); v != nil {
		for _, s := range []*string{&v.Tranship, &v.Kernel, &v.Containerd, &v.Runc, &v.Criu, &v.Arch} {
			*s = text(*s)
		}
	}
	labels := make(map[string]string, min(len(n.GetLabels()), maxLabels))
	for k, v := range n.GetLabels() {
		if len(labels) == maxLabels {
			break
		}
		labels[text(k)] = text(v)
	}
	n.Labels = labels
	n.Cpus = min(n.GetCpus(), maxCPUs)
	n.MemoryTotalBytes = min(max(n.GetMemoryTotalBytes(), 0), maxMemory)
	n.MemoryAvailableBytes = min(max(n.GetMemoryAvailableBytes(), 0), n.GetMemoryTotalBytes())
	if c := n.GetCostPerHour(); !(c >= 0 && c <= maxCost) { // NaN too
		n.CostPerHour = 0
	}
	if n.CpuLoad != nil {
		if l := n.GetCpuLoad(); math.IsNaN(l) {
			n.CpuLoad = nil
		} else {
			n.CpuLoad = proto.Float64(min(max(l, 0), 1))
		}
	}
	// Gossip's word, not the peer's own.
	n.Membership = ""
	return n
}

// saneShards are what a peer says that it runs, brought within bounds. They are
// on it, whatever it says; one without a name is none.
func saneShards(node string, list []*v1.Shard) []*v1.Shard {
	out := make([]*v1.Shard, 0, min(len(list), maxShards))
	for _, s := range list {
		if s.GetName() == "" || len(out) == maxShards {
			continue
		}
		s = proto.CloneOf(s)
		for _, t := range []*string{&s.Namespace, &s.Name, &s.Image, &s.Status, &s.Network, &s.Ip, &s.Mac, &s.NetnsPath, &s.MigrationId, &s.Note} {
			*t = visible(*t)
		}
		for i := range s.GetCommand() {
			s.Command[i] = visible(s.Command[i])
		}
		labels := make(map[string]string, len(s.GetLabels()))
		for k, v := range s.GetLabels() {
			labels[visible(k)] = visible(v)
		}
		s.Node, s.Labels = node, labels
		if c := s.GetCpus(); !(c >= 0 && c <= maxCPUs) { // NaN too
			s.Cpus = 0
		}
		for _, n := range []*int64{&s.MemoryLimitBytes, &s.MemoryUsedBytes, &s.MemoryHeldBytes} {
			*n = min(max(*n, 0), maxMemory)
		}
		out = append(out, s)
	}
	return out
}

// text drops what could move a terminal's cursor, and what is too long.
func text(s string) string { return visible(s[:min(len(s), maxText)]) }

// visible drops what could move a terminal's cursor.
func visible(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' || r >= 0x80 && r < 0xa0 {
			return -1
		}
		return r
	}, s)
}
