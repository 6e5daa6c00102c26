package control

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
)

// shards answers the Shards service.
type shards struct{ s Services }

var _ transhipv1connect.ShardsHandler = (*shards)(nil)

// Bounds of requests: far beyond use, far below harm.
const (
	maxEnv    = 1000
	maxMounts = 64
	maxArgs   = 1000
	maxGrace  = time.Hour
	maxCPUs   = 4096
)

// Run creates and starts a shard.
func (h *shards) Run(ctx context.Context, req *connect.Request[v1.RunRequest]) (*connect.Response[v1.RunResponse], error) {
	m := req.Msg
	if m.GetNode() != "" && m.GetNode() != h.s.Node && h.s.RunOn != nil {
		resp, err := h.s.RunOn(ctx, m)
		if err != nil {
			return nil, apiError(fmt.Errorf("run on %s: %w", m.GetNode(), err))
		}
		return connect.NewResponse(resp), nil
	}
	spec, err := h.runSpec(m)
	if err != nil {
		return nil, err
	}
	// A migration that brings a shard of this name has its network here already.
	if err := h.notMoving(ctx, spec.Namespace, spec.Name); err != nil {
		return nil, err
	}
	s, err := h.s.Runtime.Run(ctx, spec)
	if errors.Is(err, runtime.ErrExists) {
		return nil, apiError(fmt.Errorf("%w; choose another, or remove it with tranship rm", err))
	}
	if err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(&v1.RunResponse{Shard: h.message(s)}), nil
}

func (h *shards) runSpec(m *v1.RunRequest) (runtime.RunSpec, error) {
	namespace := m.GetNamespace()
	if err := checkNamespace(&namespace, m.GetForceNamespace()); err != nil {
		return runtime.RunSpec{}, err
	}
	spec := runtime.RunSpec{
		Namespace: namespace, Name: m.GetName(), Image: m.GetImage(), Command: m.GetCommand(),
		Network: runtime.NetworkKind(m.GetNetwork()), Memory: m.GetMemoryLimitBytes(), CPUs: m.GetCpus(),
		Env: m.GetEnv(), Labels: m.GetLabels(),
	}
	switch {
	case m.GetNode() != "" && m.GetNode() != h.s.Node:
		return spec, invalid("this is %s: run the shard on %s itself (tranship --host …), or here and migrate it", h.s.Node, m.GetNode())
	case spec.Image == "":
		return spec, invalid("the image is missing: tranship run IMAGE [COMMAND…]")
	case spec.Memory < 0:
		return spec, invalid("memory limit %d is negative; 0 means none", spec.Memory)
	case !(spec.CPUs >= 0 && spec.CPUs <= maxCPUs): // also refuses NaN
		return spec, invalid("cpus %v is not between 0 and %d", spec.CPUs, maxCPUs)
	case len(spec.Env) > maxEnv || len(m.GetMounts()) > maxMounts || len(spec.Command) > maxArgs:
		return spec, invalid("at most %d environment variables, %d mounts and %d arguments", maxEnv, maxMounts, maxArgs)
	}
	if raw := m.GetIp(); raw != "" {
		ip, err := netip.ParseAddr(raw)
		if err != nil {
			return spec, invalid("address %q: give it without a prefix length, like 10.89.1.7", raw)
		}
		spec.IP = ip.Unmap()
	}
	for _, mount := range m.GetMounts() {
		spec.Mounts = append(spec.Mounts, runtime.Mount{
			Source: mount.GetSource(), Destination: mount.GetDestination(),
			ReadOnly: mount.GetReadOnly(), Policy: runtime.MountPolicy(mount.GetPolicy()),
		})
	}
	return spec, nil
}

// message adds the migration that moves the shard away.
func (h *shards) message(s *runtime.Shard) *v1.Shard {
	m := ShardMessage(h.s.Node, s, h.migrationOf(s.Namespace, s.Name))
	if h.s.Note != nil {
		Annotate(m, h.s.Note)
	}
	return m
}

// Annotate adds to a shard of this host what its migration says of it.
func Annotate(m *v1.Shard, note func(namespace, name string) (string, bool)) {
	text, frozen := note(m.GetNamespace(), m.GetName())
	m.Note = text
	if frozen {
		m.Status = "paused"
	}
}

func (h *shards) migrationOf(namespace, name string) string {
	if h.s.MigrationOf == nil {
		return ""
	}
	return h.s.MigrationOf(namespace, name)
}

// List returns this host's shards, and with all_nodes those that peers report.
// A shard on its way appears once, where it runs.
func (h *shards) List(ctx context.Context, req *connect.Request[v1.ListShardsRequest]) (*connect.Response[v1.ListShardsResponse], error) {
	m := req.Msg
	namespaces := []string{m.GetNamespace()}
	if m.GetAllNamespaces() {
		all, err := h.s.Runtime.Namespaces(ctx)
		if err != nil {
			return nil, apiError(err)
		}
		namespaces = all
	} else if err := checkNamespace(&namespaces[0], true); err != nil {
		return nil, err
	}
	resp := &v1.ListShardsResponse{}
	for _, namespace := range namespaces {
		list, err := h.s.Runtime.List(ctx, namespace)
		if err != nil {
			return nil, apiError(err)
		}
		for i := range list {
			resp.Shards = append(resp.Shards, h.message(&list[i]))
		}
	}
	if m.GetAllNodes() && h.s.Peers != nil {
		for _, peer := range h.s.Peers(ctx) {
			if peer.Node.GetState() != NodeAlive {
				resp.UnreachableNodes = append(resp.UnreachableNodes, peer.Node.GetName())
				continue
			}
			for _, s := range peer.Shards {
				if m.GetAllNamespaces() || s.GetNamespace() == namespaces[0] {
					resp.Shards = append(resp.Shards, s)
				}
			}
		}
	}
	slices.SortStableFunc(resp.Shards, func(a, b *v1.Shard) int {
		if c := strings.Compare(a.GetNamespace(), b.GetNamespace()); c != 0 {
			return c
		}
		return strings.Compare(a.GetName(), b.GetName())
	})
	return connect.NewResponse(resp), nil
}

