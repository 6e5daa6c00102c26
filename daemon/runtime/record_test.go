package runtime

import (
	"encoding/json"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// sampleSpec is a shard as Run makes it.
func sampleSpec() *specs.Spec {
	return &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"serve"}, Capabilities: &specs.LinuxCapabilities{}},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/dev", Type: "tmpfs"}},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace},
				{Type: specs.MountNamespace},
				{Type: specs.NetworkNamespace, Path: "/run/tranship/netns/default--web"},
			},
		},
	}
}

func sampleRecord(t testing.TB, change func(*Record, *specs.Spec)) *Record {
	t.Helper()
	spec := sampleSpec()
	chain := digest.FromString("chain")
	blob := func(s string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: "m", Digest: digest.FromString(s), Size: int64(len(s))}
	}
	rec := &Record{
		Version: RecordVersion, Node: "host-1", Namespace: "default", Name: "web", Status: StatusRunning, PID: 7,
		Image: ImageRecord{
			Name: "img", Target: blob("index"), Manifest: blob("manifest"), Config: blob("config"),
			Layers: []ocispec.Descriptor{blob("layer")}, ChainID: chain,
		},
		Runtime:  RuntimeRecord{Name: "io.containerd.runc.v2"},
		Snapshot: SnapshotRecord{Snapshotter: "overlayfs", Key: "web", Parent: chain.String()},
		Network: NetworkRecord{
			Kind: NetworkShard, Path: "/run/tranship/netns/default--web",
			IP: netip.MustParsePrefix("10.89.1.7/16"), MAC: "02:74:0a:59:01:07",
		},
	}
	if change != nil {
		change(rec, spec)
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if rec.Spec == nil {
		rec.Spec = raw
	}
	return rec
}

func TestARecordSurvivesItsJourney(t *testing.T) {
	rec := sampleRecord(t, func(r *Record, _ *specs.Spec) {
		r.Labels = map[string]string{"a": "b"}
		r.Mounts = []Mount{{Source: "/a", Destination: "/b", Policy: MountCopy}}
		r.Extensions = map[string]OpaqueRecord{"x": {TypeURL: "t", Value: []byte{0, 255}}}
	})
	raw, err := json.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeRecord(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, rec) {
		t.Errorf("got %+v\nwant %+v", got, rec)
	}
	for i := range raw {
		if _, err := DecodeRecord(raw[:i]); !errors.Is(err, ErrInvalid) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
}

func TestAPeersRecordIsNotBelieved(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Record, *specs.Spec)
		want   string
	}{
		{"another version", func(r *Record, _ *specs.Spec) { r.Version = 2 }, "version 2"},
		{"a name that leaves its directory", func(r *Record, _ *specs.Spec) { r.Name = "../web" }, "shard"},
		{"a namespace that leaves its directory", func(r *Record, _ *specs.Spec) { r.Namespace = ".." }, "namespace"},
		{"a root file system that is a host directory", func(_ *Record, s *specs.Spec) { s.Root.Path = "/" }, "root.path"},
		{"a specification that is none", func(r *Record, _ *specs.Spec) { r.Spec = json.RawMessage(`[]`) }, "OCI specification"},
		{"a specification for Windows", func(_ *Record, s *specs.Spec) { s.Linux = nil }, "Linux"},
		{"a runtime that is a path", func(r *Record, _ *specs.Spec) { r.Runtime.Name = "/tmp/shim" }, "runtime"},
		{"a snapshotter that is none", func(r *Record, _ *specs.Spec) { r.Snapshot.Snapshotter = "" }, "snapshotter"},
		{"an image without a name", func(r *Record, _ *specs.Spec) { r.Image.Name = "" }, "no name"},
		{"a digest that is none", func(r *Record, _ *specs.Spec) { r.Image.Layers[0].Digest = "sha256:x" }, "blob"},
		{"a blob without a size", func(r *Record, _ *specs.Spec) { r.Image.Config.Size = 0 }, "blob"},
		{"a snapshot on other layers", func(r *Record, _ *specs.Spec) { r.Snapshot.Parent = "other" }, "parent"},
		{"an image that could not be described", func(r *Record, _ *specs.Spec) { r.Image.Problem = "gone" }, "gone"},
		{"a multicast MAC", func(r *Record, _ *specs.Spec) { r.Network.MAC = "03:00:00:00:00:01" }, "MAC"},
		{"an address with a zone", func(r *Record, _ *specs.Spec) { r.Network.IP = netip.Prefix{} }, "address"},
		{"an unknown network", func(r *Record, _ *specs.Spec) { r.Network.Kind = "wifi" }, "network kind"},
		{"a relative namespace path", func(r *Record, _ *specs.Spec) { r.Network = NetworkRecord{Kind: NetworkNetns, Path: "x"} }, "absolute"},
		{"a mount over the root", func(r *Record, _ *specs.Spec) { r.Mounts = []Mount{{Source: "/a", Destination: "/x/.."}} }, "mount"},
		{"a mount with a made-up policy", func(r *Record, _ *specs.Spec) {
			r.Mounts = []Mount{{Source: "/a", Destination: "/b", Policy: "move"}}
		}, "policy"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			raw, err := json.Marshal(sampleRecord(t, tt.change))
			if err != nil {
				t.Fatal(err)
			}
			_, err = DecodeRecord(raw)
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	for _, raw := range []string{`{"version":1,"surprise":true}`, strings.Repeat(" ", maxRecordBytes+1), `null`} {
		if _, err := DecodeRecord([]byte(raw)); !errors.Is(err, ErrInvalid) {
			t.Errorf("%.40s: %v", raw, err)
		}
	}
	good, _ := json.Marshal(sampleRecord(t, nil))
	if _, err := DecodeRecord(append(good, "{}"...)); !errors.Is(err, ErrInvalid) {
		t.Errorf("two records: %v", err)
	}
}

func FuzzDecodeRecord(f *testing.F) {
	good, err := json.Marshal(sampleRecord(f, nil))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		rec, err := DecodeRecord(raw)
		if err != nil {
			return
		}
		Movable(rec) // must not panic on what was accepted
		again, err := json.Marshal(rec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := DecodeRecord(again); err != nil {
			t.Errorf("accepted once, refused then: %v", err)
		}
	})
}

