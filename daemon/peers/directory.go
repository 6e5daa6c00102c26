// Package peers knows the other hosts of the pool and how to reach them: their
// addresses, the API over HTTP/3, page sessions. pki is the cluster's CA,
// cluster who belongs to the pool, gossip who is there.
package peers

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/migrate"
	"github.com/tranship/tranship/transfer"
)

// statusTimeout bounds the question after one peer's status: `tranship nodes` is
// answered while a host is down.
const statusTimeout = 2 * time.Second

// maxMessage bounds an API message from a peer: the largest, a container
// record, is below 4 MiB.
const maxMessage = 8 << 20

// maxAsked bounds the peers that are asked at once.
const maxAsked = 64

// Source knows the pool's other hosts. Both methods are called often, by several
// goroutines, and do not block.
type Source interface {
	// Address is the UDP address of a node's peer API; false for one that is not in the pool.
	Address(node string) (string, bool)
	// Nodes lists the other hosts, those that are down included.
	Nodes() []string
}

// Static is the pool as a configuration names it: addresses by node.
type Static map[string]string

var _ Source = Static(nil)

// Address looks a node up.
func (s Static) Address(node string) (string, bool) { a, ok := s[node]; return a, ok }

// Nodes lists the names.
func (s Static) Nodes() []string { return slices.Collect(maps.Keys(s)) }

// Directory reaches the pool's other hosts.
type Directory struct {
	source    Source
	tls       func(node string) *tls.Config
	transport *transfer.PeerTransport
	http      *http.Client

	mu       sync.Mutex
	sessions map[*transfer.Session]struct{}
}

var _ migrate.Peers = (*Directory)(nil)

// New makes a directory of the nodes that source knows. Close it.
func New(source Source, tls func(node string) *tls.Config) (*Directory, error) {
	d := &Directory{source: source, tls: tls, sessions: map[*transfer.Session]struct{}{}}
	rt, err := transfer.HTTPClient(tls, func(_ context.Context, node string) (string, error) { return d.address(node) })
	if err != nil {
		return nil, err
	}
	d.transport, d.http = rt, &http.Client{Transport: rt}
	return d, nil
}

// Close closes idle connections.
func (d *Directory) Close() error { return d.transport.Close() }

// Drop ends every connection that this host made to one whose certificate refused
// says is good no longer.
func (d *Directory) Drop(refused func(*x509.Certificate) bool) {
	d.transport.Drop(refused)
	d.mu.Lock()
	open := slices.Collect(maps.Keys(d.sessions))
	d.mu.Unlock()
	for _, s := range open {
		if s.Shows(refused) {
			_ = s.Close() // who uses it is told ErrClosed
		}
	}
}

// Nodes lists the other hosts of the pool.
func (d *Directory) Nodes() []string { return d.source.Nodes() }

func (d *Directory) address(node string) (string, error) {
	a, ok := d.source.Address(node)
	if !ok {
		return "", fmt.Errorf("%w: %s", migrate.ErrUnknownNode, node)
	}
	return a, nil
}

// Client speaks the peer API with a node.
func (d *Directory) Client(node string) (transhipv1connect.PeerClient, error) {
	if _, err := d.address(node); err != nil {
		return nil, err
	}
	return transhipv1connect.NewPeerClient(d.http, "https://"+node, connect.WithReadMaxBytes(maxMessage)), nil
}

// Pool speaks the API of the pool's administration with a node.
func (d *Directory) Pool(node string) (transhipv1connect.PoolClient, error) {
	if _, err := d.address(node); err != nil {
		return nil, err
	}
	return transhipv1connect.NewPoolClient(d.http, "https://"+node, connect.WithReadMaxBytes(maxMessage)), nil
}

// Rooms speaks the API of room for shards with a node.
func (d *Directory) Rooms(node string) (transhipv1connect.RoomsClient, error) {
	if _, err := d.address(node); err != nil {
		return nil, err
	}
	return transhipv1connect.NewRoomsClient(d.http, "https://"+node, connect.WithReadMaxBytes(maxMessage)), nil
}

// Workloads speaks with a node about workloads.
func (d *Directory) Workloads(node string) (transhipv1connect.WorkloadHostsClient, error) {
	if _, err := d.address(node); err != nil {
		return nil, err
	}
	return transhipv1connect.NewWorkloadHostsClient(d.http, "https://"+node, connect.WithReadMaxBytes(maxMessage)), nil
}

// Dial opens a page session with a node.
func (d *Directory) Dial(ctx context.Context, node, migration string, opt transfer.Options) (*transfer.Session, error) {
	addr, err := d.address(node)
	if err != nil {
		return nil, err
	}
	s, err := transfer.Dial(ctx, addr, node, d.tls, migration, opt)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	// Sessions are few, and end: what has ended goes when the next begins.
	for other := range d.sessions {
		if other.Closed() {
			delete(d.sessions, other)
		}
	}
	d.sessions[s] = struct{}{}
	return s, nil
}

// Status is what one peer said, or that it said nothing.
type Status struct {
	Node   *v1.Node
	Shards []*v1.Shard
}

// Statuses asks all peers at once; those that do not answer are "unreachable".
// Sorted by name.
func (d *Directory) Statuses(ctx context.Context) []Status {
	var wg sync.WaitGroup
	var mu sync.Mutex
	nodes := d.source.Nodes()
	out := make([]Status, 0, len(nodes))
	places := make(chan struct{}, maxAsked)
	for _, node := range nodes {
		addr, ok := d.source.Address(node)
		if !ok {
			continue // it left meanwhile
		}
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			st := d.status(ctx, node, addr)
			mu.Lock()
			defer mu.Unlock()
			out = append(out, st)
		})
	}
	wg.Wait()
	slices.SortFunc(out, func(a, b Status) int { return strings.Compare(a.Node.GetName(), b.Node.GetName()) })
	return out
}

func (d *Directory) status(ctx context.Context, node, addr string) Status {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	down := func(err error) Status {
		return Status{Node: &v1.Node{Name: node, Address: addr, State: "unreachable", Error: err.Error()}}
	}
	client, err := d.Client(node)
	if err != nil {
		return down(err)
	}
	resp, err := client.Status(ctx, connect.NewRequest(&v1.StatusRequest{}))
	if err != nil {
		return down(err)
	}
	n := sane(resp.Msg.GetNode())
	n.Name, n.Address, n.Self, n.State = node, addr, false, "alive"
	return Status{Node: n, Shards: saneShards(node, resp.Msg.GetShards())}
}

// Addresses lists the addresses that shards of reachable peers use; complete is
// false when a peer could not be asked.
func (d *Directory) Addresses(ctx context.Context) (used []netip.Addr, complete bool) {
	complete = true
	for _, st := range d.Statuses(ctx) {
		if st.Node.GetState() != "alive" {
			complete = false
		}
		for _, s := range st.Shards {
			if ip, err := netip.ParsePrefix(s.GetIp()); err == nil {
				used = append(used, ip.Addr())
			}
		}
	}
	return used, complete
}
