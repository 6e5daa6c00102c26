package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path/filepath"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
)

// DefaultAddress is where the CLI looks for the daemon.
const DefaultAddress = "unix:///run/tranship/tranship.sock"

// ErrUnreachable: nobody listens at the address, or it may not be used. Other
// errors come from the daemon.
var ErrUnreachable = errors.New("daemon unreachable")

// Client speaks to one host's daemon.
type Client struct {
	Shards     transhipv1connect.ShardsClient
	Nodes      transhipv1connect.NodesClient
	Migrations transhipv1connect.MigrationsClient
	Profiles   transhipv1connect.ProfilesClient
	Workloads  transhipv1connect.WorkloadsClient
	Cluster    transhipv1connect.ClusterClient
	Balance    transhipv1connect.BalanceClient
	http       *http.Client
}

// maxResponse bounds one message from the daemon; an inspection's specification
// is the largest.
const maxResponse = 16 << 20

// NewClient makes a client for unix:///PATH. It connects with the first call.
func NewClient(address string) (*Client, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "unix" || u.Host != "" || !filepath.IsAbs(u.Path) {
		return nil, fmt.Errorf("address %q: use unix:///PATH of the daemon's socket", address)
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, "unix", u.Path)
			if err != nil && ctx.Err() == nil {
				return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
			}
			return c, err
		},
	}
	hc := &http.Client{Transport: transport}
	const base = "http://transhipd" // the name is never resolved
	opts := []connect.ClientOption{connect.WithReadMaxBytes(maxResponse)}
	return &Client{
		Shards:     transhipv1connect.NewShardsClient(hc, base, opts...),
		Nodes:      transhipv1connect.NewNodesClient(hc, base, opts...),
		Migrations: transhipv1connect.NewMigrationsClient(hc, base, opts...),
		Profiles:   transhipv1connect.NewProfilesClient(hc, base, opts...),
		Workloads:  transhipv1connect.NewWorkloadsClient(hc, base, opts...),
		Cluster:    transhipv1connect.NewClusterClient(hc, base, opts...),
		Balance:    transhipv1connect.NewBalanceClient(hc, base, opts...),
		http:       hc,
	}, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }
