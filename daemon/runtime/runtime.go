// Package runtime is tranship's only door to containerd and to CNI. It owns
// how a shard becomes a container (Run), what another host must know to build
// the same container (Describe, Record), the destination's half-built copy
// (EnsureContent → PrepareImage → CreateForRestore → NewRestoreTask →
// RestoreTask.Start → Adopt, undone by DestroyIncoming), the shard's network
// (Network) and its freezer (Cgroup, Freezer).
//
// It refuses to know about peers, phases and CRIU: it never decides that a
// shard moves, and every method may run twice with the same outcome, because a
// daemon that died in the middle starts again from what the system shows.
package runtime

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Labels and annotations that tranship puts on containers. They travel with the
// shard, but for LabelIncoming.
const (
	// LabelShard is "true" on containers made by Run.
	LabelShard = "tranship.io/shard"
	// LabelNetwork is the NetworkKind of a container made by Run.
	LabelNetwork = "tranship.io/network"
	// LabelIP is the address with prefix length, LabelMAC the interface's.
	LabelIP  = "tranship.io/ip"
	LabelMAC = "tranship.io/mac"
	// LabelMounts is a JSON array of Mount: which bind mount moves how.
	LabelMounts = "tranship.io/mounts"
	// LabelIncoming carries the id of the migration that is building this
	// container, image or snapshot. Nothing with it may run before Commit.
	LabelIncoming = "tranship.io/incoming"
	// AnnotationCRIUConfig makes runc name a CRIU configuration file to CRIU.
	AnnotationCRIUConfig = "org.criu.config"
)

// Sentinels that callers branch on; the wrapping error names the thing.
var (
	ErrNotFound   = errors.New("no such shard")
	ErrExists     = errors.New("name is taken")
	ErrNotRunning = errors.New("shard is not running")
	ErrRunning    = errors.New("shard is running")
	ErrIncoming   = errors.New("a migration is bringing this shard here")
	ErrInvalid    = errors.New("invalid")
)

// Config is what New needs. Paths are absolute.
type Config struct {
	// Node is this host's name in the pool.
	Node string
	// Address is containerd's socket.
	Address string
	// Snapshotter makes the root file systems of shards made by Run.
	Snapshotter string
	// StateDir survives reboots: logs, address leases.
	StateDir string
	// RunDir does not: network namespaces.
	RunDir  string
	Network NetworkConfig
	// PeerAddresses tells which addresses shards of reachable peers use; nil
	// means that there are no peers. complete is false when a peer could not
	// be asked.
	PeerAddresses func(ctx context.Context) (used []netip.Addr, complete bool)
	Log           *slog.Logger
}

// NetworkConfig is the shards' network on this host.
type NetworkConfig struct {
	Bridge  string
	Subnet  netip.Prefix
	Pool    netip.Prefix
	Gateway netip.Addr
	MTU     int
	CNIBin  []string
}

// Runtime talks to one containerd. It is safe for concurrent use.
type Runtime struct {
	cfg    Config
	client *containerd.Client
	net    *Network
	leases *leaseBook
	log    *slog.Logger

	starting sync.Map // [2]string{namespace, name} of Runs under way
}

// dialTimeout is how long New waits for containerd's socket: at boot both
// services start together, and systemd orders but does not await readiness.
const dialTimeout = 10 * time.Second

// New connects to containerd and opens the address book. Close releases both.
func New(ctx context.Context, cfg Config) (*Runtime, error) {
	for _, dir := range []string{cfg.StateDir, cfg.RunDir} {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("runtime: %q is not an absolute path", dir)
		}
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("runtime: %w", err)
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	// The proxy of the environment must not see a unix socket, and the connect
	// backoff of gRPC (up to 120 s) would outlive a containerd restart by far.
	client, err := containerd.New(cfg.Address,
		containerd.WithTimeout(dialTimeout),
		containerd.WithExtraDialOpts([]grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithNoProxy(),
		}))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", cfg.Address, err)
	}
	if err := awaitAnswer(ctx, client); err != nil {
		client.Close()
		return nil, fmt.Errorf("containerd at %s: %w", cfg.Address, err)
	}
	leases, err := openLeases(filepath.Join(cfg.StateDir, "leases.db"))
	if err != nil {
		client.Close()
		return nil, err
	}
	r := &Runtime{cfg: cfg, client: client, leases: leases, log: cfg.Log}
	r.net = newNetwork(cfg)
	return r, nil
}

