package runtime

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Place is where the kernel accounts for a shard: the directories of its
// cgroups by controller. A controller that is not there is missing.
type Place struct {
	Dirs map[string]Dir
	// Netns is the inode number of its network namespace, 0 if that is the
	// daemon's own, the host's.
	Netns uint32
}

// Dir is a cgroup.
type Dir struct {
	Path string
	V2   bool
	// ID is the kernel's number for it, within its hierarchy.
	ID uint64
}

// accounted are the controllers that keep accounts.
var accounted = []string{"cpu", "cpuacct", "memory", "blkio"}

// PlaceOf finds where a task is accounted for. It works for as long as pid lives.
func PlaceOf(pid int) (Place, error) {
	membership, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return Place{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	defer membership.Close()
	paths, err := parseMembership(membership)
	if err != nil {
		return Place{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	mounts, err := cgroupMounts()
	if err != nil {
		return Place{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	p := Place{Dirs: map[string]Dir{}}
	var errs []error
	for _, controller := range accounted {
		path, v2, err := locate(controller, paths, mounts)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		d, err := dirAt(path, v2)
		if err != nil {
			return Place{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
		}
		p.Dirs[controller] = d
	}
	if len(p.Dirs) == 0 {
		return Place{}, fmt.Errorf("cgroup of pid %d: %w", pid, errors.Join(errs...))
	}
	var own, its unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
		return Place{}, fmt.Errorf("network namespace: %w", err)
	}
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &its); err != nil {
		return Place{}, fmt.Errorf("network namespace of pid %d: %w", pid, err)
	}
	if its.Ino != own.Ino {
		p.Netns = uint32(its.Ino)
	}
	return p, nil
}

// HostPlace is the root of what this daemon sees: the whole machine, or the
// cgroup namespace that it was started in. unified says that v2 is all there is.
func HostPlace() (p Place, unified bool, err error) {
	mounts, err := cgroupMounts()
	if err != nil {
		return Place{}, false, fmt.Errorf("cgroups: %w", err)
	}
	p, unified = Place{Dirs: map[string]Dir{}}, true
	for _, controller := range accounted {
		for _, key := range []string{controller, ""} {
			at := slices.IndexFunc(mounts, func(m cgroupMount) bool { return m.root == "/" && slices.Contains(m.controllers, key) })
			if at < 0 {
				continue
			}
			d, err := dirAt(mounts[at].point, key == "")
			if err != nil {
				return Place{}, false, fmt.Errorf("cgroups: %w", err)
			}
			p.Dirs[controller] = d
			if !d.V2 && controller == "cpu" {
				unified = false
			}
			break
		}
	}
	if len(p.Dirs) == 0 {
		return Place{}, false, errors.New("cgroups: no hierarchy is mounted")
	}
	var own unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &own); err != nil {
		return Place{}, false, fmt.Errorf("network namespace: %w", err)
	}
	p.Netns = uint32(own.Ino)
	return p, unified, nil
}

func cgroupMounts() ([]cgroupMount, error) {
	mountinfo, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer mountinfo.Close()
	return parseCgroupMounts(mountinfo)
}

func dirAt(path string, v2 bool) (Dir, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Dir{}, fmt.Errorf("%s: %w", path, err)
	}
	return Dir{Path: path, V2: v2, ID: st.Ino}, nil
}
