package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// mountStore makes sure that dir is a tmpfs: pages and CRIU's images must not
// wait for a disk, and a page store relies on sparse files of 2^57 bytes. The
// mount outlives the daemon, because page servers that still fill a shard do.
func mountStore(dir string, size int64) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("page store: %w", err)
	}
	mounted, err := isMountPoint(dir)
	if err != nil {
		return fmt.Errorf("page store: %w", err)
	}
	options := "mode=0700,size=90%"
	if size > 0 {
		options = fmt.Sprintf("mode=0700,size=%d", size)
	}
	if mounted {
		// A changed size takes effect without losing what is there.
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, options); err != nil {
			return fmt.Errorf("page store: resize the tmpfs at %s: %w", dir, err)
		}
		return nil
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return fmt.Errorf("page store: mount a tmpfs at %s: %w", dir, err)
	}
	// Containers that start meanwhile must not get a copy of the mount.
	if err := unix.Mount("", dir, "", unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("page store: %w", err)
	}
	return nil
}

// unmountStore removes the tmpfs if nothing is in it.
func unmountStore(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) > 0 {
		return err
	}
	if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("page store: %w", err)
	}
	return nil
}

func isMountPoint(dir string) (bool, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return false, err
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(raw)) {
		if fields := strings.Fields(line); len(fields) > 4 && fields[4] == real {
			return true, nil
		}
	}
	return false, nil
}
