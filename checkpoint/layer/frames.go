package layer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

// A stream is a sequence of frames, compressed as one s2 stream. A frame is
//
//	kind u8 | length u32 | payload
//
// with all integers little-endian, and the kinds come in this order:
//
//	header    what the stream is relative to, and what applying it makes
//	removal…  paths that go, with all below them
//	(entry (data | zero)…)…   parents before children
//	link…     further names of files that are there by now
//	end       counts, and a hash over every byte before it
//
// A stream without its end frame is a cut stream, whatever it held.
const (
	kindHeader  = 'H'
	kindRemoval = 'R'
	kindEntry   = 'E'
	kindData    = 'D'
	kindZero    = 'Z'
	kindLink    = 'L'
	kindEnd     = 'Q'
)

const (
	streamMagic   = "trlayer1"
	frameHeadSize = 5

	// chunkSize is the unit in which file content is hashed, compared and sent:
	// small enough that a database which touches a few pages sends little,
	// large enough that hashes take a ten-thousandth of the data.
	chunkSize = 256 << 10

	// maxPath bounds a path inside the layer. It is longer than PATH_MAX on
	// purpose: a shard can build deeper trees with relative calls.
	maxPath = 64<<10 - 1
	// maxDepth bounds the descriptors that a walk holds.
	maxDepth = 1024
	// maxXattrs bounds the extended attributes of one inode; file systems stop
	// at 64 KiB for names and 64 KiB a value, ext4 far below.
	maxXattrs = 1 << 20
	// maxTarget is PATH_MAX without its terminator.
	maxTarget = 4095

	maxFrame = maxXattrs + maxPath + maxTarget + 4096
)

// passID names one pass; the zero value is "nothing was ever applied".
type passID [16]byte

func (id passID) String() string { return fmt.Sprintf("%x", id[:]) }

type stamp struct {
	Sec  int64
	Nsec int64
}

func (t stamp) less(o stamp) bool { return t.Sec < o.Sec || t.Sec == o.Sec && t.Nsec < o.Nsec }

func (t stamp) timespec() unix.Timespec { return unix.Timespec{Sec: t.Sec, Nsec: t.Nsec} }

type xattr struct {
	Name  string
	Value []byte
}

type header struct {
	Base passID // zero: the stream holds everything
	ID   passID
}

// removal takes Path away, and everything below it.
type removal struct{ Path string }

// entry makes Path be there with exactly this metadata. Data and zero frames
// that follow belong to it.
type entry struct {
	Path string
	// Fresh replaces what is there by a new inode. Otherwise a regular file is
	// patched in place, because other names may lead to it.
	Fresh    bool
	Mode     uint32 // st_mode, with the type
	UID, GID uint32
	Rdev     uint64
	Size     int64
	Atime    stamp
	Mtime    stamp
	Target   string // of a symbolic link
	Xattrs   []xattr
}

type data struct {
	Off   int64
	Bytes []byte // valid until the next frame is read
}

type zero struct{ Off, Len int64 }

// link makes Path another name of the file at Leader.
type link struct{ Path, Leader string }

type end struct {
	Removals, Entries, Links uint64
	DataBytes                uint64
	Sum                      [16]byte
}

// ErrStream is wrapped by every complaint about the form of a stream.
var ErrStream = errors.New("malformed layer stream")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrStream, fmt.Sprintf(format, args...))
}

// frameWriter encodes frames and keeps what the end frame must say.
type frameWriter struct {
	dst io.Writer
	sum *xxh3.Hasher
	buf []byte
	end end
}

func newFrameWriter(dst io.Writer) *frameWriter {
	return &frameWriter{dst: dst, sum: xxh3.New()}
}

func (w *frameWriter) begin(kind byte) { w.buf = append(w.buf[:0], kind, 0, 0, 0, 0) }

func (w *frameWriter) flush() error {
	n := len(w.buf) - frameHeadSize
	if n > maxFrame {
		return fmt.Errorf("a frame of %d bytes is beyond the limit of %d", n, maxFrame)
	}
	binary.LittleEndian.PutUint32(w.buf[1:], uint32(n))
	w.sum.Write(w.buf) //nolint:errcheck // a hash.Hash never errs
	_, err := w.dst.Write(w.buf)
	return err
}

