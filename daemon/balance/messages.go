package balance

import (
	"errors"
	"fmt"
	"slices"
	"time"
	"unicode"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

// Bounds of what other hosts say: far beyond use, far below harm.
const (
	maxText  = 256
	maxWords = 64
	curves   = allocate.Spans * int(allocate.Resources) * 5
	// mostOfAHost and mostOfAShard are of CPUs, bytes or bytes/s. A host that has
	// promised room to many of the largest shards is still one that peers believe.
	mostOfAHost, mostOfAShard = 1e30, 1e15
)

// checkText refuses what is too long or could move a terminal's cursor.
func checkText(what, s string) error {
	if len(s) > maxText {
		return fmt.Errorf("%s of %d bytes", what, len(s))
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("%s %q has characters that nobody can read", what, s)
		}
	}
	return nil
}

func amountOf(what string, in []float64, most float64) (a allocate.Amount, err error) {
	if len(in) != len(a) {
		return a, fmt.Errorf("%s of %d resources, and %d are known here: are both hosts of one version?", what, len(in), len(a))
	}
	for r, v := range in {
		if !(v >= 0 && v <= most) { // NaN too
			return a, fmt.Errorf("%s: %v of %v", what, v, allocate.Resource(r))
		}
		a[r] = v
	}
	return a, nil
}

func demandOf(what string, in []float32, most float32) (d allocate.Demand, err error) {
	if len(in) != curves {
		return d, fmt.Errorf("%s of %d numbers, and %d are known here: are both hosts of one version?", what, len(in), curves)
	}
	for i := range d {
		for r := range d[i] {
			if d[i][r], err = curveOf(in, most); err != nil {
				return d, fmt.Errorf("%s: the quantiles of %v are %w", what, allocate.Resource(r), err)
			}
			in = in[len(d[i][r]):]
		}
	}
	return d, nil
}

// curveOf takes the quantiles that in begins with.
func curveOf(in []float32, most float32) (c allocate.Curve, err error) {
	last := float32(0)
	for q := range c {
		if v := in[q]; v >= last && v <= most {
			c[q], last = v, v
		} else {
			return c, fmt.Errorf("%v after %v", v, last)
		}
	}
	return c, nil
}

func flat(d *allocate.Demand) []float32 {
	out := make([]float32, 0, curves)
	for i := range d {
		for r := range d[i] {
			out = append(out, d[i][r][:]...)
		}
	}
	return out
}

// peerOf is what a host said of itself, if it can be true. Its name is whom was
// asked, not what it says.
func peerOf(name string, data []string, m *v1.RoomResponse) (*allocate.Peer, error) {
	p := &allocate.Peer{Shards: int(m.GetShards()), Leaving: m.GetLeaving()}
	p.Host = allocate.Host{ID: allocate.HostID(name), Zone: m.GetZone(), Labels: m.GetLabels(), Cost: m.GetCostPerHour(), Link: m.GetLinkBytesPerSecond(), Cordoned: m.GetCordoned()}
	errs := []error{checkText("zone", p.Zone)}
	if len(m.GetData()) > maxWords {
		errs = append(errs, fmt.Errorf("%d layers and volumes", len(m.GetData())))
	}
	p.Data = map[string]bool{}
	for _, name := range data {
		p.Data[name] = slices.Contains(m.GetData(), name)
	}
	if len(p.Labels) > maxWords {
		errs = append(errs, fmt.Errorf("%d labels", len(p.Labels)))
	}
	for k, v := range p.Labels {
		errs = append(errs, checkText("label", k), checkText("label", v))
	}
	if !good(p.Cost) || !good(p.Link) || p.Link == 0 {
		errs = append(errs, fmt.Errorf("a cost of %v an hour and a link of %v bytes/s", p.Cost, p.Link))
	}
	var err error
	p.Capacity, err = amountOf("capacity", m.GetCapacity(), mostOfAHost)
	errs = append(errs, err)
	p.Usage, err = amountOf("usage", m.GetUsage(), mostOfAHost)
	errs = append(errs, err)
	p.Load, err = demandOf("load", m.GetLoad(), mostOfAHost)
	errs = append(errs, err)
	if p.Capacity[allocate.CPU] == 0 || p.Capacity[allocate.Memory] == 0 {
		errs = append(errs, errors.New("no CPUs or no memory"))
	}
	return p, errors.Join(errs...)
}

