package doctor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tranship/tranship/checkpoint/track"
	"github.com/tranship/tranship/internal/testenv"
)

// machine puts files under a root of its own.
func machine(t *testing.T, files map[string]string) Machine {
	t.Helper()
	root := t.TempDir()
	for path, content := range files {
		at := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Machine{Root: root, CNIBin: []string{"/usr/lib/cni", "/opt/cni/bin"}}
}

const (
	allCapabilities = "CapInh:\t0\nCapEff:\t000001ffffffffff\n"
	noSysResource   = "CapEff:\t000001fffeffffff\n"
	noNetAdmin      = "CapEff:\t000001ffffffefff\n"
)

func TestFindings(t *testing.T) {
	tests := []struct {
		name  string
		ask   func(Machine, context.Context) Finding
		files map[string]string
		want  Level
		found string // part of Found
	}{
		{"a kernel with asynchronous write protection is fine", Machine.kernel, map[string]string{"proc/sys/kernel/osrelease": "6.7.0-1-amd64\n"}, OK, "6.7.0"},
		{"an older kernel that still works is worth a word", Machine.kernel, map[string]string{"proc/sys/kernel/osrelease": "6.1.0-30-amd64\n"}, Warn, "6.1"},
		{"6.12 is newer than 6.7", Machine.kernel, map[string]string{"proc/sys/kernel/osrelease": "6.12.1\n"}, OK, "6.12"},
		{"a kernel before 5.15 cannot", Machine.kernel, map[string]string{"proc/sys/kernel/osrelease": "5.10.0\n"}, Missing, "5.10"},
		{"without /proc nothing is known", Machine.kernel, nil, Missing, "unknown"},

		{"root can do everything", Machine.privileges, map[string]string{"proc/self/status": allCapabilities}, OK, "root"},
		{"root of a nested machine lacks one thing", Machine.privileges, map[string]string{"proc/self/status": noSysResource}, Warn, "CAP_SYS_RESOURCE"},
		{"without network administration it cannot", Machine.privileges, map[string]string{"proc/self/status": noNetAdmin}, Missing, "CAP_NET_ADMIN"},

		{"unified cgroups have a freezer", Machine.cgroups, map[string]string{"sys/fs/cgroup/cgroup.controllers": "cpu memory pids io"}, OK, "v2"},
		{"unified cgroups without memory cannot", Machine.cgroups, map[string]string{"sys/fs/cgroup/cgroup.controllers": "cpu pids"}, Missing, "without memory"},
		{"hybrid cgroups are found by their v1 controllers", Machine.cgroups, map[string]string{
			"sys/fs/cgroup/unified/cgroup.controllers": "", "sys/fs/cgroup/cpu/cgroup.procs": "", "sys/fs/cgroup/memory/cgroup.procs": "",
			"sys/fs/cgroup/pids/cgroup.procs": "", "sys/fs/cgroup/freezer/cgroup.procs": "",
		}, OK, "hybrid"},
		{"v1 without a freezer cannot", Machine.cgroups, map[string]string{
			"sys/fs/cgroup/cpu/cgroup.procs": "", "sys/fs/cgroup/memory/cgroup.procs": "", "sys/fs/cgroup/pids/cgroup.procs": "",
		}, Missing, "without freezer"},

		{"plugins may lie in either directory", Machine.cni, map[string]string{"opt/cni/bin/bridge": "", "usr/lib/cni/static": ""}, OK, "bridge, static"},
		{"a missing plugin is named", Machine.cni, map[string]string{"usr/lib/cni/bridge": ""}, Missing, "static"},

		{"overlay among the file systems", Machine.overlay, map[string]string{"proc/filesystems": "nodev\tsysfs\nnodev\toverlay\n"}, OK, ""},
		{"no overlay among the file systems", Machine.overlay, map[string]string{"proc/filesystems": "nodev\tsysfs\n\text4\n"}, Missing, ""},

		{"filtered bridges are worth a word", Machine.bridgeFilter, map[string]string{"proc/sys/net/bridge/bridge-nf-call-iptables": "1\n"}, Warn, "iptables"},
		{"bridges without a filter are fine", Machine.bridgeFilter, nil, OK, "off"},

		{"narrow pipes do not matter to a capable root", Machine.pipes, map[string]string{"proc/sys/fs/pipe-max-size": "1048576\n", "proc/self/status": allCapabilities}, OK, "no limit"},
		{"narrow pipes slow a nested machine", Machine.pipes, map[string]string{"proc/sys/fs/pipe-max-size": "1048576\n", "proc/self/status": noSysResource}, Warn, "1048576"},
		{"wide pipes are fine everywhere", Machine.pipes, map[string]string{"proc/sys/fs/pipe-max-size": "8388608\n", "proc/self/status": noSysResource}, OK, "8388608"},

		{"enough memory", Machine.memory, map[string]string{"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   16777216 kB\n"}, OK, "16.0 GiB"},
		{"little memory", Machine.memory, map[string]string{"proc/meminfo": "MemAvailable:   262144 kB\n"}, Warn, "0.2 GiB"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.ask(machine(t, tt.files), t.Context())
			if got.Level != tt.want || !strings.Contains(got.Found, tt.found) {
				t.Errorf("found %+v, want level %s and %q", got, tt.want, tt.found)
			}
			if got.Level != OK && got.Do == "" {
				t.Errorf("%+v does not say what to do", got)
			}
		})
	}
}

