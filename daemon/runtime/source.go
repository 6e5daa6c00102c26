package runtime

import (
	"context"
	"errors"
	"fmt"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
)

const (
	// containerd's restart monitor looks only at containers with this label. Its
	// explicitly-stopped label is no brake: policy "always" ignores it.
	labelRestartStatus = "containerd.io/restart.status"
	// labelSavedStatus keeps the value while the monitor must not look.
	labelSavedStatus = "tranship.io/restart-status"
)

// MarkStopped keeps containerd's restart monitor from starting the container
// again once its processes are gone. Before the freeze; may run twice.
func (r *Runtime) MarkStopped(ctx context.Context, namespace, name string) error {
	return r.swapLabel(ctx, namespace, name, labelRestartStatus, labelSavedStatus)
}

// UnmarkStopped undoes MarkStopped.
func (r *Runtime) UnmarkStopped(ctx context.Context, namespace, name string) error {
	return r.swapLabel(ctx, namespace, name, labelSavedStatus, labelRestartStatus)
}

func (r *Runtime) swapLabel(ctx context.Context, namespace, name, from, to string) error {
	ctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return err
	}
	labels, err := c.Labels(ctx)
	if err != nil {
		return fmt.Errorf("labels of %s: %w", name, err)
	}
	value, ok := labels[from]
	if !ok {
		return nil
	}
	// One update: a daemon killed in between would lose the value.
	if _, err := c.SetLabels(ctx, map[string]string{from: "", to: value}); err != nil {
		return fmt.Errorf("labels of %s: %w", name, err)
	}
	return nil
}

// RemoveMoved removes what the source keeps of a shard that now runs elsewhere:
// processes (frozen or not), task, shim, container, snapshot, network namespace
// and log. Its address stays in the address book as moved. Only after Commit.
// May run twice.
func (r *Runtime) RemoveMoved(ctx context.Context, namespace, name string) error {
	return r.remove(ctx, namespace, name, true)
}

// remove takes a container apart. What is gone already is no error; what fails
// does not keep the rest from being removed, but for the container, which stays
// to remember what is left.
func (r *Runtime) remove(ctx context.Context, namespace, name string, moved bool) error {
	nsctx, c, err := r.load(ctx, namespace, name)
	network := ShardNet{Namespace: namespace, Name: name}
	if errors.Is(err, ErrNotFound) {
		return errors.Join(r.net.Delete(ctx, network), removeFile(r.LogPath(namespace, name)), r.removeStdin(namespace, name))
	}
	if err != nil {
		return err
	}
	ctx = nsctx
	info, err := c.Info(ctx)
	if err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	if err := r.deleteTask(ctx, c); err != nil {
		return fmt.Errorf("remove task %s: %w", name, err)
	}
	rec, err := r.networkRecord(ctx, c, info.Labels, namespace, name)
	if err != nil {
		return err
	}
	if rec.Kind == NetworkShard {
		network.IP, network.MAC = rec.IP, rec.MAC
		ip := rec.IP.Addr()
		if moved {
			err = r.leases.take(ip, addressLease{Namespace: namespace, Name: name, State: LeaseMoved, At: time.Now()})
		} else {
			err = r.leases.drop(ip, namespace, name)
		}
		if err != nil {
			return fmt.Errorf("remove %s: %w", name, err)
		}
	}
	if err := r.net.Delete(ctx, network); err != nil {
		return err
	}
	if info.SnapshotKey != "" {
		err := r.client.SnapshotService(info.Snapshotter).Remove(ctx, info.SnapshotKey)
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove snapshot %s: %w", info.SnapshotKey, err)
		}
	}
	if err := removeFile(r.LogPath(namespace, name)); err != nil {
		return fmt.Errorf("remove log of %s: %w", name, err)
	}
	if err := r.removeStdin(namespace, name); err != nil {
		return fmt.Errorf("remove standard input of %s: %w", name, err)
	}
	if err := c.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove container %s: %w", name, err)
	}
	return nil
}

func (r *Runtime) networkRecord(ctx context.Context, c containerd.Container, labels map[string]string, namespace, name string) (NetworkRecord, error) {
	spec, err := c.Spec(ctx)
	if err != nil {
		return NetworkRecord{}, fmt.Errorf("OCI specification of %s: %w", name, err)
	}
	if spec.Linux == nil {
		return NetworkRecord{Kind: NetworkHost}, nil
	}
	return networkOf(spec, labels, r.net.Path(namespace, name)), nil
}

// LeaseHere records that an incoming shard has its address on this host now.
func (r *Runtime) LeaseHere(namespace, name string, rec NetworkRecord) error {
	if rec.Kind != NetworkShard {
		return nil
	}
	return r.leases.take(rec.IP.Addr(), addressLease{Namespace: namespace, Name: name, State: LeaseHere, At: time.Now()})
}
