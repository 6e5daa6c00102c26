package layer

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// Apply makes the changes of a stream in upper, which must not be mounted as a
// layer at that time. It reads no further than the stream's end, and blocks as
// long as r does.
//
// A stream of everything is accepted by an empty directory and by one that
// earlier streams filled, which is emptied first. A stream of changes is
// accepted by a directory that holds its base, or in which this same stream was
// begun before: applying a stream twice, or again after an interruption, gives
// what applying it once gives. All else is ErrBase.
//
// After an error the directory is half changed and says so in its marker; only
// the same stream or a stream of everything is accepted then. A full disk is
// an error that is unix.ENOSPC.
func Apply(ctx context.Context, upper string, r io.Reader) (Stats, error) {
	root, err := openRoot(upper)
	if err != nil {
		return Stats{}, err
	}
	defer root.Close()
	a := &applier{root: root, dirs: newDirs(root)}
	defer a.dirs.close()
	in := &countingReader{src: r}
	// The sender's blocks have chunkSize; larger ones are another's.
	plain := s2.NewReader(in, s2.ReaderMaxBlockSize(chunkSize), s2.ReaderAllocBlock(chunkSize))
	err = a.run(ctx, newFrameReader(plain))
	a.stats.Wire = checkpoint.Bytes(in.n)
	if in.ended && errors.Is(err, s2.ErrCorrupt) {
		err = cut(io.EOF) // s2 has the same word for a block that is not all there
	}
	if err != nil {
		return a.stats, fmt.Errorf("apply to layer %s: %w", upper, err)
	}
	return a.stats, nil
}

// applier changes the tree below root. It goes through descriptors of
// directories it opened by one name each, so no stream leads it elsewhere.
type applier struct {
	root  *rootDir
	dirs  *dirs
	stats Stats
	full  bool

	file *openFile // the regular file that data goes to
	made []*entry  // directories, whose times are set last
}

type openFile struct {
	fd    int
	entry *entry
}

func (a *applier) run(ctx context.Context, frames *frameReader) error {
	first, err := frames.next()
	if err != nil {
		return err
	}
	h, ok := first.(header)
	if !ok {
		return malformed("no header")
	}
	if err := a.begin(h); err != nil {
		return err
	}
	defer a.abandon()
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		frame, err := frames.next()
		if err != nil {
			return err
		}
		switch f := frame.(type) {
		case removal:
			err = a.remove(f.Path)
			a.stats.Removals++
		case *entry:
			if err = a.closeFile(); err == nil {
				err = a.entry(f)
			}
			a.stats.Entries++
		case data:
			err = a.write(f)
		case zero:
			err = a.punch(f)
		case link:
			if err = a.closeFile(); err == nil {
				err = a.link(f)
			}
			a.stats.Links++
		case end:
			if err := a.closeFile(); err != nil {
				return err
			}
			return a.finish(h)
		}
		if err != nil {
			return err
		}
	}
}

// begin checks that the stream fits, and marks the directory as half changed.
func (a *applier) begin(h header) error {
	err := unix.Flock(a.root.fd, unix.LOCK_EX|unix.LOCK_NB) // until the descriptor closes
	if errors.Is(err, unix.EWOULDBLOCK) {
		return ErrBusy
	}
	if err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	marker, err := a.marker()
	if err != nil {
		return err
	}
	part := fmt.Sprintf("part:%v:%v", h.Base, h.ID)
	a.full = h.Base == passID{}
	switch {
	case a.full:
		names, err := a.names()
		if err != nil {
			return err
		}
		if marker == "" && len(names) > 0 {
			return fmt.Errorf("it has content that no stream brought: %w", ErrBase)
		}
		if err := a.mark(part); err != nil {
			return err
		}
		for _, name := range names {
			if err := removeAt(a.root.fd, name, 0); err != nil {
				return fmt.Errorf("empty it: %w", err)
			}
		}
		return nil
	case marker == "done:"+h.Base.String(), marker == "done:"+h.ID.String(), marker == part:
		return a.mark(part)
	case marker == "":
		return fmt.Errorf("it was never filled, and the stream builds on pass %v: %w", h.Base, ErrBase)
	default:
		return fmt.Errorf("it holds %s, and the stream builds on pass %v: %w", marker, h.Base, ErrBase)
	}
}

// marker returns what begin or finish of an earlier stream wrote.
func (a *applier) marker() (string, error) {
	value, err := sized(func(b []byte) (int, error) { return unix.Fgetxattr(a.root.fd, markerXattr, b) })
	if errors.Is(err, unix.ENODATA) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read what was applied: %w", err)
	}
	return string(value), nil
}

func (a *applier) mark(value string) error {
	if err := unix.Fsetxattr(a.root.fd, markerXattr, []byte(value), 0); err != nil {
		return fmt.Errorf("note what is applied: %w", err)
	}
	return nil
}

