package runtime

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
)

// UndoRun removes what a Run left that its daemon did not live to end: the
// address, the network, the snapshot, the container. A shard that was started by
// then stays, and so does one that a migration brings; started says so. May run
// twice.
func (r *Runtime) UndoRun(ctx context.Context, namespace, name string) (started bool, err error) {
	s, err := r.Shard(ctx, namespace, name)
	switch {
	case errors.Is(err, ErrNotFound):
	case err != nil:
		return false, err
	case s.Status != StatusCreated || s.Incoming != "":
		return true, nil
	default:
		return false, r.remove(ctx, namespace, name, false)
	}
	if err := errors.Join(r.remove(ctx, namespace, name, false), r.leases.dropShard(namespace, name)); err != nil {
		return false, fmt.Errorf("undo the start of %s: %w", name, err)
	}
	sn := r.client.SnapshotService(r.cfg.Snapshotter)
	info, err := sn.Stat(in(ctx, namespace), name)
	if err == nil && info.Labels[LabelShard] != "" && info.Labels[LabelIncoming] == "" {
		err = sn.Remove(in(ctx, namespace), name)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return false, fmt.Errorf("undo the start of %s: %w", name, err)
	}
	return false, nil
}
