package layer

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// sender writes one pass and fills the new nodes with what the destination
// then holds. Whatever goes over the wire is recorded as it was sent, not as
// the file was before or after; so a file that changes while it is read makes
// a strange file at the destination for a while, but never a wrong index.
type sender struct {
	root    *rootDir
	dirs    *dirs
	out     *frameWriter
	frozen  bool
	settled func(*node) bool
	stats   *Stats
	buf     []byte // one chunk
}

func (s *sender) stream(ctx context.Context, h header, root *node, todo todo) error {
	if err := s.out.header(h); err != nil {
		return err
	}
	for _, path := range todo.removals {
		if err := s.out.removal(removal{Path: path}); err != nil {
			return err
		}
	}
	s.stats.Removals = len(todo.removals)
	if err := s.node(ctx, root); err != nil {
		return err
	}
	for _, n := range todo.links {
		if err := s.link(n); err != nil {
			return err
		}
	}
	return s.out.finish()
}

// node sends n and all below it, parents first.
func (s *sender) node(ctx context.Context, n *node) error {
	w := n.work
	switch {
	case n.dir():
		if w.same && !w.touched {
			n.record(w.old)
		} else if err := s.dir(n); err != nil {
			return err
		}
		if w.dropped {
			n.each(func(c *node) { c.work.dropped = true })
			return nil
		}
		for _, c := range n.children {
			if err := s.node(ctx, c); err != nil {
				return err
			}
		}
		return nil
	case w.leader != n:
		// Linked at the destination already, or linked in the end.
		if w.old != nil {
			if w.leader.work.skipped {
				return s.skip(n)
			}
			n.record(w.leader)
		}
		return nil
	case w.same:
		mapped := n.mapped
		n.record(w.old)
		n.mapped = mapped
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if n.regular() {
		return s.file(ctx, n)
	}
	return s.special(n)
}

// skip leaves n to the next pass: what the destination holds stays there.
func (s *sender) skip(n *node) error {
	if s.frozen {
		return fmt.Errorf("%q: %w", n.path(), ErrChanging)
	}
	s.stats.Unsteady++
	if n.work.old == nil {
		n.work.dropped = true
		return nil
	}
	n.record(n.work.old)
	n.work.skipped = true
	return nil
}

func (s *sender) dir(n *node) error {
	path := n.path()
	fd := s.root.fd
	if n.parent != nil {
		var err error
		if fd, err = s.dirs.open(path); gone(err) {
			return s.skip(n)
		} else if err != nil {
			return fmt.Errorf("open directory %q: %w", path, err)
		}
	}
	e, err := s.stat(n, fd, path)
	if err != nil {
		return err
	}
	if e.Xattrs, err = readXattrs(fdXattrs(fd), n.parent == nil); err != nil {
		return fmt.Errorf("attributes of %q: %w", path, err)
	}
	n.xattrs = hashXattrs(e.Xattrs)
	if old := n.work.old; old != nil && !n.work.touched && n.sameMeta(old) && n.xattrs == old.xattrs {
		return nil
	}
	return s.entry(e)
}

// stat reads n's inode again, now that it is held open, and begins its entry.
// The times come first: whatever changes after them shows in the next pass.
func (s *sender) stat(n *node, fd int, path string) (*entry, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("stat %q: %w", path, err)
	}
	n.setStat(&st)
	n.settled = s.settled(n)
	e := &entry{
		Path: path, Fresh: n.work.old == nil && !n.dir(),
		Mode: n.mode, UID: n.uid, GID: n.gid,
		Atime: stamp{int64(st.Atim.Sec), int64(st.Atim.Nsec)}, //nolint:unconvert // widths differ by platform
		Mtime: n.mtime,
	}
	switch n.kind() {
	case unix.S_IFREG:
		e.Size = n.size
	case unix.S_IFCHR, unix.S_IFBLK:
		e.Rdev = n.rdev
	}
	return e, nil
}

// open opens what was seen at n's path without opening a device or waiting at
// a fifo. It returns -1 if something else is there by now.
func (s *sender) open(n *node, path string) (int, error) {
	parent, name, err := s.dirs.parent(path)
	if gone(err) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open directory of %q: %w", path, err)
	}
	fd, err := unix.Openat(parent, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if gone(err) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open %q: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("stat %q: %w", path, err)
	}
	if st.Ino != n.ino || st.Mode&unix.S_IFMT != n.kind() {
		unix.Close(fd)
		return -1, nil
	}
	return fd, nil
}

