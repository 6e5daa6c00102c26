package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/layer"
	"github.com/tranship/tranship/daemon/runtime"
)

// The shard's tmpfs mounts move like its writable layer. At the destination each
// is made beforehand, outside of the shard; CRIU binds it into the shard, and
// then the host lets go of it.

// blobTmpfs carries the files of one; its name is the index in Record.Tmpfs.
const blobTmpfs = "tmpfs"

// openTmpfs opens them at the source.
func (o *outgoing) openTmpfs() error {
	for _, m := range o.rec.Tmpfs {
		f, err := runtime.OpenTmpfs(o.rec.PID, m.At)
		if err != nil {
			return err
		}
		o.tmpfs = append(o.tmpfs, tmpfsSource{File: f})
	}
	o.undo.push("tmpfs", func(context.Context) error { return o.closeTmpfs() })
	return nil
}

type tmpfsSource struct {
	*os.File
	index *layer.Index
}

func (o *outgoing) closeTmpfs() error {
	var errs []error
	for _, f := range o.tmpfs {
		errs = append(errs, f.Close())
	}
	o.tmpfs = nil
	return errors.Join(errs...)
}

// sendTmpfs sends what changed in them since the last time.
func (o *outgoing) sendTmpfs(ctx context.Context, frozen bool) error {
	for i := range o.tmpfs {
		t := &o.tmpfs[i]
		opt := layer.Options{Frozen: frozen, CompareAll: true}
		path := fmt.Sprintf("/proc/self/fd/%d/.", t.Fd())
		if err := o.sendTree(ctx, blobTmpfs, strconv.Itoa(i), path, &t.index, opt); err != nil {
			return fmt.Errorf("tmpfs %s: %w", o.rec.Tmpfs[i].At, err)
		}
	}
	return nil
}

// tmpfsExternals tells CRIU that they are provided at the destination.
func tmpfsExternals(rec *runtime.Record) []criu.ExternalMount {
	var out []criu.ExternalMount
	for _, m := range rec.Tmpfs {
		out = append(out, criu.ExternalMount{At: m.At, Key: m.At})
	}
	return out
}

// tmpfsDir is where a migration's tmpfs mounts are until the shard has them. It
// is no part of the store, so that nobody who removes files there can ever
// remove those of a running shard.
func (m *Manager) tmpfsDir(id string) string { return filepath.Join(m.cfg.TmpfsDir, id) }

func (in *incoming) tmpfsPath(i int) string {
	return filepath.Join(in.m.tmpfsDir(in.entry.ID), strconv.Itoa(i))
}

// makeTmpfs mounts them at the destination, empty. May run twice.
func (in *incoming) makeTmpfs() error {
	if err := in.m.dropTmpfs(in.entry.ID); err != nil {
		return err
	}
	for i, m := range in.rec.Tmpfs {
		path := in.tmpfsPath(i)
		if err := os.MkdirAll(path, 0o700); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", path, "tmpfs", 0, m.Options); err != nil {
			return fmt.Errorf("tmpfs for %s: %w", m.At, err)
		}
		// What the shard mounts inside must not appear here as well.
		if err := unix.Mount("", path, "", unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("tmpfs for %s: private: %w", m.At, err)
		}
	}
	return nil
}

func (in *incoming) takeTmpfs(ctx context.Context, name string, r io.Reader) error {
	i, err := strconv.Atoi(name)
	if err != nil || i < 0 || i >= len(in.rec.Tmpfs) {
		return fmt.Errorf("tmpfs %q is none of the shard's", name)
	}
	_, err = layer.Apply(ctx, in.tmpfsPath(i), r)
	return err
}

// provided lists them for CRIU's restore.
func (in *incoming) provided() []criu.ExternalMount {
	var out []criu.ExternalMount
	for i, m := range in.rec.Tmpfs {
		out = append(out, criu.ExternalMount{At: in.tmpfsPath(i), Key: m.At})
	}
	return out
}

// dropTmpfs lets go of a migration's tmpfs mounts: what a shard has of them
// stays, the rest is gone. May run twice.
func (m *Manager) dropTmpfs(id string) error {
	entries, err := os.ReadDir(m.tmpfsDir(id))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("tmpfs of %s: %w", id, err)
	}
	for _, e := range entries {
		path := filepath.Join(m.tmpfsDir(id), e.Name())
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: not mounted
			return fmt.Errorf("unmount %s: %w", path, err)
		}
		// Not RemoveAll: a mount point has nothing in it.
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return os.Remove(m.tmpfsDir(id))
}

// madeTmpfs lists the migrations that have such mounts.
func (m *Manager) madeTmpfs() []string {
	entries, _ := os.ReadDir(m.cfg.TmpfsDir) // not made yet: none
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}