// Close ends the connection to containerd; shards run on.
func (r *Runtime) Close() error {
	return errors.Join(r.net.close(), r.leases.Close(), r.client.Close())
}

// Network is the door to shards' network namespaces.
func (r *Runtime) Network() *Network { return r.net }

// Version returns containerd's version.
func (r *Runtime) Version(ctx context.Context) (string, error) {
	v, err := r.client.Version(ctx)
	if err != nil {
		return "", fmt.Errorf("containerd's version: %w", err)
	}
	return v.Version, nil
}

// Namespaces lists containerd's namespaces.
func (r *Runtime) Namespaces(ctx context.Context) ([]string, error) {
	all, err := r.client.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("containerd's namespaces: %w", err)
	}
	return all, nil
}

// ForeignNamespace reports whether another orchestrator owns the namespace: it
// would restart or delete what tranship moves.
func ForeignNamespace(namespace string) bool {
	return namespace == "k8s.io" || namespace == "moby"
}

// CheckName says whether a namespace or shard name is one that containerd
// takes. Such names are safe as path components.
func CheckName(kind, name string) error {
	if err := identifiers.Validate(name); err != nil {
		return fmt.Errorf("%w: %s %q: at most 76 letters, digits and single . _ - between them", ErrInvalid, kind, name)
	}
	return nil
}

// criuConfigRoot is fixed rather than under Config.RunDir: the path stands in
// the container's annotations and must mean the same on every host.
const criuConfigRoot = "/run/tranship/criu"

// CRIUConfigPath is the CRIU configuration file that runc hands to CRIU when it
// restores the shard. It exists only while a migration restores.
func CRIUConfigPath(namespace, name string) string {
	return filepath.Join(criuConfigRoot, namespace, name+".conf")
}

// CgroupPath is the cgroup of shards made by Run, relative to the hierarchies'
// roots.
func CgroupPath(namespace, name string) string {
	return filepath.Join("/tranship", namespace, name)
}

// LogPath is the file with the shard's stdout and stderr.
func (r *Runtime) LogPath(namespace, name string) string {
	return filepath.Join(r.cfg.StateDir, "logs", namespace, name+".log")
}

// in scopes ctx to a containerd namespace.
func in(ctx context.Context, namespace string) context.Context {
	return namespaces.WithNamespace(ctx, namespace)
}

// load finds the container; the returned context is scoped to its namespace.
func (r *Runtime) load(ctx context.Context, namespace, name string) (context.Context, containerd.Container, error) {
	if err := errors.Join(CheckName("namespace", namespace), CheckName("shard", name)); err != nil {
		return ctx, nil, err
	}
	ctx = in(ctx, namespace)
	c, err := r.client.LoadContainer(ctx, name)
	if errdefs.IsNotFound(err) {
		return ctx, nil, fmt.Errorf("%w: %s in namespace %s", ErrNotFound, name, namespace)
	}
	if err != nil {
		return ctx, nil, fmt.Errorf("container %s: %w", name, err)
	}
	return ctx, c, nil
}

// task finds the container's task; ErrNotRunning when it has none.
func (r *Runtime) task(ctx context.Context, namespace, name string) (context.Context, containerd.Container, containerd.Task, error) {
	ctx, c, err := r.load(ctx, namespace, name)
	if err != nil {
		return ctx, nil, nil, err
	}
	t, err := c.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return ctx, c, nil, fmt.Errorf("%w: %s in namespace %s", ErrNotRunning, name, namespace)
	}
	if err != nil {
		return ctx, c, nil, fmt.Errorf("task %s: %w", name, err)
	}
	return ctx, c, t, nil
}

// answerPoll paces the question whether containerd answers yet: its socket is
// there a moment before anybody listens on it.
const answerPoll = 50 * time.Millisecond

func awaitAnswer(ctx context.Context, client *containerd.Client) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	for {
		_, err := client.Version(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(answerPoll):
		}
	}
}
