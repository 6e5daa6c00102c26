package migrate

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/klauspost/compress/s2"

	"github.com/tranship/tranship/checkpoint"
)

func TestAnImageDirectoryArrivesAsItWasSent(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	files := map[string][]byte{
		"inventory.img": []byte("x"),
		"pages-1.img":   bytes.Repeat([]byte("0123456789abcdef"), 1<<16),
		"empty.img":     {},
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(from, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(from, "link")); err != nil {
		t.Fatal(err)
	}
	var wire bytes.Buffer
	sent, err := sendImages(from, &wire)
	if err != nil {
		t.Fatal(err)
	}
	got, err := receiveImages(to, bytes.NewReader(wire.Bytes()))
	if err != nil {
		t.Fatal(err)
	}
	if sent != got {
		t.Fatalf("digests differ: sent %x, received %x", sent, got)
	}
	entries, err := os.ReadDir(to)
	if err != nil || len(entries) != len(files) {
		t.Fatalf("%d entries, %v", len(entries), err)
	}
	for name, content := range files {
		b, err := os.ReadFile(filepath.Join(to, name))
		if err != nil || !bytes.Equal(b, content) {
			t.Errorf("%s: %d bytes, %v", name, len(b), err)
		}
	}
}

// pagesOf makes pages, each full of one byte.
func pagesOf(fill ...byte) []byte {
	var out []byte
	for _, b := range fill {
		out = append(out, bytes.Repeat([]byte{b}, checkpoint.PageSize)...)
	}
	return out
}

func TestAPageOfManyImagesIsSentOnce(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	library := make([]byte, 300*checkpoint.PageSize)
	rand.NewChaCha8([32]byte{1}).Read(library)
	files := map[string][]byte{
		"pages-1.img":   library,
		"pages-2.img":   slices.Concat(library[:100*checkpoint.PageSize], pagesOf(1, 2), library[90*checkpoint.PageSize:]),
		"pages-3.img":   slices.Concat(pagesOf(2, 0, 0, 3, 3, 1, 2), library),
		"pages-4.img":   {},
		"pages-odd.img": library[:checkpoint.PageSize+1],
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(from, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var wire bytes.Buffer
	sent, err := sendImages(from, &wire)
	if err != nil {
		t.Fatal(err)
	}
	if most := len(library) + len(library)/10; wire.Len() > most {
		t.Errorf("%d bytes were sent, more than %d", wire.Len(), most)
	}
	got, err := receiveImages(to, &wire)
	if err != nil || got != sent {
		t.Fatalf("received %x, sent %x, %v", got, sent, err)
	}
	for name, content := range files {
		if b, err := os.ReadFile(filepath.Join(to, name)); err != nil || !bytes.Equal(b, content) {
			t.Errorf("%s: %d bytes of %d, %v", name, len(b), len(content), err)
		}
	}
}

func TestAListOfPagesThatIsWrongIsRefused(t *testing.T) {
	for _, c := range []struct {
		name string
		body []byte
	}{
		{"a page that did not come before", []byte{1, 1<<1 | 1, 0}},
		{"pages beyond those that came", append([]byte{2, 1 << 1, 2<<1 | 1, 0}, pagesOf(1)...)},
		{"a run of none", []byte{1, 0}},
		{"fewer pages than the list says", append([]byte{1, 2 << 1}, pagesOf(1)...)},
		{"more pages than the list says", append([]byte{1, 1 << 1}, pagesOf(1, 2)...)},
		{"more runs than there are", []byte{200, 1}},
		{"more than fits", append(binary.AppendUvarint([]byte{1}, 1<<60), pagesOf(1)...)},
		{"nothing", nil},
	} {
		f, err := os.Create(filepath.Join(t.TempDir(), "pages-1.img"))
		if err != nil {
			t.Fatal(err)
		}
		var g gotPages
		if _, err := g.takePages(f, bytes.NewReader(c.body), 1<<30); err == nil {
			t.Errorf("%s: accepted", c.name)
		}
		if err := g.close(); err != nil {
			t.Error(err)
		}
	}
}

func TestAnImageStreamCutAnywhereIsAnError(t *testing.T) {
	from := t.TempDir()
	if err := os.WriteFile(filepath.Join(from, "core-1.img"), []byte("registers"), 0o600); err != nil {
		t.Fatal(err)
	}
	var wire bytes.Buffer
	want, err := sendImages(from, &wire)
	if err != nil {
		t.Fatal(err)
	}
	for cut := range wire.Len() {
		got, err := receiveImages(t.TempDir(), bytes.NewReader(wire.Bytes()[:cut]))
		// s2 ends cleanly at a block boundary; then the digest tells.
		if err == nil && got == want {
			t.Errorf("cut at byte %d of %d went unnoticed", cut, wire.Len())
		}
	}
}

func TestImageNamesCannotLeaveTheDirectory(t *testing.T) {
	for _, name := range []string{"../x", "/x", "a/b", ".", ""} {
		var wire bytes.Buffer
		c := s2.NewWriter(&wire)
		tw := tar.NewWriter(c)
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: 1, Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := receiveImages(t.TempDir(), &wire); err == nil {
			t.Errorf("accepted %q", name)
		}
	}
}

func FuzzReceiveImages(f *testing.F) {
	dir := f.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.img"), []byte("a"), 0o600); err != nil {
		f.Fatal(err)
	}
	var wire bytes.Buffer
	if _, err := sendImages(dir, &wire); err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.Clone(wire.Bytes()))
	for name, content := range map[string][]byte{"pages-1.img": pagesOf(1, 2), "pages-2.img": pagesOf(2, 1, 3)} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			f.Fatal(err)
		}
	}
	wire.Reset()
	if _, err := sendImages(dir, &wire); err != nil {
		f.Fatal(err)
	}
	f.Add(bytes.Clone(wire.Bytes()))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = receiveImages(t.TempDir(), bytes.NewReader(b))
	})
}