// special sends what has no content: symbolic links, fifos, sockets, devices
// and whiteouts.
func (s *sender) special(n *node) error {
	path := n.path()
	fd, err := s.open(n, path)
	if err != nil {
		return err
	}
	if fd < 0 {
		return s.skip(n)
	}
	defer unix.Close(fd)
	e, err := s.stat(n, fd, path)
	if err != nil {
		return err
	}
	if n.kind() == unix.S_IFLNK {
		buf := make([]byte, maxTarget+1)
		got, err := unix.Readlinkat(fd, "", buf)
		if err != nil {
			return fmt.Errorf("read link %q: %w", path, err)
		}
		e.Target = string(buf[:got])
	}
	if e.Xattrs, err = readXattrs(pathXattrs(procPath(fd)), false); err != nil {
		return fmt.Errorf("attributes of %q: %w", path, err)
	}
	n.xattrs = hashXattrs(e.Xattrs)
	return s.entry(e)
}

// file compares a regular file with what was sent of it, and sends the
// difference: nothing, its metadata, some chunks or all.
func (s *sender) file(ctx context.Context, n *node) error {
	path := n.path()
	handle, err := s.open(n, path)
	if err != nil {
		return err
	}
	if handle < 0 {
		return s.skip(n)
	}
	defer unix.Close(handle)
	fd, err := reopen(handle)
	if err != nil {
		return fmt.Errorf("open %q: %w", path, err)
	}
	defer unix.Close(fd)

	// A write(2) moves the times when it begins and the content until it
	// returns, all under the inode's lock. These two wait for that lock (the
	// seek on ext4, btrfs and tmpfs, the read on xfs): a write that began
	// before is then complete, and one that begins after has a later ctime.
	unix.Seek(fd, 0, unix.SEEK_DATA) //nolint:errcheck // ENXIO is fine, and what else there is will be seen below
	unix.Pread(fd, s.buf[:1], 0)     //nolint:errcheck

	e, err := s.stat(n, fd, path)
	if err != nil {
		return err
	}
	if e.Xattrs, err = readXattrs(fdXattrs(fd), false); err != nil {
		return fmt.Errorf("attributes of %q: %w", path, err)
	}
	n.xattrs = hashXattrs(e.Xattrs)
	s.stats.Compared++

	f := &fileSender{sender: s, fd: fd, node: n, entry: e}
	if old := n.work.old; old != nil {
		f.old = old.chunks
	}
	if err := f.content(ctx); err != nil {
		return fmt.Errorf("content of %q: %w", path, err)
	}
	if old := n.work.old; old == nil || !n.sameMeta(old) || n.xattrs != old.xattrs {
		if err := f.begin(); err != nil {
			return err
		}
	}
	if s.frozen {
		before := n.ctime
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("stat %q: %w", path, err)
		}
		if after := (stamp{int64(st.Ctim.Sec), int64(st.Ctim.Nsec)}); after != before || f.short { //nolint:unconvert
			return fmt.Errorf("%q: %w", path, ErrChanging)
		}
	}
	return nil
}

// link sends a further name for what its leader's entry brought.
func (s *sender) link(n *node) error {
	leader := n.work.leader
	if n.work.dropped || leader.work.dropped || leader.work.skipped {
		n.work.dropped = true // it was removed, or never there
		return nil
	}
	n.record(leader)
	s.stats.Links++
	return s.out.link(link{Path: n.path(), Leader: leader.path()})
}

func (s *sender) entry(e *entry) error {
	s.stats.Entries++
	return s.out.entry(e)
}

// fileSender sends the content of one file, chunk by chunk. Chunks without any
// data are not looked at: a hole of terabytes costs one seek.
type fileSender struct {
	*sender
	fd    int
	node  *node
	entry *entry
	old   []chunk // not yet passed
	begun bool
	short bool // the file ended before its size
	zeros zero // not yet written
}

// begin writes the entry that content belongs to, once.
func (f *fileSender) begin() error {
	if f.begun {
		return nil
	}
	f.begun = true
	return f.sender.entry(f.entry)
}

