package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// RecordVersion is the version of Record's JSON. A host refuses another one.
const RecordVersion = 1

// maxRecordBytes bounds a record from a peer: specs are tens of kilobytes.
const maxRecordBytes = 4 << 20

// Record is everything that another host needs to build the same container,
// but for the content itself. It travels as JSON.
type Record struct {
	Version   int               `json:"version"`
	Node      string            `json:"node"`
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels,omitempty"`
	Image     ImageRecord       `json:"image"`
	// Spec is the OCI runtime specification, verbatim.
	Spec       json.RawMessage         `json:"spec"`
	Runtime    RuntimeRecord           `json:"runtime"`
	Snapshot   SnapshotRecord          `json:"snapshot"`
	Network    NetworkRecord           `json:"network"`
	IO         IORecord                `json:"io"`
	Mounts     []Mount                 `json:"mounts,omitempty"`
	Tmpfs      []TmpfsMount            `json:"tmpfs,omitempty"`
	Extensions map[string]OpaqueRecord `json:"extensions,omitempty"`
	// Status and PID are the task's when Describe looked: not facts about the
	// container, so the destination ignores them.
	Status string `json:"status"`
	PID    uint32 `json:"pid"`
}

// ImageRecord names the image and the blobs of this platform.
type ImageRecord struct {
	Name string `json:"name"`
	// Target is what the name points to: a manifest, or an index over several
	// platforms of which only Manifest is needed.
	Target   ocispec.Descriptor   `json:"target"`
	Manifest ocispec.Descriptor   `json:"manifest"`
	Config   ocispec.Descriptor   `json:"config"`
	Layers   []ocispec.Descriptor `json:"layers,omitempty"`
	// ChainID is the snapshot that the unpacked layers make.
	ChainID digest.Digest `json:"chain_id,omitempty"`
	// Problem says why the image could not be described, "" when it could.
	Problem string `json:"problem,omitempty"`
}

// RuntimeRecord names the containerd shim and its options.
type RuntimeRecord struct {
	Name    string       `json:"name"`
	Options OpaqueRecord `json:"options,omitzero"`
}

// OpaqueRecord is a typed message that tranship passes on without reading it.
type OpaqueRecord struct {
	TypeURL string `json:"type_url"`
	Value   []byte `json:"value"`
}

// SnapshotRecord is the container's root file system.
type SnapshotRecord struct {
	Snapshotter string `json:"snapshotter"`
	Key         string `json:"key"`
	// Parent is the committed snapshot below, a chain ID; "" for none.
	Parent   string `json:"parent"`
	ReadOnly bool   `json:"read_only"`
}

// NetworkKind says whose network namespace a shard has.
type NetworkKind string

const (
	// NetworkShard is a namespace of tranship's own with an address that moves.
	NetworkShard NetworkKind = "shard"
	// NetworkNone is a namespace of tranship's own with loopback only.
	NetworkNone NetworkKind = "none"
	// NetworkHost is the host's.
	NetworkHost NetworkKind = "host"
	// NetworkPrivate is one that runc made, with loopback only. It arrives as
	// NetworkNone, for runc's restore would leave loopback down.
	NetworkPrivate NetworkKind = "private"
	// NetworkNetns is one that somebody else made, by path.
	NetworkNetns NetworkKind = "netns"
)

// NetworkRecord is the shard's network.
type NetworkRecord struct {
	Kind NetworkKind  `json:"kind"`
	Path string       `json:"path,omitempty"`
	IP   netip.Prefix `json:"ip,omitzero"`
	MAC  string       `json:"mac,omitempty"`
}

// Own says whether the network namespace is the shard's alone.
func (n NetworkRecord) Own() bool {
	return n.Kind == NetworkShard || n.Kind == NetworkNone || n.Kind == NetworkPrivate
}

// IORecord is where the task's standard streams go, as containerd knows it.
type IORecord struct {
	Terminal bool   `json:"terminal,omitempty"`
	Stdin    string `json:"stdin,omitempty"`
	Stdout   string `json:"stdout,omitempty"`
	Stderr   string `json:"stderr,omitempty"`
}

// MountPolicy says what a migration does with a bind mount.
type MountPolicy string

const (
	// MountShared: the same content is at the same path on every host.
	MountShared MountPolicy = "shared"
	// MountCopy: the content moves with the shard.
	MountCopy MountPolicy = "copy"
)

// Mount is a bind mount that Run was asked for.
type Mount struct {
	Source      string      `json:"source"`
	Destination string      `json:"destination"`
	ReadOnly    bool        `json:"read_only,omitempty"`
	Policy      MountPolicy `json:"policy,omitempty"`
}

