package runtime

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Settings are what containerd knows of a container: no process and no cgroup is
// looked at.
type Settings struct {
	Image    string
	Labels   map[string]string
	CPUs     float64  // the limit; 0: none
	Incoming string   // as Shard has it
	Running  bool     // or paused
	Shared   []string // sources of the mounts that are declared shared

	updated time.Time
}

// Settings lists those of all containers of a namespace, by name: a few calls
// for any number of containers. before is what it returned last; what has not
// changed since is not parsed again.
func (r *Runtime) Settings(ctx context.Context, namespace string, before map[string]Settings) (map[string]Settings, error) {
	if err := CheckName("namespace", namespace); err != nil {
		return nil, err
	}
	ctx = in(ctx, namespace)
	all, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("containers of namespace %s: %w", namespace, err)
	}
	running, err := r.client.TaskService().List(ctx, &tasks.ListTasksRequest{})
	if err = nativeError(err); err != nil && !errdefs.IsNotFound(err) { // the namespace went meanwhile
		return nil, fmt.Errorf("tasks of namespace %s: %w", namespace, err)
	}
	out := make(map[string]Settings, len(all))
	for i := range all {
		c := &all[i]
		s, known := before[c.ID]
		if !known || !s.updated.Equal(c.UpdatedAt) {
			if s, err = settingsOf(c); err != nil {
				return nil, err
			}
		}
		s.Running = false
		out[c.ID] = s
	}
	for _, t := range running.GetTasks() {
		if s, ok := out[t.ID]; ok {
			status := statusOf(t.Status)
			s.Running = status == StatusRunning || status == StatusPaused
			out[t.ID] = s
		}
	}
	return out, nil
}

func settingsOf(c *containers.Container) (Settings, error) {
	s := Shard{}
	if c.Spec != nil {
		var spec specs.Spec
		if err := json.Unmarshal(c.Spec.GetValue(), &spec); err != nil {
			return Settings{}, fmt.Errorf("OCI specification of %s: %w", c.ID, err)
		}
		s.limits(&spec)
	}
	out := Settings{Image: c.Image, Labels: c.Labels, CPUs: s.CPUs, Incoming: c.Labels[LabelIncoming], updated: c.UpdatedAt}
	for _, m := range mountsOf(c.Labels) {
		if m.Policy == MountShared {
			out.Shared = append(out.Shared, m.Source)
		}
	}
	return out, nil
}
