package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
)

// Destination's side. CreateForRestore and NewRestoreTask build everything up
// to the one call that starts the shard; everything built carries LabelIncoming
// until Adopt, so that a daemon that was killed knows what to throw away.

// CreateForRestore makes the snapshot and the container of an incoming shard
// on top of PrepareImage's image. Nothing runs. May run twice for the same
// migration; ErrExists when the name belongs to another container.
func (r *Runtime) CreateForRestore(ctx context.Context, rec *Record, image, migration string) error {
	ctx, err := r.withLease(in(ctx, rec.Namespace), migration)
	if err != nil {
		return err
	}
	have, err := r.client.ContainerService().Get(ctx, rec.Name)
	switch {
	case err == nil && have.Labels[LabelIncoming] == migration:
		return nil
	case err == nil:
		return fmt.Errorf("%w: container %s in namespace %s", ErrExists, rec.Name, rec.Namespace)
	case !errdefs.IsNotFound(err):
		return fmt.Errorf("container %s: %w", rec.Name, err)
	}
	if err := r.prepareSnapshot(ctx, rec, migration); err != nil {
		return err
	}
	spec, err := r.incomingSpec(rec)
	if err != nil {
		return err
	}
	labels := maps.Clone(rec.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	// A restart monitor that saw its label here would start a second copy.
	if status, ok := labels[labelRestartStatus]; ok {
		labels[labelSavedStatus] = status
		delete(labels, labelRestartStatus)
	}
	labels[LabelIncoming] = migration
	if rec.Network.Kind == NetworkPrivate {
		labels[LabelNetwork] = string(NetworkNone)
	}
	c := containers.Container{
		ID: rec.Name, Labels: labels, Image: image, Spec: spec,
		Snapshotter: rec.Snapshot.Snapshotter, SnapshotKey: rec.Name,
		Runtime:    containers.RuntimeInfo{Name: rec.Runtime.Name, Options: rec.Runtime.Options.any()},
		Extensions: map[string]typeurl.Any{},
	}
	for key, value := range rec.Extensions {
		c.Extensions[key] = value.any()
	}
	if _, err := r.client.ContainerService().Create(ctx, c); err != nil {
		return fmt.Errorf("container %s: %w", rec.Name, err)
	}
	return nil
}

func (o OpaqueRecord) any() typeurl.Any {
	if o.TypeURL == "" {
		return nil
	}
	return &anypb.Any{TypeUrl: o.TypeURL, Value: o.Value}
}

func (r *Runtime) prepareSnapshot(ctx context.Context, rec *Record, migration string) error {
	sn := r.client.SnapshotService(rec.Snapshot.Snapshotter)
	make := sn.Prepare
	if rec.Snapshot.ReadOnly {
		make = sn.View
	}
	label := snapshots.WithLabels(map[string]string{LabelIncoming: migration})
	_, err := make(ctx, rec.Name, rec.Snapshot.Parent, label)
	if err == nil {
		return nil
	}
	if !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("snapshot %s: %w", rec.Name, err)
	}
	info, err := sn.Stat(ctx, rec.Name)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", rec.Name, err)
	}
	if info.Labels[LabelIncoming] != migration {
		return fmt.Errorf("%w: snapshot %s in namespace %s", ErrExists, rec.Name, rec.Namespace)
	}
	return nil
}

// incomingSpec is the source's specification with what is this host's own: the
// path of the network namespace and the CRIU configuration annotation, which
// containers that tranship did not make lack.
func (r *Runtime) incomingSpec(rec *Record) (typeurl.Any, error) {
	// A generic tree rather than specs.Spec: fields that this version of the
	// specification does not know must survive.
	var spec map[string]any
	dec := json.NewDecoder(strings.NewReader(string(rec.Spec)))
	dec.UseNumber() // 64-bit limits do not survive float64
	if err := dec.Decode(&spec); err != nil {
		return nil, fmt.Errorf("OCI specification of %s: %w", rec.Name, err)
	}
	annotations, _ := spec["annotations"].(map[string]any)
	if annotations == nil {
		annotations = map[string]any{}
	}
	annotations[AnnotationCRIUConfig] = CRIUConfigPath(rec.Namespace, rec.Name)
	spec["annotations"] = annotations
	switch rec.Network.Kind {
	case NetworkShard, NetworkNone, NetworkPrivate:
		linux, _ := spec["linux"].(map[string]any)
		list, _ := linux["namespaces"].([]any)
		for _, entry := range list {
			if ns, _ := entry.(map[string]any); ns["type"] == string(specs.NetworkNamespace) {
				ns["path"] = r.net.Path(rec.Namespace, rec.Name)
			}
		}
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("OCI specification of %s: %w", rec.Name, err)
	}
	// The type URL that containerd registers for specs.Spec (core/runtime).
	return &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Spec", Value: raw}, nil
}