func (f *fileSender) content(ctx context.Context) error {
	size := f.node.size
	var segments []zero
	dataEnd := int64(0) // up to here there is no hole, if the position is below
	for pos := int64(0); pos < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if pos >= dataEnd {
			next, err := unix.Seek(f.fd, pos, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) || err == nil && next >= size {
				break
			}
			if err != nil {
				return fmt.Errorf("seek data: %w", err)
			}
			pos = next
		}
		at := pos / chunkSize
		start := at * chunkSize
		buf := f.buf[:min(chunkSize, size-start)]
		clear(buf)
		segments = segments[:0]
		for limit := start + int64(len(buf)); pos < limit; {
			if pos >= dataEnd {
				hole, err := unix.Seek(f.fd, pos, unix.SEEK_HOLE)
				if err != nil && !errors.Is(err, unix.ENXIO) {
					return fmt.Errorf("seek hole: %w", err)
				}
				if err != nil { // cut off behind our back
					f.short = true
					pos = limit
					break
				}
				dataEnd = hole
			}
			stop := min(dataEnd, limit)
			if stop <= pos { // punched behind our back
				stop = pos
			} else if err := f.read(buf[pos-start:stop-start], pos); err != nil {
				return err
			} else {
				segments = append(segments, zero{Off: pos, Len: stop - pos})
			}
			pos = stop
			if pos >= limit {
				break
			}
			next, err := unix.Seek(f.fd, pos, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) {
				pos = size
				break
			}
			if err != nil {
				return fmt.Errorf("seek data: %w", err)
			}
			pos, dataEnd = next, 0
		}
		if len(segments) == 0 {
			continue
		}
		if err := f.chunk(at, buf, segments); err != nil {
			return err
		}
	}
	// What is left of the old file is a hole now, or cut off.
	if err := f.passOld((size + chunkSize - 1) / chunkSize); err != nil {
		return err
	}
	return f.flushZeros()
}

// read fills p from the file. What is no longer there reads as zero, here as at
// the destination, whose file gets the size of the entry.
func (f *fileSender) read(p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pread(f.fd, p, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		if n == 0 {
			f.short = true
			return nil
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// chunk compares one chunk with what was sent and sends its segments if it
// differs; what lies between them becomes a hole.
func (f *fileSender) chunk(at int64, buf []byte, segments []zero) error {
	now := chunk{at: at, sum: xxh3.Hash128(buf)}
	f.node.chunks = append(f.node.chunks, now)
	if err := f.passOld(at); err != nil {
		return err
	}
	if len(f.old) > 0 && f.old[0].at == at {
		same := f.old[0].sum == now.sum
		f.old = f.old[1:]
		if same {
			return nil
		}
	}
	start := at * chunkSize
	pos := start
	for _, seg := range segments {
		if err := f.hole(pos, seg.Off-pos); err != nil {
			return err
		}
		if err := f.flushZeros(); err != nil {
			return err
		}
		if err := f.begin(); err != nil {
			return err
		}
		if err := f.out.data(data{Off: seg.Off, Bytes: buf[seg.Off-start : seg.Off-start+seg.Len]}); err != nil {
			return err
		}
		f.stats.Data += checkpoint.Bytes(seg.Len)
		pos = seg.Off + seg.Len
	}
	return f.hole(pos, start+int64(len(buf))-pos)
}

// passOld turns the old chunks before the given number into holes.
func (f *fileSender) passOld(before int64) error {
	for len(f.old) > 0 && f.old[0].at < before {
		start := f.old[0].at * chunkSize
		f.old = f.old[1:]
		if err := f.hole(start, min(chunkSize, f.node.size-start)); err != nil {
			return err
		}
	}
	return nil
}

// hole collects neighbouring holes into one frame. A fresh file is a hole from
// the start.
func (f *fileSender) hole(off, n int64) error {
	if n <= 0 || f.entry.Fresh {
		return nil
	}
	if f.zeros.Len > 0 && f.zeros.Off+f.zeros.Len == off {
		f.zeros.Len += n
		return nil
	}
	if err := f.flushZeros(); err != nil {
		return err
	}
	f.zeros = zero{Off: off, Len: n}
	return nil
}

func (f *fileSender) flushZeros() error {
	z := f.zeros
	f.zeros = zero{}
	if z.Len == 0 {
		return nil
	}
	if err := f.begin(); err != nil {
		return err
	}
	return f.out.zero(z)
}

// reopen turns a handle (O_PATH) on a regular file into a readable descriptor.
func reopen(handle int) (int, error) {
	const flags = unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Open(procPath(handle), flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		fd, err = unix.Open(procPath(handle), flags, 0)
	}
	return fd, err
}

// procPath names an open file so that calls without a variant for descriptors
// of O_PATH reach it. It leads to the file itself even if that is a link.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }
