package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/klauspost/compress/s2"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/testenv"
)

// script writes frames as a sender does, or as one should not.
func script(t testing.TB, frames ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	w := newFrameWriter(&b)
	for _, f := range frames {
		var err error
		switch f := f.(type) {
		case header:
			err = w.header(f)
		case removal:
			err = w.removal(f)
		case entry:
			err = w.entry(&f)
		case data:
			err = w.data(f)
		case zero:
			err = w.zero(f)
		case link:
			err = w.link(f)
		case end:
			err = w.finish()
		default:
			t.Fatalf("no frame: %T", f)
		}
		must(t, err)
	}
	return b.Bytes()
}

func decode(r io.Reader) ([]any, error) {
	fr := newFrameReader(r)
	var out []any
	for {
		f, err := fr.next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		switch v := f.(type) {
		case *entry:
			f = *v
		case data:
			v.Bytes = bytes.Clone(v.Bytes)
			f = v
		}
		out = append(out, f)
	}
}

var (
	aHeader = header{ID: passID{1}}
	aFile   = entry{Path: "a/b", Fresh: true, Mode: unix.S_IFREG | 0o644, UID: 1, GID: 2, Size: 1 << 20, Atime: stamp{1, 2}, Mtime: stamp{-3, 999999999}, Xattrs: []xattr{{"user.x", []byte{0, 1}}, {"user.y", []byte{}}}}
	aDir    = entry{Path: "a", Mode: unix.S_IFDIR | 0o1777}
)

func TestFramesRoundTrip(t *testing.T) {
	frames := []any{
		header{Base: passID{9}, ID: passID{1}},
		removal{"gone"},
		removal{"new\nline/\xff"},
		entry{Mode: unix.S_IFDIR | 0o755},
		aDir, aFile,
		data{0, []byte("xyz")},
		zero{3, 100},
		data{1<<20 - 1, []byte{7}},
		entry{Path: "l", Fresh: true, Mode: unix.S_IFLNK | 0o777, Target: "../../etc/passwd"},
		entry{Path: "w", Fresh: true, Mode: unix.S_IFCHR},
		link{"c", "a/b"},
		end{},
	}
	got, err := decode(bytes.NewReader(script(t, frames...)))
	if err != nil {
		t.Fatal(err)
	}
	got[len(got)-1] = end{}
	if !reflect.DeepEqual(got, frames) {
		t.Errorf("read\n%+v\nwant\n%+v", got, frames)
	}
}