// UpperDir is the directory that holds what the shard wrote to its root file
// system, on this host; "" for a read-only root. Its work directory is beside it.
func (r *Runtime) UpperDir(ctx context.Context, namespace, name string) (string, error) {
	mounts, err := r.rootMounts(ctx, namespace, name)
	if err != nil {
		return "", err
	}
	dir, err := upperOf(mounts)
	if err != nil {
		return "", fmt.Errorf("writable layer of %s: %w", name, err)
	}
	return dir, nil
}

func (r *Runtime) rootMounts(ctx context.Context, namespace, name string) ([]mount.Mount, error) {
	ctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", name, err)
	}
	mounts, err := r.client.SnapshotService(info.Snapshotter).Mounts(ctx, info.SnapshotKey)
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", info.SnapshotKey, err)
	}
	return mounts, nil
}

// upperOf reads the writable directory out of a snapshot's mounts: one overlay,
// or, for a snapshot without parents or a view of one layer, one bind mount.
func upperOf(mounts []mount.Mount) (string, error) {
	if len(mounts) != 1 {
		return "", fmt.Errorf("%d mounts instead of one", len(mounts))
	}
	m := mounts[0]
	switch m.Type {
	case "overlay":
		for _, o := range m.Options {
			if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
				return dir, nil
			}
		}
		return "", nil
	case "bind":
		if m.ReadOnly() {
			return "", nil
		}
		return m.Source, nil
	}
	return "", fmt.Errorf("file system %q: only overlayfs has a writable layer that can be told apart", m.Type)
}

// RestoreTask is a task that containerd prepared but did not start: shim and
// root file system are there.
type RestoreTask struct {
	task            containerd.Task
	namespace, name string
}

// NewRestoreTask has containerd start the shim and mount the root file system.
// imagePath need not be complete before Start. Both paths are directories.
func (r *Runtime) NewRestoreTask(ctx context.Context, rec *Record, imagePath, workPath string) (*RestoreTask, error) {
	namespace, name := rec.Namespace, rec.Name
	ctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", name, err)
	}
	opts := new(options.Options)
	if info.Runtime.Options != nil && len(info.Runtime.Options.GetValue()) > 0 {
		// containerd takes either the container's options or the task's: carry
		// the former over, or a BinaryName would be lost.
		if err := typeurl.UnmarshalTo(info.Runtime.Options, opts); err != nil {
			return nil, fmt.Errorf("runtime options of %s: %w", name, err)
		}
	}
	opts.CriuImagePath, opts.CriuWorkPath = imagePath, workPath
	io, err := r.restoreIO(ctx, namespace, name, rec.IO.Stdin != "")
	if err != nil {
		return nil, err
	}
	t, err := c.NewTask(ctx, io, func(_ context.Context, _ *containerd.Client, ti *containerd.TaskInfo) error {
		ti.Options = opts
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("task %s: %w", name, err)
	}
	return &RestoreTask{task: t, namespace: namespace, name: name}, nil
}

// Start has runc restore the shard and returns the host pid of its init. When
// it returns nil the shard runs.
func (t *RestoreTask) Start(ctx context.Context) (int, error) {
	if err := t.task.Start(in(ctx, t.namespace)); err != nil {
		return 0, fmt.Errorf("restore %s: %w", t.name, err)
	}
	return int(t.task.Pid()), nil
}

// logIO sends both streams to the shard's log file.
func (r *Runtime) logIO(namespace, name string) (cio.Creator, error) {
	path := r.LogPath(namespace, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("log of %s: %w", name, err)
	}
	return cio.LogFile(path), nil
}

