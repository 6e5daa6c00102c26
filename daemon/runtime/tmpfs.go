package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/osthread"
)

// TmpfsMount is a tmpfs of the shard's, such as /dev and /dev/shm. CRIU packs
// each with tar and gzip inside the freeze; tranship moves their files as it
// moves the writable layer, and tells CRIU that they are provided.
type TmpfsMount struct {
	At string `json:"at"` // mount point in the shard
	// Options are those of mount(2) that give the file system its limits.
	Options string `json:"options,omitempty"`
}

var (
	// plainPath has nothing that CRIU's configuration file or mountinfo quotes.
	plainPath = regexp.MustCompile(`^(/[A-Za-z0-9_][A-Za-z0-9._-]*)+$`)
	// tmpfsOption is one of tmpfs(5) that a mount may be made with again.
	tmpfsOption = regexp.MustCompile(`^(size|nr_inodes|mode|uid|gid)=[0-9]+[kmg]?$`)
)

// tmpfsOf finds the tmpfs mounts of a specification that are in a process's
// mountinfo as runc made them: whole, and not hidden by another mount.
func tmpfsOf(spec *specs.Spec, mountinfo string) []TmpfsMount {
	type mounted struct {
		count int
		mount TmpfsMount
		whole bool
	}
	seen := map[string]*mounted{}
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		fields, fs := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || len(fs) < 3 {
			continue
		}
		m := seen[fields[4]]
		if m == nil {
			m = &mounted{}
			seen[fields[4]] = m
		}
		m.count++
		m.whole = fs[0] == "tmpfs" && fields[3] == "/"
		m.mount = TmpfsMount{At: fields[4], Options: limitsOf(fs[2])}
	}
	var out []TmpfsMount
	for _, want := range spec.Mounts {
		at := filepath.Clean(want.Destination)
		if m := seen[at]; want.Type == "tmpfs" && m != nil && m.count == 1 && m.whole && plainPath.MatchString(at) {
			out = append(out, m.mount)
		}
	}
	return out
}

func limitsOf(options string) string {
	kept := slices.DeleteFunc(strings.Split(options, ","), func(o string) bool { return !tmpfsOption.MatchString(o) })
	return strings.Join(kept, ",")
}

func (m TmpfsMount) validate(spec *specs.Spec) error {
	known := spec != nil && slices.ContainsFunc(spec.Mounts, func(s specs.Mount) bool {
		return s.Type == "tmpfs" && filepath.Clean(s.Destination) == m.At
	})
	if !known || !plainPath.MatchString(m.At) || filepath.Clean(m.At) != m.At || limitsOf(m.Options) != m.Options {
		return fmt.Errorf("%w: tmpfs %q with options %q is none of the specification's", ErrInvalid, m.At, m.Options)
	}
	return nil
}

// OpenTmpfs opens one of a process's tmpfs mounts alone, without what is mounted
// in it. The descriptor is of a detached copy of the mount; Close lets go of it.
func OpenTmpfs(pid uint32, at string) (*os.File, error) {
	fd := -1
	// A mount can be copied only from inside its namespace.
	err := osthread.Do(func() error {
		ns, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(ns)
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("setns: %w", err)
		}
		fd, err = unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open tmpfs %s of process %d: %w", at, pid, err)
	}
	return os.NewFile(uintptr(fd), at), nil
}
