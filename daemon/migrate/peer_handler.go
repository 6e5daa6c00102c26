package migrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
	"github.com/tranship/tranship/transfer"
)

// PeerHandler is what other hosts call. Who calls is what their certificate
// says; a migration only obeys the host that reserved it.
type PeerHandler struct {
	m    *Manager
	host Host
}

// Host is what peers may ask of a host besides migrations.
type Host struct {
	// Node describes it.
	Node func(context.Context) *v1.Node
	// Shards lists its shards.
	Shards func(context.Context) []*v1.Shard
	// Run starts a shard on it.
	Run func(context.Context, *v1.RunRequest) (*v1.RunResponse, error)
	// Load and History are of its profiles; nil when they are off.
	Load    func(context.Context, *v1.LoadRequest) (*v1.LoadResponse, error)
	History func(context.Context, *v1.HistoryRequest) (*v1.HistoryResponse, error)
}

var _ transhipv1connect.PeerHandler = (*PeerHandler)(nil)

// NewPeerHandler makes the handler.
func NewPeerHandler(m *Manager, host Host) *PeerHandler { return &PeerHandler{m: m, host: host} }

// Status describes this host.
func (h *PeerHandler) Status(ctx context.Context, _ *connect.Request[v1.StatusRequest]) (*connect.Response[v1.StatusResponse], error) {
	return connect.NewResponse(&v1.StatusResponse{Node: h.host.Node(ctx), Shards: h.host.Shards(ctx), UnixNs: time.Now().UnixNano()}), nil
}

// Run starts a shard here for an operator at another host.
func (h *PeerHandler) Run(ctx context.Context, r *connect.Request[v1.RunRequest]) (*connect.Response[v1.RunResponse], error) {
	resp, err := h.host.Run(ctx, r.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}

// Clock answers with this host's time, for the offset between two hosts' clocks.
func (h *PeerHandler) Clock(context.Context, *connect.Request[v1.ClockRequest]) (*connect.Response[v1.ClockResponse], error) {
	return connect.NewResponse(&v1.ClockResponse{UnixNs: time.Now().UnixNano()}), nil
}

const (
	// maxShardMemory: sums of what is reserved stay far from where numbers turn negative.
	maxShardMemory = 1 << 50
	// maxReceiving from one host, of which two shards leave at a time.
	maxReceiving = 16
)

// Reserve checks whether the shard could come here and, unless dry_run, takes
// its name and memory.
func (h *PeerHandler) Reserve(ctx context.Context, r *connect.Request[v1.ReserveRequest]) (*connect.Response[v1.ReserveResponse], error) {
	peer, req := transfer.PeerFrom(ctx), r.Msg
	if err := failpoint.Hit(ctx, "destination.reserve"); err != nil {
		return nil, connect.NewError(connect.CodeUnavailable, err)
	}
	name, namespace := req.GetShard().GetName(), req.GetShard().GetNamespace()
	if err := errors.Join(runtime.CheckName("namespace", namespace), runtime.CheckName("shard", name), runtime.CheckName("migration", req.GetId())); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if n := req.GetMemoryBytes(); n < 0 || n > maxShardMemory {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("a shard of %d bytes", n))
	}
	if n := h.m.receivingFrom(peer); n >= maxReceiving && !req.GetDryRun() {
		return connect.NewResponse(&v1.ReserveResponse{UnixNs: time.Now().UnixNano(), Findings: []*v1.Finding{
			refuse("busy", "wait until some have ended", "%d migrations from %s are under way on %s", n, peer, h.m.cfg.Node),
		}}), nil
	}
	findings := h.m.checkIncoming(ctx, peer, req)
	resp := &v1.ReserveResponse{Findings: findings, UnixNs: time.Now().UnixNano()}
	if req.GetDryRun() || refused(findings) {
		return connect.NewResponse(resp), nil
	}
	entry := &Entry{
		ID: req.GetId(), Role: Destination, State: Receiving, Namespace: namespace, Shard: name,
		Peer: peer, Mode: req.GetMode(), Started: time.Now(), MemoryBytes: req.GetMemoryBytes(),
	}
	if _, err := h.m.journal.Get(Destination, entry.ID); err == nil {
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("migration %s was reserved before", entry.ID))
	}
	if err := h.m.claim(shardKey{namespace, name}, entry.ID); err != nil {
		resp.Findings = append(resp.Findings, refuse("migrating", "wait until it has ended", "%v on %s", err, h.m.cfg.Node))
		return connect.NewResponse(resp), nil
	}
	if err := h.m.journal.Put(entry); err != nil {
		h.m.release(shardKey{namespace, name}, entry.ID)
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	h.m.addIncoming(h.m.newIncoming(entry))
	return connect.NewResponse(resp), nil
}

// Prepare builds what can be built before the freeze.
func (h *PeerHandler) Prepare(ctx context.Context, r *connect.Request[v1.PrepareRequest]) (*connect.Response[v1.PrepareResponse], error) {
	in, err := h.m.incomingOf(ctx, r.Msg.GetId())
	if err != nil {
		return nil, err
	}
	missing, err := in.prepare(ctx, r.Msg.GetContainer())
	if err != nil {
		return nil, apiError(err)
	}
	resp := &v1.PrepareResponse{Ready: len(missing) == 0}
	for _, d := range missing {
		resp.MissingBlobs = append(resp.MissingBlobs, d.Digest.String())
	}
	return connect.NewResponse(resp), nil
}

