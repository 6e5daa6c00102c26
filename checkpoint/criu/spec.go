package criu

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ExternalsOf derives, from the OCI specification that a container was made
// with, what runc provides again at restore and CRIU must not dump: bind
// mounts, masked files, device nodes, cgroup v1 mounts and the network
// namespace. It mirrors what runc's own checkpoint tells CRIU
// (libcontainer/criu_linux.go), because stock runc restores what was dumped
// here. root is the container's root filesystem as seen through the init
// process, /proc/PID/root.
func ExternalsOf(spec *specs.Spec, root string) (mounts []ExternalMount, external []string, err error) {
	bind := func(at string) { mounts = append(mounts, ExternalMount{At: path.Clean(at), Key: path.Clean(at)}) }
	cgroupns := false
	if spec.Linux != nil {
		for _, ns := range spec.Linux.Namespaces {
			switch ns.Type {
			case specs.CgroupNamespace:
				cgroupns = true
			case specs.NetworkNamespace, specs.PIDNamespace:
				if ns.Path == "" && ns.Type == specs.PIDNamespace {
					continue
				}
				if ns.Path == "" {
					// runc never lets CRIU restore a network namespace's
					// content, loopback included: it is always made beforehand.
					ns.Path = filepath.Join(filepath.Dir(root), "ns/net")
				}
				key, err := externalNamespace(ns)
				if err != nil {
					return nil, nil, err
				}
				external = append(external, key)
			}
		}
	}
	for _, m := range spec.Mounts {
		switch {
		case m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind"):
			bind(m.Destination)
		case m.Type == "cgroup" && !cgroupns && !cgroupUnified():
			binds, err := cgroupBinds(m.Destination)
			if err != nil {
				return nil, nil, err
			}
			for _, b := range binds {
				bind(b)
			}
		}
	}
	if spec.Linux != nil {
		for _, p := range spec.Linux.MaskedPaths {
			fi, err := os.Stat(filepath.Join(root, p))
			if err == nil && !fi.IsDir() {
				mounts = append(mounts, ExternalMount{At: p, Key: maskKey})
			}
		}
	}
	slices.SortFunc(mounts, func(a, b ExternalMount) int { return strings.Compare(a.At, b.At) })
	return slices.Compact(mounts), external, nil
}

// ExternalMount is a mount that CRIU leaves to the restoring runtime. At is the
// mount point in the shard; Key is the name by which the runtime offers it.
type ExternalMount struct{ At, Key string }

// maskKey is runc's one key for all masked files.
const maskKey = "/dev/null"

// externalNamespace is CRIU's name for a namespace that outlives the shard; the
// key after the colon is the one that runc restores with.
func externalNamespace(ns specs.LinuxNamespace) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(ns.Path, &st); err != nil {
		return "", fmt.Errorf("%s namespace %s: %w", ns.Type, ns.Path, err)
	}
	switch ns.Type {
	case specs.NetworkNamespace:
		return fmt.Sprintf("net[%d]:extRootNetNS", st.Ino), nil
	default:
		return fmt.Sprintf("pid[%d]:extRootPidNS", st.Ino), nil
	}
}

func cgroupUnified() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// cgroupBinds lists the mount points that runc makes for a v1 "cgroup" mount:
// one bind a hierarchy, named like the hierarchy's own mount point.
func cgroupBinds(destination string) ([]string, error) {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cgroup hierarchies: %w", err)
	}
	var binds []string
	for line := range strings.Lines(string(raw)) {
		before, after, ok := strings.Cut(line, " - ")
		if !ok || !strings.HasPrefix(after, "cgroup ") {
			continue
		}
		fields := strings.Fields(before)
		if len(fields) > 4 {
			binds = append(binds, path.Join(destination, path.Base(fields[4])))
		}
	}
	return binds, nil
}
