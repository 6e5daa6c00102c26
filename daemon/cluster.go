package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/peers"
	"github.com/tranship/tranship/daemon/peers/cluster"
	"github.com/tranship/tranship/daemon/peers/gossip"
	"github.com/tranship/tranship/daemon/peers/pki"
)

const (
	// exchangeEvery paces the comparison of statements with one other host, for
	// those that were down when a revocation was told to all.
	exchangeEvery = 20 * time.Second
	// tellEvery paces what this host says of itself.
	tellEvery = 15 * time.Second
	// renewRetry is how soon a renewal that came to nothing is tried again.
	renewRetry = 10 * time.Minute
	// rpcTimeout bounds one question to another host.
	rpcTimeout = 5 * time.Second
	// joinAgainEvery is for a host that stands alone.
	joinAgainEvery = 5 * time.Second
)

// belonging is this host's part in the cluster: who it is, who else is there,
// and the CA's word. It runs:
//
//	start (before peers are reached) → listen → run, until the daemon stops
type belonging struct {
	h    *host
	dir  string
	self pki.Identity
	// advertise is where the peer API is reached, gossipAt where membership is.
	advertise, gossipAt netip.AddrPort

	member    *cluster.Membership // nil: the pool is what the configuration says
	authority *cluster.Authority  // nil: the CA's key is elsewhere
	joins     *cluster.Server
	door      net.Listener
	static    peers.Static
	// live is nil until listen: migrations that an earlier life left are settled
	// before there is gossip.
	live atomic.Pointer[gossip.Gossip]
	// life ends, and work is waited for, when the daemon stops.
	life context.Context
	work sync.WaitGroup

	mu        sync.Mutex
	left      bool
	renewNext time.Time
}

var _ peers.Source = (*belonging)(nil)

// errNoCluster says that this host belongs to none.
var errNoCluster = errors.New("this host belongs to no cluster: tranship cluster init makes one, tranship cluster join enters one; then start transhipd again")

// startBelonging reads what this host is. nil without an error is a host that
// was set up to have peers and belongs to no cluster yet.
func (h *host) startBelonging() (*belonging, *serverTLS, func(string) *tls.Config, error) {
	cfg := h.cfg
	life, stop := context.WithCancel(context.Background())
	b := &belonging{h: h, dir: filepath.Dir(cfg.PKI.CA), static: peers.Static{}, life: life}
	h.onClose(func() error { stop(); b.work.Wait(); return nil })
	for _, p := range cfg.Peers {
		b.static[p.Name] = p.Address
	}
	if _, err := os.Stat(cfg.PKI.Cert); errors.Is(err, os.ErrNotExist) && len(cfg.Peers) == 0 {
		h.log.Warn("no peers", "err", errNoCluster)
		return nil, nil, nil, nil
	}
	var err error
	if b.member, err = cluster.OpenMembership(b.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil, err
	}
	if b.authority, err = cluster.OpenAuthority(b.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil, err
	}
	server, client, err := pki.TLS(cfg.PKI.CA, cfg.PKI.Cert, cfg.PKI.Key, b.refuse)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("certificates of %s: %w", cfg.Node, err)
	}
	cert, err := pki.ReadCert(cfg.PKI.Cert)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("certificates of %s: %w", cfg.Node, err)
	}
	if b.self, err = pki.IdentityOf(cert); err != nil {
		return nil, nil, nil, fmt.Errorf("certificates of %s: %w", cfg.Node, err)
	}
	if b.self.Name != cfg.Node {
		return nil, nil, nil, fmt.Errorf("the certificate %s is of %s, and the configuration names this host %s", cfg.PKI.Cert, b.self.Name, cfg.Node)
	}
	if b.member == nil {
		return b, server, client, nil
	}
	return b, server, client, b.addresses()
}

// addresses finds where this host is reached; gossip has to say it.
func (b *belonging) addresses() error {
	cfg := b.h.cfg
	listen := cfg.Peer.Advertise
	if listen == "" {
		listen = cfg.Peer.Listen
	}
	at, err := netip.ParseAddrPort(listen)
	if err != nil || at.Addr().IsUnspecified() || at.Port() == 0 {
		return fmt.Errorf("peer.advertise: other hosts have to be told an ADDRESS:PORT, and peer.listen is %q", cfg.Peer.Listen)
	}
	b.advertise = at
	if cfg.Cluster.Gossip != "" {
		b.gossipAt = netip.MustParseAddrPort(cfg.Cluster.Gossip) // validated
		return nil
	}
	b.gossipAt = netip.AddrPortFrom(at.Addr(), at.Port()+1)
	return nil
}

