package profiler

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/probe"
	"github.com/tranship/tranship/ebpf/profile"
)

// Source says where a signal comes from on this host. Programs are replaced one
// by one: what a program that the kernel refused would have counted comes from
// the cgroup's files or from the network namespace, or is absent.
type Source struct {
	Signal profile.Signal
	// From is bpf:PROGRAM, cgroup:FILE, netlink, procfs:FILE, tracker, or absent.
	From string
	// Why it is absent, or not from where it is best taken.
	Why string
}

// Absent is the From of a signal that this host cannot have.
const Absent = "absent"

// sources decides, for a host with this probe (nil without any), whose cgroups
// are like place. trackerWhy is empty when written pages can be tracked.
func sources(p *probe.Probe, probeWhy error, place runtime.Place, trackerWhy string) []Source {
	failed := func(part probe.Part) string {
		if p == nil {
			return probeWhy.Error()
		}
		if err := p.Failed(part); err != nil {
			return firstLine(err.Error())
		}
		return ""
	}
	out := make([]Source, profile.Signals)
	set := func(from, why string, signals ...profile.Signal) {
		for _, s := range signals {
			out[s] = Source{Signal: s, From: from, Why: why}
		}
	}
	sched, block, tcp := failed(probe.PartSched), failed(probe.PartBlock), failed(probe.PartTCP)
	if sched == "" {
		set("bpf:sched_switch", "", profile.CPU, profile.Wait, profile.Voluntary, profile.Forced, profile.MinorFaults, profile.MajorFaults)
	} else {
		set(cpuFile(place), sched, profile.CPU)
		set(fromDir(place, "memory", "memory.stat", "memory.stat"), sched, profile.MinorFaults, profile.MajorFaults)
		set(Absent, sched, profile.Wait, profile.Voluntary, profile.Forced)
	}
	if block == "" {
		set("bpf:block_rq_issue", "", profile.ReadBytes, profile.WriteBytes, profile.ReadOps, profile.WriteOps)
	} else {
		set(fromDir(place, "blkio", "", "io.stat"), block, profile.ReadBytes, profile.WriteBytes, profile.ReadOps, profile.WriteOps)
	}
	set("netlink", "", profile.ReceiveBytes, profile.TransmitBytes, profile.ReceivePackets, profile.TransmitPackets)
	if tcp == "" {
		set("bpf:tcp_retransmit_skb", "", profile.Retransmits)
		set("bpf:inet_sock_set_state", "", profile.Connections, profile.RoundTrip)
	} else {
		set("procfs:net/snmp", tcp, profile.Retransmits, profile.Connections)
		set(Absent, tcp, profile.RoundTrip)
	}
	set(fromDir(place, "cpu", "cpu.stat", "cpu.stat"), "", profile.Throttled)
	set(fromDir(place, "memory", "memory.usage_in_bytes", "memory.current"), "", profile.MemoryBytes)
	set(fromDir(place, "memory", "memory.stat", "memory.stat"), "", profile.WorkingSet)
	pressureSource(place, set)
	why := "not counted by this version"
	if err := countsInstructions(); err != nil {
		why = err.Error()
	}
	set(Absent, why, profile.Instructions, profile.CacheMisses)
	if trackerWhy == "" {
		set("tracker", "every profile.dirty_minutes, and on demand: tranship top --dirty SHARD", profile.DirtyPages)
	} else {
		set(Absent, trackerWhy, profile.DirtyPages)
	}
	for i := range out {
		if out[i].From == Absent && out[i].Why == "" {
			out[i].Why = "no cgroup of this host accounts for it"
		}
	}
	return out
}

func cpuFile(place runtime.Place) string {
	return fromDir(place, "cpuacct", "cpuacct.usage", "cpu.stat")
}

// fromDir names the file of a controller under v1 or v2; "" is none.
func fromDir(place runtime.Place, controller, v1, v2 string) string {
	d, ok := place.Dirs[controller]
	switch {
	case ok && d.V2 && v2 != "":
		return "cgroup:" + v2
	case ok && !d.V2 && v1 != "":
		return "cgroup:" + v1
	}
	return Absent
}

// pressureSource: cgroups have PSI under v2 only, and only if it was not turned
// off at boot.
func pressureSource(place runtime.Place, set func(from, why string, signals ...profile.Signal)) {
	for _, f := range []struct {
		controller, file string
		signal           profile.Signal
	}{{"cpu", "cpu.pressure", profile.CPUPressure}, {"memory", "memory.pressure", profile.MemoryPressure}, {"blkio", "io.pressure", profile.IOPressure}} {
		d, ok := place.Dirs[f.controller]
		switch _, err := os.ReadFile("/proc/pressure/cpu"); {
		case !ok || !d.V2:
			set(Absent, "cgroup v1 has no pressure stall information", f.signal)
		case errors.Is(err, unix.EOPNOTSUPP):
			set(Absent, "off in this kernel; boot with psi=1", f.signal)
		case err != nil:
			set(Absent, err.Error(), f.signal)
		default:
			set("cgroup:"+f.file, "", f.signal)
		}
	}
}

// countsInstructions says why the machine does not count instructions: most
// virtual machines do not show the counters of the processor.
func countsInstructions() error {
	attr := unix.PerfEventAttr{
		Type: unix.PERF_TYPE_HARDWARE, Config: unix.PERF_COUNT_HW_INSTRUCTIONS,
		Size: uint32(unix.PERF_ATTR_SIZE_VER0),
	}
	fd, err := unix.PerfEventOpen(&attr, -1, 0, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("this machine does not count instructions: %w", err)
	}
	return unix.Close(fd)
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}

// Examine says where signals would come from on this machine, for an operator
// who has not started a daemon yet. It loads the programs and removes them; it
// needs root.
func Examine(tracker error) []Source {
	place, unified, err := runtime.HostPlace()
	if err != nil {
		return sources(nil, err, place, reason(tracker))
	}
	p, err := probe.Open(probe.Config{
		Unified: unified, Host: probe.Identity{Tasks: place.Dirs["cpu"].ID, Block: place.Dirs["blkio"].ID},
	})
	out := sources(p, err, place, reason(tracker))
	if p != nil {
		// It was only asked; what it held goes with it.
		_ = p.Close()
	}
	return out
}

func reason(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
