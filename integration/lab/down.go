package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// downDeadline bounds the end of a lab. A gigabyte of shard memory takes the
// kernel a fraction of a second to free, so what takes longer is stuck.
const downDeadline = 60 * time.Second

// mountPoints are directories that hosts mount their own over. The machine may
// not have them; then the lab makes them, marks them, and removes them again.
var mountPoints = []string{"/etc/tranship", "/var/lib/tranship", "/var/lib/containerd"}

// Down ends the lab and removes every trace of it, including what hosts left
// behind that a crash kept out of any record. Without a lab it does nothing.
func Down(ctx context.Context) error {
	if err := needRoot(); err != nil {
		return err
	}
	unlock, err := acquire(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return sweep(ctx)
}

// sweep is Down under the lock. The order is that of dependence: processes
// hold namespaces, namespaces hold mounts and links, cgroups hold processes.
func sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, downDeadline, errors.New("the lab does not end"))
	defer cancel()
	recorded, _ := readState() // unreadable: the cgroups still tell
	if err := clearNode(ctx, ""); err != nil {
		return err
	}
	reap(recorded)
	if err := unmountBelow(rootDir); err != nil {
		return err
	}
	if err := removeMountPoints(); err != nil {
		return err
	}
	if err := os.RemoveAll(rootDir); err != nil {
		return fmt.Errorf("removing the lab's files: %w", err)
	}
	return nil
}

// reap collects inits that this very process started, which a test does; those
// of an earlier `lab up` are somebody else's children.
func reap(s state) {
	for _, rec := range s.Nodes {
		_, _ = unix.Wait4(rec.PID, nil, unix.WNOHANG, nil)
	}
}

// clearNode kills what runs in a node's cgroups, or with "" in the lab's, and
// removes them.
func clearNode(ctx context.Context, node string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	if err := killCgroups(ctx, mounts, node); err != nil {
		return err
	}
	return removeCgroups(ctx, mounts, node)
}

// killCgroups repeats until nothing is left, because a process may fork, or
// freeze another, between a look and the signal.
func killCgroups(ctx context.Context, mounts []cgroupMount, node string) error {
	return poll(ctx, func() (bool, error) {
		thaw(mounts, node)
		pids := cgroupProcesses(mounts, node)
		for _, pid := range pids {
			if err := killMember(pid, node); err != nil {
				return false, err
			}
		}
		return len(pids) == 0, fmt.Errorf("processes %v do not end", pids)
	})
}

// killMember kills a process if it is still a member of the node's cgroups; a
// pid read a moment ago may be somebody else's by now, a pidfd is not.
func killMember(pid int, node string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // gone
	}
	defer unix.Close(fd)
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil || !inCgroup(string(raw), filepath.Join("/", cgroupName, node)) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("killing process %d: %w", pid, err)
	}
	return nil
}

// inCgroup reads /proc/PID/cgroup: lines of hierarchy:controllers:path.
func inCgroup(text, cgroup string) bool {
	for _, line := range strings.Split(text, "\n") {
		if parts := strings.SplitN(line, ":", 3); len(parts) == 3 && strings.HasPrefix(parts[2]+"/", cgroup+"/") {
			return true
		}
	}
	return false
}

// unmountBelow takes away mounts of the machine's own namespace below dir. The
// lab makes none, but removing files through somebody's bind mount would
// destroy what is behind it.
func unmountBelow(dir string) error {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var below []string
	for _, line := range strings.Split(string(raw), "\n") {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			below = append(below, fields[4])
		}
	}
	for i := len(below) - 1; i >= 0; i-- { // latest first: it may lie over another
		if err := unix.Unmount(below[i], unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmounting %s: %w", below[i], err)
		}
	}
	return nil
}

// madeMark names the record that a mount point is the lab's making.
func madeMark(dir string) string {
	return filepath.Join(rootDir, "made"+strings.ReplaceAll(dir, "/", "-"))
}

// makeMountPoints creates missing ones. The mark comes first: after a crash in
// between, an empty directory at most is removed in vain.
func makeMountPoints() error {
	for _, dir := range mountPoints {
		if exists(dir) {
			continue
		}
		if err := os.WriteFile(madeMark(dir), nil, 0o600); err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("mount point: %w", err)
		}
	}
	return nil
}

// removeMountPoints removes marked ones, unless somebody put files there. While
// another lab is up it inherits the marks: removing a directory would unmount
// what its hosts have mounted over it.
func removeMountPoints() error {
	heir := otherLab()
	for _, dir := range mountPoints {
		mark := madeMark(dir)
		if !exists(mark) {
			continue
		}
		if heir != "" {
			if err := os.Rename(mark, filepath.Join(heir, filepath.Base(mark))); err != nil {
				return fmt.Errorf("mount point %s: %w", dir, err)
			}
			continue
		}
		err := unix.Rmdir(dir)
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTEMPTY) {
			return fmt.Errorf("removing mount point %s: %w", dir, err)
		}
	}
	return nil
}

// otherLab returns the directory of another lab on this machine, or "".
func otherLab() string {
	labs, _ := filepath.Glob(rootPrefix + "*") // the pattern is well-formed
	for _, dir := range labs {
		if dir != rootDir && exists(filepath.Join(dir, filepath.Base(statePath))) {
			return dir
		}
	}
	return ""
}

// acquire takes the lock that makes one lab a machine, one change at a time.
// The file goes with the lock, so whoever got it checks that it is still the
// one with that name.
func acquire(ctx context.Context) (release func(), err error) {
	err = poll(ctx, func() (bool, error) {
		f, err := os.OpenFile(lockPath, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return false, fmt.Errorf("locking the lab: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			holder, _ := os.ReadFile(lockPath)
			f.Close()
			return false, fmt.Errorf("process %s is bringing the lab up or down", bytes.TrimSpace(holder))
		}
		mine, err1 := f.Stat()
		named, err2 := os.Stat(lockPath)
		if err1 != nil || err2 != nil || !os.SameFile(mine, named) {
			f.Close()
			return false, errors.New("the lab's lock was just released")
		}
		_ = f.Truncate(0)
		_, _ = f.WriteString(strconv.Itoa(os.Getpid()))
		release = func() {
			_ = os.Remove(lockPath)
			f.Close()
		}
		return true, nil
	})
	return release, err
}