// Adopt makes an incoming container an ordinary one, after Commit. May run twice.
func (r *Runtime) Adopt(ctx context.Context, namespace, name, migration string) error {
	ctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return fmt.Errorf("container %s: %w", name, err)
	}
	if got := info.Labels[LabelIncoming]; got != "" && got != migration {
		return fmt.Errorf("adopt %s: it belongs to migration %s", name, got)
	}
	if err := r.UnmarkStopped(ctx, namespace, name); err != nil {
		return fmt.Errorf("adopt %s: %w", name, err)
	}
	// containerd removes a label that is set to nothing.
	clear := map[string]string{LabelIncoming: ""}
	if _, err := c.SetLabels(ctx, clear); err != nil {
		return fmt.Errorf("adopt %s: %w", name, err)
	}
	sn := r.client.SnapshotService(info.Snapshotter)
	if _, err := sn.Update(ctx, snapshots.Info{Name: info.SnapshotKey, Labels: clear}, "labels."+LabelIncoming); err != nil {
		return fmt.Errorf("adopt snapshot %s: %w", info.SnapshotKey, err)
	}
	store := r.client.ImageService()
	img, err := store.Get(ctx, info.Image)
	if err == nil && img.Labels[LabelIncoming] == migration {
		img.Labels = clear
		_, err = store.Update(ctx, img, "labels."+LabelIncoming)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("adopt image %s: %w", info.Image, err)
	}
	return r.dropLease(ctx, migration)
}

// DestroyIncoming undoes everything from EnsureContent to RestoreTask.Start: task,
// shim, container, snapshot, the image and content that the migration brought,
// and its lease. What was here before stays. May run twice. It refuses to touch
// a container that does not carry the migration's label.
func (r *Runtime) DestroyIncoming(ctx context.Context, namespace, name, migration string) error {
	if err := errors.Join(CheckName("namespace", namespace), CheckName("shard", name)); err != nil {
		return err
	}
	ctx = in(ctx, namespace)
	var errs []error
	step := func(what string, err error) {
		if err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, ErrNotFound) {
			errs = append(errs, fmt.Errorf("undo %s of %s: %w", what, name, err))
		}
	}
	_, c, err := r.load(ctx, namespace, name)
	step("container", err)
	ours := errors.Is(err, ErrNotFound) // what is left of a half-done undo
	snapshotter := r.cfg.Snapshotter
	if err == nil {
		info, err := c.Info(ctx)
		step("container", err)
		if err == nil && info.Labels[LabelIncoming] == migration {
			ours, snapshotter = true, info.Snapshotter
			step("task", r.deleteTask(ctx, c))
			step("container", c.Delete(ctx))
		}
	}
	sn := r.client.SnapshotService(snapshotter)
	if info, err := sn.Stat(ctx, name); err == nil && info.Labels[LabelIncoming] == migration {
		step("snapshot", sn.Remove(ctx, name))
	} else {
		step("snapshot", err)
	}
	brought, err := r.client.ImageService().List(ctx, fmt.Sprintf("labels.%q==%s", LabelIncoming, migration))
	step("image", err)
	for _, img := range brought {
		step("image", r.client.ImageService().Delete(ctx, img.Name, images.SynchronousDelete()))
	}
	step("lease", r.dropLease(ctx, migration))
	if ours {
		step("log", removeFile(r.LogPath(namespace, name)))
		step("standard input", r.removeStdin(namespace, name))
	}
	return errors.Join(errs...)
}

// deleteTask kills what runs, deletes the task and with it its shim. A frozen
// task dies too: SIGKILL is sent before the thaw, so that no instruction of the
// shard's runs in between.
func (r *Runtime) deleteTask(ctx context.Context, c containerd.Container) error {
	t, err := c.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if t.Pid() > 0 {
		if cg, err := openCgroup(int(t.Pid())); err == nil {
			// The task may be gone by now; then there is nobody to kill.
			if err := cg.Kill(ctx); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	_, err = t.Delete(ctx, containerd.WithProcessKill)
	if errdefs.IsNotFound(err) || errors.Is(err, syscall.ESRCH) {
		return nil
	}
	return err
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
