package profiler

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/ebpf/probe"
	"github.com/tranship/tranship/ebpf/profile"
)

// hostKey is the host's name in the store: no shard's, which have a slash.
const hostKey = "@host"

// hostSubject is the host as a whole: what its shards use, and everything else
// below the root of its cgroups.
type hostSubject struct {
	files   *files
	links   *links
	netns   int // a descriptor of its network namespace
	profile *profile.Profile
	// total is what all slots together have counted since the daemon started;
	// rest is the host's own slot as of the last sample.
	total, rest probe.Usage
	interfaces  map[uint32]linkCounters // as of the last round
	uplinks     map[uint32]bool
	// linkBytes is the uplinks' speed in bytes a second, 0 unknown.
	linkBytes float64
	memory    float64 // in bytes
}

func newHost(p *Profiler) (*hostSubject, error) {
	l, err := hostLinks(p.instead.Has(profile.Retransmits))
	if err != nil {
		return nil, err
	}
	h := &hostSubject{files: newFiles(p.place, p.instead), links: l, netns: -1, profile: profile.New(), interfaces: map[uint32]linkCounters{}}
	if h.netns, err = unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("network namespace: %w", err), h.close())
	}
	if p.probe != nil {
		if h.rest, _, err = p.probe.Read(probe.HostSlot); err != nil {
			return nil, errors.Join(err, h.close())
		}
	}
	return h, nil
}

func (h *hostSubject) close() error {
	err := errors.Join(h.links.close(), h.files.close())
	if h.netns >= 0 {
		err = errors.Join(err, unix.Close(h.netns))
		h.netns = -1
	}
	return err
}

// readInterfaces reads the counters of all the host's, by index; nil when that fails.
func (h *hostSubject) readInterfaces(buf []byte) (map[uint32]linkCounters, error) {
	all, err := h.links.dump(buf)
	if err != nil {
		return nil, err
	}
	clear(h.interfaces)
	for _, c := range all {
		h.interfaces[c.index] = c
	}
	return h.interfaces, nil
}

// add adds what a slot has counted since before.
func (h *hostSubject) add(before, after *probe.Usage) {
	t := &h.total
	for _, c := range []struct {
		to         *uint64
		from, till uint64
	}{
		{&t.CpuNs, before.CpuNs, after.CpuNs},
		{&t.Voluntary, before.Voluntary, after.Voluntary},
		{&t.Forced, before.Forced, after.Forced},
		{&t.MinorFaults, before.MinorFaults, after.MinorFaults},
		{&t.MajorFaults, before.MajorFaults, after.MajorFaults},
		{&t.WaitNs, before.WaitNs, after.WaitNs},
		{&t.ReadBytes, before.ReadBytes, after.ReadBytes},
		{&t.WriteBytes, before.WriteBytes, after.WriteBytes},
		{&t.ReadOps, before.ReadOps, after.ReadOps},
		{&t.WriteOps, before.WriteOps, after.WriteOps},
		{&t.ReadNs, before.ReadNs, after.ReadNs},
		{&t.WriteNs, before.WriteNs, after.WriteNs},
		{&t.Retransmits, before.Retransmits, after.Retransmits},
	} {
		*c.to += c.till - c.from
	}
	for i := range t.Wait {
		t.Wait[i] += after.Wait[i] - before.Wait[i]
		t.Read[i] += after.Read[i] - before.Read[i]
		t.Write[i] += after.Write[i] - before.Write[i]
	}
}

// observeHost samples the host, after its shards. p.mu is held.
func (p *Profiler) observeHost(r *round, minutes map[string][]profile.Point) {
	h := p.host
	sm := profile.Sample{At: r.at}
	h.files.read(&sm, p.tick, p.buf)
	if p.probe != nil {
		u, conns, err := p.probe.Read(probe.HostSlot)
		if err != nil {
			p.log.Warn("profiles: counts of the host", "err", err)
		} else {
			h.add(&h.rest, &u)
			h.rest = u
			p.take(&sm, &h.total)
			p.takeConnections(&sm, conns)
		}
	}
	if p.tick%workingSetEvery == 1 || h.uplinks == nil {
		h.uplinks, h.linkBytes = uplinks("/sys/class/net")
	}
	if r.interfaces != nil {
		var sum linkCounters
		for index := range h.uplinks {
			c := r.interfaces[index]
			sum.add(&c)
		}
		sum.set(&sm)
	}
	if h.links.snmp != nil {
		h.links.readSNMP(&sm, p.buf)
	}
	h.readMeminfo(&sm, p.tick)
	done, gap := h.profile.Observe(&sm)
	if gap != profile.NoGap {
		p.gaps[gap]++
	}
	if len(done) > 0 {
		minutes[hostKey] = append(minutes[hostKey], done...)
	}
}

// readMeminfo knows the capacity, and what is used where the root cgroup has no
// account (v2).
func (h *hostSubject) readMeminfo(s *profile.Sample, tick int) {
	_, counted := s.Get(profile.MemoryBytes)
	if counted && h.memory > 0 && tick%workingSetEvery != 2 {
		return // memory is plugged in rarely
	}
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return
	}
	kib := map[string]float64{}
	for line := range strings.Lines(string(raw)) {
		name, rest, _ := strings.Cut(line, ":")
		if f := strings.Fields(rest); len(f) > 0 {
			kib[name], _ = strconv.ParseFloat(f[0], 64)
		}
	}
	h.memory = kib["MemTotal"] * 1024
	if !counted {
		s.Set(profile.MemoryBytes, (kib["MemTotal"]-kib["MemFree"])*1024)
		s.Set(profile.WorkingSet, (kib["MemTotal"]-kib["MemAvailable"])*1024)
	}
}

// uplinks finds the interfaces through which the host talks to others: those
// with a device behind them; on a host without any (a container, the lab) all
// that are neither loopback nor bridge nor the host's end of a container's.
func uplinks(dir string) (map[uint32]bool, float64) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return map[uint32]bool{}, 0
	}
	read := func(name, file string) string {
		raw, err := os.ReadFile(filepath.Join(dir, name, file))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(raw))
	}
	real, other := map[uint32]bool{}, map[uint32]bool{}
	speed := map[uint32]float64{}
	for _, e := range entries {
		has := func(sub string) bool { return unix.Access(filepath.Join(dir, e.Name(), sub), unix.F_OK) == nil }
		device := has("device")
		if !device && (strings.HasPrefix(e.Name(), "veth") || has("bridge")) {
			continue
		}
		index, err := strconv.ParseUint(read(e.Name(), "ifindex"), 10, 32)
		if err != nil || index == loopback {
			continue
		}
		if mbit, err := strconv.ParseFloat(read(e.Name(), "speed"), 64); err == nil && mbit > 0 {
			speed[uint32(index)] = mbit * 1e6 / 8
		}
		if device {
			real[uint32(index)] = true
		} else {
			other[uint32(index)] = true
		}
	}
	if len(real) == 0 {
		real = other
	}
	total := 0.0
	for index := range real {
		total += speed[index]
	}
	return real, total
}