func TestFramesThatNoSenderWrites(t *testing.T) {
	with := func(change func(*entry)) entry {
		e := aFile
		change(&e)
		return e
	}
	deep := strings.Repeat("d/", maxDepth) + "d"
	cases := []struct {
		name   string
		frames []any
	}{
		{"no header", []any{aDir}},
		{"two headers", []any{aHeader, aHeader}},
		{"a pass without a name", []any{header{}}},
		{"a pass that builds on itself", []any{header{Base: passID{1}, ID: passID{1}}}},
		{"a removal after an entry", []any{aHeader, aDir, removal{"x"}}},
		{"an entry after a link", []any{aHeader, aDir, link{"x", "y"}, aDir}},
		{"data without a file", []any{aHeader, data{0, []byte("x")}}},
		{"data of a directory", []any{aHeader, aDir, data{0, []byte("x")}}},
		{"data beyond the size", []any{aHeader, aFile, data{1 << 20, []byte("x")}}},
		{"data at a negative offset", []any{aHeader, aFile, data{-1, []byte("x")}}},
		{"data that goes back", []any{aHeader, aFile, data{10, []byte("x")}, data{10, []byte("x")}}},
		{"no data", []any{aHeader, aFile, data{0, nil}}},
		{"more data than a chunk", []any{aHeader, aFile, data{0, make([]byte, chunkSize+1)}}},
		{"a hole beyond the size", []any{aHeader, aFile, zero{0, 1<<20 + 1}}},
		{"a hole around the end of numbers", []any{aHeader, aFile, zero{1, 1<<63 - 1}}},
		{"a hole of nothing", []any{aHeader, aFile, zero{0, 0}}},
		{"removal of the root", []any{aHeader, removal{""}}},
		{"removal of the directory above", []any{aHeader, removal{".."}}},
		{"an absolute path", []any{aHeader, with(func(e *entry) { e.Path = "/etc/passwd" })}},
		{"a path that climbs", []any{aHeader, with(func(e *entry) { e.Path = "a/../../b" })}},
		{"a path with a dot", []any{aHeader, with(func(e *entry) { e.Path = "a/./b" })}},
		{"a path with two slashes", []any{aHeader, with(func(e *entry) { e.Path = "a//b" })}},
		{"a path with a zero byte", []any{aHeader, with(func(e *entry) { e.Path = "a\x00b" })}},
		{"a name of 256 bytes", []any{aHeader, with(func(e *entry) { e.Path = strings.Repeat("x", 256) })}},
		{"a path too deep", []any{aHeader, with(func(e *entry) { e.Path = deep })}},
		{"a root that is a file", []any{aHeader, with(func(e *entry) { e.Path = "" })}},
		{"a negative size", []any{aHeader, with(func(e *entry) { e.Size = -1 })}},
		{"an unknown type", []any{aHeader, with(func(e *entry) { e.Mode = 0o644 })}},
		{"bits beside the mode", []any{aHeader, with(func(e *entry) { e.Mode |= 1 << 20 })}},
		{"a second of more than a second", []any{aHeader, with(func(e *entry) { e.Mtime.Nsec = 1e9 })}},
		{"times that mean now", []any{aHeader, with(func(e *entry) { e.Atime.Nsec = unix.UTIME_NOW })}},
		{"a file with a device number", []any{aHeader, with(func(e *entry) { e.Rdev = 1 })}},
		{"a file with a link target", []any{aHeader, with(func(e *entry) { e.Target = "x" })}},
		{"a symbolic link without a target", []any{aHeader, entry{Path: "l", Fresh: true, Mode: unix.S_IFLNK}}},
		{"a link target too long", []any{aHeader, entry{Path: "l", Fresh: true, Mode: unix.S_IFLNK, Target: strings.Repeat("x", maxTarget+1)}}},
		{"a fifo to be patched", []any{aHeader, entry{Path: "p", Mode: unix.S_IFIFO}}},
		{"a fresh directory", []any{aHeader, entry{Path: "d", Fresh: true, Mode: unix.S_IFDIR}}},
		{"attributes beyond the limit", []any{aHeader, with(func(e *entry) {
			e.Xattrs = []xattr{{"user.a", make([]byte, maxXattrs-100)}, {"user.b", make([]byte, 100)}}
		})}},
		{"an attribute without a name", []any{aHeader, with(func(e *entry) { e.Xattrs = []xattr{{"", nil}} })}},
		{"tranship's own mark", []any{aHeader, with(func(e *entry) { e.Xattrs = []xattr{{markerXattr, []byte("done:")}} })}},
		{"a link to itself", []any{aHeader, link{"x", "x"}}},
		{"a link that climbs", []any{aHeader, aDir, link{"x", "../../etc/shadow"}}},
	}
	for _, c := range cases {
		frames, err := decode(bytes.NewReader(script(t, append(c.frames, end{})...)))
		if !errors.Is(err, ErrStream) {
			t.Errorf("%s: %+v, %v; want ErrStream", c.name, frames, err)
		}
	}
}

func TestEndThatDoesNotFit(t *testing.T) {
	good := script(t, aHeader, aDir, aFile, data{0, []byte("content")}, end{})
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x20
		if _, err := decode(bytes.NewReader(bad)); err == nil {
			t.Errorf("byte %d of %d changed, and nobody noticed", i, len(good))
		}
	}
	for i := range good {
		if _, err := decode(bytes.NewReader(good[:i])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut at %d of %d: %v, want an unexpected end", i, len(good), err)
		}
	}
}

