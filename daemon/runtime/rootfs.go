package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// Rootfs is the root file system that containerd mounted into the bundle of a
// restore task. The last changes of the writable layer are written below an
// unmounted overlay: changing an upper directory under a mounted one is
// undefined (kernel Documentation/filesystems/overlayfs.rst).
type Rootfs struct {
	Path   string
	mounts []mount.Mount
}

// Rootfs finds the mounted root of a restore task.
func (r *Runtime) Rootfs(ctx context.Context, namespace, name string) (*Rootfs, error) {
	mounts, err := r.rootMounts(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("root file system of %s: %w", name, err)
	}
	// containerd's state directory is configurable and not told to clients; the
	// rest of the path is fixed.
	tail := filepath.Join("/io.containerd.runtime.v2.task", namespace, name, "rootfs")
	for line := range strings.Lines(string(raw)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasSuffix(unescapeMount(fields[4]), tail) {
			return &Rootfs{Path: unescapeMount(fields[4]), mounts: mounts}, nil
		}
	}
	return nil, fmt.Errorf("root file system of %s: containerd has none mounted at …%s", name, tail)
}

// Unmount takes the root file system off; nothing when it is off already.
func (f *Rootfs) Unmount() error {
	if err := unix.Unmount(f.Path, 0); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", f.Path, err)
	}
	return nil
}

// Mount puts it back. The shard must not start before.
func (f *Rootfs) Mount() error {
	if err := mount.All(f.mounts, f.Path); err != nil {
		return fmt.Errorf("mount %s: %w", f.Path, err)
	}
	return nil
}
