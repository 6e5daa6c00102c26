package daemon

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	goruntime "runtime"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/track"
	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/migrate"
	"github.com/tranship/tranship/daemon/peers/pki"
	"github.com/tranship/tranship/daemon/workloads/steward"
	"github.com/tranship/tranship/transfer"
)

type serverTLS = tls.Config

// hostFacts do not change while the daemon lives.
type hostFacts struct {
	versions *v1.Versions
	tracker  track.Kind
}

func (h *host) gatherFacts(ctx context.Context, criuBinary string, kind track.Kind) hostFacts {
	v := &v1.Versions{Tranship: h.version, Protocol: transfer.ProtocolVersion, Arch: goruntime.GOARCH}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		v.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var err error
	if v.Containerd, err = h.rt.Version(ctx); err != nil {
		h.log.Warn("version of containerd", "err", err)
	}
	if v.Runc, err = runcVersion(ctx); err != nil {
		h.log.Warn("version of runc", "err", err)
	}
	if criuBinary != "" {
		if cv, err := criu.VersionOf(ctx, criuBinary); err != nil {
			h.log.Warn("version of criu", "err", err)
		} else {
			v.Criu = cv.String()
		}
	}
	return hostFacts{versions: v, tracker: kind}
}

var runcLine = regexp.MustCompile(`(?m)^runc version (\S+)`)

func runcVersion(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "runc", "--version").Output()
	if err != nil {
		return "", fmt.Errorf("runc --version: %w", err)
	}
	m := runcLine.FindSubmatch(out)
	if m == nil {
		return "", fmt.Errorf("runc --version: no version in %q", out)
	}
	return string(m[1]), nil
}

// node describes this host to its peers and to the CLI.
func (h *host) node(ctx context.Context) *v1.Node {
	n := h.self()
	n.Shards = uint32(len(h.localShards(ctx)))
	return n
}

// self is node without what containerd has to be asked.
func (h *host) self() *v1.Node {
	n := &v1.Node{
		Name: h.cfg.Node, Address: h.cfg.Peer.Listen, Self: true, State: control.NodeAlive,
		Cpus: uint32(goruntime.NumCPU()), Versions: h.facts.versions, Tracker: string(h.facts.tracker),
		Zone: h.cfg.Host.Zone, Labels: h.cfg.Host.Labels, CostPerHour: h.cfg.Host.CostPerHour,
		Cordoned: h.cordon.on(), CpuLoad: h.cpuLoad(),
	}
	if b := h.cluster; b != nil {
		n.Id, n.Authority = b.self.ID, b.authority != nil
		if cert, err := pki.ReadCert(h.cfg.PKI.Cert); err == nil {
			n.CertificateEndsUnixMs = cert.NotAfter.UnixMilli()
		}
		if n.Membership = control.MemberStatic; b.member != nil {
			n.Membership = control.MemberAlive
		}
	}
	if raw, err := os.ReadFile("/proc/meminfo"); err == nil {
		n.MemoryTotalBytes, n.MemoryAvailableBytes = migrate.MemoryOf(string(raw))
	}
	return n
}

// localAPI is what the unix socket serves.
func (h *host) localAPI() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(transhipv1connect.NewMigrationsHandler(h.moves, handlerOptions()...))
	mux.Handle(transhipv1connect.NewClusterHandler(&clusterHandler{h: h}, handlerOptions()...))
	mux.Handle(transhipv1connect.NewWorkloadsHandler(steward.Local{Steward: h.steward}, handlerOptions()...))
	control.Mount(mux, h.services(), handlerOptions()...)
	h.mountProfiles(mux)
	h.mountBalance(mux)
	return mux
}

// maxRequest bounds an API message.
const maxRequest = 8 << 20

func handlerOptions() []connect.HandlerOption {
	return []connect.HandlerOption{connect.WithReadMaxBytes(maxRequest)}
}

// rawPages keeps connect from compressing pages once more, and slower.
func rawPages() connect.HandlerOption {
	return connect.WithConditionalHandlerOptions(func(spec connect.Spec) []connect.HandlerOption {
		if spec.Procedure != transhipv1connect.PeerFetchProcedure {
			return nil
		}
		return []connect.HandlerOption{connect.WithCompression("gzip", nil, nil)}
	})
}

// noPeers is the pool of a host that has no peer address.
type noPeers struct{}

var _ migrate.Peers = noPeers{}

func (noPeers) Client(node string) (transhipv1connect.PeerClient, error) {
	return nil, fmt.Errorf("%w: %s (this host has no peer.listen in its configuration)", migrate.ErrUnknownNode, node)
}

func (noPeers) Dial(_ context.Context, node, _ string, _ transfer.Options) (*transfer.Session, error) {
	return nil, fmt.Errorf("%w: %s", migrate.ErrUnknownNode, node)
}