// Inspect returns one shard with its OCI specification.
func (h *shards) Inspect(ctx context.Context, req *connect.Request[v1.InspectRequest]) (*connect.Response[v1.InspectResponse], error) {
	namespace, name, err := target(req.Msg, true)
	if err != nil {
		return nil, err
	}
	s, err := h.s.Runtime.Shard(ctx, namespace, name)
	if err != nil {
		return nil, h.notHere(ctx, namespace, name, err)
	}
	rec, err := h.s.Runtime.Describe(ctx, namespace, name)
	if err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(&v1.InspectResponse{Shard: h.message(s), SpecJson: rec.Spec}), nil
}

// Logs streams the shard's output. With follow it ends when the client leaves
// or the shard does.
func (h *shards) Logs(ctx context.Context, req *connect.Request[v1.LogsRequest], stream *connect.ServerStream[v1.LogsChunk]) error {
	namespace, name, err := target(req.Msg, true)
	if err != nil {
		return err
	}
	err = h.s.Runtime.Logs(ctx, namespace, name, req.Msg.GetTail(), req.Msg.GetFollow(), func(b []byte) error {
		return stream.Send(&v1.LogsChunk{Data: b})
	})
	if err != nil {
		return h.notHere(ctx, namespace, name, err)
	}
	return nil
}

// Stop ends a shard's processes.
func (h *shards) Stop(ctx context.Context, req *connect.Request[v1.StopRequest]) (*connect.Response[v1.StopResponse], error) {
	namespace, name, err := target(req.Msg, req.Msg.GetForceNamespace())
	if err != nil {
		return nil, err
	}
	grace := time.Duration(req.Msg.GetTimeoutMs()) * time.Millisecond
	if grace < 0 || grace > maxGrace {
		return nil, invalid("a grace of %v is not between 0 and %v", grace, maxGrace)
	}
	if err := h.notMoving(ctx, namespace, name); err != nil {
		return nil, err
	}
	if err := h.s.Runtime.Stop(ctx, namespace, name, grace); err != nil {
		return nil, h.notHere(ctx, namespace, name, err)
	}
	return connect.NewResponse(&v1.StopResponse{}), nil
}

// Remove deletes a shard.
func (h *shards) Remove(ctx context.Context, req *connect.Request[v1.RemoveRequest]) (*connect.Response[v1.RemoveResponse], error) {
	namespace, name, err := target(req.Msg, req.Msg.GetForceNamespace())
	if err != nil {
		return nil, err
	}
	if err := h.notMoving(ctx, namespace, name); err != nil {
		return nil, err
	}
	err = h.s.Runtime.Remove(ctx, namespace, name, req.Msg.GetForce())
	if errors.Is(err, runtime.ErrRunning) {
		return nil, apiError(fmt.Errorf("%w; tranship stop it first, or tranship rm -f", err))
	}
	if err != nil {
		return nil, h.notHere(ctx, namespace, name, err)
	}
	return connect.NewResponse(&v1.RemoveResponse{}), nil
}

func target(m interface {
	GetNamespace() string
	GetName() string
}, force bool,
) (namespace, name string, err error) {
	namespace, name = m.GetNamespace(), m.GetName()
	if err := checkNamespace(&namespace, force); err != nil {
		return "", "", err
	}
	if err := runtime.CheckName("shard", name); err != nil {
		return "", "", apiError(err)
	}
	return namespace, name, nil
}

// notMoving refuses to pull a shard away from under its migration.
func (h *shards) notMoving(ctx context.Context, namespace, name string) error {
	if h.s.Pulling != nil && h.s.Pulling(namespace, name) {
		return nil
	}
	if h.s.AwaitArrival != nil {
		if err := h.s.AwaitArrival(ctx, namespace, name); err != nil {
			return connect.NewError(connect.CodeCanceled, err)
		}
	}
	if id := h.migrationOf(namespace, name); id != "" {
		return connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("%s is being moved: wait for migration %s, or tranship cancel %s", name, id, id))
	}
	return nil
}

// notHere adds to "no such shard" where the shard is, if a peer has it.
func (h *shards) notHere(ctx context.Context, namespace, name string, err error) error {
	if !errors.Is(err, runtime.ErrNotFound) {
		return apiError(err)
	}
	if h.s.Peers != nil {
		for _, peer := range h.s.Peers(ctx) {
			for _, s := range peer.Shards {
				if s.GetName() == name && s.GetNamespace() == namespace {
					return apiError(fmt.Errorf("%w on %s: it is on %s, ask there", err, h.s.Node, peer.Node.GetName()))
				}
			}
		}
	}
	return apiError(fmt.Errorf("%w; tranship ps lists those that are there", err))
}