func (a *applier) names() ([]string, error) {
	fd, err := openDirAt(a.root.fd, ".")
	if err != nil {
		return nil, fmt.Errorf("open it: %w", err)
	}
	defer unix.Close(fd)
	names, err := readNames(fd)
	if err != nil {
		return nil, fmt.Errorf("read it: %w", err)
	}
	return names, nil
}

// remove takes away a path with all below it. It may be gone already.
func (a *applier) remove(path string) error {
	parent, name, err := a.dirs.parent(path)
	if gone(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %q: %w", path, err)
	}
	if err := removeAt(parent, name, 0); err != nil {
		return fmt.Errorf("remove %q: %w", path, err)
	}
	return nil
}

func (a *applier) entry(e *entry) error {
	var err error
	switch kind := e.Mode & unix.S_IFMT; {
	case e.Path == "":
		err = a.dirMeta(a.root.fd, e)
	case kind == unix.S_IFDIR:
		err = a.dir(e)
	case kind == unix.S_IFREG:
		err = a.openFile(e)
	default:
		err = a.special(e)
	}
	if err != nil {
		return fmt.Errorf("make %q: %w", e.Path, err)
	}
	return nil
}

// place opens the directory that e goes to.
func (a *applier) place(path string) (int, string, error) {
	parent, name, err := a.dirs.parent(path)
	if gone(err) {
		return -1, "", fmt.Errorf("its directory is missing (%w): %w", err, ErrBase)
	}
	if err != nil {
		return -1, "", fmt.Errorf("open its directory: %w", err)
	}
	return parent, name, nil
}

func (a *applier) dir(e *entry) error {
	parent, name, err := a.place(e.Path)
	if err != nil {
		return err
	}
	fd, err := openDirAt(parent, name)
	if gone(err) { // nothing, or no directory
		if err := removeAt(parent, name, 0); err != nil {
			return err
		}
		if err := unix.Mkdirat(parent, name, 0o700); err != nil {
			return fmt.Errorf("mkdir: %w", err)
		}
		fd, err = openDirAt(parent, name)
	}
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	return a.dirMeta(fd, e)
}

// dirMeta sets all but the times, which the entries below would move again.
func (a *applier) dirMeta(fd int, e *entry) error {
	a.made = append(a.made, e)
	return setMeta(fd, e, e.Path == "")
}

// setMeta works on a readable descriptor. The order counts: a new owner takes
// set-uid bits and capabilities away, and a mode rewrites an ACL.
func setMeta(fd int, e *entry, root bool) error {
	if err := unix.Fchown(fd, int(e.UID), int(e.GID)); err != nil {
		return fmt.Errorf("chown to %d:%d: %w", e.UID, e.GID, err)
	}
	if err := unix.Fchmod(fd, e.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod to %#o: %w", e.Mode&0o7777, err)
	}
	xattrs := e.Xattrs
	e.Xattrs = nil // a directory's entry is kept to the end, its attributes need not be
	return writeXattrs(fdXattrs(fd), xattrs, root)
}

