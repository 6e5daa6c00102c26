package daemon

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/migrate"
	"github.com/tranship/tranship/daemon/peers/cluster"
	"github.com/tranship/tranship/transfer"
)

// poolHandler is what other hosts ask of this one besides migrations.
type poolHandler struct{ h *host }

var _ transhipv1connect.PoolHandler = (*poolHandler)(nil)

var errNoMembership = connect.NewError(connect.CodeFailedPrecondition, errors.New("the pool of this host is what its configuration says"))

// Exchange makes both ends know the newer statement.
func (p *poolHandler) Exchange(_ context.Context, r *connect.Request[v1.ExchangeRequest]) (*connect.Response[v1.ExchangeResponse], error) {
	b := p.h.cluster
	if b.member == nil {
		return nil, errNoMembership
	}
	if m := r.Msg.GetPapers(); m != nil {
		err := b.install(cluster.Signed{Statement: m.GetStatement(), Signature: m.GetSignature()}, m.GetKey())
		if errors.Is(err, cluster.ErrForged) {
			return nil, connect.NewError(connect.CodeInvalidArgument, err)
		}
		if err != nil {
			return nil, connect.NewError(connect.CodeInternal, err)
		}
	}
	papers := b.papers()
	resp := &v1.ExchangeResponse{Number: papers.GetNumber()}
	if r.Msg.GetNumber() < papers.GetNumber() {
		resp.Papers = papers
	}
	return connect.NewResponse(resp), nil
}

// Renew signs for the caller, under the name that its certificate has.
func (p *poolHandler) Renew(ctx context.Context, r *connect.Request[v1.RenewRequest]) (*connect.Response[v1.RenewResponse], error) {
	b := p.h.cluster
	if b.authority == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errNoCAKey(b))
	}
	cert, err := b.authority.Renew(transfer.CertificateFrom(ctx), r.Msg.GetRequest())
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	p.h.log.Info("a certificate was renewed", "peer", transfer.PeerFrom(ctx))
	return connect.NewResponse(&v1.RenewResponse{Certificate: cert}), nil
}

// Depart makes the caller belong no longer. The answer goes out over the
// connection that the departure ends, so the spreading waits for it.
func (p *poolHandler) Depart(ctx context.Context, _ *connect.Request[v1.DepartRequest]) (*connect.Response[v1.DepartResponse], error) {
	b, peer := p.h.cluster, transfer.PeerFrom(ctx)
	if b.authority == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errNoCAKey(b))
	}
	signed, key, err := b.authority.Depart(transfer.CertificateFrom(ctx))
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	p.h.log.Info("a host left", "peer", peer)
	b.work.Go(func() {
		wait := time.NewTimer(departGrace)
		defer wait.Stop()
		select {
		case <-b.life.Done(): // the others hear it from the register, after the next start
		case <-wait.C:
			b.announce(b.life, signed, key)
		}
	})
	return connect.NewResponse(&v1.DepartResponse{}), nil
}

// departGrace lets the answer reach the host that leaves.
const departGrace = 500 * time.Millisecond

// announce makes a statement hold here and tells everybody.
func (b *belonging) announce(ctx context.Context, signed cluster.Signed, key []byte) (told, not []string) {
	if b.member == nil {
		return nil, nil
	}
	// Those that are told over the old gossip key learn the new one by this.
	if err := b.install(signed, key); err != nil {
		b.h.log.Error("the new statement", "err", err)
		return nil, b.Nodes()
	}
	return b.spread(ctx)
}

// Cordon is another host's operator's.
func (p *poolHandler) Cordon(ctx context.Context, r *connect.Request[v1.CordonRequest]) (*connect.Response[v1.CordonResponse], error) {
	resp, err := p.h.cordonHere(ctx, r.Msg)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return connect.NewResponse(resp), nil
}

// Drain drains this host for an operator at another.
func (p *poolHandler) Drain(ctx context.Context, r *connect.Request[v1.DrainRequest], stream *connect.ServerStream[v1.DrainEvent]) error {
	return p.h.drainHere(ctx, r.Msg, stream.Send)
}

// StopDrain ends it.
func (p *poolHandler) StopDrain(_ context.Context, r *connect.Request[v1.StopDrainRequest]) (*connect.Response[v1.StopDrainResponse], error) {
	if err := p.h.stopDrainHere(r.Msg); err != nil {
		return nil, err
	}
	return connect.NewResponse(&v1.StopDrainResponse{}), nil
}

// guarded is migrate's handler behind the cordon.
type guarded struct {
	*migrate.PeerHandler
	h *host
}

var _ transhipv1connect.PeerHandler = (*guarded)(nil)

// Reserve refuses while this host is cordoned, with whatever else stands against
// the move: who reads it wants to know all of it.
func (g *guarded) Reserve(ctx context.Context, r *connect.Request[v1.ReserveRequest]) (*connect.Response[v1.ReserveResponse], error) {
	if !g.h.cordon.on() {
		return g.PeerHandler.Reserve(ctx, r)
	}
	r.Msg.DryRun = true
	resp, err := g.PeerHandler.Reserve(ctx, r)
	if err != nil {
		return nil, err
	}
	resp.Msg.Findings = append(resp.Msg.Findings, &v1.Finding{
		Code: "cordoned", Message: g.h.cfg.Node + " is cordoned: it takes no shards",
		Advice: "choose another node, or tranship uncordon " + g.h.cfg.Node,
	})
	return resp, nil
}

