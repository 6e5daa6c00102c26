package lab

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tranship/tranship/internal/testenv"
)

// unpacked is an image as a runtime would see it.
type unpacked struct {
	name   string
	config ocispec.Image
	files  map[string]*tar.Header
	data   map[string][]byte
}

// unpack follows the layout from the index down and checks every digest.
func unpack(t *testing.T, raw []byte) unpacked {
	t.Helper()
	blobs := readTar(t, raw)
	get := func(d ocispec.Descriptor, into any) []byte {
		data, ok := blobs[blobPath(d)]
		if !ok || digest.FromBytes(data.data) != d.Digest || int64(len(data.data)) != d.Size {
			t.Fatalf("blob %v is missing or another", d)
		}
		if into != nil {
			if err := json.Unmarshal(data.data, into); err != nil {
				t.Fatal(err)
			}
		}
		return data.data
	}
	var index ocispec.Index
	if err := json.Unmarshal(blobs[ocispec.ImageIndexFile].data, &index); err != nil || len(index.Manifests) != 1 {
		t.Fatalf("index: %v, %d manifests", err, len(index.Manifests))
	}
	var manifest ocispec.Manifest
	get(index.Manifests[0], &manifest)
	u := unpacked{name: index.Manifests[0].Annotations[imageNameAnnotation], files: map[string]*tar.Header{}, data: map[string][]byte{}}
	get(manifest.Config, &u.config)
	if len(manifest.Layers) != 1 || len(u.config.RootFS.DiffIDs) != 1 || u.config.RootFS.DiffIDs[0] != manifest.Layers[0].Digest {
		t.Fatalf("layers %v do not match %v", manifest.Layers, u.config.RootFS.DiffIDs)
	}
	for name, e := range readTar(t, get(manifest.Layers[0], nil)) {
		u.files[name], u.data[name] = e.header, e.data
	}
	return u
}

type tarEntry struct {
	header *tar.Header
	data   []byte
}

func readTar(t *testing.T, raw []byte) map[string]tarEntry {
	t.Helper()
	entries := map[string]tarEntry{}
	for tr := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(h.Name, "/")
		if _, twice := entries[name]; twice {
			t.Errorf("%s is in the archive twice", name)
		}
		entries[name] = tarEntry{h, data}
	}
}

func pack(t *testing.T, spec ImageSpec) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := PackImage(t.Context(), spec, &buf); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestAProgramComesWithItsLoaderAndLibraries(t *testing.T) {
	spec := ImageSpec{Name: "example/sh:1", Bins: []string{"/bin/sh"}, Cmd: []string{"sh", "-c", "true"}, Env: []string{"K=V"}, User: "nobody"}
	first := pack(t, spec)
	u := unpack(t, first)
	if u.name != spec.Name || strings.Join(u.config.Config.Cmd, " ") != "sh -c true" || u.config.Config.User != "nobody" {
		t.Errorf("%s: %+v", u.name, u.config.Config)
	}
	if h := u.files["tmp"]; h == nil || h.Mode&0o7777 != 0o1777 {
		t.Errorf("/tmp is %+v", h)
	}
	// What the system's own loader finds must all be there, under these names.
	out, err := exec.Command("ldd", "/bin/sh").Output()
	if err != nil {
		testenv.Missing(t, "ldd: "+err.Error())
	}
	libraries := 0
	for _, field := range strings.Fields(string(out)) {
		if !strings.HasPrefix(field, "/") {
			continue
		}
		libraries++
		if !u.resolves(field) {
			t.Errorf("%s is not in the image", field)
		}
	}
	if libraries == 0 {
		t.Errorf("ldd said %q", out)
	}
	if again := pack(t, spec); !bytes.Equal(first, again) {
		t.Error("the same input gave another image")
	}
}

// resolves follows symbolic links inside the image.
func (u unpacked) resolves(path string) bool {
	for range 40 {
		parts := strings.Split(strings.Trim(path, "/"), "/")
		next := ""
		for i := range parts {
			name := strings.Join(parts[:i+1], "/")
			h := u.files[name]
			if h == nil {
				return false
			}
			if h.Typeflag == tar.TypeSymlink {
				to := h.Linkname
				if !filepath.IsAbs(to) {
					to = filepath.Join("/", filepath.Dir(name), to)
				}
				next = filepath.Join(append([]string{to}, parts[i+1:]...)...)
				break
			}
		}
		if next == "" {
			return true
		}
		path = next
	}
	return false
}

func TestAScriptComesWithItsInterpreter(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/usr/bin/env sh\necho hello\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	u := unpack(t, pack(t, ImageSpec{Name: "x", Bins: []string{script}}))
	for _, path := range []string{script, "/usr/bin/env", "/bin/sh"} {
		if !u.resolves(path) {
			t.Errorf("%s is not in the image", path)
		}
	}
	if len(u.config.Config.Cmd) != 1 || u.config.Config.Cmd[0] != script {
		t.Errorf("it runs %v by default", u.config.Config.Cmd)
	}
	if !strings.HasPrefix(u.config.Config.Env[0], "PATH="+filepath.Dir(script)+":") {
		t.Errorf("the script is not on %s", u.config.Config.Env[0])
	}
}

func TestARootFileSystemIsTakenAsItIs(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a", "b", "file"), []byte("content"), 0o604); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/nowhere", filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	u := unpack(t, pack(t, ImageSpec{Name: "x", Rootfs: dir}))
	if h := u.files["a/b/file"]; h == nil || h.Mode&0o777 != 0o604 || string(u.data["a/b/file"]) != "content" || h.Uid != os.Getuid() {
		t.Errorf("file: %+v, %q", h, u.data["a/b/file"])
	}
	if h := u.files["dangling"]; h == nil || h.Linkname != "/nowhere" {
		t.Errorf("link: %+v", h)
	}
	if len(u.files) != 4 {
		t.Errorf("%d entries, want 4: nothing is added", len(u.files))
	}
}

func TestAnImageOfNothingIsRefused(t *testing.T) {
	for name, spec := range map[string]ImageSpec{
		"no name":            {Bins: []string{"/bin/sh"}},
		"nothing to pack":    {Name: "x"},
		"two kinds at once":  {Name: "x", Rootfs: "/tmp", Bins: []string{"/bin/sh"}},
		"a missing program":  {Name: "x", Bins: []string{"/no/such/program"}},
		"an unknown program": {Name: "x", Bins: []string{"no-such-program"}},
		"a missing root":     {Name: "x", Rootfs: "/no/such/directory"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := PackImage(t.Context(), spec, io.Discard); err == nil {
				t.Error("no error")
			}
		})
	}
}

func TestScriptInterpreter(t *testing.T) {
	for _, tt := range []struct{ name, content, want string }{
		{"plain", "#!/bin/sh\n", "/bin/sh"},
		{"with an argument", "#!/bin/bash -e\n", "/bin/bash"},
		{"with spaces", "#! /usr/bin/perl\n", "/usr/bin/perl"},
		{"through env", "#!/usr/bin/env python3\n", "/usr/bin/env python3"},
		{"through env with options", "#!/usr/bin/env -S A=b node --flag\n", "/usr/bin/env node"},
		{"no line end", "#!/bin/sh", "/bin/sh"},
		{"not a script", "\x7fELF\x02\x01", ""},
		{"empty", "", ""},
		{"an empty line", "#!\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(path, []byte(tt.content), 0o755); err != nil {
				t.Fatal(err)
			}
			got, err := scriptInterpreter(path)
			if err != nil || strings.Join(got, " ") != tt.want {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}
