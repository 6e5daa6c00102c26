package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroupMount is one hierarchy as the machine has it mounted.
type cgroupMount struct {
	Target string `json:"target"`
	// V2 is the unified hierarchy, alone or beside v1 (hybrid).
	V2 bool `json:"v2"`
	// Options name the controllers of a v1 hierarchy, as mount(2) wants them.
	Options string `json:"options"`
}

// cgroupMounts lists the machine's hierarchies, v1, hybrid or v2.
func cgroupMounts() ([]cgroupMount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var mounts []cgroupMount
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if m, ok := parseCgroupMount(lines.Text()); ok {
			mounts = append(mounts, m)
		}
	}
	if len(mounts) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted below " + cgroupRoot)
	}
	return mounts, nil
}

// parseCgroupMount reads one line of mountinfo (proc_pid_mountinfo(5)): six
// fields, optional ones up to a dash, then type, source and super options.
func parseCgroupMount(line string) (cgroupMount, bool) {
	before, after, ok := strings.Cut(line, " - ")
	fields, super := strings.Fields(before), strings.Fields(after)
	if !ok || len(fields) < 6 || len(super) < 3 {
		return cgroupMount{}, false
	}
	m := cgroupMount{Target: fields[4], V2: super[0] == "cgroup2"}
	if super[0] != "cgroup" && !m.V2 || !strings.HasPrefix(m.Target, cgroupRoot) {
		return cgroupMount{}, false
	}
	if !m.V2 {
		m.Options = v1Options(super[2])
	}
	return m, true
}

// v1Options keeps what identifies a hierarchy: a second mount must name the
// same controllers, and may not name a release agent outside the first
// cgroup namespace.
func v1Options(super string) string {
	var keep []string
	named := false
	for _, opt := range strings.Split(super, ",") {
		switch {
		case opt == "rw", opt == "ro", opt == "clone_children", opt == "noprefix", strings.HasPrefix(opt, "release_agent="):
		case strings.HasPrefix(opt, "name="):
			named = true
			keep = append(keep, opt)
		default:
			keep = append(keep, opt)
		}
	}
	controllers := slices.DeleteFunc(slices.Clone(keep), func(o string) bool { return o == "xattr" || strings.HasPrefix(o, "name=") })
	if named && len(controllers) == 0 {
		keep = append(keep, "none")
	}
	return strings.Join(keep, ",")
}

// makeCgroups creates a node's cgroup in every hierarchy.
func makeCgroups(mounts []cgroupMount, node string) error {
	for _, m := range mounts {
		at := m.Target
		for _, name := range []string{cgroupName, node} {
			// Down to the node's cgroup but not in it: init joins that first, and
			// a cgroup that hands controllers down takes no processes. Beside v1
			// there is nothing to hand down.
			if m.V2 && m.Target == cgroupRoot {
				enableControllers(at)
			}
			parent := at
			at = filepath.Join(at, name)
			if err := os.Mkdir(at, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("cgroup: %w", err)
			}
			if !m.V2 {
				if err := inheritCpuset(parent, at); err != nil {
					return fmt.Errorf("cgroup: %w", err)
				}
			}
		}
	}
	return nil
}

// enableControllers hands all of a v2 cgroup's controllers to its children,
// one by one: a controller that cannot be had (a real-time task in the way of
// cpu, processes in the way of the rest) must not cost the others. What then
// really misses one, fails by its name.
func enableControllers(dir string) {
	raw, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, name := range strings.Fields(string(raw)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0)
	}
}

// inheritCpuset fills a new v1 cpuset, which starts empty and takes no process
// until it has processors and memory nodes.
func inheritCpuset(parent, dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		raw, err := os.ReadFile(filepath.Join(parent, name))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // not the cpuset hierarchy
		}
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0); err != nil {
			return err
		}
	}
	return nil
}

// joinCgroups moves a process, with all its threads, into a node's cgroups.
func joinCgroups(mounts []cgroupMount, node string, pid int) error {
	for _, m := range mounts {
		procs := filepath.Join(m.Target, cgroupName, node, "cgroup.procs")
		if err := os.WriteFile(procs, []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("moving process %d: %w", pid, err)
		}
	}
	return nil
}

