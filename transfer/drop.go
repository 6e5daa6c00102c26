package transfer

import (
	"context"
	"crypto/x509"

	"github.com/quic-go/quic-go"
)

// codeRevoked closes connections of a peer that no longer belongs.
const codeRevoked quic.ApplicationErrorCode = 6

// Drop ends every connection whose peer showed a certificate that refused says is
// good no longer. Whether the peer may come back is what the TLS configuration says.
func (s *Server) Drop(refused func(*x509.Certificate) bool) {
	s.mu.Lock()
	var theirs []*quic.Conn
	for conn := range s.conns {
		if shows(conn, refused) {
			theirs = append(theirs, conn)
		}
	}
	s.mu.Unlock()
	for _, conn := range theirs {
		conn.CloseWithError(codeRevoked, "revoked")
	}
}

// Drop is Server.Drop for connections that this host made, and the requests on them.
func (t *PeerTransport) Drop(refused func(*x509.Certificate) bool) {
	t.mu.Lock()
	var theirs []*quic.Conn
	for conn := range t.conns {
		if shows(conn, refused) {
			theirs = append(theirs, conn)
		}
	}
	t.mu.Unlock()
	for _, conn := range theirs {
		conn.CloseWithError(codeRevoked, "revoked")
	}
}

// Shows says whether refused holds for the certificate of the other end.
func (s *Session) Shows(refused func(*x509.Certificate) bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range s.links {
		if shows(l.conn, refused) {
			return true
		}
	}
	return false
}

func shows(conn *quic.Conn, refused func(*x509.Certificate) bool) bool {
	cert := peerCertificate(conn)
	return cert == nil || refused(cert)
}

// keep remembers a connection while it lives.
func (t *PeerTransport) keep(conn *quic.Conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conns == nil {
		t.conns = map[*quic.Conn]struct{}{}
	}
	t.conns[conn] = struct{}{}
	context.AfterFunc(conn.Context(), func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.conns, conn)
	})
}

// Closed says whether the session was closed.
func (s *Session) Closed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}
