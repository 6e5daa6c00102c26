package daemon

import (
	"context"
	"crypto/x509"
	"fmt"
	"path/filepath"
	"slices"
	"sync"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/migrate"
	"github.com/tranship/tranship/daemon/peers/cluster"
	"github.com/tranship/tranship/daemon/peers/pki"
	"github.com/tranship/tranship/daemon/workloads"
	"github.com/tranship/tranship/daemon/workloads/steward"
	"github.com/tranship/tranship/transfer"
)

// startWorkloads opens the book of workloads and removes what an earlier life
// was starting when it ended. After the migrations: what they bring is theirs.
func (h *host) startWorkloads(ctx context.Context) error {
	book, err := steward.OpenBook(filepath.Join(h.cfg.StateDir, "workloads.db"))
	if err != nil {
		return err
	}
	h.onClose(book.Close)
	tenants := map[string]workloads.Tenant{}
	for name, t := range h.cfg.Tenants {
		tenants[name] = workloads.Tenant{CPUs: t.CPUs, Memory: t.MemoryBytes, Shards: t.Shards}
	}
	met, err := book.Met()
	if err != nil {
		return err
	}
	conf := steward.Config{
		Node: h.cfg.Node, Book: book, Pool: &workloadPool{h: h, book: book, met: met}, Runtime: h.rt, Tenants: tenants,
		MigrationOf: h.moves.MigrationOf, Caller: transfer.PeerFrom, Log: h.log,
	}
	if h.cluster != nil {
		ca, err := pki.ReadCert(h.cfg.PKI.CA)
		if err != nil {
			return fmt.Errorf("workloads: %w", err)
		}
		conf.Seals = &recordSeals{ca: ca, cert: h.cfg.PKI.Cert, key: h.cfg.PKI.Key}
	}
	h.steward = steward.New(conf)
	return h.steward.Recover(ctx)
}

// recordSeals seals workloads' records with this host's pair as its files are now:
// certificates are renewed.
type recordSeals struct {
	ca        *x509.Certificate
	cert, key string
}

var _ steward.Seals = (*recordSeals)(nil)

// sealPurpose is in what is signed, so that nothing else that a host signs is a
// workload's record.
const sealPurpose = "workload"

// Seal is as this host.
func (s *recordSeals) Seal(statement []byte) (pki.Seal, error) {
	pair, err := pki.LoadPair(s.cert, s.key)
	if err != nil {
		return pki.Seal{}, fmt.Errorf("certificate of this host: %w", err)
	}
	return pki.MakeSeal(pair, sealPurpose, statement)
}

// Open names who sealed it.
func (s *recordSeals) Open(seal pki.Seal, statement []byte) (string, error) {
	host, err := seal.Open(s.ca, sealPurpose, statement)
	return host.Name, err
}

// workloadPool is this host's pool for the steward: the hosts that membership
// shows, and those that it showed once and that were neither revoked nor left.
// Membership forgets who is down for a day, and knows nobody at first; what
// those hosts run is still there.
type workloadPool struct {
	h    *host
	book *steward.Book

	mu  sync.Mutex
	met map[string]string // IDs by name, as in the book
}

var _ steward.Pool = (*workloadPool)(nil)

// Look asks all hosts.
func (p *workloadPool) Look(ctx context.Context) []control.NodeStatus {
	out := []control.NodeStatus{p.Here(ctx)}
	if p.h.peers == nil {
		return out
	}
	heard := map[string]bool{}
	for _, st := range p.h.peers.Statuses(ctx) {
		heard[st.Node.GetName()] = true
		out = append(out, control.NodeStatus{Node: st.Node, Shards: st.Shards})
	}
	for _, node := range p.Nodes() {
		if !heard[node] {
			out = append(out, control.NodeStatus{Node: &v1.Node{Name: node, State: control.NodeUnreachable, Error: "membership has forgotten it"}})
		}
	}
	return out
}

// Here is this host.
func (p *workloadPool) Here(ctx context.Context) control.NodeStatus {
	n, shards := p.h.self(), p.h.localShards(ctx)
	n.Shards = uint32(len(shards))
	return control.NodeStatus{Node: n, Shards: shards}
}

// Nodes lists the others.
func (p *workloadPool) Nodes() []string {
	b := p.h.cluster
	if p.h.peers == nil || b == nil || b.hasLeft() {
		return nil
	}
	nodes := p.h.peers.Nodes()
	if b.member == nil {
		return nodes // the configuration is all there is to know
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	shown := map[string]string{}
	for _, s := range b.member.Seeds() {
		shown[s.Name] = ""
	}
	if g := b.live.Load(); g != nil {
		for _, m := range g.Members() {
			shown[m.Name] = m.ID
		}
	}
	gone := func(name, id string) bool {
		return slices.ContainsFunc(b.member.Revoked(), func(r cluster.Revoked) bool {
			return r.Name == name && (id == "" || r.ID == "" || r.ID == id)
		})
	}
	for name, id := range shown {
		if gone(name, id) {
			continue
		}
		if known, met := p.met[name]; name != b.self.Name && (!met || id != "" && id != known) {
			if err := p.book.Meet(name, id); err != nil {
				p.h.log.Warn("hosts of the pool", "err", err)
			}
			p.met[name] = id
		}
	}
	for name, id := range p.met {
		switch {
		case slices.Contains(nodes, name):
		case !gone(name, id):
			nodes = append(nodes, name)
		default:
			if err := p.book.Part(name); err != nil {
				p.h.log.Warn("hosts of the pool", "err", err)
			}
			delete(p.met, name)
		}
	}
	slices.Sort(nodes)
	return nodes
}

// Client speaks with one.
func (p *workloadPool) Client(node string) (transhipv1connect.WorkloadHostsClient, error) {
	if p.h.peers == nil {
		return nil, fmt.Errorf("%w: %s", migrate.ErrUnknownNode, node)
	}
	return p.h.peers.Workloads(node)
}
