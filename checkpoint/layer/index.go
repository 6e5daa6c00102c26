package layer

import (
	"strings"
	"time"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// Index is what the destination holds after a pass: every path with the
// identity that its inode had on the source when it was read, and hashes of the
// content that was sent. It is immutable once Send has returned it.
type Index struct {
	id         passID
	root       *node
	files      int
	nextObject object
	// suspect: the clock stepped back during the pass, so that a ctime may have
	// been given twice. The next pass compares everything.
	suspect bool
}

// Files returns the number of paths in the layer.
func (x *Index) Files() int { return x.files }

// Bytes returns the size of all regular files, holes included, each inode once.
func (x *Index) Bytes() checkpoint.Bytes {
	var sum int64
	seen := map[uint64]bool{}
	x.root.each(func(n *node) {
		if !n.regular() || n.nlink > 1 && seen[n.ino] {
			return
		}
		seen[n.ino] = n.nlink > 1
		sum += n.size
	})
	return checkpoint.Bytes(sum)
}

// object numbers the inodes at the destination. Two paths with one object are
// hard links there; inode numbers of the source cannot say this, because they
// are used again.
type object uint64

// chunk is the content of one chunk that is not a hole; at is its number.
type chunk struct {
	at  int64
	sum xxh3.Uint128
}

// node is one path. Everything above the line is what lstat says.
type node struct {
	name     string
	parent   *node
	children []*node // of a directory, sorted by name

	mode     uint32
	uid, gid uint32
	nlink    uint64
	ino      uint64
	rdev     uint64
	size     int64
	mtime    stamp
	ctime    stamp

	// ---- what was sent
	object object
	xattrs xxh3.Uint128 // hash of names and values
	chunks []chunk      // of a regular file, in order, holes left out
	// settled: ctime was old enough when the content was read that any later
	// change gives another one.
	settled bool
	// mapped: was in AlwaysCompare.
	mapped bool
	// linked: shares its object with other paths.
	linked bool

	// ---- used while planning and sending, nil in a sealed index
	work *work
}

func (n *node) kind() uint32  { return n.mode & unix.S_IFMT }
func (n *node) dir() bool     { return n.kind() == unix.S_IFDIR }
func (n *node) regular() bool { return n.kind() == unix.S_IFREG }

// whiteout says that the node is overlayfs's mark for "removed from below".
// The kernel links all whiteouts of a layer to one inode, whose times and link
// count then say nothing about any one of them; here each is its own, and once
// sent it is never compared: no process of the shard can reach it.
func (n *node) whiteout() bool { return n.kind() == unix.S_IFCHR && n.rdev == 0 }

func (n *node) path() string {
	if n.parent == nil {
		return ""
	}
	size := -1
	for m := n; m.parent != nil; m = m.parent {
		size += len(m.name) + 1
	}
	b := make([]byte, size)
	for m := n; m.parent != nil; m = m.parent {
		size -= len(m.name)
		copy(b[size:], m.name)
		if size > 0 {
			size--
			b[size] = '/'
		}
	}
	return string(b)
}

// each calls f for n and all below it, parents first.
func (n *node) each(f func(*node)) {
	f(n)
	for _, c := range n.children {
		c.each(f)
	}
}

// regularFiles are the paths of all regular files.
func (x *Index) regularFiles() []string {
	var paths []string
	x.root.each(func(n *node) {
		if n.regular() {
			paths = append(paths, n.path())
		}
	})
	return paths
}

// lookup finds a path below n, nil if it is not there.
func (n *node) lookup(path string) *node {
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if name == "" || name == "." {
			continue
		}
		i, ok := n.child(name)
		if !ok {
			return nil
		}
		n = n.children[i]
	}
	return n
}

func (n *node) child(name string) (int, bool) {
	lo, hi := 0, len(n.children)
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if n.children[mid].name < name {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo, lo < len(n.children) && n.children[lo].name == name
}

// sameStat says that nothing about the inode moved since old was recorded.
// ctime cannot be set, so it stands for everything that lstat does not show;
// the other fields are there because they cost nothing.
func (n *node) sameStat(old *node) bool {
	return n.ino == old.ino && n.ctime == old.ctime && n.sameMeta(old) && n.nlink == old.nlink
}

// sameMeta compares what an entry frame carries, but for attributes and targets.
func (n *node) sameMeta(old *node) bool {
	return n.mode == old.mode && n.uid == old.uid && n.gid == old.gid &&
		n.rdev == old.rdev && n.mtime == old.mtime && (n.size == old.size || n.dir())
}

// record takes over all that from says about an inode and what was sent of it;
// name and place in the tree stay.
func (n *node) record(from *node) {
	name, parent, children, work := n.name, n.parent, n.children, n.work
	*n = *from
	n.name, n.parent, n.children, n.work = name, parent, children, work
}

func (n *node) setStat(st *unix.Stat_t) {
	n.mode, n.uid, n.gid = st.Mode, st.Uid, st.Gid
	n.nlink, n.ino, n.rdev, n.size = uint64(st.Nlink), st.Ino, uint64(st.Rdev), st.Size //nolint:unconvert // widths differ by platform
	n.mtime = stamp{int64(st.Mtim.Sec), int64(st.Mtim.Nsec)}                            //nolint:unconvert
	n.ctime = stamp{int64(st.Ctim.Sec), int64(st.Ctim.Nsec)}                            //nolint:unconvert
}

// seal drops what was not sent and all that only served this pass.
func (x *Index) seal() {
	x.files = x.root.seal()
}

func (n *node) seal() int {
	n.work = nil
	files := 1
	kept := n.children[:0]
	for _, c := range n.children {
		if c.work != nil && c.work.dropped {
			continue
		}
		files += c.seal()
		kept = append(kept, c)
	}
	clear(n.children[len(kept):])
	n.children = kept
	return files
}

const (
	// tick is twice the coarsest clock with which kernels stamp inodes (HZ=100).
	// A file whose ctime is less than this before the pass began may change
	// again and keep it.
	tick = 20 * time.Millisecond

	// ioWindow is for larger files: a direct write moves ctime when it is
	// submitted and the content when the disk has answered, and nothing
	// outside can wait for it. Buffered writes need no such window: reading
	// starts with calls that wait for the inode's lock.
	ioWindow     = time.Second
	ioWindowSize = 64 << 10

	// wholeSecond is the resolution of file systems that stamp with seconds
	// (ext4 with 128-byte inodes).
	wholeSecond = time.Second
)

// settledBefore returns the test whether a ctime is old enough, for a pass that
// began, or whose list of mappings was begun, at these times.
func settledBefore(began, listed time.Time) func(*node) bool {
	limit := began
	if !listed.IsZero() && listed.Before(limit) {
		limit = listed
	}
	return func(n *node) bool {
		window := tick
		if n.regular() && n.size >= ioWindowSize {
			window = ioWindow
		}
		if n.ctime.Nsec == 0 {
			window += wholeSecond
		}
		before := limit.Add(-window)
		return n.ctime.less(stamp{before.Unix(), int64(before.Nanosecond())})
	}
}

// clockStepped says that the wall clock lost time against the monotonic one
// since began, by more than slewing explains (0.05 %).
func clockStepped(began time.Time) bool {
	now := time.Now()
	monotonic, wall := now.Sub(began), now.Round(0).Sub(began.Round(0))
	return wall < monotonic-monotonic/1000-5*time.Millisecond
}
