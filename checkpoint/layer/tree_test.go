package layer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// describe writes down everything about a tree that a pass must carry, without
// using any code of the package.
func describe(t testing.TB, root string) map[string]string {
	t.Helper()
	out := map[string]string{}
	links := map[uint64][]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("mode %o owner %d:%d mtime %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" size %d sha %x", st.Size, sha256.Sum256(content))
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			s += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			s += fmt.Sprintf(" dev %x", st.Rdev)
			if st.Rdev == 0 {
				// Its times, owner and attributes mean nothing.
				out[rel] = "whiteout"
				return nil
			}
		}
		buf := make([]byte, 64<<10)
		n, err := unix.Llistxattr(path, buf)
		if err != nil {
			return err
		}
		names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
		slices.Sort(names)
		for _, name := range names {
			if name == "" || name == markerXattr {
				continue
			}
			value := make([]byte, 64<<10)
			n, err := unix.Lgetxattr(path, name, value)
			if err != nil {
				return err
			}
			s += fmt.Sprintf(" %s=%x", name, value[:n])
		}
		out[rel] = s
		if !d.IsDir() && st.Nlink > 1 {
			links[st.Ino] = append(links[st.Ino], rel)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("describe %s: %v", root, err)
	}
	for _, paths := range links {
		for _, p := range paths {
			out[p] += fmt.Sprintf(" linked %q", paths)
		}
	}
	return out
}

func mustEqual(t testing.TB, source, destination string) {
	t.Helper()
	want, have := describe(t, source), describe(t, destination)
	for path, w := range want {
		if h, ok := have[path]; !ok {
			t.Errorf("%q is missing; at the source: %s", path, w)
		} else if h != w {
			t.Errorf("%q differs\n source %s\n there  %s", path, w, h)
		}
	}
	for path, h := range have {
		if _, ok := want[path]; !ok {
			t.Errorf("%q should not be there: %s", path, h)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// pass sends and applies once and returns the index and the stream.
func pass(t testing.TB, src, dst string, since *Index, opt Options) (*Index, Stats, []byte) {
	t.Helper()
	var wire bytes.Buffer
	next, stats, err := Send(context.Background(), src, since, &wire, opt)
	if err != nil {
		t.Fatal(err)
	}
	stream := bytes.Clone(wire.Bytes())
	if _, err := Apply(context.Background(), dst, &wire); err != nil {
		t.Fatal(err)
	}
	if wire.Len() != 0 {
		t.Fatalf("%d bytes of the stream were not read", wire.Len())
	}
	return next, stats, stream
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, path string, content []byte) {
	t.Helper()
	must(t, os.WriteFile(path, content, 0o644))
}

// fill returns n bytes that do not repeat, different for each seed.
func fill(seed byte, n int) []byte {
	b := make([]byte, n)
	x := uint64(seed)*0x9e3779b97f4a7c15 + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}