// refuse is asked about every peer's certificate.
func (b *belonging) refuse(cert *x509.Certificate) error {
	if b.member == nil {
		return nil
	}
	return b.member.Refuse(cert)
}

// Address is the configuration's word, else gossip's.
func (b *belonging) Address(node string) (string, bool) {
	if a, ok := b.static[node]; ok {
		return a, !b.hasLeft()
	}
	if b.hasLeft() || b.member == nil {
		return "", false
	}
	if g := b.live.Load(); g != nil {
		if m, ok := g.Member(node); ok {
			return m.Address, true
		}
	}
	for _, s := range b.member.Seeds() { // before gossip has begun
		if s.Name == node && node != b.self.Name {
			return s.Address, true
		}
	}
	return "", false
}

// Nodes lists the other hosts.
func (b *belonging) Nodes() []string {
	if b.hasLeft() {
		return nil
	}
	var out []string
	for name := range b.static {
		out = append(out, name)
	}
	if b.live.Load() != nil {
		for _, m := range b.live.Load().Members() {
			out = append(out, m.Name)
		}
	}
	slices.Sort(out)
	out = slices.Compact(out)
	if b.member == nil {
		return out
	}
	return slices.DeleteFunc(out, b.revoked)
}

// revoked says whether the host that a name stood for was revoked, and no other
// of that name has come.
func (b *belonging) revoked(name string) bool {
	if b.live.Load() != nil {
		if _, ok := b.live.Load().Member(name); ok {
			return false
		}
	}
	return slices.ContainsFunc(b.member.Revoked(), func(r cluster.Revoked) bool { return r.Name == name })
}

func (b *belonging) hasLeft() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.left
}

// listen opens the ports of membership and, at the authority, of joining.
func (b *belonging) listen() error {
	if b.authority != nil {
		l, err := net.Listen("tcp", b.h.cfg.Peer.Listen)
		if err != nil {
			return fmt.Errorf("joining hosts: %w", err)
		}
		b.door = l
		b.h.onClose(func() error { return ignoreClosed(l.Close()) })
		b.joins = &cluster.Server{
			Authority: b.authority, Name: b.self.Name, Log: b.h.log, Seeds: b.seeds,
			Taken: func(name string) bool { return name == b.self.Name || slices.Contains(b.Nodes(), name) },
			Certificate: func() (*tls.Certificate, error) {
				return pki.LoadPair(b.h.cfg.PKI.Cert, b.h.cfg.PKI.Key)
			},
		}
	}
	if b.member == nil {
		return nil
	}
	if b.authority != nil {
		// The register is newer than the file after a crash between the two.
		signed, key, err := b.authority.Papers()
		if err != nil {
			return err
		}
		if _, err := b.member.Install(signed, key); err != nil {
			return err
		}
	}
	_, _, key := b.member.Papers()
	g, err := gossip.Start(gossip.Config{
		Name: b.self.Name, Bind: b.gossipAt, Advertise: b.gossipAt, Key: key,
		Brief: b.brief, Gone: b.member.Gone, Log: b.h.log,
	})
	if err != nil {
		return err
	}
	b.live.Store(g)
	b.h.onClose(g.Close)
	return nil
}

// seeds are whom a new host, or this one after a restart, asks first.
func (b *belonging) seeds() []cluster.Seed {
	out := []cluster.Seed{{Name: b.self.Name, Address: b.advertise.String(), Gossip: b.gossipAt.String()}}
	if b.live.Load() == nil {
		return out
	}
	for _, m := range b.live.Load().Members() {
		if m.State == gossip.Alive {
			out = append(out, cluster.Seed{Name: m.Name, Address: m.Address, Gossip: m.Gossip})
		}
	}
	return out
}

// brief is what gossip tells of this host.
func (b *belonging) brief() gossip.Brief {
	n := b.h.self()
	out := gossip.Brief{
		ID: b.self.ID, Address: b.advertise.String(), Zone: n.GetZone(), Version: n.GetVersions().GetTranship(),
		CPUs: int(n.GetCpus()), MemoryMiB: n.GetMemoryTotalBytes() >> 20, CostPerHour: n.GetCostPerHour(),
		Cordoned: n.GetCordoned(), Authority: b.authority != nil,
	}
	if n.CpuLoad != nil {
		out.CPULoad = tenths(n.GetCpuLoad())
	}
	if t := n.GetMemoryTotalBytes(); t > 0 {
		out.MemoryLoad = tenths(1 - float64(n.GetMemoryAvailableBytes())/float64(t))
	}
	return out
}

