package runtime

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
)

// Task is a running container's place among processes.
type Task struct {
	Namespace, Name string
	// PID of its init, in the daemon's pid namespace.
	PID int
}

// TaskEvent says that a task began or ended. A task may begin twice in a row
// (it is created, then it starts), and end without having begun.
type TaskEvent struct {
	Task
	Ended bool
}

// WatchTasks calls emit for every task of every namespace that begins or ends,
// until ctx ends or containerd is lost, either of which is the error. What
// happened before it was called is in Tasks. emit must not block for long:
// containerd drops the events of a subscriber that falls behind.
func (r *Runtime) WatchTasks(ctx context.Context, emit func(TaskEvent)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	envelopes, errs := r.client.Subscribe(ctx, `topic=="/tasks/create"`, `topic=="/tasks/start"`, `topic=="/tasks/exit"`)
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("containerd's events: %w", context.Cause(ctx))
		case err := <-errs:
			if err == nil {
				err = errors.New("the stream ended")
			}
			return fmt.Errorf("containerd's events: %w", err)
		case env := <-envelopes:
			if env == nil {
				continue
			}
			event, err := typeurl.UnmarshalAny(env.Event)
			if err != nil {
				return fmt.Errorf("containerd's event %s: %w", env.Topic, err)
			}
			if e, ok := taskEvent(env.Namespace, event); ok {
				emit(e)
			}
		}
	}
}

func taskEvent(namespace string, event any) (TaskEvent, bool) {
	switch e := event.(type) {
	case *events.TaskCreate:
		// A task that is restored has no process before it starts.
		return TaskEvent{Task: Task{namespace, e.ContainerID, int(e.Pid)}}, e.Pid != 0
	case *events.TaskStart:
		return TaskEvent{Task: Task{namespace, e.ContainerID, int(e.Pid)}}, true
	case *events.TaskExit:
		// The exit of a process that was executed in the container has its own id.
		return TaskEvent{Task: Task{namespace, e.ContainerID, int(e.Pid)}, Ended: true}, e.ID == e.ContainerID
	}
	return TaskEvent{}, false
}

// Tasks lists the tasks of all namespaces that have a process.
func (r *Runtime) Tasks(ctx context.Context) ([]Task, error) {
	namespaces, err := r.Namespaces(ctx)
	if err != nil {
		return nil, err
	}
	var out []Task
	for _, ns := range namespaces {
		resp, err := r.client.TaskService().List(in(ctx, ns), &tasks.ListTasksRequest{})
		if errdefs.IsNotFound(nativeError(err)) {
			continue // the namespace went meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("tasks of namespace %s: %w", ns, nativeError(err))
		}
		for _, t := range resp.Tasks {
			if st := statusOf(t.Status); t.Pid != 0 && (st == StatusRunning || st == StatusPaused || st == StatusCreated) {
				out = append(out, Task{ns, t.ID, int(t.Pid)})
			}
		}
	}
	return out, nil
}

// Labels returns a container's labels.
func (r *Runtime) Labels(ctx context.Context, namespace, name string) (map[string]string, error) {
	ctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	labels, err := c.Labels(ctx)
	if err != nil {
		return nil, fmt.Errorf("labels of %s: %w", name, err)
	}
	return labels, nil
}