func (w *frameWriter) header(h header) error {
	w.begin(kindHeader)
	w.buf = append(w.buf, streamMagic...)
	w.buf = append(w.buf, h.Base[:]...)
	w.buf = append(w.buf, h.ID[:]...)
	return w.flush()
}

func (w *frameWriter) removal(r removal) error {
	w.begin(kindRemoval)
	w.buf = append(w.buf, r.Path...)
	w.end.Removals++
	return w.flush()
}

func (w *frameWriter) entry(e *entry) error {
	w.begin(kindEntry)
	var flags byte
	if e.Fresh {
		flags = 1
	}
	b := append(w.buf, flags)
	b = binary.LittleEndian.AppendUint32(b, e.Mode)
	b = binary.LittleEndian.AppendUint32(b, e.UID)
	b = binary.LittleEndian.AppendUint32(b, e.GID)
	b = binary.LittleEndian.AppendUint64(b, e.Rdev)
	b = binary.LittleEndian.AppendUint64(b, uint64(e.Size))
	for _, t := range []stamp{e.Atime, e.Mtime} {
		b = binary.LittleEndian.AppendUint64(b, uint64(t.Sec))
		b = binary.LittleEndian.AppendUint32(b, uint32(t.Nsec))
	}
	b = appendString16(b, e.Path)
	b = appendString16(b, e.Target)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Xattrs)))
	for _, x := range e.Xattrs {
		b = appendString16(b, x.Name)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(x.Value)))
		b = append(b, x.Value...)
	}
	w.buf = b
	w.end.Entries++
	return w.flush()
}

func (w *frameWriter) data(d data) error {
	w.begin(kindData)
	w.buf = binary.LittleEndian.AppendUint64(w.buf, uint64(d.Off))
	w.buf = append(w.buf, d.Bytes...)
	w.end.DataBytes += uint64(len(d.Bytes))
	return w.flush()
}

func (w *frameWriter) zero(z zero) error {
	w.begin(kindZero)
	w.buf = binary.LittleEndian.AppendUint64(w.buf, uint64(z.Off))
	w.buf = binary.LittleEndian.AppendUint64(w.buf, uint64(z.Len))
	return w.flush()
}

func (w *frameWriter) link(l link) error {
	w.begin(kindLink)
	w.buf = appendString16(w.buf, l.Path)
	w.buf = appendString16(w.buf, l.Leader)
	w.end.Links++
	return w.flush()
}

// finish writes the end frame.
func (w *frameWriter) finish() error {
	w.end.Sum = w.sum.Sum128().Bytes()
	w.begin(kindEnd)
	for _, n := range []uint64{w.end.Removals, w.end.Entries, w.end.Links, w.end.DataBytes} {
		w.buf = binary.LittleEndian.AppendUint64(w.buf, n)
	}
	w.buf = append(w.buf, w.end.Sum[:]...)
	return w.flush()
}