func tenths(share float64) int { return int(min(max(share, 0), 1)*10 + 0.5) }

// run keeps the host in the cluster until ctx ends.
func (b *belonging) run(ctx context.Context) error {
	var work sync.WaitGroup
	defer work.Wait()
	if b.live.Load() != nil {
		work.Go(func() { b.stayKnown(ctx) })
		work.Go(func() { b.every(ctx, tellEvery, b.tell) })
		work.Go(func() { b.every(ctx, exchangeEvery, b.exchangeWithOne) })
	}
	work.Go(func() { b.every(ctx, time.Minute, b.renewInTime) })
	if b.joins == nil {
		<-ctx.Done()
		return nil
	}
	if err := b.joins.Serve(ctx, b.door); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// every runs f at once and then with some jitter, so that hosts that were
// started together do not stay together.
func (b *belonging) every(ctx context.Context, pace time.Duration, f func(context.Context)) {
	for {
		if !b.hasLeft() {
			f(ctx)
		}
		wait := time.NewTimer(pace*3/4 + rand.N(pace/2))
		select {
		case <-ctx.Done():
			wait.Stop()
			return
		case <-wait.C:
		}
	}
}

// stayKnown joins the seeds, and again whenever nobody else is there.
func (b *belonging) stayKnown(ctx context.Context) {
	b.every(ctx, joinAgainEvery, func(ctx context.Context) {
		alive := slices.ContainsFunc(b.live.Load().Members(), func(m gossip.Member) bool { return m.State == gossip.Alive })
		if alive {
			b.keepSeeds()
			return
		}
		// Who missed a revocation has the old key: the statement comes first.
		var at []string
		for _, s := range b.member.Seeds() {
			if s.Name == b.self.Name {
				continue
			}
			if err := b.exchange(ctx, s.Name); err != nil {
				b.h.log.Debug("statement", "peer", s.Name, "err", err)
			}
			at = append(at, s.Name+"/"+s.Gossip)
		}
		if len(at) == 0 || ctx.Err() != nil {
			return
		}
		if _, err := b.live.Load().Join(at); err != nil {
			b.h.log.Debug("no other host answers", "err", err)
		}
	})
}

// keepSeeds remembers the hosts of now for the next start.
func (b *belonging) keepSeeds() {
	now := b.seeds()[1:]
	if len(now) > 8 { // enough to find one of them alive
		now = now[:8]
	}
	last := slices.DeleteFunc(b.member.Seeds(), func(s cluster.Seed) bool { return s.Name == b.self.Name })
	if slices.Equal(now, last) || len(now) < len(last) && len(last) <= 8 && len(now) == 0 {
		return
	}
	if err := b.member.KeepSeeds(now); err != nil {
		b.h.log.Warn("remember the other hosts", "err", err)
	}
}

func (b *belonging) tell(context.Context) {
	if err := b.live.Load().Tell(); err != nil {
		b.h.log.Debug("tell the others", "err", err)
	}
}

func (b *belonging) exchangeWithOne(ctx context.Context) {
	// Again: a handshake may have been under way when the statement came.
	b.dropRevoked()
	nodes := b.Nodes()
	if len(nodes) == 0 {
		return
	}
	node := nodes[rand.IntN(len(nodes))]
	if err := b.exchange(ctx, node); err != nil {
		b.h.log.Debug("statement", "peer", node, "err", err)
	}
}

// exchange compares statements with another host; both end with the newer one.
func (b *belonging) exchange(ctx context.Context, node string) error {
	client, err := b.h.peers.Pool(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	_, number, _ := b.member.Papers()
	resp, err := client.Exchange(ctx, connect.NewRequest(&v1.ExchangeRequest{Number: number}))
	if err != nil {
		return err
	}
	if p := resp.Msg.GetPapers(); p != nil {
		return b.install(cluster.Signed{Statement: p.GetStatement(), Signature: p.GetSignature()}, p.GetKey())
	}
	if resp.Msg.GetNumber() < number {
		return b.send(ctx, node)
	}
	return nil
}

// send gives a host this one's statement.
func (b *belonging) send(ctx context.Context, node string) error {
	client, err := b.h.peers.Pool(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	papers := b.papers()
	_, err = client.Exchange(ctx, connect.NewRequest(&v1.ExchangeRequest{Number: papers.GetNumber(), Papers: papers}))
	return err
}

func (b *belonging) papers() *v1.Papers {
	signed, number, key := b.member.Papers()
	return &v1.Papers{Statement: signed.Statement, Signature: signed.Signature, Key: key, Number: number}
}

// install makes a newer statement hold: on disk, in every handshake from now on,
// for connections that are there, and for the gossip key.
func (b *belonging) install(signed cluster.Signed, key []byte) error {
	newer, err := b.member.Install(signed, key)
	if err != nil || !newer {
		return err
	}
	b.h.log.Info("the cluster's statement is newer", "revoked", len(b.member.Revoked()))
	b.dropRevoked()
	if b.live.Load() != nil {
		return b.live.Load().Rekey(key)
	}
	return nil
}

// dropRevoked ends the connections of hosts that were revoked, by what they showed
// when they connected: what gossip says of their names is anybody's word.
func (b *belonging) dropRevoked() {
	b.drop(func(cert *x509.Certificate) bool { return b.member.Refuse(cert) != nil })
}

func (b *belonging) drop(refused func(*x509.Certificate) bool) {
	if b.h.pages != nil {
		b.h.pages.Drop(refused)
	}
	b.h.peers.Drop(refused)
}

// spread tells every other host, and says whom.
func (b *belonging) spread(ctx context.Context) (told, not []string) {
	var mu sync.Mutex
	var work sync.WaitGroup
	places := make(chan struct{}, 32)
	for _, node := range b.Nodes() {
		places <- struct{}{}
		work.Go(func() {
			defer func() { <-places }()
			err := b.send(ctx, node)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				b.h.log.Warn("tell of a revocation", "peer", node, "err", err)
				not = append(not, node)
				return
			}
			told = append(told, node)
		})
	}
	work.Wait()
	slices.Sort(told)
	slices.Sort(not)
	return told, not
}

// renewInTime replaces this host's certificate once two thirds of its life are over.
func (b *belonging) renewInTime(ctx context.Context) {
	cert, err := pki.ReadCert(b.h.cfg.PKI.Cert)
	if err != nil {
		b.h.log.Error("certificate of this host", "err", err)
		return
	}
	now := time.Now()
	if now.Before(pki.RenewAt(cert)) || now.Before(b.renewNext) {
		return
	}
	b.renewNext = now.Add(renewRetry)
	if err := b.renew(ctx); err != nil {
		b.h.log.Warn("the certificate of this host was not renewed", "ends", cert.NotAfter, "err", err)
		return
	}
	b.h.log.Info("the certificate of this host was renewed")
}

func (b *belonging) renew(ctx context.Context) error {
	request, keyPEM, err := pki.NewRequest()
	if err != nil {
		return err
	}
	certPEM, err := b.sign(ctx, request)
	if err != nil {
		return err
	}
	if _, err := tls.X509KeyPair(certPEM, keyPEM); err != nil {
		return fmt.Errorf("the new certificate: %w", err)
	}
	cert, err := pki.ParseCert(certPEM)
	if err != nil {
		return fmt.Errorf("the new certificate: %w", err)
	}
	if host, err := pki.IdentityOf(cert); err != nil || host.Name != b.self.Name {
		return fmt.Errorf("the new certificate is of %v, not of %s (%w)", host, b.self.Name, err)
	}
	// Between the two the daemon serves the pair from before (pki.TLS).
	return pki.ReplacePair(b.h.cfg.PKI.Cert, b.h.cfg.PKI.Key, certPEM, keyPEM)
}

// sign has the authority sign a request of this host.
func (b *belonging) sign(ctx context.Context, request []byte) ([]byte, error) {
	if b.authority != nil {
		cert, err := pki.ReadCert(b.h.cfg.PKI.Cert)
		if err != nil {
			return nil, err
		}
		return b.authority.Renew(cert, request)
	}
	if b.member == nil {
		return nil, errors.New("nobody is known to have the CA's key: replace it by hand")
	}
	client, err := b.h.peers.Pool(b.member.Authority())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	resp, err := client.Renew(ctx, connect.NewRequest(&v1.RenewRequest{Request: request}))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", b.member.Authority(), err)
	}
	return resp.Msg.GetCertificate(), nil
}
