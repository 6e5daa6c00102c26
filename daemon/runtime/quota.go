package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// CPULimit is the bandwidth limit of a cgroup (Documentation/scheduler/sched-bwc.rst):
// at most Quota of CPU time in every Period. No Quota is no limit.
type CPULimit struct {
	Quota  time.Duration `json:"quota,omitempty"`
	Period time.Duration `json:"period,omitempty"`
}

// CPUs is the limit as a number of processors, 0 for none.
func (l CPULimit) CPUs() float64 {
	if l.Quota <= 0 || l.Period <= 0 {
		return 0
	}
	return float64(l.Quota) / float64(l.Period)
}

// ErrNoCPULimit says that the shard's cgroup has no CPU controller with limits.
var ErrNoCPULimit = errors.New("the shard's cgroup has no CPU limit to set")

// CPULimit reads the shard's limit.
func (c Cgroup) CPULimit() (CPULimit, error) {
	if c.CPU == "" {
		return CPULimit{}, ErrNoCPULimit
	}
	var quota, period string
	if c.cpuV2 {
		raw, err := os.ReadFile(filepath.Join(c.CPU, "cpu.max"))
		if err != nil {
			return CPULimit{}, noCPULimit(err)
		}
		quota, period, _ = strings.Cut(strings.TrimSpace(string(raw)), " ")
	} else {
		for file, into := range map[string]*string{"cpu.cfs_quota_us": &quota, "cpu.cfs_period_us": &period} {
			raw, err := os.ReadFile(filepath.Join(c.CPU, file))
			if err != nil {
				return CPULimit{}, noCPULimit(err)
			}
			*into = strings.TrimSpace(string(raw))
		}
	}
	var l CPULimit
	us, err := strconv.ParseInt(period, 10, 64)
	if err != nil {
		return l, fmt.Errorf("CPU limit of %s: %w", c.CPU, err)
	}
	l.Period = time.Duration(us) * time.Microsecond
	if quota == "max" || quota == "-1" {
		return l, nil
	}
	if us, err = strconv.ParseInt(quota, 10, 64); err != nil {
		return l, fmt.Errorf("CPU limit of %s: %w", c.CPU, err)
	}
	l.Quota = time.Duration(us) * time.Microsecond
	return l, nil
}

// SetCPULimit sets it. The kernel refuses (EINVAL) under v1 what a parent or a
// nested cgroup with a limit of its own does not allow.
func (c Cgroup) SetCPULimit(l CPULimit) error {
	if c.CPU == "" {
		return ErrNoCPULimit
	}
	quota, period := "-1", strconv.FormatInt(l.Period.Microseconds(), 10)
	if c.cpuV2 {
		quota = "max"
	}
	if l.Quota > 0 {
		quota = strconv.FormatInt(l.Quota.Microseconds(), 10)
	}
	if c.cpuV2 {
		return c.writeCPU("cpu.max", quota+" "+period)
	}
	// One after the other, so without a limit first: the old quota in the new
	// period might be more than the parent allows.
	if err := c.writeCPU("cpu.cfs_quota_us", "-1"); err != nil {
		return err
	}
	if err := c.writeCPU("cpu.cfs_period_us", period); err != nil {
		return err
	}
	if l.Quota <= 0 {
		return nil
	}
	return c.writeCPU("cpu.cfs_quota_us", quota)
}

func (c Cgroup) writeCPU(file, value string) error {
	// Not os.WriteFile: it would create a plain file if the directory were not a cgroup.
	f, err := os.OpenFile(filepath.Join(c.CPU, file), os.O_WRONLY, 0)
	if err != nil {
		return noCPULimit(err)
	}
	_, err = f.WriteString(value)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set %s to %s: %w", file, value, err)
	}
	return nil
}

func noCPULimit(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNoCPULimit, err)
	}
	return err
}

// CPUUsed is the CPU time of the shard since it began.
func (c Cgroup) CPUUsed() (time.Duration, error) {
	if c.CPU == "" {
		return 0, ErrNoCPULimit
	}
	if !c.cpuV2 {
		raw, err := os.ReadFile(filepath.Join(c.cpuacct, "cpuacct.usage"))
		if err != nil {
			return 0, fmt.Errorf("CPU time: %w", err)
		}
		ns, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("CPU time: %w", err)
		}
		return time.Duration(ns), nil
	}
	raw, err := os.ReadFile(filepath.Join(c.CPU, "cpu.stat"))
	if err != nil {
		return 0, fmt.Errorf("CPU time: %w", err)
	}
	for line := range strings.Lines(string(raw)) {
		if value, ok := strings.CutPrefix(line, "usage_usec "); ok {
			us, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("CPU time: %w", err)
			}
			return time.Duration(us) * time.Microsecond, nil
		}
	}
	return 0, fmt.Errorf("CPU time: %s/cpu.stat does not say", c.CPU)
}