// Redirect makes the shard's address point here.
func (h *PeerHandler) Redirect(ctx context.Context, r *connect.Request[v1.RedirectRequest]) (*connect.Response[v1.RedirectResponse], error) {
	in, err := h.m.incomingOf(ctx, r.Msg.GetId())
	if err != nil {
		return nil, err
	}
	if err := in.redirect(); err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(&v1.RedirectResponse{}), nil
}

// Seal is the source's word that everything was sent.
func (h *PeerHandler) Seal(ctx context.Context, r *connect.Request[v1.SealRequest]) (*connect.Response[v1.SealResponse], error) {
	in, err := h.m.incomingOf(ctx, r.Msg.GetId())
	if err != nil {
		return nil, err
	}
	if err := in.seal(ctx, r.Msg.GetImageDigest(), r.Msg.GetOwedDigest()); err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(&v1.SealResponse{UnixNs: time.Now().UnixNano()}), nil
}

// Commit starts the shard. The code Aborted is this host's durable word that it
// never will; NotFound says that it does not know the migration.
func (h *PeerHandler) Commit(ctx context.Context, r *connect.Request[v1.CommitRequest]) (*connect.Response[v1.CommitResponse], error) {
	in, err := h.m.incomingOf(ctx, r.Msg.GetId())
	if err != nil {
		return nil, err
	}
	resp, err := in.start(ctx)
	if err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(resp), nil
}

// Abort gives a migration up that was not committed.
func (h *PeerHandler) Abort(ctx context.Context, r *connect.Request[v1.AbortRequest]) (*connect.Response[v1.AbortResponse], error) {
	in, err := h.m.incomingOf(ctx, r.Msg.GetId())
	if connect.CodeOf(err) == connect.CodeNotFound {
		return connect.NewResponse(&v1.AbortResponse{}), nil // nothing was reserved, or it is forgotten
	}
	if err != nil {
		if connect.CodeOf(err) == connect.CodeAborted {
			return connect.NewResponse(&v1.AbortResponse{}), nil
		}
		return nil, err
	}
	if err := in.abort(ctx, CodeFailed, r.Msg.GetReason()); err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(&v1.AbortResponse{}), nil
}

// Decision tells a destination in doubt what this host, the source, decided.
func (h *PeerHandler) Decision(ctx context.Context, r *connect.Request[v1.DecisionRequest]) (*connect.Response[v1.DecisionResponse], error) {
	e, err := h.m.journal.Get(Source, r.Msg.GetId())
	if errors.Is(err, ErrUnknownMigration) {
		return nil, connect.NewError(connect.CodeNotFound, err)
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	if e.Peer != transfer.PeerFrom(ctx) {
		return nil, connect.NewError(connect.CodePermissionDenied, fmt.Errorf("migration %s goes to another host", e.ID))
	}
	return connect.NewResponse(&v1.DecisionResponse{Decision: decisionOf(e.State)}), nil
}

// checkIncoming is the destination's half of pre-flight.
func (m *Manager) checkIncoming(ctx context.Context, peer string, req *v1.ReserveRequest) []*v1.Finding {
	here, err := m.facts()
	if err != nil {
		return []*v1.Finding{refuse("host", "see the log of transhipd on "+m.cfg.Node, "%s: %v", m.cfg.Node, err)}
	}
	there := hostFacts{Node: peer, Versions: req.GetVersions(), CPUFeatures: req.GetCpuFeatures(), Now: time.Unix(0, req.GetUnixNs())}
	out := compareHosts(there, here, req.GetMemoryBytes()+m.reservedMemory(ctx, req.GetId()), time.Second)
	out = append(out, m.checkArrival(ctx, req)...)
	if other := m.MigrationOf(req.GetShard().GetNamespace(), req.GetShard().GetName()); other != "" && other != req.GetId() {
		out = append(out, refuse("migrating", "wait until it has ended", "shard %s is part of migration %s on %s", req.GetShard().GetName(), other, m.cfg.Node))
	}
	return out
}

// facts describes this host.
func (m *Manager) facts() (hostFacts, error) {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return hostFacts{}, err
	}
	mem, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return hostFacts{}, err
	}
	_, available := MemoryOf(string(mem))
	return hostFacts{
		Node: m.cfg.Node, Versions: m.cfg.Versions, CPUFeatures: parseCPUFeatures(string(cpu)),
		MemoryAvailable: available, Now: time.Now(),
	}, nil
}

// apiError gives an error the code that the other end branches on.
func apiError(err error) error {
	var aborted *abortedError
	switch {
	case errors.As(err, &aborted):
		return connect.NewError(connect.CodeAborted, err)
	case errors.Is(err, runtime.ErrInvalid):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeUnavailable, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

// peerError drops connect's code from a peer's error: the text is what counts.
func peerError(err error) error {
	var ce *connect.Error
	if errors.As(err, &ce) && connect.IsWireError(err) {
		return errors.New(ce.Message())
	}
	return err
}

// Arch is the architecture name in Versions.
const Arch = goruntime.GOARCH
