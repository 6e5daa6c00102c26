package leak

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// containerdSocket is where every host's containerd listens.
const containerdSocket = "/run/containerd/containerd.sock"

// containerd lists what containerd has, in all of its namespaces, by ctr: it is
// another client than transhipd. A host without containerd has nothing.
func (s *Snapshot) containerd(ctx context.Context) error {
	if _, err := os.Stat(containerdSocket); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	spaces, err := ctr(ctx, "namespaces", "list", "--quiet")
	if err != nil {
		return err
	}
	for _, ns := range spaces {
		for _, q := range []struct {
			cat  Category
			args []string
			// key of the fields of a line; the others take the first field.
			key func(fields []string) string
		}{
			{Container, []string{"containers", "list", "--quiet"}, nil},
			{Task, []string{"tasks", "list"}, func(f []string) string {
				if len(f) > 2 {
					return f[0] + " " + strings.ToLower(f[2]) // id, pid, status
				}
				return f[0]
			}},
			{Snap, []string{"snapshots", "list"}, func(f []string) string {
				// key [parent] kind: an active one is a container's own layer
				return f[len(f)-1] + " " + withoutNumbers(f[0])
			}},
			{Lease, []string{"leases", "list", "--quiet"}, func(f []string) string { return withoutNumbers(f[0]) }},
			{Image, []string{"images", "list", "--quiet"}, nil},
			{Content, []string{"content", "list", "--quiet"}, nil},
		} {
			lines, err := ctr(ctx, append([]string{"--namespace", ns}, q.args...)...)
			if err != nil {
				return err
			}
			for i, line := range lines {
				fields := strings.Fields(line)
				if len(fields) == 0 || i == 0 && (q.cat == Task || q.cat == Snap) {
					continue // the heading
				}
				key := fields[0]
				if q.key != nil {
					key = q.key(fields)
				}
				s.add(q.cat, key+" in "+ns, line)
			}
		}
	}
	return nil
}

func ctr(ctx context.Context, args ...string) ([]string, error) {
	cmd := exec.CommandContext(ctx, "ctr", append([]string{"--address", containerdSocket}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		var ended *exec.ExitError
		if errors.As(err, &ended) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(ended.Stderr)))
		}
		return nil, fmt.Errorf("ctr %s: %w", strings.Join(args, " "), err)
	}
	text := strings.TrimRight(string(out), "\n")
	if text == "" {
		return nil, nil
	}
	return strings.Split(text, "\n"), nil
}

// places are where files may be left, and how far down they are looked at: a
// bundle's root file system or an image directory is one thing, not thousands.
var places = []struct {
	dir   string
	depth int
}{
	{"run/tranship", 4},
	{"var/lib/tranship", 4},
	{"run/containerd/io.containerd.runtime.v2.task", 2},
	{"run/containerd/io.containerd.runtime.v1.linux", 2},
	{"run/containerd/runc", 2},
	{"run/containerd/fifo", 1},
	{"run/runc", 2},
	{"run/cni", 3},
	{"run/netns", 1},
	{"var/lib/cni", 3},
	{"var/lib/containerd/io.containerd.runtime.v2.task", 2},
	{"var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots", 1},
	{"var/lib/containerd/tmpmounts", 1},
	{"dev/shm", 2},
	// runc and CRIU work here when nobody says otherwise.
	{"tmp", 1},
}

// tmpOurs: /tmp is everybody's, a lab host's is the machine's, and mounts below
// it appear in every host. Only what containerd, runc, CRIU and transhipd make
// counts there.
var tmpOurs = []string{".criu", "criu", "runc", "containerd-", "ctd-", "transhipd"}

func (s *Snapshot) files(root string) error {
	for _, p := range places {
		base := filepath.Join(root, p.dir)
		err := filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			}
			rel := strings.TrimPrefix(strings.TrimPrefix(path, base), "/")
			if p.dir == "tmp" && rel != "" && !ours(rel) {
				if d.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			at := strings.TrimPrefix(path, strings.TrimSuffix(root, "/"))
			key := at
			if strings.HasSuffix(p.dir, "/snapshots") && rel != "" {
				key = filepath.Dir(at) + "/N" // numbers count up for ever
			}
			if d.IsDir() {
				key += "/"
			}
			s.add(File, key, at)
			if d.IsDir() && rel != "" && strings.Count(rel, "/")+1 >= p.depth {
				return fs.SkipDir
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// oursBelowTmp is false for what others keep in /tmp, true for all other paths.
func oursBelowTmp(path string) bool {
	rel, below := strings.CutPrefix(path, "/tmp/")
	return !below || ours(rel)
}

func ours(name string) bool {
	for _, prefix := range tmpOurs {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}
