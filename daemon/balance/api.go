package balance

import (
	"cmp"
	"context"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
)

// Handler answers the Balance service.
type Handler struct{ B *Balancer }

var _ transhipv1connect.BalanceHandler = (*Handler)(nil)

// Plan is what the last round found.
func (h *Handler) Plan(context.Context, *connect.Request[v1.PlanRequest]) (*connect.Response[v1.PlanResponse], error) {
	b := h.B
	b.mu.Lock()
	defer b.mu.Unlock()
	resp := &v1.PlanResponse{
		Node: b.facts.Name, Autopilot: string(b.cfg.Autopilot), EveryMs: b.cfg.Every.Milliseconds(),
		Decisions: b.decisionsNow(), Trouble: b.trouble, Shards: uint32(len(b.view.Shards)),
	}
	if !b.viewAt.IsZero() {
		resp.AtUnixMs, resp.Loss = b.viewAt.UnixMilli(), b.plan.Loss
		for i, p := range b.plan.Overload {
			resp.Spans = append(resp.Spans, &v1.PlanSpan{UntilMs: allocate.SpanEnd(i).Milliseconds(), Overload: p})
		}
	}
	for _, r := range b.ledger.Held(b.now()) {
		// By this host's clock, whatever its source's says.
		until := time.Now().Add(r.Expires.Sub(b.now()))
		resp.Held = append(resp.Held, &v1.HeldRoom{Shard: string(r.Shard.ID), From: string(r.From), ExpiresUnixMs: until.UnixMilli(), Reason: string(r.Reason)})
	}
	for _, name := range b.peers.names {
		if why := b.peers.faults[name]; why != "" {
			resp.Faults = append(resp.Faults, &v1.PeerFault{Node: name, Why: why})
		}
	}
	slices.SortFunc(resp.Decisions, func(x, y *v1.BalanceDecision) int { return cmp.Compare(x.GetId(), y.GetId()) })
	return connect.NewResponse(resp), nil
}

// Decisions is what was decided before. Those of the last round are there as
// they are now.
func (h *Handler) Decisions(_ context.Context, r *connect.Request[v1.DecisionsRequest]) (*connect.Response[v1.DecisionsResponse], error) {
	b := h.B
	b.mu.Lock()
	now := map[uint64]*v1.BalanceDecision{}
	for _, d := range b.decisionsNow() {
		now[d.GetId()] = d
	}
	b.mu.Unlock()
	most := min(int(r.Msg.GetMost()), keepDecisions)
	list, err := b.store.list(time.UnixMilli(r.Msg.GetSinceUnixMs()), most)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	for i, d := range list {
		if n := now[d.GetId()]; n != nil {
			list[i] = n
		}
	}
	return connect.NewResponse(&v1.DecisionsResponse{Decisions: list}), nil
}
