// Package peers knows the other hosts of the pool and how to reach them: their
// addresses, the API over HTTP/3, page sessions. pki is the cluster's CA.
package peers

import (
	"context"
	"crypto/tls"
	"fmt"
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

// Directory is the pool as this host's configuration names it.
type Directory struct {
	addresses map[string]string // by node
	tls       func(node string) *tls.Config
	http      *http.Client
	closeHTTP func() error
}

var _ migrate.Peers = (*Directory)(nil)

// New makes a directory of the nodes and their addresses. Close it.
func New(addresses map[string]string, tls func(node string) *tls.Config) (*Directory, error) {
	d := &Directory{addresses: addresses, tls: tls}
	rt, err := transfer.HTTPClient(tls, func(_ context.Context, node string) (string, error) { return d.address(node) })
	if err != nil {
		return nil, err
	}
	d.http, d.closeHTTP = &http.Client{Transport: rt}, rt.Close
	return d, nil
}

// Close closes idle connections.
func (d *Directory) Close() error { return d.closeHTTP() }

func (d *Directory) address(node string) (string, error) {
	a, ok := d.addresses[node]
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

// Dial opens a page session with a node.
func (d *Directory) Dial(ctx context.Context, node, migration string, opt transfer.Options) (*transfer.Session, error) {
	addr, err := d.address(node)
	if err != nil {
		return nil, err
	}
	return transfer.Dial(ctx, addr, node, d.tls, migration, opt)
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
	out := make([]Status, 0, len(d.addresses))
	for node, addr := range d.addresses {
		wg.Go(func() {
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
	n := resp.Msg.GetNode()
	if n == nil {
		n = &v1.Node{}
	}
	n.Name, n.Address, n.Self, n.State = node, addr, false, "alive"
	return Status{Node: n, Shards: resp.Msg.GetShards()}
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
