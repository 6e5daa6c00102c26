package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/drain"
	"github.com/tranship/tranship/daemon/migrate"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads"
	"github.com/tranship/tranship/daemon/workloads/steward"
)

// drains is the one drain that a host may have.
type drains struct {
	mu   sync.Mutex
	stop context.CancelCauseFunc
}

func (d *drains) begin(stop context.CancelCauseFunc) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stop != nil {
		return false
	}
	d.stop = stop
	return true
}

func (d *drains) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stop = nil
}

// drainNode drains a node of the pool, through the node itself.
func (h *host) drainNode(ctx context.Context, req *v1.DrainRequest, send func(*v1.DrainEvent) error) error {
	if h.isHere(req.GetNode()) {
		return h.drainHere(ctx, req, send)
	}
	if h.peers == nil {
		return errNoPeers
	}
	client, err := h.peers.Pool(req.GetNode())
	if err != nil {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("%w; tranship nodes lists the pool", err))
	}
	stream, err := client.Drain(ctx, connect.NewRequest(req))
	if err != nil {
		return fmt.Errorf("drain %s: %w", req.GetNode(), err)
	}
	defer stream.Close()
	for stream.Receive() {
		if err := send(stream.Msg()); err != nil {
			return err
		}
	}
	if err := stream.Err(); err != nil {
		return fmt.Errorf("drain %s: %w", req.GetNode(), err)
	}
	return nil
}

func (h *host) stopDrain(ctx context.Context, req *v1.StopDrainRequest) error {
	if h.isHere(req.GetNode()) {
		return h.stopDrainHere(req)
	}
	if h.peers == nil {
		return errNoPeers
	}
	client, err := h.peers.Pool(req.GetNode())
	if err != nil {
		return connect.NewError(connect.CodeNotFound, err)
	}
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	_, err = client.StopDrain(ctx, connect.NewRequest(req))
	return err
}

func (h *host) stopDrainHere(req *v1.StopDrainRequest) error {
	h.drains.mu.Lock()
	defer h.drains.mu.Unlock()
	if h.drains.stop == nil {
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("%s is not being drained", h.cfg.Node))
	}
	cause := drain.ErrStopped
	if req.GetDeadline() {
		cause = drain.ErrDeadline
	}
	h.drains.stop(cause)
	return nil
}

// drainHere drains this host. It stays cordoned afterwards, whatever happened:
// that is what a person wants who takes it out of the pool, and can undo.
func (h *host) drainHere(ctx context.Context, req *v1.DrainRequest, send func(*v1.DrainEvent) error) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	if !h.drains.begin(stop) {
		return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("%s is being drained already", h.cfg.Node))
	}
	defer h.drains.end()
	if req.GetDeadlineMs() > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, time.Duration(req.GetDeadlineMs())*time.Millisecond, drain.ErrDeadline)
		defer cancel()
	}
	if _, err := h.cordonHere(ctx, &v1.CordonRequest{}); err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	client, err := control.NewClient("unix://" + h.cfg.API.Socket)
	if err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	defer client.Close()
	m := &mover{h: h, client: client, maxBlackout: req.GetMaxBlackoutMs()}
	// Whoever follows may have gone; the drain then ends by ctx.
	m.tell = func(e *v1.DrainEvent) { _ = send(e) }
	res, err := drain.Run(ctx, m, func(p drain.Progress) {
		m.last = &v1.DrainEvent{Shard: p.Shard.Name, To: p.To, Note: p.Note, Done: uint32(p.Done), All: uint32(p.All)}
		m.tell(m.last)
	})
	if err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	h.log.Info("drained", "outcome", res.Outcome, "moved", len(res.Moved), "stayed", len(res.Stayed))
	out := &v1.DrainResult{Node: h.cfg.Node, Outcome: res.Outcome}
	for _, s := range res.Moved {
		out.Moved = append(out.Moved, drainedMessage(s, s.To))
	}
	for _, s := range res.Stayed {
		out.Stayed = append(out.Stayed, drainedMessage(s, h.cfg.Node))
	}
	return send(&v1.DrainEvent{Done: uint32(len(res.Moved) + len(res.Stayed)), All: uint32(len(res.Moved) + len(res.Stayed)), Result: out})
}

func drainedMessage(s drain.Settled, at string) *v1.DrainedShard {
	return &v1.DrainedShard{
		Namespace: s.Namespace, Name: s.Name, To: at, MigrationId: s.ID, BlackoutMs: s.BlackoutMs, Code: s.Code, Reason: s.Reason,
	}
}

// mover is this host for package drain. It moves by the same API as the command
// line, so a drained shard is moved like any other.
type mover struct {
	h           *host
	client      *control.Client
	maxBlackout int64
	tell        func(*v1.DrainEvent)
	last        *v1.DrainEvent
}

var _ drain.Mover = (*mover)(nil)

