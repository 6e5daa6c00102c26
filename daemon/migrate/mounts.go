package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint/layer"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

// Bind mounts that are declared to be copied move like the writable layer: in
// bulk while the shard runs, and once more while it is frozen. What stays at the
// source afterwards is an old copy; it is marked as such, and only a directory
// so marked, or one that does not exist, may be written to when a shard comes.

// leftXattr, on a directory at the source, names the migration that copied it
// away.
const leftXattr = "trusted.tranship.left"

// blobMount carries one copied mount; its name is the index in Record.Mounts.
const blobMount = "mount"

// copiedMounts lists the indexes of the mounts that move with the shard.
func copiedMounts(rec *runtime.Record) []int {
	var out []int
	for i, m := range rec.Mounts {
		if m.Policy == runtime.MountCopy {
			out = append(out, i)
		}
	}
	return out
}

// checkCopiedMounts is the source's pre-flight: only directories can be copied.
func checkCopiedMounts(rec *runtime.Record) []*v1.Finding {
	var out []*v1.Finding
	for _, i := range copiedMounts(rec) {
		m := rec.Mounts[i]
		if fi, err := os.Stat(m.Source); err != nil || !fi.IsDir() {
			out = append(out, refuse("mount-copy", "mount a directory, or declare it shared",
				"%s, mounted at %s, is not a directory and cannot be copied", m.Source, m.Destination))
		}
	}
	return out
}

// checkMountTarget is the destination's: nothing that somebody else owns is
// overwritten.
func checkMountTarget(node, path string) *v1.Finding {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil && fi.IsDir() && wasLeft(path) {
		return nil // an old copy of a shard that moved away from here
	}
	return refuse("mount-exists", "remove it there, or declare the mount shared", "%s, declared to be copied, exists on %s already", path, node)
}

func wasLeft(path string) bool {
	n, err := unix.Lgetxattr(path, leftXattr, make([]byte, 256))
	return err == nil && n > 0
}

// sendMounts sends what changed in the copied mounts since the last time.
func (o *outgoing) sendMounts(ctx context.Context, frozen bool) error {
	pids, err := o.cgroup.Processes()
	if err != nil {
		return err
	}
	listed := time.Now()
	mapped := sharedWritable(pids)
	for _, i := range copiedMounts(o.rec) {
		m := o.rec.Mounts[i]
		opt := layer.Options{Frozen: frozen, ListedAt: listed, AlwaysCompare: below(mapped, m.Destination)}
		index := o.mountIndex[i]
		err := o.sendTree(ctx, blobMount, strconv.Itoa(i), m.Source, &index, opt)
		o.mountIndex[i] = index
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.Destination, err)
		}
	}
	return nil
}

// sendTree sends what changed in a directory since index, which becomes that of
// what the destination has then; after an error it has nothing to build on.
func (o *outgoing) sendTree(ctx context.Context, kind, name, path string, index **layer.Index, opt layer.Options) error {
	since := *index
	*index = nil
	sent, err := o.stream(ctx, kind, name, func(w io.Writer) error {
		next, _, err := layer.Send(ctx, path, since, w, opt)
		*index = next
		return err
	})
	if err != nil {
		*index = nil
		return err
	}
	o.report.count(sent)
	return nil
}

// below gives those of the paths that lie under dir, relative to it.
func below(paths []string, dir string) []string {
	var out []string
	for _, p := range paths {
		if rel, err := filepath.Rel(dir, p); err == nil && rel != "." && filepath.IsLocal(rel) {
			out = append(out, rel)
		}
	}
	return out
}

// makeMounts prepares the directories of copied mounts, empty. They are
// journaled first: what is in the journal is the migration's to remove.
func (in *incoming) makeMounts() error {
	for _, i := range copiedMounts(in.rec) {
		path := in.rec.Mounts[i].Source
		if slices.Contains(in.entry.MadeMounts, path) {
			continue
		}
		if f := checkMountTarget(in.m.cfg.Node, path); f != nil {
			return errors.New(f.GetMessage())
		}
		in.entry.MadeMounts = append(in.entry.MadeMounts, path)
		if err := in.m.journal.Put(in.entry); err != nil {
			return err
		}
		if err := errors.Join(os.RemoveAll(path), os.MkdirAll(path, 0o755)); err != nil {
			return err
		}
	}
	return nil
}

func (in *incoming) takeMount(ctx context.Context, name string, r io.Reader) error {
	i, err := strconv.Atoi(name)
	if err != nil || i < 0 || i >= len(in.rec.Mounts) || in.rec.Mounts[i].Policy != runtime.MountCopy {
		return fmt.Errorf("mount %q is not one that is copied", name)
	}
	_, err = layer.Apply(ctx, in.rec.Mounts[i].Source, r)
	return err
}

// dropMounts removes what makeMounts made. May run twice.
func (in *incoming) dropMounts() error {
	var errs []error
	for _, path := range in.entry.MadeMounts {
		errs = append(errs, os.RemoveAll(path))
	}
	return errors.Join(errs...)
}

// leaveMounts marks what stays at the source of a shard that has moved away.
func leaveMounts(e *Entry) error {
	var errs []error
	for _, path := range e.CopiedMounts {
		err := unix.Lsetxattr(path, leftXattr, []byte(e.ID), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("mark %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}
