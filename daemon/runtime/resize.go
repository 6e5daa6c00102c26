package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

// ErrInUse refuses a memory limit below what the shard has in memory.
var ErrInUse = errors.New("memory is in use")

// cpuPeriod is the kernel's default, in µs.
const cpuPeriod = 100_000

// Resize is what a shard's limits become. 0 is no limit; nil stays as it is.
type Resize struct {
	CPUs   *float64
	Memory *int64 // bytes
	// Labels are set; those that are "" are removed.
	Labels map[string]string
}

func (z Resize) validate() error {
	if z.Memory != nil && *z.Memory != 0 && *z.Memory < minMemory {
		return fmt.Errorf("%w: memory limit of %d bytes: at least %d are needed", ErrInvalid, *z.Memory, minMemory)
	}
	if z.CPUs != nil && *z.CPUs != 0 && !(*z.CPUs >= 0.01 && *z.CPUs <= 1<<16) {
		return fmt.Errorf("%w: cpus %v: use 0 for no limit, or at least 0.01", ErrInvalid, *z.CPUs)
	}
	return nil
}

// Resize changes a shard's limits under its running processes, which notice
// nothing. First the cgroup, by runc, whose own state then says the same; then,
// in one update, the container's specification and labels: a task that starts
// anew, and a copy on another host, have them from there. Whoever is killed
// between the two does it again with the same outcome. A memory limit below what
// cannot be given back is ErrInUse; a shard that is arriving ErrIncoming.
func (r *Runtime) Resize(ctx context.Context, namespace, name string, z Resize) (*Shard, error) {
	if err := z.validate(); err != nil {
		return nil, err
	}
	nsctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	s, err := r.shard(nsctx, namespace, c)
	if err != nil {
		return nil, err
	}
	if s.Incoming != "" {
		return nil, fmt.Errorf("%w: migration %s", ErrIncoming, s.Incoming)
	}
	cpus, memory := s.CPUs, s.MemoryLimit
	if z.CPUs != nil {
		cpus = *z.CPUs
	}
	if z.Memory != nil {
		memory = *z.Memory
	}
	if s.PID != 0 && (z.CPUs != nil || z.Memory != nil) {
		if err := r.resizeTask(nsctx, s, cpus, memory); err != nil {
			return nil, err
		}
	}
	err = c.Update(nsctx, func(_ context.Context, _ *containerd.Client, info *containers.Container) error {
		if info.Labels == nil {
			info.Labels = map[string]string{}
		}
		maps.Copy(info.Labels, z.Labels)
		maps.DeleteFunc(info.Labels, func(k, v string) bool { _, ours := z.Labels[k]; return ours && v == "" })
		raw, err := withLimits(info.Spec.GetValue(), cpus, memory)
		if err != nil {
			return err
		}
		info.Spec = &anypb.Any{TypeUrl: info.Spec.GetTypeUrl(), Value: raw}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("resize %s: %w", name, err)
	}
	return r.Shard(ctx, namespace, name)
}

func (r *Runtime) resizeTask(ctx context.Context, s *Shard, cpus float64, memory int64) error {
	if memory != 0 {
		cg, err := openCgroup(int(s.PID))
		if err != nil {
			return fmt.Errorf("resize %s: %w", s.Name, err)
		}
		used, err := cg.workingSet()
		if err != nil {
			return fmt.Errorf("resize %s: %w", s.Name, err)
		}
		if used > memory {
			return fmt.Errorf("%w: %s has %d MiB that it cannot give back, and the limit would be %d MiB", ErrInUse, s.Name, used>>20, memory>>20)
		}
	}
	_, c, err := r.load(ctx, s.Namespace, s.Name)
	if err != nil {
		return err
	}
	t, err := c.Task(ctx, nil)
	if err != nil {
		return fmt.Errorf("resize %s: %w", s.Name, err)
	}
	// Both together: runc takes what is missing for "as it is", but only in the cgroup.
	res := &specs.LinuxResources{}
	setLimits(res, cpus, memory)
	if err := t.Update(ctx, containerd.WithResources(res)); err != nil {
		return fmt.Errorf("resize %s: %w", s.Name, err)
	}
	return nil
}

// setLimits writes -1 for none, which is what undoes a limit.
func setLimits(res *specs.LinuxResources, cpus float64, memory int64) {
	quota, period := int64(-1), uint64(cpuPeriod)
	if cpus > 0 {
		quota = int64(cpus * cpuPeriod)
	}
	if memory <= 0 {
		memory = -1
	}
	res.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	res.Memory = &specs.LinuxMemory{Limit: &memory}
}

// withLimits is a specification with other limits. A generic tree rather than
// specs.Spec: fields that this version does not know must survive.
func withLimits(raw []byte, cpus float64, memory int64) ([]byte, error) {
	var spec map[string]any
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	dec.UseNumber() // 64-bit limits do not survive float64
	if err := dec.Decode(&spec); err != nil {
		return nil, fmt.Errorf("OCI specification: %w", err)
	}
	var res specs.LinuxResources
	setLimits(&res, cpus, memory)
	linux := within(spec, "linux")
	resources := within(linux, "resources")
	cpu, mem := within(resources, "cpu"), within(resources, "memory")
	delete(cpu, "quota")
	delete(cpu, "period")
	delete(mem, "limit")
	if *res.CPU.Quota > 0 {
		cpu["quota"], cpu["period"] = *res.CPU.Quota, *res.CPU.Period
	}
	if *res.Memory.Limit > 0 {
		mem["limit"] = *res.Memory.Limit
	}
	return json.Marshal(spec)
}

// within finds or makes an object in another.
func within(o map[string]any, key string) map[string]any {
	if in, ok := o[key].(map[string]any); ok {
		return in
	}
	in := map[string]any{}
	o[key] = in
	return in
}

// workingSet is the memory that the kernel could not take back at once: what is
// in use without the page cache that nobody touched lately; 0 without accounting.
func (c Cgroup) workingSet() (int64, error) {
	used, err := c.MemoryCurrent()
	if err != nil || used == 0 {
		return 0, err
	}
	raw, err := os.ReadFile(filepath.Join(c.Memory, "memory.stat"))
	if err != nil {
		return 0, fmt.Errorf("memory in use: %w", err)
	}
	key := "total_inactive_file"
	if c.memoryV2 {
		key = "inactive_file"
	}
	for line := range strings.Lines(string(raw)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), " ")
		if k != key {
			continue
		}
		idle, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("memory in use: %w", err)
		}
		return max(0, used-idle), nil
	}
	return used, nil
}