// mountCgroups runs inside a node's cgroup and mount namespaces: the same
// hierarchies at the same places, but rooted in the node's own cgroups. A v1
// hierarchy keeps its old root when its mount is inherited, so everything below
// /sys has to go first; the caller did that.
func mountCgroups(mounts []cgroupMount, links map[string]string) error {
	unified := slices.ContainsFunc(mounts, func(m cgroupMount) bool { return m.V2 && m.Target == cgroupRoot })
	if !unified {
		if err := unix.Mount("tmpfs", cgroupRoot, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755"); err != nil {
			return fmt.Errorf("mounting %s: %w", cgroupRoot, err)
		}
	}
	for _, m := range mounts {
		if err := os.MkdirAll(m.Target, 0o755); err != nil {
			return err
		}
		fstype := "cgroup"
		if m.V2 {
			fstype = "cgroup2"
		}
		if err := unix.Mount(fstype, m.Target, fstype, unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, m.Options); err != nil {
			return fmt.Errorf("mounting cgroup %s (%s): %w", m.Target, m.Options, err)
		}
	}
	for name, to := range links {
		if err := os.Symlink(to, filepath.Join(cgroupRoot, name)); err != nil {
			return err
		}
	}
	if !unified {
		return nil
	}
	// v2 allows processes only in leaves once controllers are handed down.
	leaf := filepath.Join(cgroupRoot, "init")
	if err := os.Mkdir(leaf, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("moving into %s: %w", leaf, err)
	}
	enableControllers(cgroupRoot)
	return nil
}

// cgroupLinks are the symbolic links beside the hierarchies (cpu → cpu,cpuacct).
func cgroupLinks() map[string]string {
	links := map[string]string{}
	entries, _ := os.ReadDir(cgroupRoot)
	for _, e := range entries {
		if e.Type()&fs.ModeSymlink != 0 {
			if to, err := os.Readlink(filepath.Join(cgroupRoot, e.Name())); err == nil {
				links[e.Name()] = to
			}
		}
	}
	return links
}

// cgroupProcesses lists every process in the lab's cgroups, or in one node's.
func cgroupProcesses(mounts []cgroupMount, node string) []int {
	var pids []int
	eachCgroup(mounts, node, func(dir string) {
		raw, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			return
		}
		for _, field := range strings.Fields(string(raw)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 && !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
	})
	return pids
}

// thaw lets every frozen task of the lab run. A task in a frozen v1 cgroup
// does not even die of SIGKILL.
func thaw(mounts []cgroupMount, node string) {
	eachCgroup(mounts, node, func(dir string) {
		// Only one of the files exists, and a cgroup may vanish meanwhile: what
		// stays frozen shows in the wait for its end.
		for name, value := range map[string]string{"freezer.state": "THAWED", "cgroup.freeze": "0"} {
			if path := filepath.Join(dir, name); exists(path) {
				_ = os.WriteFile(path, []byte(value), 0)
			}
		}
	})
}

// removeCgroups removes a node's cgroups or all the lab's. A cgroup stays busy
// for a moment after its last process died.
func removeCgroups(ctx context.Context, mounts []cgroupMount, node string) error {
	return poll(ctx, func() (bool, error) {
		var busy error
		var dirs []string
		eachCgroup(mounts, node, func(dir string) { dirs = append(dirs, dir) })
		slices.Reverse(dirs) // children before parents
		for _, dir := range dirs {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				busy = fmt.Errorf("removing cgroup %s: %w", dir, err)
			}
		}
		return busy == nil, busy
	})
}

// eachCgroup visits the lab's cgroups (one node's, or with "" all), parents first.
func eachCgroup(mounts []cgroupMount, node string, visit func(dir string)) {
	for _, m := range mounts {
		top := filepath.Join(m.Target, cgroupName, node)
		_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				visit(path)
			}
			return nil // gone meanwhile: nothing to visit
		})
	}
}

// poll asks done every few milliseconds until it says yes or ctx ends; then
// the last reason is the error. For conditions the kernel does not announce.
func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, reason := done()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), reason)
		case <-tick.C:
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// startTime returns a process's start in clock ticks since boot, and whether
// it still runs: a zombie does not.
func startTime(pid int) (uint64, bool) {
	if pid <= 0 {
		return 0, false
	}
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, false
	}
	// The command's name may hold spaces and parentheses: count from the last.
	_, rest, ok := strings.Cut(string(raw[max(0, strings.LastIndexByte(string(raw), ')')):]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 || fields[0] == "Z" || fields[0] == "X" {
		return 0, false
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	return start, err == nil
}
