package daemon

import (
	"context"
	"fmt"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/transfer"
)

// services is what the local API shows of this host.
func (h *host) services() control.Services {
	s := control.Services{
		Node: h.cfg.Node, Runtime: h.rt, Self: h.node, MigrationOf: h.moves.MigrationOf,
		Note: h.moves.Note, Pulling: h.moves.Pulling, AwaitArrival: h.moves.AwaitArrival, Cordon: h.cordonNode, Drain: h.drainNode, StopDrain: h.stopDrain,
	}
	if h.peers != nil {
		s.Peers = func(ctx context.Context) []control.NodeStatus {
			var out []control.NodeStatus
			for _, st := range h.peers.Statuses(ctx) {
				h.cluster.label(st.Node)
				out = append(out, control.NodeStatus{Node: st.Node, Shards: st.Shards})
			}
			return out
		}
		s.RunOn = func(ctx context.Context, req *v1.RunRequest) (*v1.RunResponse, error) {
			peer, err := h.peers.Client(req.GetNode())
			if err != nil {
				return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("%w; tranship nodes lists the pool", err))
			}
			resp, err := peer.Run(transfer.Once(ctx), connect.NewRequest(req))
			if err != nil {
				return nil, err
			}
			return resp.Msg, nil
		}
	}
	return s
}

// runForPeer runs a shard here for an operator at another host. It goes no
// further: two hosts that name each other would pass it on for ever.
func (h *host) runForPeer(ctx context.Context, req *v1.RunRequest) (*v1.RunResponse, error) {
	s := h.services()
	s.RunOn = nil
	return control.RunHere(ctx, s, req)
}

// localShards lists this host's shards for its peers; what containerd cannot
// tell is left out and logged.
func (h *host) localShards(ctx context.Context) []*v1.Shard {
	namespaces, err := h.rt.Namespaces(ctx)
	if err != nil {
		h.log.Warn("list shards", "err", err)
		return nil
	}
	var out []*v1.Shard
	for _, ns := range namespaces {
		shards, err := h.rt.List(ctx, ns)
		if err != nil {
			h.log.Warn("list shards", "namespace", ns, "err", err)
			continue
		}
		for i := range shards {
			m := control.ShardMessage(h.cfg.Node, &shards[i], h.moves.MigrationOf(ns, shards[i].Name))
			control.Annotate(m, h.moves.Note)
			out = append(out, m)
		}
	}
	return out
}
