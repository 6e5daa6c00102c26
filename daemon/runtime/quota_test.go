package runtime

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tranship/tranship/internal/testenv"
)

func TestACPULimitIsSetAndReadInBothVersions(t *testing.T) {
	for _, tt := range []struct {
		name   string
		files  map[string]string
		v2     bool
		before CPULimit
		after  map[string]string // for 5 ms in 20 ms
	}{
		{
			name:   "v1",
			files:  map[string]string{"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"},
			before: CPULimit{Period: 100 * time.Millisecond},
			// A file keeps what was written to it without being cut first.
			after: map[string]string{"cpu.cfs_quota_us": "5000", "cpu.cfs_period_us": "20000"},
		},
		{
			name:   "v2",
			files:  map[string]string{"cpu.max": "max 100000\n"},
			v2:     true,
			before: CPULimit{Period: 100 * time.Millisecond},
			after:  map[string]string{"cpu.max": "5000 20000"},
		},
		{
			name:   "v2 with a limit",
			files:  map[string]string{"cpu.max": "150000 100000\n"},
			v2:     true,
			before: CPULimit{Quota: 150 * time.Millisecond, Period: 100 * time.Millisecond},
			after:  map[string]string{"cpu.max": "5000 20000"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range tt.files {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			cg := Cgroup{CPU: dir, cpuV2: tt.v2}
			if got, err := cg.CPULimit(); err != nil || got != tt.before {
				t.Errorf("%+v, %v", got, err)
			}
			if err := cg.SetCPULimit(CPULimit{Quota: 5 * time.Millisecond, Period: 20 * time.Millisecond}); err != nil {
				t.Fatal(err)
			}
			for name, want := range tt.after {
				raw, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil || len(raw) < len(want) || string(raw[:len(want)]) != want {
					t.Errorf("%s is %q, %v", name, raw, err)
				}
			}
		})
	}
	gone := Cgroup{CPU: filepath.Join(t.TempDir(), "gone")}
	if _, err := gone.CPULimit(); !errors.Is(err, ErrNoCPULimit) {
		t.Errorf("a cgroup that is gone: %v", err)
	}
	if err := gone.SetCPULimit(CPULimit{Period: time.Second}); !errors.Is(err, ErrNoCPULimit) {
		t.Errorf("a cgroup that is gone: %v", err)
	}
}

// The kernel's word for it: the limit of a real cgroup, set and given back.
func TestTheKernelTakesACPULimit(t *testing.T) {
	testenv.NeedRoot(t)
	top, v2 := "/sys/fs/cgroup/cpu", false
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		top, v2 = "/sys/fs/cgroup", true
	}
	dir, err := os.MkdirTemp(top, "tranship-quota-")
	if err != nil {
		testenv.Missing(t, "a CPU cgroup that can be made: "+err.Error())
	}
	defer os.Remove(dir)
	cg := Cgroup{CPU: dir, cpuV2: v2, cpuacct: dir}
	before, err := cg.CPULimit()
	if err != nil {
		t.Fatal(err)
	}
	tight := CPULimit{Quota: 2 * time.Millisecond, Period: 20 * time.Millisecond}
	for _, l := range []CPULimit{tight, before, tight, before} {
		if err := cg.SetCPULimit(l); err != nil {
			t.Fatal(err)
		}
		if got, err := cg.CPULimit(); err != nil || got != l {
			t.Errorf("set %+v, got %+v, %v", l, got, err)
		}
	}
	if tight.CPUs() != 0.1 || before.CPUs() != 0 {
		t.Error(tight.CPUs(), before.CPUs())
	}
}
