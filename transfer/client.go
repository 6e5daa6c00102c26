package transfer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// PeerTransport carries the control API to peers: an http.RoundTripper for URLs
// https://NODE/…, over one HTTP/3 connection a node that is kept and made anew
// when it is lost.
type PeerTransport struct {
	socket    net.PacketConn
	transport *quic.Transport
	http      *http3.Transport

	mu    sync.Mutex
	conns map[*quic.Conn]struct{}
}

// HTTPClient makes a PeerTransport. resolve finds a node's UDP address; it is
// asked at every new connection. The peer must prove that it is the node that
// the URL names.
func HTTPClient(tlsFor func(node string) *tls.Config, resolve func(ctx context.Context, node string) (addr string, err error)) (*PeerTransport, error) {
	socket, err := net.ListenUDP("udp", nil)
	if err != nil {
		return nil, fmt.Errorf("socket for peers' API: %w", err)
	}
	t := &PeerTransport{socket: socket, transport: &quic.Transport{Conn: socket}}
	conf := quicConfig(DefaultIdleTimeout, DefaultKeepAlive)
	conf.MaxIncomingStreams = -1 // a server has nothing to ask
	t.http = &http3.Transport{
		QUICConfig: conf,
		Dial: func(ctx context.Context, addr string, _ *tls.Config, conf *quic.Config) (*quic.Conn, error) {
			node, _, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			where, err := resolve(ctx, node)
			if err != nil {
				return nil, fmt.Errorf("address of %s: %w", node, err)
			}
			udp, err := net.ResolveUDPAddr("udp", where)
			if err != nil {
				return nil, fmt.Errorf("address of %s: %w", node, err)
			}
			tlsConf := tlsFor(node).Clone()
			tlsConf.NextProtos = []string{alpnAPI}
			conn, err := t.transport.Dial(ctx, udp, tlsConf, conf)
			if err == nil {
				t.keep(conn)
			}
			return conn, err
		},
	}
	return t, nil
}

// onceKey marks the context of a request that must not be sent twice.
type onceKey struct{}

// Once marks requests that may not run twice: see RoundTrip.
func Once(ctx context.Context) context.Context { return context.WithValue(ctx, onceKey{}, true) }

// RoundTrip sends a request. A peer that cannot be heard is ErrLinkLost, one
// that is not who the URL names ErrUntrusted.
//
// A peer that was restarted since the last request knows nothing of the
// connection, and says so when it is used. The request is then sent again on a
// new one, unless Once forbids that: the old process may have worked on it.
func (t *PeerTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.http.RoundTrip(req)
	var restarted *quic.StatelessResetError
	if once, _ := req.Context().Value(onceKey{}).(bool); errors.As(err, &restarted) && !once && req.GetBody != nil {
		body, berr := req.GetBody()
		if berr != nil {
			return nil, errors.Join(linkError(err), berr)
		}
		again := req.Clone(req.Context())
		again.Body = body
		resp, err = t.http.RoundTrip(again)
	}
	if err != nil && req.Context().Err() == nil {
		err = linkError(err)
	}
	return resp, err
}

// CloseIdleConnections is what http.Client.CloseIdleConnections calls.
func (t *PeerTransport) CloseIdleConnections() { t.http.CloseIdleConnections() }

// Close ends all connections, and requests with them.
func (t *PeerTransport) Close() error {
	return errors.Join(t.http.Close(), t.transport.Close(), t.socket.Close())
}