// Describe gathers the record of a container, running or not. It reads only.
func (r *Runtime) Describe(ctx context.Context, namespace, name string) (*Record, error) {
	ctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("describe %s: %w", name, err)
	}
	rec := &Record{
		Version: RecordVersion, Node: r.cfg.Node, Namespace: namespace, Name: name,
		Labels:  info.Labels,
		Runtime: RuntimeRecord{Name: info.Runtime.Name, Options: opaque(info.Runtime.Options)},
	}
	if info.Spec != nil {
		rec.Spec = json.RawMessage(info.Spec.GetValue())
	}
	for key, value := range info.Extensions {
		if rec.Extensions == nil {
			rec.Extensions = map[string]OpaqueRecord{}
		}
		rec.Extensions[key] = opaque(value)
	}
	spec, err := rec.OCISpec()
	if err != nil {
		return nil, fmt.Errorf("describe %s: %w", name, err)
	}
	rec.Mounts = mountsOf(info.Labels)
	rec.Network = networkOf(spec, info.Labels, r.net.Path(namespace, name))
	if rec.Snapshot, err = r.describeSnapshot(ctx, info); err != nil {
		return nil, fmt.Errorf("describe %s: %w", name, err)
	}
	rec.Image = r.describeImage(ctx, info, rec.Snapshot.Parent)
	if err := r.describeTask(ctx, rec); err != nil {
		return nil, fmt.Errorf("describe %s: %w", name, err)
	}
	if rec.PID > 0 {
		// A task that ends now has none, and cannot be moved either.
		info, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", rec.PID))
		rec.Tmpfs = tmpfsOf(spec, string(info))
	}
	return rec, nil
}

func (r *Runtime) describeSnapshot(ctx context.Context, info containers.Container) (SnapshotRecord, error) {
	rec := SnapshotRecord{Snapshotter: info.Snapshotter, Key: info.SnapshotKey}
	if info.SnapshotKey == "" {
		return rec, nil // `ctr run --rootfs`; Movable refuses it
	}
	s, err := r.client.SnapshotService(info.Snapshotter).Stat(ctx, info.SnapshotKey)
	if err != nil {
		return rec, fmt.Errorf("snapshot %s: %w", info.SnapshotKey, err)
	}
	rec.Parent = s.Parent
	rec.ReadOnly = s.Kind == snapshots.KindView
	return rec, nil
}

// describeImage never fails: a container runs on when its image is gone or was
// replaced by a newer one under the same name, and then Problem says so.
func (r *Runtime) describeImage(ctx context.Context, info containers.Container, parent string) ImageRecord {
	rec := ImageRecord{Name: info.Image}
	if info.Image == "" {
		rec.Problem = "the container was made without an image"
		return rec
	}
	img, err := r.client.GetImage(ctx, info.Image)
	if err != nil {
		rec.Problem = fmt.Sprintf("image %s: %v", info.Image, err)
		return rec
	}
	rec.Target = img.Target()
	store := r.client.ContentStore()
	manifest, desc, err := manifestOf(ctx, store, rec.Target, img.Platform())
	if err != nil {
		rec.Problem = fmt.Sprintf("image %s: %v", info.Image, err)
		return rec
	}
	rec.Manifest, rec.Config, rec.Layers = desc, manifest.Config, manifest.Layers
	diffs, err := images.RootFS(ctx, store, manifest.Config)
	if err != nil {
		rec.Problem = fmt.Sprintf("image %s: %v", info.Image, err)
		return rec
	}
	rec.ChainID = identity.ChainID(diffs)
	// The lower layers are most of what the shard's open files are made of. A
	// tag that was pulled anew since the container started names other layers.
	if string(rec.ChainID) != parent {
		rec.Problem = fmt.Sprintf("image %s now means other layers (%s) than the container was made from (%s)", info.Image, rec.ChainID, parent)
	}
	return rec
}

func (r *Runtime) describeTask(ctx context.Context, rec *Record) error {
	rec.Status = StatusCreated
	t, err := r.client.TaskService().Get(ctx, taskRequest(rec.Name))
	if err != nil {
		if isNotFound(err) {
			return nil
		}
		return fmt.Errorf("task: %w", err)
	}
	p := t.Process
	rec.Status, rec.PID = statusOf(p.Status), p.Pid
	rec.IO = IORecord{Terminal: p.Terminal, Stdin: p.Stdin, Stdout: p.Stdout, Stderr: p.Stderr}
	return nil
}

func opaque(any typeurl.Any) OpaqueRecord {
	if any == nil || any.GetTypeUrl() == "" {
		return OpaqueRecord{}
	}
	return OpaqueRecord{TypeURL: any.GetTypeUrl(), Value: any.GetValue()}
}

// OCISpec decodes the record's OCI specification.
func (rec *Record) OCISpec() (*specs.Spec, error) {
	var spec specs.Spec
	if err := json.Unmarshal(rec.Spec, &spec); err != nil {
		return nil, fmt.Errorf("OCI specification: %w", err)
	}
	if spec.Linux == nil || spec.Process == nil || spec.Root == nil {
		return nil, errors.New("OCI specification: not one of a Linux container")
	}
	return &spec, nil
}

// mountsOf reads LabelMounts; a label that somebody else wrote and that does
// not parse counts as none, so that Movable refuses the mounts it describes.
func mountsOf(labels map[string]string) []Mount {
	var mounts []Mount
	if raw := labels[LabelMounts]; raw != "" {
		if json.Unmarshal([]byte(raw), &mounts) != nil {
			return nil
		}
	}
	return mounts
}

