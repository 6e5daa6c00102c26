package runtime

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// What a shard is doing.
const (
	StatusCreated = "created" // no task, or one that was not started
	StatusRunning = "running"
	StatusPaused  = "paused" // frozen by somebody, maybe by a migration
	StatusStopped = "stopped"
	StatusUnknown = "unknown"
)

// Shard is a container as List sees it.
type Shard struct {
	Namespace, Name string
	Image           string
	Status          string
	PID             uint32 // host pid of init, 0 when not running
	ExitCode        uint32
	Network         NetworkRecord
	MemoryLimit     int64
	MemoryUsed      int64
	MemoryHeld      int64 // of MemoryUsed, without page cache that is idle
	CPUs            float64
	Labels          map[string]string
	Command         []string
	CreatedAt       time.Time
	// Incoming is the migration that is building this container, or "".
	Incoming string
}

func taskRequest(id string) *tasks.GetRequest { return &tasks.GetRequest{ContainerID: id} }

func statusOf(s tasktypes.Status) string {
	switch s {
	case tasktypes.Status_CREATED:
		return StatusCreated
	case tasktypes.Status_RUNNING:
		return StatusRunning
	case tasktypes.Status_PAUSED, tasktypes.Status_PAUSING:
		return StatusPaused
	case tasktypes.Status_STOPPED:
		return StatusStopped
	}
	return StatusUnknown
}

// List returns all containers of a namespace, by name. Those that are deleted
// meanwhile are left out.
func (r *Runtime) List(ctx context.Context, namespace string) ([]Shard, error) {
	if err := CheckName("namespace", namespace); err != nil {
		return nil, err
	}
	ctx = in(ctx, namespace)
	all, err := r.client.Containers(ctx)
	if err != nil {
		return nil, fmt.Errorf("containers of namespace %s: %w", namespace, err)
	}
	shards := make([]Shard, 0, len(all))
	for _, c := range all {
		s, err := r.shard(ctx, namespace, c)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		shards = append(shards, *s)
	}
	slices.SortFunc(shards, func(a, b Shard) int { return strings.Compare(a.Name, b.Name) })
	return shards, nil
}

// Shard looks at one container.
func (r *Runtime) Shard(ctx context.Context, namespace, name string) (*Shard, error) {
	ctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	return r.shard(ctx, namespace, c)
}

func (r *Runtime) shard(ctx context.Context, namespace string, c containerd.Container) (*Shard, error) {
	info, err := c.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID(), err)
	}
	s := &Shard{
		Namespace: namespace, Name: info.ID, Image: info.Image, Status: StatusCreated,
		Labels: info.Labels, CreatedAt: info.CreatedAt, Incoming: info.Labels[LabelIncoming],
	}
	spec, err := c.Spec(ctx)
	if err != nil {
		return nil, fmt.Errorf("OCI specification of %s: %w", s.Name, err)
	}
	if spec.Linux != nil {
		s.Network = networkOf(spec, info.Labels, r.net.Path(namespace, s.Name))
	}
	s.limits(spec)
	t, err := r.client.TaskService().Get(ctx, taskRequest(s.Name))
	if isNotFound(err) {
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", s.Name, nativeError(err))
	}
	s.Status, s.ExitCode = statusOf(t.Process.Status), t.Process.ExitStatus
	if s.Status != StatusRunning && s.Status != StatusPaused {
		return s, nil
	}
	s.PID = t.Process.Pid
	// Between the two looks the shard may have ended: then it uses nothing.
	if cg, err := openCgroup(int(s.PID)); err == nil {
		s.MemoryUsed, _ = cg.MemoryCurrent()
		s.MemoryHeld, _ = cg.workingSet()
		// containerd learns of a freeze only if it was asked for it.
		if state, err := cg.Freezer().State(); err == nil && state != Thawed {
			s.Status = StatusPaused
		}
	}
	return s, nil
}

