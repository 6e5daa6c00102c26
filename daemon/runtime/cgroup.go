package runtime

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Cgroup is where the kernel keeps a running shard. It stays valid while the
// shard's init lives.
type Cgroup struct {
	// Dir is the directory whose freezing stops the shard: of the v1 freezer
	// hierarchy where there is one (runc uses it then), else of v2.
	Dir string
	// V2 says which of the two Dir is.
	V2 bool
	// Memory is the directory with the memory counters, "" without any.
	Memory   string
	memoryV2 bool
	// CPU is the directory with the CPU limit, "" without any.
	CPU     string
	cpuV2   bool
	cpuacct string // v1 only: where CPU time is counted
}

// Cgroup finds the cgroup of a running (or frozen) shard.
func (r *Runtime) Cgroup(ctx context.Context, namespace, name string) (Cgroup, error) {
	_, _, t, err := r.task(ctx, namespace, name)
	if err != nil {
		return Cgroup{}, err
	}
	if t.Pid() == 0 {
		return Cgroup{}, fmt.Errorf("%w: %s in namespace %s", ErrNotRunning, name, namespace)
	}
	return openCgroup(int(t.Pid()))
}

func openCgroup(pid int) (Cgroup, error) {
	membership, err := os.Open(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return Cgroup{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	defer membership.Close()
	paths, err := parseMembership(membership)
	if err != nil {
		return Cgroup{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	mountinfo, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return Cgroup{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	defer mountinfo.Close()
	mounts, err := parseCgroupMounts(mountinfo)
	if err != nil {
		return Cgroup{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	var cg Cgroup
	if cg.Dir, cg.V2, err = locate("freezer", paths, mounts); err != nil {
		return Cgroup{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	if cg.Memory, cg.memoryV2, err = locate("memory", paths, mounts); err != nil {
		cg.Memory = "" // no accounting is no reason not to run
	}
	if cg.CPU, cg.cpuV2, err = locate("cpu", paths, mounts); err != nil {
		cg.CPU = "" // nor is a shard that cannot be throttled
	} else if !cg.cpuV2 {
		if cg.cpuacct, _, err = locate("cpuacct", paths, mounts); err != nil {
			cg.CPU = ""
		}
	}
	return cg, nil
}

// locate prefers the v1 hierarchy of a controller over v2, as runc does.
func locate(controller string, paths map[string]string, mounts []cgroupMount) (dir string, v2 bool, err error) {
	for _, key := range []string{controller, ""} {
		path, ok := paths[key]
		if !ok {
			continue
		}
		for _, m := range mounts {
			if !slices.Contains(m.controllers, key) {
				continue
			}
			// The kernel writes /.. for what is outside the reader's cgroup
			// namespace, which filepath would take for the root.
			rel, err := filepath.Rel(m.root, path)
			if err != nil || rel == ".." || strings.HasPrefix(rel, "../") || strings.HasPrefix(path, "/..") {
				continue
			}
			if rel == "." {
				// Freezing the root would freeze the daemon with it; the kernel
				// has no such file, but say so before anything tries.
				return "", false, fmt.Errorf("the process is in the root of the %q hierarchy", controller)
			}
			return filepath.Join(m.point, rel), key == "", nil
		}
	}
	return "", false, fmt.Errorf("no mounted hierarchy with the %s controller", controller)
}

// parseMembership reads /proc/PID/cgroup (cgroups(7)): lines of id:controllers:path.
// The key of the v2 hierarchy is "".
func parseMembership(r io.Reader) (map[string]string, error) {
	paths := map[string]string{}
	scan := bufio.NewScanner(r)
	for scan.Scan() {
		parts := strings.SplitN(scan.Text(), ":", 3)
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			return nil, fmt.Errorf("line %q", scan.Text())
		}
		if parts[0] == "0" {
			paths[""] = parts[2]
			continue
		}
		for _, controller := range strings.Split(parts[1], ",") {
			paths[controller] = parts[2]
		}
	}
	return paths, scan.Err()
}

type cgroupMount struct {
	root, point string
	// controllers of the hierarchy; {""} for v2.
	controllers []string
}

// parseCgroupMounts reads the cgroup mounts out of /proc/PID/mountinfo
// (proc_pid_mountinfo(5)).
func parseCgroupMounts(r io.Reader) ([]cgroupMount, error) {
	var mounts []cgroupMount
	scan := bufio.NewScanner(r)
	scan.Buffer(nil, 1<<20) // overlay options make long lines
	for scan.Scan() {
		before, after, ok := strings.Cut(scan.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 2 {
			return nil, fmt.Errorf("mountinfo line %q", scan.Text())
		}
		m := cgroupMount{root: unescapeMount(left[3]), point: unescapeMount(left[4])}
		switch {
		case right[0] == "cgroup2":
			m.controllers = []string{""}
		case right[0] == "cgroup" && len(right) > 2:
			m.controllers = strings.Split(right[2], ",")
		default:
			continue
		}
		mounts = append(mounts, m)
	}
	return mounts, scan.Err()
}

// unescapeMount undoes the octal escapes of space, tab, newline and backslash.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// MemoryCurrent is what the shard uses now, page cache included; 0 without accounting.
func (c Cgroup) MemoryCurrent() (int64, error) {
	if c.Memory == "" {
		return 0, nil
	}
	file := "memory.usage_in_bytes"
	if c.memoryV2 {
		file = "memory.current"
	}
	raw, err := os.ReadFile(filepath.Join(c.Memory, file))
	if errors.Is(err, os.ErrNotExist) && c.memoryV2 {
		return 0, nil // the controller is not enabled in this subtree
	}
	if err != nil {
		return 0, fmt.Errorf("memory in use: %w", err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("memory in use: %w", err)
	}
	return n, nil
}

// Processes lists the host pids of all processes (thread groups) in the cgroup
// and in the cgroups that the shard made below it.
func (c Cgroup) Processes() ([]int, error) {
	var pids []int
	err := filepath.WalkDir(c.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			// A nested cgroup may go away under the walk; the top may not.
			if errors.Is(err, os.ErrNotExist) && path != c.Dir {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		raw, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if errors.Is(err, syscall.ENODEV) || errors.Is(err, os.ErrNotExist) && path != c.Dir {
			return nil
		}
		if errors.Is(err, syscall.EOPNOTSUPP) {
			return fmt.Errorf("%s is a threaded cgroup, whose processes cannot be listed: %w", path, err)
		}
		if err != nil {
			return err
		}
		for _, field := range strings.Fields(string(raw)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return err
			}
			if pid > 0 { // 0: a process of another pid namespace than ours
				pids = append(pids, pid)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("processes of %s: %w", c.Dir, err)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// Kill ends every process without letting one more instruction of theirs run,
// frozen or not: the signal waits when the thaw comes.
func (c Cgroup) Kill(ctx context.Context) error {
	if c.V2 {
		err := os.WriteFile(filepath.Join(c.Dir, "cgroup.kill"), []byte("1"), 0)
		if err == nil || !errors.Is(err, os.ErrNotExist) {
			return err // the file exists since Linux 5.14, and also kills frozen tasks
		}
	}
	pids, err := c.Processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("kill %d: %w", pid, err)
		}
	}
	return c.Freezer().Thaw(ctx)
}
