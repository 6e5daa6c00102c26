package runtime

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Alike is a running shard that is like another one.
type Alike struct {
	Name string
	// Init is the host pid of its first process, Processes are those of all.
	Init      int
	Processes []int
}

// Alike lists the shards of this host that run the image of rec, in its namespace
// and for its tenant: those of the same workload first, then by name. A shard that
// is paused, or that a migration has not started yet, is none of them.
func (r *Runtime) Alike(ctx context.Context, rec *Record) ([]Alike, error) {
	ctx = in(ctx, rec.Namespace)
	all, err := r.client.Containers(ctx, fmt.Sprintf("image==%q", rec.Image.Name))
	if err != nil {
		return nil, fmt.Errorf("containers with image %s: %w", rec.Image.Name, err)
	}
	type candidate struct {
		Alike
		workload bool
	}
	var found []candidate
	for _, c := range all {
		s, err := r.shard(ctx, rec.Namespace, c)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if s.Name == rec.Name || s.Status != StatusRunning || s.Labels[LabelTenant] != rec.Labels[LabelTenant] {
			continue
		}
		cg, err := openCgroup(int(s.PID))
		if err != nil {
			continue // it has ended since
		}
		pids, err := cg.Processes()
		if err != nil {
			continue
		}
		workload := rec.Labels[LabelWorkload]
		found = append(found, candidate{Alike{s.Name, int(s.PID), pids}, workload != "" && s.Labels[LabelWorkload] == workload})
	}
	slices.SortStableFunc(found, func(a, b candidate) int {
		if a.workload != b.workload {
			if a.workload {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Name, b.Name)
	})
	out := make([]Alike, len(found))
	for i, c := range found {
		out[i] = c.Alike
	}
	return out, nil
}
