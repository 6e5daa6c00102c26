package migrate

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/s2"
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
	f.Add(wire.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = receiveImages(t.TempDir(), bytes.NewReader(b))
	})
}