func TestTrackerFindingsSayWhyNoBetterOne(t *testing.T) {
	for _, tt := range []struct {
		kind track.Kind
		why  error
		want Level
	}{
		{track.UffdWP, nil, OK},
		{track.SoftDirty, errors.New("Linux 6.1 has no PAGEMAP_SCAN"), Warn},
		{track.None, errors.New("no soft-dirty bits"), Warn},
	} {
		got := Machine{Tracker: func() (track.Kind, error) { return tt.kind, tt.why }}.tracker(t.Context())
		if got.Level != tt.want || tt.why != nil && !strings.Contains(got.Found, tt.why.Error()) {
			t.Errorf("%s: %+v", tt.kind, got)
		}
	}
}

func TestANewKernelNeedsANewerCRIU(t *testing.T) {
	for release, want := range map[string]string{
		"6.12.0": "4.1.1", "6.15.9": "4.1.1", "6.16.0": "4.2.0", "6.18.44-fc": "4.2.0", "7.0.1": "4.2.0",
	} {
		m := machine(t, map[string]string{"proc/sys/kernel/osrelease": release})
		if got := m.oldestCRIU().String(); got != want {
			t.Errorf("Linux %s: CRIU %s, want %s", release, got, want)
		}
	}
}

func TestAProgramThatIsNotThereIsMissing(t *testing.T) {
	m := Machine{Output: func(context.Context, string, ...string) (string, error) { return "", errors.New("not found") }}
	if got := m.program("runc", "runc", "install it")(t.Context()); got.Level != Missing || got.Do != "install it" {
		t.Errorf("%+v", got)
	}
}

func TestOnlyWhatIsMissingMakesAMachineUnfit(t *testing.T) {
	if !Healthy([]Finding{{Level: OK}, {Level: Warn}}) {
		t.Error("a warning made the machine unfit")
	}
	if Healthy([]Finding{{Level: OK}, {Level: Missing}}) {
		t.Error("something missing did not make the machine unfit")
	}
}

// Every kernel that tranship runs on has both, so a finding would be a mistake of
// the question.
func TestUDPOffloadIsTried(t *testing.T) {
	f := (Machine{}).offload(t.Context())
	if strings.Contains(f.Do, "loopback") {
		testenv.Missing(t, "a loopback device: "+f.Found)
	}
	if f.Level != OK {
		t.Errorf("%+v", f)
	}
}
