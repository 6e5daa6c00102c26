//go:build integration

package runtime_test

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/vishvananda/netlink"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/testenv"
)

const (
	inside    = "TRANSHIP_RUNTIME_TEST_INSIDE"
	testImage = "test.local/shard:1"
	namespace = "default"
	// criuDir holds CRIU as `make` installs it.
	criuDir = "/usr/local/lib/tranship/criu"
)

// TestMain runs the tests again in mount, network, pid and uts namespaces of
// their own: what they start dies with them, and no bridge of the machine's is
// touched.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(inside) != "" {
		if os.Getenv(inside) != "" {
			if err := settle(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS,
		Pdeathsig:  syscall.SIGKILL,
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func settle() error {
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
	}{
		{"", "/", "", syscall.MS_REC | syscall.MS_PRIVATE},
		{"proc", "/proc", "proc", 0},
		{"tmpfs", "/run", "tmpfs", 0},
	} {
		if err := syscall.Mount(m.source, m.target, m.fstype, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// host is one containerd with a Runtime on it.
type host struct {
	*runtime.Runtime
	client *containerd.Client
	dir    string
	bridge string
	// before are the interfaces that were there before the host.
	before []string
}

func newHost(t *testing.T, name string) *host {
	t.Helper()
	testenv.NeedRoot(t)
	for _, program := range []string{"containerd", "containerd-shim-runc-v2", "runc"} {
		if _, err := exec.LookPath(program); err != nil {
			testenv.Missing(t, program)
		}
	}
	dir := t.TempDir()
	h := &host{dir: dir, bridge: "br-" + name, before: veths(t)}
	path := os.Getenv("PATH")
	bin := filepath.Join(dir, "bin")
	must(t, os.Mkdir(bin, 0o755))
	if _, err := os.Stat(filepath.Join(criuDir, "criu")); err == nil {
		must(t, os.Symlink(filepath.Join(criuDir, "criu"), filepath.Join(bin, "criu")))
	}
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs", "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
  address = %q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "c.sock"))
	must(t, os.WriteFile(filepath.Join(dir, "config.toml"), []byte(config), 0o644))
	log, err := os.Create(filepath.Join(dir, "containerd.log"))
	must(t, err)
	cmd := exec.Command("containerd", "--log-level", "warn", "--config", filepath.Join(dir, "config.toml"))
	cmd.Env = append(os.Environ(), "PATH="+bin+":"+path)
	cmd.Stdout, cmd.Stderr = log, log
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			raw, _ := os.ReadFile(log.Name())
			t.Logf("containerd's log:\n%s", tail(raw, 6000))
		}
	})
	cfg := runtime.Config{
		Node: name, Address: filepath.Join(dir, "c.sock"), Snapshotter: "overlayfs",
		StateDir: filepath.Join(dir, "var"), RunDir: filepath.Join(dir, "run"),
		Network: runtime.NetworkConfig{
			Bridge: h.bridge,
			Subnet: netip.MustParsePrefix("10.89.0.0/16"),
			Pool:   netip.MustParsePrefix("10.89.1.0/24"),
			CNIBin: []string{"/usr/lib/cni", "/opt/cni/bin"},
		},
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	// containerd makes its socket when it is ready.
	await(t, ctx, "containerd's socket", func() bool { _, err := os.Stat(cfg.Address); return err == nil })
	h.Runtime, err = runtime.New(ctx, cfg)
	must(t, err)
	t.Cleanup(func() { h.Close() })
	h.client, err = containerd.New(cfg.Address)
	must(t, err)
	t.Cleanup(func() { h.client.Close() })
	t.Cleanup(func() {
		shards, err := h.List(context.Background(), namespace)
		if err != nil {
			t.Error(err)
		}
		for _, s := range shards {
			if s.Incoming != "" {
				err = h.DestroyIncoming(context.Background(), namespace, s.Name, s.Incoming)
			} else {
				err = h.Remove(context.Background(), namespace, s.Name, true)
			}
			if err != nil {
				t.Error(err)
			}
		}
	})
	return h
}

// addImage gives the host the image with the program of testdata/shard, in two
// layers, behind an index with another platform's manifest that is not there.
func (h *host) addImage(t *testing.T) {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), namespace)
	ctx, done, err := h.client.WithLease(ctx)
	must(t, err)
	defer done(ctx)
	program, err := os.ReadFile(buildShard(t))
	must(t, err)
	blob := func(mediaType string, raw []byte, labels map[string]string) ocispec.Descriptor {
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
		err := content.WriteBlob(ctx, h.client.ContentStore(), d.Digest.String(), bytes.NewReader(raw), d, content.WithLabels(labels))
		if err != nil && !errdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
		return d
	}
	document := func(mediaType string, v any, labels map[string]string) ocispec.Descriptor {
		raw, err := json.Marshal(v)
		must(t, err)
		return blob(mediaType, raw, labels)
	}
	var layers []ocispec.Descriptor
	var diffs []digest.Digest
	for _, file := range []struct {
		name string
		raw  []byte
	}{{"shard", program}, {"etc/motd", []byte("hello\n")}} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		must(t, w.WriteHeader(&tar.Header{Name: file.name, Mode: 0o755, Size: int64(len(file.raw))}))
		_, err := w.Write(file.raw)
		must(t, err)
		must(t, w.Close())
		layers = append(layers, blob(ocispec.MediaTypeImageLayer, b.Bytes(), nil))
		diffs = append(diffs, digest.FromBytes(b.Bytes()))
	}
	platform := ocispec.Platform{OS: "linux", Architecture: goruntime.GOARCH}
	config := document(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platform,
		Config:   ocispec.ImageConfig{Entrypoint: []string{"/shard"}, Cmd: []string{"default"}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffs},
	}, nil)
	labels := map[string]string{"containerd.io/gc.ref.content.config": config.Digest.String()}
	for i, l := range layers {
		labels[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = l.Digest.String()
	}
	manifest := document(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: layers,
	}, labels)
	manifest.Platform = &platform
	absent := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("absent"), Size: 7,
		Platform: &ocispec.Platform{OS: "linux", Architecture: "s390x"},
	}
	index := document(ocispec.MediaTypeImageIndex, ocispec.Index{
		MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{absent, manifest},
	}, map[string]string{"containerd.io/gc.ref.content.m.1": manifest.Digest.String()})
	_, err = h.client.ImageService().Create(ctx, images.Image{Name: testImage, Target: index})
	must(t, err)
}

func buildShard(t *testing.T) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "shard")
	cmd := exec.Command("go", "build", "-o", out, "./testdata/shard")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if raw, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the test's shard: %v\n%s", err, raw)
	}
	return out
}

func (h *host) run(t *testing.T, s runtime.RunSpec) *runtime.Shard {
	t.Helper()
	s.Namespace, s.Image = namespace, testImage
	shard, err := h.Run(t.Context(), s)
	must(t, err)
	return shard
}

// listen gives this side of the bridge the address 10.89.255.1.
func (h *host) listen(t *testing.T) {
	t.Helper()
	link, err := netlink.LinkByName(h.bridge)
	must(t, err)
	addr, err := netlink.ParseAddr("10.89.255.1/16")
	must(t, err)
	if err := netlink.AddrReplace(link, addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.AddrDel(link, addr) })
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// await looks until ok holds or ctx ends.
func await(t *testing.T, ctx context.Context, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatalf("waited in vain for %s", what)
		case <-tick.C:
		}
	}
}

func tail(raw []byte, n int) string {
	return strings.ToValidUTF8(string(raw[max(0, len(raw)-n):]), "?")
}