func (s *Shard) limits(spec *specs.Spec) {
	if spec.Process != nil {
		s.Command = spec.Process.Args
	}
	if spec.Linux == nil || spec.Linux.Resources == nil {
		return
	}
	if m := spec.Linux.Resources.Memory; m != nil && m.Limit != nil && *m.Limit > 0 {
		s.MemoryLimit = *m.Limit
	}
	if c := spec.Linux.Resources.CPU; c != nil && c.Quota != nil && c.Period != nil && *c.Quota > 0 && *c.Period > 0 {
		s.CPUs = float64(*c.Quota) / float64(*c.Period)
	}
}

// Stop sends the image's stop signal (SIGTERM by default), and SIGKILL once
// grace has passed. The container stays, stopped. ErrNotRunning when it had no
// running task.
func (r *Runtime) Stop(ctx context.Context, namespace, name string, grace time.Duration) error {
	ctx, c, t, err := r.task(ctx, namespace, name)
	if err != nil {
		return err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return fmt.Errorf("stop %s: %w", name, err)
	}
	if id := info.Labels[LabelIncoming]; id != "" {
		return fmt.Errorf("%w: migration %s", ErrIncoming, id)
	}
	exited, err := t.Wait(ctx)
	if err != nil {
		return fmt.Errorf("stop %s: %w", name, err)
	}
	sig, err := containerd.GetStopSignal(ctx, c, syscall.SIGTERM)
	if err != nil {
		return fmt.Errorf("stop %s: %w", name, err)
	}
	if err := t.Kill(ctx, sig); errdefs.IsNotFound(err) {
		return fmt.Errorf("%w: %s in namespace %s", ErrNotRunning, name, namespace)
	} else if err != nil {
		return fmt.Errorf("stop %s: %w", name, err)
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case st := <-exited:
		return stopError(name, st)
	case <-ctx.Done():
		return fmt.Errorf("stop %s: %w", name, context.Cause(ctx))
	case <-timer.C:
	}
	if err := t.Kill(ctx, syscall.SIGKILL, containerd.WithKillAll); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("kill %s: %w", name, err)
	}
	select {
	case st := <-exited:
		return stopError(name, st)
	case <-ctx.Done():
		return fmt.Errorf("kill %s: %w", name, context.Cause(ctx))
	}
}

// stopError: a lost connection to containerd also ends the channel.
func stopError(name string, st containerd.ExitStatus) error {
	if err := st.Error(); err != nil {
		return fmt.Errorf("stop %s: %w", name, err)
	}
	return nil
}

// Remove deletes a shard with its snapshot, network and log. A running one is
// refused (ErrRunning) unless force is set; one that a migration is building
// always (ErrIncoming).
func (r *Runtime) Remove(ctx context.Context, namespace, name string, force bool) error {
	s, err := r.Shard(ctx, namespace, name)
	if err != nil {
		return err
	}
	switch {
	case s.Incoming != "":
		return fmt.Errorf("%w: migration %s", ErrIncoming, s.Incoming)
	case !force && (s.Status == StatusRunning || s.Status == StatusPaused):
		return fmt.Errorf("%w: %s in namespace %s", ErrRunning, name, namespace)
	}
	return r.remove(ctx, namespace, name, false)
}

// Exit says how a task ended.
type Exit struct {
	Code uint32
	At   time.Time
}

// Wait blocks until the shard's task ends. A cancelled ctx and a lost
// containerd are errors, not exits. ErrNotRunning without a task.
func (r *Runtime) Wait(ctx context.Context, namespace, name string) (Exit, error) {
	ctx, _, t, err := r.task(ctx, namespace, name)
	if err != nil {
		return Exit{}, err
	}
	exited, err := t.Wait(ctx)
	if err != nil {
		return Exit{}, fmt.Errorf("wait for %s: %w", name, err)
	}
	select {
	case <-ctx.Done():
		return Exit{}, fmt.Errorf("wait for %s: %w", name, context.Cause(ctx))
	case st := <-exited:
		code, at, err := st.Result()
		if err != nil {
			return Exit{}, errors.Join(fmt.Errorf("wait for %s: %w", name, err), context.Cause(ctx))
		}
		return Exit{Code: code, At: at}, nil
	}
}