// openFile makes or opens a regular file; data and zero frames follow.
func (a *applier) openFile(e *entry) error {
	parent, name, err := a.place(e.Path)
	if err != nil {
		return err
	}
	if e.Fresh {
		if err := removeAt(parent, name, 0); err != nil {
			return err
		}
		fd, err := unix.Openat(parent, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return fmt.Errorf("create: %w", err)
		}
		a.file = &openFile{fd: fd, entry: e}
		if e.Size > 0 {
			if err := unix.Ftruncate(fd, e.Size); err != nil {
				return fmt.Errorf("set size %d: %w", e.Size, err)
			}
		}
		return nil
	}
	// By a handle first: opening what turns out to be a device has effects.
	handle, err := unix.Openat(parent, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if gone(err) {
		return fmt.Errorf("the file to patch is missing: %w", ErrBase)
	}
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer unix.Close(handle)
	var st unix.Stat_t
	if err := unix.Fstat(handle, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("what is to be patched is no regular file: %w", ErrBase)
	}
	fd, err := unix.Open(procPath(handle), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	a.file = &openFile{fd: fd, entry: e}
	if st.Size != e.Size {
		if err := unix.Ftruncate(fd, e.Size); err != nil {
			return fmt.Errorf("set size %d: %w", e.Size, err)
		}
	}
	return nil
}

func (a *applier) write(d data) error {
	a.stats.Data += checkpoint.Bytes(len(d.Bytes))
	for p, off := d.Bytes, d.Off; len(p) > 0; {
		n, err := unix.Pwrite(a.file.fd, p, off)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("write %d bytes at %d of %q: %w", len(p), off, a.file.entry.Path, err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (a *applier) punch(z zero) error {
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	err := unix.Fallocate(a.file.fd, mode, z.Off, z.Len)
	if errors.Is(err, unix.EOPNOTSUPP) {
		zeros := make([]byte, min(z.Len, chunkSize))
		for off := z.Off; off < z.Off+z.Len; off += int64(len(zeros)) {
			piece := zeros[:min(int64(len(zeros)), z.Off+z.Len-off)]
			if err := a.write(data{Off: off, Bytes: piece}); err != nil {
				return err
			}
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("punch %d bytes at %d of %q: %w", z.Len, z.Off, a.file.entry.Path, err)
	}
	return nil
}

// closeFile ends the regular file under way. Its metadata comes after its
// content, because writing takes capabilities away and moves the times.
func (a *applier) closeFile() error {
	f := a.file
	if f == nil {
		return nil
	}
	a.file = nil
	err := setMeta(f.fd, f.entry, false)
	if err == nil {
		err = setTimes(unix.AT_FDCWD, procPath(f.fd), f.entry.Atime, f.entry.Mtime, 0)
	}
	// Some file systems report a full disk only here.
	if cerr := unix.Close(f.fd); err == nil && cerr != nil {
		err = fmt.Errorf("close: %w", cerr)
	}
	if err != nil {
		return fmt.Errorf("finish %q: %w", f.entry.Path, err)
	}
	return nil
}

// abandon closes what an error left open.
func (a *applier) abandon() {
	if a.file != nil {
		unix.Close(a.file.fd)
		a.file = nil
	}
}

func (a *applier) special(e *entry) error {
	parent, name, err := a.place(e.Path)
	if err != nil {
		return err
	}
	if err := removeAt(parent, name, 0); err != nil {
		return err
	}
	isLink := e.Mode&unix.S_IFMT == unix.S_IFLNK
	if isLink {
		err = unix.Symlinkat(e.Target, parent, name)
	} else {
		err = unix.Mknodat(parent, name, e.Mode&unix.S_IFMT|0o600, int(e.Rdev))
	}
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if err := unix.Fchownat(parent, name, int(e.UID), int(e.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("chown to %d:%d: %w", e.UID, e.GID, err)
	}
	handle, err := unix.Openat(parent, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer unix.Close(handle)
	if !isLink { // whose mode nobody can set or reads
		if err := unix.Chmod(procPath(handle), e.Mode&0o7777); err != nil {
			return fmt.Errorf("chmod to %#o: %w", e.Mode&0o7777, err)
		}
	}
	if err := writeXattrs(pathXattrs(procPath(handle)), e.Xattrs, false); err != nil {
		return err
	}
	return setTimes(parent, name, e.Atime, e.Mtime, unix.AT_SYMLINK_NOFOLLOW)
}

func setTimes(dirfd int, name string, atime, mtime stamp, flags int) error {
	if err := unix.UtimesNanoAt(dirfd, name, []unix.Timespec{atime.timespec(), mtime.timespec()}, flags); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

func (a *applier) link(l link) error {
	if err := a.linkTo(l); err != nil {
		return fmt.Errorf("link %q to %q: %w", l.Path, l.Leader, err)
	}
	return nil
}

func (a *applier) linkTo(l link) error {
	shared, leader, err := a.place(l.Leader)
	if err != nil {
		return err
	}
	// The next use of dirs may close it.
	shared, err = unix.FcntlInt(uintptr(shared), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("hold directory: %w", err)
	}
	defer unix.Close(shared)
	var want, have unix.Stat_t
	if err := unix.Fstatat(shared, leader, &want, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("stat its leader (%w): %w", err, ErrBase)
	}
	if want.Mode&unix.S_IFMT == unix.S_IFDIR {
		return malformed("its leader is a directory")
	}
	parent, name, err := a.place(l.Path)
	if err != nil {
		return err
	}
	err = unix.Fstatat(parent, name, &have, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && have.Ino == want.Ino {
		return nil
	}
	if err := removeAt(parent, name, 0); err != nil {
		return err
	}
	return unix.Linkat(shared, leader, parent, name, 0)
}

// finish sets the times of directories, now that no name changes any more, and
// marks the layer as holding the pass. The stream has an entry for each
// directory in which it changes names.
func (a *applier) finish(h header) error {
	for i := len(a.made) - 1; i >= 0; i-- {
		e := a.made[i]
		fd, err := a.dirs.open(e.Path)
		if err == nil {
			err = setTimes(unix.AT_FDCWD, procPath(fd), e.Atime, e.Mtime, 0)
		}
		if err != nil {
			return fmt.Errorf("times of directory %q: %w", e.Path, err)
		}
	}
	return a.mark("done:" + h.ID.String())
}

type countingReader struct {
	src   io.Reader
	n     int64
	ended bool
}

func (r *countingReader) Read(p []byte) (int, error) {
	n, err := r.src.Read(p)
	r.n += int64(n)
	r.ended = r.ended || err == io.EOF
	return n, err
}