func TestTheNetworkIsReadFromTheSpecification(t *testing.T) {
	const own = "/run/tranship/netns/default--web"
	shard := map[string]string{LabelNetwork: "shard", LabelIP: "10.89.1.7/16", LabelMAC: "02:74:0a:59:01:07"}
	for _, tt := range []struct {
		name   string
		ns     []specs.LinuxNamespace
		labels map[string]string
		want   NetworkKind
	}{
		{"no namespace is the host's network", nil, nil, NetworkHost},
		{"a namespace without a path is runc's", []specs.LinuxNamespace{{Type: "network"}}, nil, NetworkPrivate},
		{"somebody's path is somebody's", []specs.LinuxNamespace{{Type: "network", Path: "/run/netns/x"}}, nil, NetworkNetns},
		{"labels do not make a path ours", []specs.LinuxNamespace{{Type: "network", Path: "/run/netns/x"}}, shard, NetworkNetns},
		{"our path with an address", []specs.LinuxNamespace{{Type: "network", Path: own}}, shard, NetworkShard},
		{"our path with loopback only", []specs.LinuxNamespace{{Type: "network", Path: own}}, map[string]string{LabelNetwork: "none"}, NetworkNone},
		{"our path with a broken label is nobody's", []specs.LinuxNamespace{{Type: "network", Path: own}}, map[string]string{LabelNetwork: "shard", LabelIP: "x"}, NetworkNetns},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := networkOf(&specs.Spec{Linux: &specs.Linux{Namespaces: tt.ns}}, tt.labels, own)
			if got.Kind != tt.want || (got.Kind == NetworkShard) != got.IP.IsValid() {
				t.Errorf("%+v, want %s", got, tt.want)
			}
		})
	}
}

func TestTheDestinationsSpecificationKeepsWhatItDoesNotKnow(t *testing.T) {
	rec := sampleRecord(t, nil)
	rec.Spec = json.RawMessage(`{"ociVersion":"9.9","future":{"limit":18446744073709551615},"process":{},"root":{"path":"rootfs"},
		"linux":{"namespaces":[{"type":"network","path":"/old"},{"type":"pid"}]}}`)
	r := &Runtime{net: newNetwork(Config{RunDir: "/here"})}
	out, err := r.incomingSpec(rec)
	if err != nil {
		t.Fatal(err)
	}
	got := string(out.GetValue())
	for _, want := range []string{
		`18446744073709551615`, `"path":"/here/netns/default--web"`, `"org.criu.config":"/run/tranship/criu/default/web.conf"`, `"ociVersion":"9.9"`,
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%s lacks %s", got, want)
		}
	}
	if strings.Contains(got, "/old") {
		t.Errorf("%s has the source's path", got)
	}
}

func TestTheWritableLayerIsFound(t *testing.T) {
	for _, tt := range []struct {
		name   string
		mounts []mount.Mount
		want   string
		fails  bool
	}{
		{name: "an overlay", mounts: []mount.Mount{{Type: "overlay", Options: []string{"index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"}}}, want: "/u"},
		{name: "a read-only overlay has none", mounts: []mount.Mount{{Type: "overlay", Options: []string{"lowerdir=/a:/b"}}}},
		{name: "a snapshot without parents", mounts: []mount.Mount{{Type: "bind", Source: "/s", Options: []string{"rw", "rbind"}}}, want: "/s"},
		{name: "a view of one layer has none", mounts: []mount.Mount{{Type: "bind", Source: "/s", Options: []string{"ro", "rbind"}}}},
		{name: "another file system", mounts: []mount.Mount{{Type: "ext4", Source: "/dev/x"}}, fails: true},
		{name: "no mounts", fails: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := upperOf(tt.mounts)
			if got != tt.want || (err != nil) != tt.fails {
				t.Errorf("%q %v", got, err)
			}
		})
	}
}