// networkOf says which kind of network the specification asks for. own is the
// path that tranship would have given the shard's namespace.
func networkOf(spec *specs.Spec, labels map[string]string, own string) NetworkRecord {
	rec := NetworkRecord{Kind: NetworkHost}
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			rec.Kind, rec.Path = NetworkNetns, ns.Path
			if ns.Path == "" {
				rec.Kind = NetworkPrivate
			}
		}
	}
	if rec.Kind != NetworkNetns || rec.Path != own {
		return rec
	}
	switch NetworkKind(labels[LabelNetwork]) {
	case NetworkNone:
		rec.Kind = NetworkNone
	case NetworkShard:
		ip, err := netip.ParsePrefix(labels[LabelIP])
		if err != nil {
			break
		}
		rec.Kind, rec.IP, rec.MAC = NetworkShard, ip, labels[LabelMAC]
	}
	return rec
}

// DecodeRecord reads a record that a peer sent and checks everything that the
// destination acts on. Unknown fields are errors: a field that this version
// does not know may be one that it must not ignore.
func DecodeRecord(raw []byte) (*Record, error) {
	if len(raw) > maxRecordBytes {
		return nil, fmt.Errorf("%w: container record of %d bytes", ErrInvalid, len(raw))
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	rec := new(Record)
	if err := dec.Decode(rec); err != nil {
		return nil, fmt.Errorf("%w: container record: %w", ErrInvalid, err)
	}
	if dec.More() {
		return nil, fmt.Errorf("%w: container record: bytes after its end", ErrInvalid)
	}
	if err := rec.Validate(); err != nil {
		return nil, err
	}
	return rec, nil
}

// Validate reports everything that is wrong with a record, as ErrInvalid.
func (rec *Record) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: container record: "+format, append([]any{ErrInvalid}, args...)...))
	}
	if rec.Version != RecordVersion {
		bad("version %d, this host knows %d", rec.Version, RecordVersion)
	}
	errs = append(errs, CheckName("namespace", rec.Namespace), CheckName("shard", rec.Name))
	spec, err := rec.OCISpec()
	if err != nil {
		bad("%v", err)
	} else if spec.Root.Path != "rootfs" {
		bad("root.path %q is not the bundle's rootfs", spec.Root.Path)
	}
	if !strings.HasPrefix(rec.Runtime.Name, "io.containerd.") {
		bad("runtime %q is not one of containerd's", rec.Runtime.Name)
	}
	if err := CheckName("snapshotter", rec.Snapshot.Snapshotter); err != nil {
		errs = append(errs, err)
	}
	rec.validateImage(bad)
	rec.validateNetwork(bad)
	for _, m := range rec.Tmpfs {
		if err := m.validate(spec); err != nil {
			errs = append(errs, err)
		}
	}
	for _, m := range rec.Mounts {
		if err := m.validate(); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (rec *Record) validateImage(bad func(string, ...any)) {
	img := rec.Image
	if img.Problem != "" {
		bad("%s", img.Problem)
		return
	}
	if img.Name == "" {
		bad("the image has no name")
	}
	blobs := append([]ocispec.Descriptor{img.Target, img.Manifest, img.Config}, img.Layers...)
	for _, d := range blobs {
		if err := d.Digest.Validate(); err != nil || d.Size <= 0 {
			bad("image %s: blob %q of %d bytes", img.Name, d.Digest, d.Size)
		}
	}
	if len(img.Layers) > 0 && img.ChainID.Validate() != nil {
		bad("image %s: chain ID %q", img.Name, img.ChainID)
	}
	if rec.Snapshot.Parent != string(img.ChainID) {
		bad("the snapshot's parent %q is not the image's chain %q", rec.Snapshot.Parent, img.ChainID)
	}
}

func (rec *Record) validateNetwork(bad func(string, ...any)) {
	n := rec.Network
	switch n.Kind {
	case NetworkShard:
		if mac, err := net.ParseMAC(n.MAC); err != nil || len(mac) != 6 || mac[0]&1 != 0 {
			bad("MAC address %q", n.MAC)
		}
		if !n.IP.IsValid() || n.IP.Addr().Zone() != "" {
			bad("address %q", n.IP)
		}
	case NetworkNone, NetworkHost, NetworkPrivate:
	case NetworkNetns:
		if !filepath.IsAbs(n.Path) {
			bad("network namespace %q is not an absolute path", n.Path)
		}
	default:
		bad("network kind %q", n.Kind)
	}
}

func (m Mount) validate() error {
	if !filepath.IsAbs(m.Source) || !filepath.IsAbs(m.Destination) || filepath.Clean(m.Destination) == "/" {
		return fmt.Errorf("%w: mount %s → %s: both paths must be absolute, and the second not /", ErrInvalid, m.Source, m.Destination)
	}
	switch m.Policy {
	case "", MountShared, MountCopy:
		return nil
	}
	return fmt.Errorf("%w: mount %s: policy %q is neither shared nor copy", ErrInvalid, m.Destination, m.Policy)
}

func isNotFound(err error) bool { return err != nil && errdefs.IsNotFound(nativeError(err)) }
