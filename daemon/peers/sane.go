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

// text drops what could move a terminal's cursor, and what is too long.
func text(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == '\uFFFD' || r >= 0x80 && r < 0xa0 {
			return -1
		}
		return r
	}, s)
}