func roomMessage(p *allocate.Peer) *v1.RoomResponse {
	return &v1.RoomResponse{
		Zone: p.Zone, Labels: p.Labels, Capacity: p.Capacity[:], CostPerHour: p.Cost, LinkBytesPerSecond: p.Link, Cordoned: p.Cordoned,
		Leaving: p.Leaving, Load: flat(&p.Load), Usage: p.Usage[:], Shards: uint32(p.Shards),
	}
}

func bookMessage(namespace, name string, r *allocate.Request) *v1.BookRequest {
	s := &r.Shard
	m := &v1.BookRequest{
		Namespace: namespace, Name: name, Workload: string(s.Workload), Tenant: string(s.Tenant), Priority: uint32(s.Priority),
		Demand: flat(&s.Demand), Usage: s.Usage[:], Bytes: s.Bytes, DirtyBytesPerSecond: s.Dirty, SpreadHost: uint32(s.Spread.PerHost),
		Reason: string(r.Reason), TakesMs: r.Takes.Milliseconds(), Peak: s.Peak[:],
	}
	for _, w := range s.Avoid {
		m.Avoid = append(m.Avoid, string(w))
	}
	return m
}

// requestOf is what a peer asks for, if it can be computed with.
func requestOf(peer string, m *v1.BookRequest) (allocate.Request, error) {
	errs := []error{
		runtime.CheckName("namespace", m.GetNamespace()), runtime.CheckName("shard", m.GetName()),
		checkText("workload", m.GetWorkload()), checkText("tenant", m.GetTenant()),
	}
	s := allocate.Shard{
		ID: shardID(m.GetNamespace(), m.GetName()), Workload: allocate.Workload(m.GetWorkload()), Tenant: allocate.Tenant(m.GetTenant()),
		Bytes: m.GetBytes(), Dirty: m.GetDirtyBytesPerSecond(),
	}
	if m.GetPriority() > allocate.MaxPriority {
		errs = append(errs, fmt.Errorf("priority %d", m.GetPriority()))
	}
	s.Priority = int(m.GetPriority())
	if len(m.GetAvoid()) > maxWords || m.GetSpreadHost() > 1<<20 {
		errs = append(errs, fmt.Errorf("%d workloads to avoid, %d shards a host", len(m.GetAvoid()), m.GetSpreadHost()))
	}
	s.Spread.PerHost = int(m.GetSpreadHost())
	for _, w := range m.GetAvoid() {
		errs = append(errs, checkText("workload", w))
		s.Avoid = append(s.Avoid, allocate.Workload(w))
	}
	if !(s.Bytes >= 0 && s.Bytes <= mostOfAShard && s.Dirty >= 0 && s.Dirty <= mostOfAShard) {
		errs = append(errs, fmt.Errorf("%v bytes of which %v are written a second", s.Bytes, s.Dirty))
	}
	var err error
	s.Usage, err = amountOf("usage", m.GetUsage(), mostOfAShard)
	errs = append(errs, err)
	s.Demand, err = demandOf("forecast", m.GetDemand(), mostOfAShard)
	errs = append(errs, err)
	switch peak := m.GetPeak(); len(peak) {
	case 0: // a version that does not know of peaks
	case len(s.Peak):
		if s.Peak, err = curveOf(peak, mostOfAShard); err != nil {
			errs = append(errs, fmt.Errorf("forecast of the peak: the quantiles are %w", err))
		}
	default:
		errs = append(errs, fmt.Errorf("forecast of the peak of %d numbers", len(peak)))
	}
	reason := allocate.Reason(m.GetReason())
	if reason != allocate.Overload && reason != allocate.Consolidate && reason != allocate.Threshold {
		errs = append(errs, fmt.Errorf("reason %.40q", m.GetReason()))
	}
	takes := time.Duration(m.GetTakesMs()) * time.Millisecond
	if m.GetTakesMs() < 0 || m.GetTakesMs() > (24*time.Hour).Milliseconds() {
		errs = append(errs, fmt.Errorf("a move of %d ms", m.GetTakesMs()))
	}
	return allocate.Request{Shard: s, From: allocate.HostID(peer), Reason: reason, Takes: takes}, errors.Join(errs...)
}
