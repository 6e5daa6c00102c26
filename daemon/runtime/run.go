package runtime

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/tranship/tranship/internal/failpoint"
)

// RunSpec is what Run needs. The zero value of a field is its default.
type RunSpec struct {
	Namespace string
	Name      string // "" lets Run choose
	Image     string
	Command   []string // replaces the image's command, behind its entrypoint
	Network   NetworkKind
	IP        netip.Addr
	Memory    int64 // bytes, 0 is unlimited
	CPUs      float64
	Env       []string
	Mounts    []Mount
	Labels    map[string]string
	// Index makes it a shard of the workload that Labels name; nil: it is none.
	Index *int
	// Spec is LabelSpec, for shards with an Index.
	Spec string
}

// minMemory is what runc itself needs to start a container (it refuses less).
const minMemory = 6 << 20

func (s RunSpec) validate() error {
	errs := []error{CheckName("namespace", s.Namespace), CheckName("shard", s.Name)}
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
	}
	// The name becomes the hostname, which Linux cuts off at 64 bytes.
	if len(s.Name) > 63 {
		bad("shard %q: more than 63 characters do not fit a hostname", s.Name)
	}
	switch s.Network {
	case NetworkShard:
	case NetworkHost, NetworkNone:
		if s.IP.IsValid() {
			bad("an address needs network shard, not %s", s.Network)
		}
	default:
		bad("network %q: use shard, host or none", s.Network)
	}
	if s.Memory != 0 && s.Memory < minMemory {
		bad("memory limit of %d bytes: at least %d are needed to start a container", s.Memory, minMemory)
	}
	if s.CPUs < 0 || s.CPUs > 0 && s.CPUs < 0.01 {
		bad("cpus %v: use 0 for no limit, or at least 0.01", s.CPUs)
	}
	for _, env := range s.Env {
		if key, _, ok := strings.Cut(env, "="); !ok || key == "" {
			bad("environment %q is not KEY=VALUE", env)
		}
	}
	for key, value := range s.Labels {
		if key == "" || len(key)+len(value) > 4096 { // containerd's limit
			bad("label %q: key and value may have 4096 bytes together", key)
		}
		if strings.HasPrefix(key, "containerd.io/") {
			bad("label %q: its prefix is reserved", key)
		}
		if strings.HasPrefix(key, "tranship.io/") {
			errs = append(errs, checkPolicy(key, value))
		}
	}
	for _, m := range s.Mounts {
		errs = append(errs, m.validate())
	}
	return errors.Join(errs...)
}

// Run creates and starts a shard:
//
//  1. the image, pulled when this host lacks it, is unpacked
//  2. an address is leased, the network namespace made and connected
//  3. the container gets its snapshot and specification
//  4. its task starts
//
// What fails undoes the steps before it.
func (r *Runtime) Run(ctx context.Context, s RunSpec) (_ *Shard, err error) {
	if s.Name == "" {
		s.Name = randomName()
	}
	if s.Network == "" {
		s.Network = NetworkShard
	}
	if err := s.validate(); err != nil {
		return nil, err
	}
	for _, m := range s.Mounts {
		if _, err := os.Stat(m.Source); err != nil {
			return nil, fmt.Errorf("%w: mount source: %w", ErrInvalid, err)
		}
	}
	// Two at once would take each other for leftovers.
	key := [2]string{s.Namespace, s.Name}
	if _, busy := r.starting.LoadOrStore(key, true); busy {
		return nil, fmt.Errorf("%w: %s in namespace %s is being started", ErrExists, s.Name, s.Namespace)
	}
	defer r.starting.Delete(key)
	if _, _, err := r.load(ctx, s.Namespace, s.Name); err == nil {
		return nil, fmt.Errorf("%w: %s in namespace %s", ErrExists, s.Name, s.Namespace)
	} else if !errors.Is(err, ErrNotFound) {
		return nil, err
	}
	nsctx := in(ctx, s.Namespace)
	var undo []func(context.Context) error
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := detached(nsctx)
		defer cancel()
		for _, f := range slices.Backward(undo) {
			err = errors.Join(err, f(ctx))
		}
	}()
	img, err := r.image(nsctx, s.Image)
	if err != nil {
		return nil, err
	}
	network := ShardNet{Namespace: s.Namespace, Name: s.Name}
	// Without a container, network and address of this name are what a daemon
	// that was killed in an earlier Run left.
	if err := errors.Join(r.net.Delete(ctx, network), r.leases.dropShard(s.Namespace, s.Name)); err != nil {
		return nil, err
	}
	if s.Network == NetworkShard {
		if network.IP, err = r.allocate(ctx, s.Namespace, s.Name, s.IP); err != nil {
			return nil, err
		}
		network.MAC = MACFor(network.IP.Addr())
		undo = append(undo, func(context.Context) error {
			return r.leases.drop(network.IP.Addr(), s.Namespace, s.Name)
		})
	}
	if s.Network != NetworkHost {
		undo = append(undo, func(ctx context.Context) error { return r.net.Delete(ctx, network) })
		if err := r.net.Create(ctx, network); err != nil {
			return nil, err
		}
	}
	c, err := r.createContainer(nsctx, s, img, network, &undo)
	if err != nil {
		return nil, err
	}
	undo = append(undo, func(ctx context.Context) error { return r.deleteTask(ctx, c) })
	if err := failpoint.Hit(ctx, "run.created"); err != nil {
		return nil, err
	}
	io, err := r.logIO(s.Namespace, s.Name)
	if err != nil {
		return nil, err
	}
	t, err := c.NewTask(nsctx, io)
	if err != nil {
		return nil, fmt.Errorf("create task %s: %w", s.Name, err)
	}
	if err := t.Start(nsctx); err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Name, err)
	}
	return r.Shard(ctx, s.Namespace, s.Name)
}

