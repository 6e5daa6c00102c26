package runtime

import (
	"context"
	"errors"
	"fmt"
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