// label adds what membership knows of a peer to what the peer says.
func (b *belonging) label(n *v1.Node) {
	n.Membership = "static"
	if b.live.Load() == nil {
		return
	}
	m, ok := b.live.Load().Member(n.GetName())
	if !ok {
		return
	}
	n.Membership = m.State
	if n.GetState() == "alive" {
		return
	}
	// What it last said of itself is better than nothing.
	n.Id, n.Zone, n.Cordoned, n.Authority, n.CostPerHour = m.ID, m.Zone, m.Cordoned, m.Authority, m.CostPerHour
	n.Cpus, n.MemoryTotalBytes = uint32(m.CPUs), m.MemoryMiB<<20
}

// clusterHandler answers the command line about who belongs.
type clusterHandler struct{ h *host }

var _ transhipv1connect.ClusterHandler = (*clusterHandler)(nil)

func errNoCAKey(b *belonging) error {
	if b.member != nil && b.member.Authority() != b.self.Name {
		return fmt.Errorf("%s has not the key of the cluster's CA: do it on %s", b.self.Name, b.member.Authority())
	}
	return fmt.Errorf("%s has not the key of the cluster's CA: do it on the host where tranship cluster init was run", b.self.Name)
}

func (c *clusterHandler) belonging() (*belonging, error) {
	if c.h.cluster == nil || c.h.cluster.hasLeft() {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errNoCluster)
	}
	return c.h.cluster, nil
}

func (c *clusterHandler) authority() (*belonging, error) {
	b, err := c.belonging()
	if err != nil {
		return nil, err
	}
	if b.authority == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errNoCAKey(b))
	}
	return b, nil
}

// Token makes a join token.
func (c *clusterHandler) Token(_ context.Context, r *connect.Request[v1.TokenRequest]) (*connect.Response[v1.TokenResponse], error) {
	b, err := c.authority()
	if err != nil {
		return nil, err
	}
	if b.member == nil {
		return nil, errNoMembership
	}
	ttl := time.Duration(r.Msg.GetTtlMs()) * time.Millisecond
	if ttl == 0 {
		ttl = cluster.DefaultTokenTTL
	}
	token, expires, err := b.authority.Token(ttl)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	b.joins.Expect(expires)
	return connect.NewResponse(&v1.TokenResponse{Token: token.String(), ExpiresUnixMs: expires.UnixMilli(), Address: b.advertise.String()}), nil
}

// Revoke makes a host belong no longer, and tells all others.
func (c *clusterHandler) Revoke(ctx context.Context, r *connect.Request[v1.RevokeRequest]) (*connect.Response[v1.RevokeResponse], error) {
	b, err := c.authority()
	if err != nil {
		return nil, err
	}
	if b.member == nil {
		return nil, errNoMembership
	}
	node := r.Msg.GetNode()
	if node == b.self.Name {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%s has the CA's key and cannot revoke itself", node))
	}
	_, known := b.Address(node)
	signed, key, err := b.authority.Revoke(node, known)
	if errors.Is(err, cluster.ErrUnknownHost) {
		return nil, connect.NewError(connect.CodeNotFound, err)
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	c.h.log.Warn("a host was revoked", "peer", node)
	told, not := b.announce(ctx, signed, key)
	return connect.NewResponse(&v1.RevokeResponse{Told: told, NotTold: not}), nil
}

// Leave makes this host belong no longer: the authority is told, then the
// others, then the files go. Shards that run here run on.
func (c *clusterHandler) Leave(ctx context.Context, r *connect.Request[v1.LeaveRequest]) (*connect.Response[v1.LeaveResponse], error) {
	b, err := c.belonging()
	if err != nil {
		return nil, err
	}
	failed := func(err error) error { return connect.NewError(connect.CodeFailedPrecondition, err) }
	if b.member == nil {
		return nil, errNoMembership
	}
	if b.authority != nil && len(b.Nodes()) > 0 {
		return nil, failed(fmt.Errorf("%s has the CA's key, and without it no host can join or renew: it leaves last", b.self.Name))
	}
	running := 0
	for _, s := range c.h.localShards(ctx) {
		if s.GetStatus() == "running" {
			running++
		}
	}
	if running > 0 && !r.Msg.GetForce() {
		return nil, failed(fmt.Errorf("%d shards run here and could not move any more: tranship drain %s first, or --force", running, b.self.Name))
	}
	if b.authority == nil {
		err := b.depart(ctx)
		if err != nil && !r.Msg.GetForce() {
			return nil, failed(fmt.Errorf("%s was not told: %w; with --force this host leaves without a word, and has to be revoked there", b.member.Authority(), err))
		}
		if err != nil {
			c.h.log.Warn("left without a word", "err", err)
		}
	}
	if err := b.leave(ctx); err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return connect.NewResponse(&v1.LeaveResponse{}), nil
}

func (b *belonging) depart(ctx context.Context) error {
	client, err := b.h.peers.Pool(b.member.Authority())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	_, err = client.Depart(ctx, connect.NewRequest(&v1.DepartRequest{}))
	return err
}

// leave is this host's own part of leaving.
func (b *belonging) leave(ctx context.Context) error {
	if b.live.Load() != nil {
		if err := b.live.Load().Leave(ctx); err != nil {
			b.h.log.Debug("leave", "err", err)
		}
	}
	b.mu.Lock()
	b.left = true
	b.mu.Unlock()
	err := cluster.Forget(b.dir)
	if b.live.Load() != nil {
		err = errors.Join(err, b.live.Load().Close())
	}
	b.drop(func(*x509.Certificate) bool { return true })
	b.h.log.Info("this host left the cluster")
	return err
}