func (r *Runtime) createContainer(ctx context.Context, s RunSpec, img containerd.Image, network ShardNet, undo *[]func(context.Context) error) (containerd.Container, error) {
	labels := map[string]string{LabelShard: "true", LabelNetwork: string(s.Network)}
	maps.Copy(labels, s.Labels)
	if s.Index != nil {
		labels[LabelIndex], labels[LabelSpec] = strconv.Itoa(*s.Index), s.Spec
	}
	if network.IP.IsValid() {
		labels[LabelIP], labels[LabelMAC] = network.IP.String(), network.MAC
	}
	if len(s.Mounts) > 0 {
		raw, err := json.Marshal(s.Mounts)
		if err != nil {
			return nil, err
		}
		if len(raw)+len(LabelMounts) > 4096 {
			return nil, fmt.Errorf("%w: too many mounts for a label", ErrInvalid)
		}
		labels[LabelMounts] = string(raw)
	}
	// A snapshot without a container is what an interrupted Run leaves.
	sn := r.client.SnapshotService(r.cfg.Snapshotter)
	if info, err := sn.Stat(ctx, s.Name); err == nil && info.Labels[LabelShard] != "" && info.Labels[LabelIncoming] == "" {
		if err := sn.Remove(ctx, s.Name); err != nil {
			return nil, fmt.Errorf("snapshot %s of an interrupted run: %w", s.Name, err)
		}
	}
	c, err := r.client.NewContainer(ctx, s.Name,
		containerd.WithSnapshotter(r.cfg.Snapshotter),
		containerd.WithNewSnapshot(s.Name, img, snapshots.WithLabels(map[string]string{LabelShard: "true"})),
		containerd.WithImageName(img.Name()),
		containerd.WithImageStopSignal(img, "SIGTERM"),
		containerd.WithAdditionalContainerLabels(labels),
		containerd.WithRuntime("io.containerd.runc.v2", nil),
		containerd.WithNewSpec(r.specOpts(s, img)...))
	if err != nil {
		if rm := sn.Remove(context.WithoutCancel(ctx), s.Name); rm != nil && !errdefs.IsNotFound(rm) {
			err = errors.Join(err, rm)
		}
		return nil, fmt.Errorf("create container %s: %w", s.Name, err)
	}
	*undo = append(*undo, func(ctx context.Context) error { return c.Delete(ctx, containerd.WithSnapshotCleanup) })
	return c, nil
}

