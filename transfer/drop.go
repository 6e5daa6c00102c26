package transfer

import (
	"context"

	"github.com/quic-go/quic-go"
)

// codeRevoked closes connections of a peer that no longer belongs.
const codeRevoked quic.ApplicationErrorCode = 6

// Drop ends every connection that a peer has here. Whether it may come back is
// what the TLS configuration says.
func (s *Server) Drop(peer string) {
	s.mu.Lock()
	var theirs []*quic.Conn
	for conn := range s.conns {
		if peerName(conn) == peer {
			theirs = append(theirs, conn)
		}
	}
	s.mu.Unlock()
	for _, conn := range theirs {
		conn.CloseWithError(codeRevoked, "revoked")
	}
}

// Drop ends every connection to a node, and the requests on it.
func (t *PeerTransport) Drop(node string) {
	t.mu.Lock()
	conns := make([]*quic.Conn, 0, len(t.conns[node]))
	for conn := range t.conns[node] {
		conns = append(conns, conn)
	}
	t.mu.Unlock()
	for _, conn := range conns {
		conn.CloseWithError(codeRevoked, "revoked")
	}
}

// keep remembers a connection while it lives.
func (t *PeerTransport) keep(node string, conn *quic.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conns == nil {
		t.conns = map[string]map[*quic.Conn]struct{}{}
	}
	if t.conns[node] == nil {
		t.conns[node] = map[*quic.Conn]struct{}{}
	}
	t.conns[node][conn] = struct{}{}
	context.AfterFunc(conn.Context(), func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if delete(t.conns[node], conn); len(t.conns[node]) == 0 {
			delete(t.conns, node)
		}
	})
}

// Closed says whether the session was closed.
func (s *Session) Closed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}
