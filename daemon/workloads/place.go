package workloads

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tranship/tranship/allocate"
)

// reserve is the memory that a host keeps for itself (drain and pre-flight ask
// the same).
const reserve = 128 << 20

// room is what a host could still promise.
type room struct {
	cpus   float64
	memory int64
}

// usage is what a host has promised: CPUs by request; of memory what is in use,
// the reserve, and what its shards may still claim of their requests.
func (h *Host) usage() room {
	u := room{memory: max(0, h.MemoryTotal-h.MemoryAvailable) + reserve}
	for i := range h.Shards {
		s := &h.Shards[i]
		u.cpus += s.RequestCPUs
		u.memory += max(0, s.RequestMemory-s.Used)
	}
	return u
}

func (h *Host) room() room {
	u := h.usage()
	return room{cpus: float64(h.CPUs) - u.cpus, memory: h.MemoryTotal - u.memory}
}

// Mates are the workload's shards on a host, on their way included.
func (h *Host) Mates(namespace, workload string) int {
	n := 0
	for i := range h.Shards {
		if s := &h.Shards[i]; s.Namespace == namespace && s.Workload == workload {
			n++
		}
	}
	return n
}

// Unfit says why a shard of a workload cannot run on a host as it is, in words
// and with numbers; "" when it can. zoneMates are the workload's shards by zone.
func Unfit(want *Spec, name string, h *Host, zoneMates map[string]int) string {
	if !h.Alive {
		return "does not answer"
	}
	for i := range h.Shards {
		s := &h.Shards[i]
		switch {
		case s.Namespace == want.Namespace && s.Name == name:
			return "has a container " + name + " that is not of the workload"
		case s.Namespace == want.Namespace && s.Workload != want.Name && slices.Contains(want.Avoid, s.Workload):
			return "runs " + s.Name + ", of a workload to avoid"
		case s.Namespace == want.Namespace && s.Workload != want.Name && slices.Contains(s.Avoid, want.Name):
			return "runs " + s.Name + ", which avoids " + want.Name
		}
	}
	for _, near := range want.Near {
		if h.Mates(want.Namespace, near) == 0 {
			return "runs no shard of " + near
		}
	}
	if n := h.Mates(want.Namespace, want.Name); want.Spread.PerHost > 0 && n >= want.Spread.PerHost {
		return fmt.Sprintf("has %d of its shards (spread.per_host = %d)", n, want.Spread.PerHost)
	}
	u := h.usage()
	peer := allocate.Peer{
		Host: allocate.Host{
			ID: allocate.HostID(h.Name), Zone: h.Zone, Labels: h.Labels, Cordoned: h.Cordoned, Link: 1,
			Capacity: allocate.Amount{allocate.CPU: float64(h.CPUs) + epsilon, allocate.Memory: float64(h.MemoryTotal)},
		},
		Usage: allocate.Amount{allocate.CPU: u.cpus, allocate.Memory: float64(u.memory)},
	}
	shard := allocate.Shard{
		Zones: want.Zones, Labels: want.Labels, Spread: allocate.Spread{PerZone: want.Spread.PerZone}, ZoneMates: zoneMates,
		Usage: allocate.Amount{allocate.CPU: want.Size.CPURequest, allocate.Memory: float64(want.Size.MemoryRequest)},
	}
	switch why := peer.Unfit(time.Time{}, &shard, &allocate.Config{}); why {
	case "":
		return ""
	case allocate.UnfitCordoned:
		return "is cordoned"
	case allocate.UnfitZone:
		return fmt.Sprintf("is in zone %q, not in %s", h.Zone, strings.Join(want.Zones, " or "))
	case allocate.UnfitSpread:
		return fmt.Sprintf("is in zone %q, which has %d of its shards (spread.per_zone = %d)", h.Zone, zoneMates[h.Zone], want.Spread.PerZone)
	case allocate.UnfitLabel:
		return "has not the labels that affinity.labels asks for"
	case allocate.CPU.String():
		return fmt.Sprintf("has %.2f of %d CPUs free, and %.2f are needed", max(0, h.room().cpus), h.CPUs, want.Size.CPURequest)
	case allocate.Memory.String():
		return fmt.Sprintf("has %dM of memory free, and %dM are needed", max(0, h.room().memory)>>20, want.Size.MemoryRequest>>20)
	default:
		return why
	}
}

// add places missing shards, one after another: each on the host that has the
// fewest of the workload, then in the zone that has, then the emptiest.
func (p *planner) add(missing []int) {
	want := p.in.Want
	for _, index := range missing {
		name := want.Shard(index)
		zones := map[string]int{}
		for i := range p.in.Hosts {
			h := &p.in.Hosts[i]
			zones[h.Zone] += h.Mates(want.Namespace, want.Name)
		}
		var best *Host
		var why []string
		for i := range p.in.Hosts {
			h := &p.in.Hosts[i]
			if reason := Unfit(want, name, h, zones); reason != "" {
				why = append(why, h.Name+" "+reason)
			} else if best == nil || p.in.Prefer[name] == h.Name || p.in.Prefer[name] != best.Name && better(want, h, best, zones) {
				best = h
			}
		}
		if best == nil {
			p.refuse("%s fits no host: %s; make room, add a host, or lower the size or the number of shards", name, strings.Join(why, "; "))
			return // the others would only say the same
		}
		p.Steps = append(p.Steps, Step{Op: Add, Index: index, Shard: name, Node: best.Name})
		best.Shards = append(best.Shards, Shard{
			Namespace: want.Namespace, Name: name, Workload: want.Name, Tenant: want.Tenant, Index: index, Running: true, Avoid: want.Avoid,
			RequestCPUs: want.Size.CPURequest, RequestMemory: want.Size.MemoryRequest,
		})
		p.repoint(best)
	}
}

func better(want *Spec, a, b *Host, zones map[string]int) bool {
	if x, y := a.Mates(want.Namespace, want.Name), b.Mates(want.Namespace, want.Name); x != y {
		return x < y
	}
	if x, y := zones[a.Zone], zones[b.Zone]; x != y {
		return x < y
	}
	if x, y := a.fill(), b.fill(); x < y-tilt || x > y+tilt {
		return x < y
	}
	if len(a.Shards) != len(b.Shards) {
		return len(a.Shards) < len(b.Shards)
	}
	return a.Name < b.Name
}

// tilt between hosts that are equally full.
const tilt = 0.02

// fill is the fuller of CPU and memory.
func (h *Host) fill() float64 {
	u := h.usage()
	f := h.CPULoad
	if h.CPUs > 0 {
		f = max(f, u.cpus/float64(h.CPUs))
	}
	if h.MemoryTotal > 0 {
		f = max(f, float64(u.memory)/float64(h.MemoryTotal))
	}
	return f
}
