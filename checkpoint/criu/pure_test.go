package criu

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestParseVersion(t *testing.T) {
	for out, want := range map[string]Version{
		"Version: 4.2.1\n":                  {4, 2, 1},
		"Version: 4.2\nGitID: v4.2\n":       {4, 2, 0},
		"Version: 3.17.1\nGitID: v3.17.1\n": {3, 17, 1},
	} {
		got, err := parseVersion(out)
		if err != nil || got != want {
			t.Errorf("%q: %v, %v", out, got, err)
		}
	}
	if _, err := parseVersion("criu: not found"); err == nil {
		t.Error("accepted nonsense")
	}
	if !(Version{4, 1, 0}).Less(MinVersion) || (Version{4, 2, 0}).Less(MinVersion) || MinVersion.Less(MinVersion) {
		t.Error("versions are out of order")
	}
}

func TestExternalsOfMirrorsWhatRuncRestores(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "proc/acpi"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "proc/kcore"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	spec := &specs.Spec{
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc"},
			{Destination: "/data/", Type: "bind", Source: "/srv"},
			{Destination: "/etc/hosts", Type: "none", Options: []string{"rbind", "ro"}},
		},
		Linux: &specs.Linux{
			MaskedPaths: []string{"/proc/kcore", "/proc/acpi", "/proc/gone"},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.CgroupNamespace},
				{Type: specs.NetworkNamespace, Path: "/proc/self/ns/net"},
			},
		},
	}
	mounts, external, err := ExternalsOf(spec, root)
	if err != nil {
		t.Fatal(err)
	}
	if want := []ExternalMount{{"/data", "/data"}, {"/etc/hosts", "/etc/hosts"}, {"/proc/kcore", "/dev/null"}}; !slices.Equal(mounts, want) {
		t.Errorf("mounts %v, want %v", mounts, want)
	}
	if len(external) != 1 || !strings.HasPrefix(external[0], "net[") || !strings.HasSuffix(external[0], "]:extRootNetNS") {
		t.Errorf("external %v", external)
	}
	// A namespace of runc's own is that of the init process.
	spec.Linux.Namespaces[2].Path = ""
	spec.Linux.MaskedPaths = nil
	if _, own, err := ExternalsOf(spec, "/proc/self/root"); err != nil || !slices.Equal(own, external) {
		t.Errorf("without a path: external %v, %v; want %v", own, err, external)
	}
	spec.Linux.Namespaces[2].Path = "/proc/self/ns/none"
	if _, _, err := ExternalsOf(spec, root); err == nil {
		t.Error("a network namespace that does not exist was accepted")
	}
}

func TestRestoreConfigIsWhatCRIUParses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b.conf")
	if err := (RestoreConfig{LazyPages: true, TCPEstablished: true, LogLevel: 2}).Write(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil || string(b) != "lazy-pages\ntcp-established\nfile-locks\nverbosity=2\n" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestWriteDescriptorsRecordsThreeLinks(t *testing.T) {
	dir := t.TempDir()
	if err := WriteDescriptors(dir, os.Getpid()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "descriptors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var links []string
	if err := json.Unmarshal(b, &links); err != nil || len(links) != 3 {
		t.Errorf("%s, %v", b, err)
	}
}

func TestErrorTailPrefersErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("(0.1) fine\n(0.2) Error (x.c:1): bad\n(0.3) fine\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := ErrorTail(path); got != "(0.2) Error (x.c:1): bad" {
		t.Errorf("%q", got)
	}
	if got := ErrorTail(path + ".none"); got != "" {
		t.Errorf("%q", got)
	}
}
