package runtime

import (
	"context"
	"errors"
	"fmt"

	containerd "github.com/containerd/containerd/v2/client"
)

// PreparedTask finds the task that NewRestoreTask made in an earlier life of the
// daemon: containerd and the shim kept it.
func (r *Runtime) PreparedTask(ctx context.Context, namespace, name string) (*RestoreTask, error) {
	_, _, t, err := r.task(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	if t.Pid() != 0 {
		return nil, fmt.Errorf("task %s: %w", name, ErrRunning)
	}
	return &RestoreTask{task: t, namespace: namespace, name: name}, nil
}

// Runs says whether a task of the shard is running or paused. When containerd
// cannot be asked the answer is yes: whoever asks wants to be sure that it does
// not.
func (r *Runtime) Runs(ctx context.Context, namespace, name string) bool {
	rec, err := r.Describe(ctx, namespace, name)
	if err != nil {
		return !isNotFound(err) && !errors.Is(err, ErrNotFound)
	}
	return rec.Status == StatusRunning || rec.Status == StatusPaused
}

// MustRun is nil if the shim itself says that the shard's task runs. A shim that
// has died is an error at once, before containerd has cleaned up after it.
func (r *Runtime) MustRun(ctx context.Context, namespace, name string) error {
	ctx, _, t, err := r.task(ctx, namespace, name)
	if err != nil {
		return err
	}
	status, err := t.Status(ctx)
	if err != nil {
		return fmt.Errorf("task %s: %w", name, err)
	}
	if status.Status != containerd.Running {
		return fmt.Errorf("task %s is %s: %w", name, status.Status, ErrNotRunning)
	}
	return nil
}