// Shards lists what runs here. What does not run needs no other host.
func (m *mover) Shards(ctx context.Context) ([]drain.Shard, error) {
	namespaces, err := m.h.rt.Namespaces(ctx)
	if err != nil {
		return nil, err
	}
	cpus := m.h.shardCPUs()
	var out []drain.Shard
	for _, ns := range namespaces {
		shards, err := m.h.rt.List(ctx, ns)
		if err != nil {
			return nil, err
		}
		for i := range shards {
			s := &shards[i]
			if s.Status != runtime.StatusRunning {
				continue
			}
			d := drain.Shard{
				Namespace: ns, Name: s.Name, Memory: s.MemoryUsed, CPUs: cpus[[2]string{ns, s.Name}],
				Near: s.Labels[runtime.LabelNear] != "",
			}
			if runtime.ForeignNamespace(ns) {
				d.Stays, d.StaysCode = "namespace "+ns+" belongs to another orchestrator", "foreign-namespace"
			}
			out = append(out, d)
		}
	}
	return out, nil
}

// Hosts asks the others, and judges them by the rules of the shard's workload.
func (m *mover) Hosts(ctx context.Context, s drain.Shard) []drain.Host {
	if m.h.peers == nil {
		return nil
	}
	rules, zones := &workloads.Spec{}, map[string]int{}
	here := steward.HostOf(control.NodeStatus{Node: m.h.self(), Shards: m.h.localShards(ctx)})
	for i := range here.Shards {
		if it := &here.Shards[i]; it.Namespace == s.Namespace && it.Name == s.Name {
			rules = steward.Rules(s.Namespace, it.Policy)
			zones[here.Zone] = here.Mates(s.Namespace, rules.Name) - 1
		}
	}
	statuses := m.h.peers.Statuses(ctx)
	hosts := make([]workloads.Host, len(statuses))
	for i, st := range statuses {
		hosts[i] = steward.HostOf(control.NodeStatus{Node: st.Node, Shards: st.Shards})
		zones[hosts[i].Zone] += hosts[i].Mates(s.Namespace, rules.Name)
	}
	out := make([]drain.Host, len(hosts))
	for i := range hosts {
		h := &hosts[i]
		out[i] = drain.Host{
			Name: h.Name, Alive: h.Alive, Cordoned: h.Cordoned, CPUs: h.CPUs, CPULoad: h.CPULoad, Shards: len(h.Shards),
			MemoryTotal: h.MemoryTotal, MemoryAvailable: h.MemoryAvailable, Unfit: workloads.Unfit(rules, s.Name, h, zones),
		}
	}
	return out
}

// Move moves one shard and follows it to its end. The stream outlives ctx: only
// its result says whether the shard was handed over by then.
func (m *mover) Move(ctx context.Context, s drain.Shard, to string) drain.Moved {
	sctx, leave := context.WithCancel(context.WithoutCancel(ctx))
	defer leave()
	failed := func(err error) drain.Moved { return drain.Moved{Code: drain.CodeFailed, Reason: err.Error()} }
	stream, err := m.client.Migrations.Migrate(sctx, connect.NewRequest(&v1.MigrateRequest{
		Namespace: s.Namespace, Shard: s.Name, Node: to, MaxBlackoutMs: m.maxBlackout,
	}))
	if err != nil {
		return failed(err)
	}
	defer stream.Close()
	id := make(chan string, 1)
	var work sync.WaitGroup
	defer work.Wait()
	over := make(chan struct{})
	defer close(over)
	work.Go(func() { m.cancelWhen(ctx, sctx, id, over) })
	named := false
	for stream.Receive() {
		e := stream.Msg()
		if p := e.GetProgress(); p.GetId() != "" && !named {
			named = true
			id <- p.GetId()
		}
		if r := e.GetResult(); r != nil {
			return movedOf(r, e.GetRefused())
		}
		m.tell(&v1.DrainEvent{Shard: s.Name, To: to, Progress: e.GetProgress(), Done: m.last.GetDone(), All: m.last.GetAll()})
	}
	err = stream.Err()
	if err == nil {
		err = errors.New("the migration ended without a result")
	}
	return failed(err)
}

// cancelWhen cancels the migration once ctx ends and its name is known.
func (m *mover) cancelWhen(ctx, sctx context.Context, id <-chan string, over <-chan struct{}) {
	select {
	case <-over:
		return
	case <-ctx.Done():
	}
	select {
	case <-over:
	case name := <-id:
		// One that can no longer be cancelled ends well, or says what it is.
		if _, err := m.client.Migrations.Cancel(sctx, connect.NewRequest(&v1.CancelRequest{Id: name})); err != nil && connect.CodeOf(err) != connect.CodeFailedPrecondition && sctx.Err() == nil {
			m.h.log.Warn("cancel", "migration", name, "err", err)
		}
	}
}

func movedOf(r *v1.Migration, refused []*v1.Finding) drain.Moved {
	out := drain.Moved{ID: r.GetId(), BlackoutMs: r.GetBlackoutMs(), Code: r.GetCode(), Reason: r.GetReason()}
	switch r.GetOutcome() {
	case migrate.OutcomeDone:
		out.Code, out.Reason = "", ""
	case migrate.OutcomeInDoubt:
		out.Code = drain.CodeInDoubt
	default:
		if out.Code == "" {
			out.Code = drain.CodeFailed
		}
		if len(refused) > 0 {
			out.Code = drain.CodeRefused
			var why []string
			for _, f := range refused {
				if !f.GetWarning() {
					why = append(why, f.GetMessage())
				}
			}
			out.Reason = strings.Join(why, "; ")
		}
	}
	return out
}
