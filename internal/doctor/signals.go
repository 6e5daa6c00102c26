package doctor

import (
	"context"
	"slices"
	"strings"
)

// Signal is one thing that is profiled, and where it comes from here.
type Signal struct {
	Name string
	// From is bpf:PROGRAM, cgroup:FILE, netlink, procfs:FILE, tracker or absent.
	From string
	// Why it is absent, or comes from elsewhere than where it is best taken.
	Why string
}

// signals makes a line for every source, with what comes from it. A program that
// this kernel refuses is a warning; what the machine does not have is not.
func (m Machine) signals(context.Context) []Finding {
	if m.Signals == nil {
		return nil
	}
	type source struct{ from, why string }
	var order []source
	names := map[source][]string{}
	for _, s := range m.Signals() {
		at := source{s.From, s.Why}
		if names[at] == nil {
			order = append(order, at)
		}
		names[at] = append(names[at], s.Name)
	}
	// What is wrong comes last, where it is read.
	slices.SortStableFunc(order, func(a, b source) int { return strings.Compare(rank(a.from), rank(b.from)) })
	var out []Finding
	for _, at := range order {
		f := Finding{Name: "profiles from " + at.from, Level: OK, Found: strings.Join(names[at], ", ")}
		if at.from == "absent" {
			f.Name = "not profiled"
		}
		if at.why != "" {
			f.Found += " (" + at.why + ")"
		}
		if program := slices.Contains(bestByProgram, names[at][0]); program && !strings.HasPrefix(at.from, "bpf:") {
			f.Level, f.Do = Warn, "boot Linux 5.15 or newer with CONFIG_DEBUG_INFO_BTF, without lockdown; as root"
		}
		out = append(out, f)
	}
	return out
}

// bestByProgram begins each group of signals that a BPF program counts.
var bestByProgram = []string{"cpu", "wait", "minor_faults", "read_bytes", "retransmits", "connections", "round_trip"}

func rank(from string) string {
	if from == "absent" {
		return "~"
	}
	return from
}