func appendString16(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

// frameReader decodes frames and refuses whatever a frameWriter does not write:
// frames out of order, paths that could leave the layer, lengths beyond a
// file's size, an end that does not fit.
type frameReader struct {
	src  io.Reader
	sum  *xxh3.Hasher
	buf  []byte
	last byte // kind of the frame before; 0 at the start
	end  end

	file   *entry // the regular file that data belongs to
	offset int64  // end of its last piece; pieces only go forward
}

func newFrameReader(src io.Reader) *frameReader {
	return &frameReader{src: src, sum: xxh3.New()}
}

// mayFollow lists, for each kind, what may stand before it.
var mayFollow = map[byte]string{
	kindHeader:  "\x00",
	kindRemoval: "HR",
	kindEntry:   "HREDZ",
	kindData:    "EDZ",
	kindZero:    "EDZ",
	kindLink:    "HREDZL",
	kindEnd:     "HREDZL",
}

// next returns the next frame: header, removal, *entry, data, zero, link or
// end. An error that is io.ErrUnexpectedEOF says that the stream was cut.
func (r *frameReader) next() (any, error) {
	if r.last == kindEnd {
		return nil, io.EOF
	}
	var head [frameHeadSize]byte
	if _, err := io.ReadFull(r.src, head[:]); err != nil {
		return nil, cut(err)
	}
	kind, size := head[0], int64(binary.LittleEndian.Uint32(head[1:]))
	follows, known := mayFollow[kind]
	switch {
	case !known:
		return nil, malformed("frame of unknown kind %#x", kind)
	case strings.IndexByte(follows, r.last) < 0:
		return nil, malformed("frame %q after %q", kind, r.last)
	case size > maxFrame || kind == kindData && size > chunkSize+8:
		return nil, malformed("frame %q of %d bytes", kind, size)
	}
	// The buffer grows with what arrives, not with what a length claims.
	if err := r.fill(size); err != nil {
		return nil, err
	}
	if kind != kindEnd { // which is not part of what it sums up
		r.sum.Write(head[:]) //nolint:errcheck // a hash.Hash never errs
		r.sum.Write(r.buf)   //nolint:errcheck
	}
	r.last = kind
	return r.parse(kind)
}

func (r *frameReader) fill(size int64) error {
	if size <= int64(cap(r.buf)) {
		r.buf = r.buf[:size]
		if _, err := io.ReadFull(r.src, r.buf); err != nil {
			return cut(err)
		}
		return nil
	}
	b := bytes.NewBuffer(r.buf[:0])
	n, err := io.CopyN(b, r.src, size)
	r.buf = b.Bytes()
	if err != nil || n < size {
		return cut(err)
	}
	return nil
}

func (r *frameReader) parse(kind byte) (any, error) {
	c := cursor{b: r.buf}
	switch kind {
	case kindHeader:
		magic := string(c.take(len(streamMagic)))
		if !c.short && magic != streamMagic {
			return nil, malformed("not a layer stream of a version that this host knows")
		}
		var h header
		copy(h.Base[:], c.take(16))
		copy(h.ID[:], c.take(16))
		if err := c.done("header"); err != nil {
			return nil, err
		}
		if h.ID == (passID{}) || h.ID == h.Base {
			return nil, malformed("pass without a name of its own")
		}
		return h, nil
	case kindRemoval:
		p := removal{Path: string(r.buf)}
		r.end.Removals++
		return p, checkPath(p.Path)
	case kindEntry:
		r.end.Entries++
		e, err := parseEntry(&c)
		if err != nil {
			return nil, err
		}
		r.file, r.offset = e, 0
		return e, nil
	case kindData:
		d := data{Off: c.i64()}
		d.Bytes = c.take(len(c.b))
		r.end.DataBytes += uint64(len(d.Bytes))
		if c.short || len(d.Bytes) == 0 {
			return nil, malformed("data frame of %d bytes", len(r.buf))
		}
		return d, r.piece(d.Off, int64(len(d.Bytes)))
	case kindZero:
		z := zero{Off: c.i64(), Len: c.i64()}
		if err := c.done("zero"); err != nil {
			return nil, err
		}
		return z, r.piece(z.Off, z.Len)
	case kindLink:
		l := link{Path: c.string16(), Leader: c.string16()}
		r.end.Links++
		if err := c.done("link"); err != nil {
			return nil, err
		}
		if l.Path == l.Leader {
			return nil, malformed("%q linked to itself", l.Path)
		}
		return l, errors.Join(checkPath(l.Path), checkPath(l.Leader))
	case kindEnd:
		e := end{Removals: c.u64(), Entries: c.u64(), Links: c.u64(), DataBytes: c.u64()}
		copy(e.Sum[:], c.take(16))
		if err := c.done("end"); err != nil {
			return nil, err
		}
		want := r.end
		want.Sum = r.sum.Sum128().Bytes()
		if e != want {
			return nil, malformed("its end does not fit: sent %d removals, %d entries, %d links, %d bytes; arrived %d, %d, %d, %d, or with other content",
				e.Removals, e.Entries, e.Links, e.DataBytes, want.Removals, want.Entries, want.Links, want.DataBytes)
		}
		return e, nil
	}
	panic("unreachable: kinds are checked before")
}

// piece checks that a run of bytes lies inside the file and after the last one.
func (r *frameReader) piece(off, n int64) error {
	switch {
	case r.file.Mode&unix.S_IFMT != unix.S_IFREG:
		return malformed("content for %q, which is no regular file", r.file.Path)
	case off < r.offset || n <= 0 || off > r.file.Size || n > r.file.Size-off:
		return malformed("bytes %d+%d of %q, which has %d", off, n, r.file.Path, r.file.Size)
	}
	r.offset = off + n
	return nil
}

func parseEntry(c *cursor) (*entry, error) {
	flags := c.u8()
	e := &entry{Fresh: flags == 1, Mode: c.u32(), UID: c.u32(), GID: c.u32(), Rdev: c.u64(), Size: c.i64()}
	e.Atime = stamp{c.i64(), int64(c.u32())}
	e.Mtime = stamp{c.i64(), int64(c.u32())}
	e.Path = c.string16()
	e.Target = c.string16()
	count := c.u32()
	total := 0
	for range count {
		x := xattr{Name: c.string16()}
		x.Value = bytes.Clone(c.take(int(c.u32())))
		if c.short {
			break // count may claim anything; what is there decides
		}
		if x.Name == "" || len(x.Name) > unix.NAME_MAX || strings.IndexByte(x.Name, 0) >= 0 {
			return nil, malformed("attribute name %q", x.Name)
		}
		if x.Name == markerXattr {
			return nil, malformed("attribute %s, which belongs to tranship", x.Name)
		}
		total += len(x.Name) + len(x.Value)
		e.Xattrs = append(e.Xattrs, x)
	}
	if err := c.done("entry"); err != nil {
		return nil, err
	}
	if e.Path != "" { // "" is the root of the layer
		if err := checkPath(e.Path); err != nil {
			return nil, err
		}
	}
	kind := e.Mode & unix.S_IFMT
	switch {
	case flags > 1:
		return nil, malformed("flags %#x of %q", flags, e.Path)
	case e.Mode&^(unix.S_IFMT|0o7777) != 0:
		return nil, malformed("mode %#o of %q", e.Mode, e.Path)
	case e.Path == "" && kind != unix.S_IFDIR:
		return nil, malformed("a root that is no directory")
	case total > maxXattrs:
		return nil, malformed("%d bytes of attributes at %q", total, e.Path)
	case e.Size < 0 || kind != unix.S_IFREG && e.Size != 0:
		return nil, malformed("size %d of %q", e.Size, e.Path)
	case e.Atime.Nsec >= 1e9 || e.Mtime.Nsec >= 1e9:
		return nil, malformed("time of %q", e.Path)
	case e.Rdev != 0 && kind != unix.S_IFCHR && kind != unix.S_IFBLK:
		return nil, malformed("device number of %q", e.Path)
	case (kind == unix.S_IFLNK) != (e.Target != "") || len(e.Target) > maxTarget || strings.IndexByte(e.Target, 0) >= 0:
		return nil, malformed("link target of %q", e.Path)
	}
	switch kind {
	case unix.S_IFREG:
	case unix.S_IFDIR:
		if e.Fresh {
			return nil, malformed("directory %q as a fresh inode", e.Path)
		}
	case unix.S_IFLNK, unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK:
		if !e.Fresh {
			return nil, malformed("patch of %q, which has no content", e.Path)
		}
	default:
		return nil, malformed("type %#o of %q", kind, e.Path)
	}
	return e, nil
}

// checkPath admits relative paths of plain names only: what passes cannot
// climb, and each name can be handed to openat on its own.
func checkPath(p string) error {
	if p == "" || len(p) > maxPath {
		return malformed("path of %d bytes", len(p))
	}
	if strings.IndexByte(p, 0) >= 0 {
		return malformed("path %q", p)
	}
	depth := 0
	for name := range strings.SplitSeq(p, "/") {
		if name == "" || name == "." || name == ".." || len(name) > unix.NAME_MAX {
			return malformed("path %q", p)
		}
		if depth++; depth > maxDepth {
			return malformed("path of more than %d names", maxDepth)
		}
	}
	return nil
}

// cut turns the end of the input into the error it is here.
func cut(err error) error {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("layer stream cut short: %w", io.ErrUnexpectedEOF)
	}
	return fmt.Errorf("read layer stream: %w", err)
}
