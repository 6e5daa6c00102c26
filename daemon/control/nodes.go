package control

import (
	"context"
	"errors"
	"slices"
	"strings"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
)

// States of a node.
const (
	NodeAlive       = "alive"
	NodeUnreachable = "unreachable"
)

// How membership sees a node.
const (
	MemberAlive = "alive"
	// MemberSuspected: nobody hears it. It may be dead, or cut off.
	MemberSuspected = "suspected"
	// MemberStatic: it is in the configuration alone.
	MemberStatic = "static"
)

// nodes answers the Nodes service.
type nodes struct{ s Services }

var _ transhipv1connect.NodesHandler = (*nodes)(nil)

// ListNodes returns this host and its peers, by name.
func (h *nodes) ListNodes(ctx context.Context, _ *connect.Request[v1.ListNodesRequest]) (*connect.Response[v1.ListNodesResponse], error) {
	resp := &v1.ListNodesResponse{Nodes: []*v1.Node{h.s.Self(ctx)}}
	if h.s.Peers != nil {
		for _, peer := range h.s.Peers(ctx) {
			resp.Nodes = append(resp.Nodes, peer.Node)
		}
	}
	slices.SortFunc(resp.Nodes, func(a, b *v1.Node) int { return strings.Compare(a.GetName(), b.GetName()) })
	return connect.NewResponse(resp), nil
}

// Version returns what this host is made of.
func (h *nodes) Version(ctx context.Context, _ *connect.Request[v1.VersionRequest]) (*connect.Response[v1.VersionResponse], error) {
	return connect.NewResponse(&v1.VersionResponse{Versions: h.s.Self(ctx).GetVersions(), Node: h.s.Node}), nil
}

// Cordon keeps migrations from coming to a node.
func (h *nodes) Cordon(ctx context.Context, r *connect.Request[v1.CordonRequest]) (*connect.Response[v1.CordonResponse], error) {
	if h.s.Cordon == nil {
		return nil, connect.NewError(connect.CodeUnimplemented, errNoPool)
	}
	resp, err := h.s.Cordon(ctx, r.Msg)
	if err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(resp), nil
}

// Drain moves off a node what can move.
func (h *nodes) Drain(ctx context.Context, r *connect.Request[v1.DrainRequest], stream *connect.ServerStream[v1.DrainEvent]) error {
	if h.s.Drain == nil {
		return connect.NewError(connect.CodeUnimplemented, errNoPool)
	}
	if r.Msg.GetDeadlineMs() < 0 || r.Msg.GetMaxBlackoutMs() < 0 {
		return invalid("deadline and blackout cannot be negative")
	}
	if err := h.s.Drain(ctx, r.Msg, stream.Send); err != nil {
		return apiError(err)
	}
	return nil
}

// StopDrain ends a drain in good order.
func (h *nodes) StopDrain(ctx context.Context, r *connect.Request[v1.StopDrainRequest]) (*connect.Response[v1.StopDrainResponse], error) {
	if h.s.StopDrain == nil {
		return nil, connect.NewError(connect.CodeUnimplemented, errNoPool)
	}
	if err := h.s.StopDrain(ctx, r.Msg); err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(&v1.StopDrainResponse{}), nil
}

var errNoPool = errors.New("this host has no pool")