func TestLengthsThatOnlyClaim(t *testing.T) {
	// A megabyte is announced, nothing comes: nothing of that size is allocated.
	raw := append(script(t, aHeader), kindEntry, 0, 0, 0x10, 0)
	if n := testing.AllocsPerRun(1, func() { _, _ = decode(bytes.NewReader(raw)) }); n > 100 {
		t.Errorf("%v allocations", n)
	}
	if _, err := decode(bytes.NewReader(append(script(t, aHeader), kindEntry, 0xff, 0xff, 0xff, 0xff))); !errors.Is(err, ErrStream) {
		t.Errorf("%v, want ErrStream", err)
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(script(f, aHeader, removal{"r"}, aDir, aFile, data{0, []byte("x")}, zero{1, 9}, link{"c", "a/b"}, end{}))
	f.Add(script(f, header{Base: passID{1}, ID: passID{2}}, entry{Path: "l", Fresh: true, Mode: unix.S_IFLNK, Target: "/"}, end{}))
	f.Add(script(f, aHeader, end{}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		frames, err := decode(bytes.NewReader(raw))
		if err != nil {
			return
		}
		again := script(t, frames...)
		if !bytes.Equal(again, raw[:len(again)]) {
			t.Fatalf("read %+v, written again %x, was %x", frames, again, raw)
		}
	})
}

// FuzzApply lets anything that passes for frames at a real directory, with a
// directory beside it that no stream may touch.
func FuzzApply(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root: make test runs it")
	}
	link := entry{Path: "out", Fresh: true, Mode: unix.S_IFLNK | 0o777, Target: "../outside"}
	through := aFile
	through.Path = "out/f"
	below := aDir
	below.Path = "out"
	f.Add(script(f, aHeader, link, through))
	f.Add(script(f, aHeader, link, below, through, data{0, []byte("x")}))
	f.Add(script(f, aHeader, link, entry{Path: "out", Mode: unix.S_IFREG, Size: 1}))
	f.Add(script(f, aHeader, aDir, aFile, data{5, []byte("x")}, zero{9, 10}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		base := t.TempDir()
		must(t, os.Mkdir(base+"/outside", 0o700))
		put(t, base+"/outside/f", []byte("untouched"))
		before := describe(t, base+"/outside")
		must(t, os.Mkdir(base+"/upper", 0o700))
		var wire bytes.Buffer
		w := s2.NewWriter(&wire, s2.WriterBlockSize(chunkSize))
		_, err := w.Write(raw)
		must(t, errors.Join(err, w.Close()))
		_, _ = Apply(context.Background(), base+"/upper", &wire)
		if after := describe(t, base+"/outside"); !reflect.DeepEqual(before, after) {
			t.Fatalf("outside was %v and is %v", before, after)
		}
		if names, err := os.ReadDir(base); err != nil || len(names) != 2 {
			t.Fatalf("beside the layer: %v, %v", names, err)
		}
	})
}

// TestHostileStreams are those that a frame alone does not give away.
func TestHostileStreams(t *testing.T) {
	testenv.NeedRoot(t)
	symlink := entry{Path: "out", Fresh: true, Mode: unix.S_IFLNK | 0o777, Target: "../outside"}
	fileIn := func(path string) entry { e := aFile; e.Path, e.Size = path, 1; return e }
	patch := func(path string) entry { e := fileIn(path); e.Fresh = false; return e }
	fifo := entry{Path: "out", Fresh: true, Mode: unix.S_IFIFO | 0o600}
	cases := []struct {
		name   string
		frames []any
		want   error
	}{
		{"a file through a symbolic link", []any{aHeader, symlink, fileIn("out/f"), data{0, []byte("x")}, end{}}, ErrBase},
		{"a patch of what a symbolic link leads to", []any{aHeader, entry{Path: "l", Fresh: true, Mode: unix.S_IFLNK, Target: "../outside/f"}, patch("l"), data{0, []byte("x")}, end{}}, ErrBase},
		{"a patch of a fifo", []any{aHeader, fifo, patch("out"), data{0, []byte("x")}, end{}}, ErrBase},
		{"a patch of nothing", []any{aHeader, patch("f"), end{}}, ErrBase},
		{"a link to what a symbolic link leads to", []any{aHeader, symlink, link{"l", "out/f"}, end{}}, ErrBase},
		{"a link to a directory", []any{aHeader, aDir, link{"l", "a"}, end{}}, ErrStream},
		{"a link to nothing", []any{aHeader, link{"l", "x"}, end{}}, ErrBase},
		{"a file in no directory", []any{aHeader, aFile, end{}}, ErrBase},
		{"no end", []any{aHeader, aDir}, io.ErrUnexpectedEOF},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			base := t.TempDir()
			must(t, os.Mkdir(base+"/outside", 0o700))
			put(t, base+"/outside/f", []byte("untouched"))
			before := describe(t, base+"/outside")
			must(t, os.Mkdir(base+"/upper", 0o700))
			var wire bytes.Buffer
			w := s2.NewWriter(&wire, s2.WriterBlockSize(chunkSize))
			_, err := w.Write(script(t, c.frames...))
			must(t, errors.Join(err, w.Close()))
			if _, err := Apply(context.Background(), base+"/upper", &wire); !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if after := describe(t, base+"/outside"); !reflect.DeepEqual(before, after) {
				t.Errorf("outside was %v and is %v", before, after)
			}
		})
	}
	t.Run("a file that turns into a bomb", func(t *testing.T) {
		// A block larger than the sender's is refused before it is unpacked.
		var wire bytes.Buffer
		w := s2.NewWriter(&wire, s2.WriterBlockSize(4<<20))
		_, err := w.Write(make([]byte, 4<<20))
		must(t, errors.Join(err, w.Close()))
		if _, err := Apply(context.Background(), t.TempDir(), &wire); err == nil {
			t.Error("accepted")
		}
	})
}
