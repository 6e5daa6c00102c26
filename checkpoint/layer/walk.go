package layer

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// rootDir is the upper directory. All access goes through its descriptor, one
// name at a time and never through a symbolic link: while a shard runs it can
// put a link wherever a directory was, and what is read here is sent away.
type rootDir struct {
	fd   int
	dev  uint64
	path string
}

func openRoot(path string) (*rootDir, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open layer %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("stat layer %s: %w", path, err)
	}
	return &rootDir{fd: fd, dev: uint64(st.Dev), path: path}, nil //nolint:unconvert // width differs by platform
}

func (r *rootDir) Close() { unix.Close(r.fd) }

// tree is the outcome of a walk.
type tree struct {
	root     *node
	files    int
	unsteady int
}

// walker reads a tree with lstat alone; several directories at a time, because
// this is what the freeze waits for.
type walker struct {
	root     *rootDir
	frozen   bool
	group    *errgroup.Group
	ctx      context.Context
	files    atomic.Int64
	unsteady atomic.Int64
}

func walk(ctx context.Context, root *rootDir, frozen bool) (*tree, error) {
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(max(2, runtime.GOMAXPROCS(0)))
	w := &walker{root: root, frozen: frozen, group: group, ctx: gctx}
	top := &node{}
	var st unix.Stat_t
	if err := unix.Fstat(root.fd, &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", root.path, err)
	}
	top.setStat(&st)
	// A directory opened here and not the root's descriptor: reading moves its offset.
	fd, err := openDirAt(root.fd, ".")
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root.path, err)
	}
	w.files.Store(1)
	group.Go(func() error { return w.dir(fd, top, 0, 0) })
	if err := group.Wait(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return nil, cause
		}
		return nil, err
	}
	return &tree{root: top, files: int(w.files.Load()), unsteady: int(w.unsteady.Load())}, nil
}

// dir reads the directory n, which it closes, and all below it.
func (w *walker) dir(fd int, n *node, depth, length int) error {
	defer unix.Close(fd)
	if err := w.ctx.Err(); err != nil {
		return err
	}
	if depth > maxDepth || length > maxPath {
		return fmt.Errorf("%.80q…: deeper than %d directories or %d bytes", n.path(), maxDepth, maxPath)
	}
	names, err := readNames(fd)
	if err != nil {
		return fmt.Errorf("read directory %q: %w", n.path(), err)
	}
	slab := make([]node, len(names))
	n.children = make([]*node, 0, len(names))
	var st unix.Stat_t // one for all: it goes to the heap
	for i, name := range names {
		err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if gone(err) {
			if err := w.unsteadyAt(n.path() + "/" + name); err != nil {
				return err
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("stat %q in %q: %w", name, n.path(), err)
		}
		if uint64(st.Dev) != w.root.dev { //nolint:unconvert // width differs by platform
			return fmt.Errorf("%q in %q is on another file system", name, n.path())
		}
		c := &slab[i]
		c.name, c.parent = name, n
		c.setStat(&st)
		n.children = append(n.children, c)
	}
	w.files.Add(int64(len(n.children)))

	kept := n.children[:0]
	for _, c := range n.children {
		if c.dir() {
			sub, err := openDirAt(fd, c.name)
			if gone(err) {
				if err := w.unsteadyAt(c.path()); err != nil {
					return err
				}
				w.files.Add(-1)
				continue
			}
			if err != nil {
				return fmt.Errorf("open directory %q: %w", c.path(), err)
			}
			down := func() error { return w.dir(sub, c, depth+1, length+len(c.name)+1) }
			if !w.group.TryGo(down) {
				if err := down(); err != nil {
					return err
				}
			}
		}
		kept = append(kept, c)
	}
	n.children = kept
	return nil
}

func (w *walker) unsteadyAt(path string) error {
	if w.frozen {
		return fmt.Errorf("%q: %w", path, ErrChanging)
	}
	w.unsteady.Add(1)
	return nil
}

// gone says that a name led nowhere any more, or to another type of file than
// a moment before.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ESTALE)
}

// openDirAt opens one name below a directory, without following links and
// without moving its access time where that is allowed.
func openDirAt(dirfd int, name string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(dirfd, name, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		fd, err = unix.Openat(dirfd, name, flags, 0)
	}
	return fd, err
}

// readNames returns the names in a directory, sorted, each once: a directory
// that changes while it is read may show one twice.
func readNames(fd int) ([]string, error) {
	buf := direntBuffers.Get().(*[32 << 10]byte)
	defer direntBuffers.Put(buf)
	var names []string
	for {
		n, err := unix.ReadDirent(fd, buf[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.ENOENT) {
			break // removed after it was opened: empty
		}
		if err != nil {
			return nil, err
		}
		if n <= 0 {
			break
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

var direntBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// removeAt removes a name and, if it is a directory, all below it. It may be
// gone already.
func removeAt(parent int, name string, depth int) error {
	err := unix.Unlinkat(parent, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) {
		return fmt.Errorf("unlink %q: %w", name, err)
	}
	if depth > maxDepth {
		return fmt.Errorf("%q: deeper than %d directories", name, maxDepth)
	}
	fd, err := openDirAt(parent, name)
	if err != nil {
		return fmt.Errorf("open directory %q: %w", name, err)
	}
	defer unix.Close(fd)
	names, err := readNames(fd)
	if err != nil {
		return fmt.Errorf("read directory %q: %w", name, err)
	}
	for _, below := range names {
		if err := removeAt(fd, below, depth+1); err != nil {
			return err
		}
	}
	if err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR); err != nil {
		return fmt.Errorf("remove directory %q: %w", name, err)
	}
	return nil
}

// dirs opens directories below a root by path. It holds the descriptors of the
// last path, because neighbours are asked for after each other.
type dirs struct {
	root  *rootDir
	names []string
	fds   []int
}

func newDirs(root *rootDir) *dirs { return &dirs{root: root} }

// open returns the directory at path, "" for the root. The descriptor stays
// the owner's and is valid until the next call.
func (d *dirs) open(path string) (int, error) {
	fd, depth := d.root.fd, 0
	if path != "" {
		for name := range strings.SplitSeq(path, "/") {
			if depth < len(d.names) && d.names[depth] == name {
				fd = d.fds[depth]
				depth++
				continue
			}
			d.cut(depth)
			next, err := openDirAt(fd, name)
			if err != nil {
				return -1, err
			}
			d.names, d.fds = append(d.names, name), append(d.fds, next)
			fd = next
			depth++
		}
	}
	d.cut(depth)
	return fd, nil
}

// parent opens the directory that holds path and returns path's last name.
func (d *dirs) parent(path string) (int, string, error) {
	dir, name := split(path)
	fd, err := d.open(dir)
	return fd, name, err
}

func (d *dirs) cut(depth int) {
	for _, fd := range d.fds[depth:] {
		unix.Close(fd)
	}
	d.names, d.fds = d.names[:depth], d.fds[:depth]
}

func (d *dirs) close() { d.cut(0) }

func split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path
	}
	return path[:i], path[i+1:]
}
