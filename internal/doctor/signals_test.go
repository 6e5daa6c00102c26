package doctor

import (
	"strings"
	"testing"
)

func TestSignalsSayTheirSource(t *testing.T) {
	m := Machine{Signals: func() []Signal {
		return []Signal{
			{"cpu", "bpf:sched_switch", ""},
			{"wait", "bpf:sched_switch", ""},
			{"read_bytes", "absent", "operation not permitted"},
			{"instructions", "absent", "this machine does not count them"},
			{"receive_bytes", "netlink", ""},
		}
	}}
	var text []string
	for _, f := range m.signals(t.Context()) {
		text = append(text, string(f.Level)+" "+f.Name+": "+f.Found)
		if (f.Level == Warn) != (f.Do != "") {
			t.Errorf("%s: %s to do %q", f.Name, f.Level, f.Do)
		}
	}
	want := strings.Join([]string{
		"ok profiles from bpf:sched_switch: cpu, wait",
		"ok profiles from netlink: receive_bytes",
		"warn not profiled: read_bytes (operation not permitted)",
		"ok not profiled: instructions (this machine does not count them)",
	}, "\n")
	if got := strings.Join(text, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := (Machine{}).signals(t.Context()); got != nil {
		t.Error(got)
	}
}
