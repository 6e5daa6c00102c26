package control

import (
	"context"
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