// specOpts makes the OCI specification. Against containerd's default it leaves
// out what costs blackout: CRIU packs each tmpfs with a tar process of its own
// (10–15 ms each way), so /run is part of the root file system, and directories
// of /proc and /sys that are hidden by a tmpfs by default are read-only instead.
func (r *Runtime) specOpts(s RunSpec, img containerd.Image) []oci.SpecOpts {
	env := append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, s.Env...)
	opts := []oci.SpecOpts{
		oci.WithImageConfigArgs(img, s.Command),
		withEnv(env[0], s.Env),
		oci.WithHostname(s.Name),
		oci.WithCgroup(CgroupPath(s.Namespace, s.Name)),
		oci.WithoutRunMount,
		oci.WithAnnotations(map[string]string{AnnotationCRIUConfig: CRIUConfigPath(s.Namespace, s.Name)}),
		withoutMaskedDirectories,
		withOpenFiles,
	}
	switch s.Network {
	case NetworkHost:
		opts = append(opts, oci.WithHostNamespace(specs.NetworkNamespace))
	default:
		opts = append(opts, oci.WithLinuxNamespace(specs.LinuxNamespace{
			Type: specs.NetworkNamespace, Path: r.net.Path(s.Namespace, s.Name),
		}))
	}
	if s.Memory > 0 {
		opts = append(opts, oci.WithMemoryLimit(uint64(s.Memory)))
	}
	if s.CPUs > 0 {
		opts = append(opts, oci.WithCPUCFS(int64(s.CPUs*cpuPeriod), cpuPeriod))
	}
	var mounts []specs.Mount
	for _, m := range s.Mounts {
		options := []string{"rbind", "rw"}
		if m.ReadOnly {
			options[1] = "ro"
		}
		mounts = append(mounts, specs.Mount{
			Type: "bind", Source: filepath.Clean(m.Source), Destination: filepath.Clean(m.Destination), Options: options,
		})
	}
	return append(opts, oci.WithMounts(mounts))
}

// withEnv lays the caller's environment over the image's, and gives a PATH to
// images that name none.
func withEnv(path string, env []string) oci.SpecOpts {
	return func(ctx context.Context, client oci.Client, c *containers.Container, s *oci.Spec) error {
		if !slices.ContainsFunc(s.Process.Env, func(e string) bool { return strings.HasPrefix(e, "PATH=") }) {
			s.Process.Env = append(s.Process.Env, path)
		}
		return oci.WithEnv(env)(ctx, client, c, s)
	}
}

// withoutMaskedDirectories: runc hides a file behind /dev/null, which CRIU takes
// for an external mount, but a directory behind a tmpfs.
func withoutMaskedDirectories(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	s.Linux.MaskedPaths = slices.DeleteFunc(s.Linux.MaskedPaths, func(path string) bool {
		fi, err := os.Stat(path)
		if err != nil || !fi.IsDir() {
			return false
		}
		s.Linux.ReadonlyPaths = append(s.Linux.ReadonlyPaths, path)
		return true
	})
	return nil
}

// withOpenFiles gives services room for connections: containerd's default of
// 1024 is also the hard limit. Never more than this host may give.
func withOpenFiles(ctx context.Context, client oci.Client, c *containers.Container, s *oci.Spec) error {
	var own syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &own); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	const hard = 524288 // systemd's default
	return oci.WithRlimit(&specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: min(own.Max, hard)})(ctx, client, c, s)
}

// EnsureImage has an image on this host as Run would have it: pulled when it is
// missing, and unpacked.
func (r *Runtime) EnsureImage(ctx context.Context, namespace, ref string) error {
	_, err := r.image(in(ctx, namespace), ref)
	return err
}

// image finds the image, pulls it when this host lacks it, and unpacks it.
func (r *Runtime) image(ctx context.Context, ref string) (containerd.Image, error) {
	if ref == "" {
		return nil, fmt.Errorf("%w: the image is missing", ErrInvalid)
	}
	img, err := r.client.GetImage(ctx, ref)
	if errdefs.IsNotFound(err) {
		// What `docker` calls redis is docker.io/library/redis:latest in containerd.
		named, parseErr := reference.ParseDockerRef(ref)
		if parseErr != nil {
			return nil, fmt.Errorf("%w: image %q: %w", ErrInvalid, ref, parseErr)
		}
		if img, err = r.client.GetImage(ctx, named.String()); errdefs.IsNotFound(err) {
			img, err = r.client.Pull(ctx, named.String(), containerd.WithPullUnpack, containerd.WithPullSnapshotter(r.cfg.Snapshotter))
		}
		if err != nil {
			return nil, fmt.Errorf("image %s is not on this host (ctr images import brings it) and could not be pulled: %w", ref, err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", ref, err)
	}
	unpacked, err := img.IsUnpacked(ctx, r.cfg.Snapshotter)
	if err == nil && !unpacked {
		err = img.Unpack(ctx, r.cfg.Snapshotter)
	}
	if err != nil {
		return nil, fmt.Errorf("unpack image %s: %w", ref, err)
	}
	return img, nil
}

func randomName() string {
	var b [4]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return "shard-" + hex.EncodeToString(b[:])
}
