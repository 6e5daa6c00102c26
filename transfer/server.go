package transfer

import (
	"context"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// Server is a host's one door for its peers.
type Server struct {
	log    *slog.Logger
	accept AcceptFunc

	socket    net.PacketConn
	transport *quic.Transport
	listener  *quic.Listener
	api       *http3.Server

	ctx    context.Context // ends when the server closes
	cancel context.CancelFunc
	once   sync.Once

	mu       sync.Mutex
	closing  bool
	running  sync.WaitGroup // connections and API requests; grows only under mu
	conns    map[*quic.Conn]struct{}
	perPeer  map[string]int
	sessions map[inboundKey]*inbound
}

// Listen binds the UDP address addr. tlsConf must require and verify the peers'
// certificates (as pki.TLS makes it). api answers HTTP/3 requests, whose context
// names the peer (PeerFrom); it may be nil. Nothing is served before Serve; a
// server that is not needed after all is closed.
func Listen(addr string, tlsConf *tls.Config, api http.Handler, accept AcceptFunc, log *slog.Logger) (*Server, error) {
	udp, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, fmt.Errorf("listen for peers on %q: %w", addr, err)
	}
	socket, err := listenUDP("udp", udp)
	if err != nil {
		return nil, fmt.Errorf("listen for peers: %w", err)
	}
	return listen(socket, tlsConf, quicConfig(DefaultIdleTimeout, DefaultKeepAlive), api, accept, log)
}

func listen(socket net.PacketConn, tlsConf *tls.Config, conf *quic.Config, api http.Handler, accept AcceptFunc, log *slog.Logger) (*Server, error) {
	if tlsConf.ClientAuth != tls.RequireAndVerifyClientCert || tlsConf.ClientCAs == nil {
		socket.Close()
		return nil, errors.New("listen for peers: the TLS configuration does not verify their certificates")
	}
	tlsConf = tlsConf.Clone()
	tlsConf.NextProtos = []string{alpnPages, alpnAPI}
	transport := &quic.Transport{Conn: socket, StatelessResetKey: resetKey(tlsConf)}
	listener, err := transport.Listen(tlsConf, conf)
	if err != nil {
		err = fmt.Errorf("listen for peers on %v: %w", socket.LocalAddr(), err)
		return nil, errors.Join(err, transport.Close(), socket.Close())
	}
	s := &Server{
		log: log, accept: accept,
		socket: socket, transport: transport, listener: listener,
		conns: map[*quic.Conn]struct{}{}, perPeer: map[string]int{}, sessions: map[inboundKey]*inbound{},
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.api = &http3.Server{
		Handler:        s.counted(api),
		MaxHeaderBytes: 64 << 10,
		// quic-go reports what it meets in every connection; a peer could fill the
		// disk with it.
		Logger: slog.New(slog.DiscardHandler),
		ConnContext: func(ctx context.Context, conn *quic.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, peerCertificate(conn))
		},
	}
	return s, nil
}

// resetKey makes a restarted daemon able to say, with a stateless reset, that it
// knows nothing of a connection: the peer learns it in a round trip and not
// after the idle timeout. It must be the same after a restart and secret, so it
// is derived from the host's own key. Without one there are just no resets.
func resetKey(conf *tls.Config) *quic.StatelessResetKey {
	var pair *tls.Certificate
	switch {
	case len(conf.Certificates) > 0:
		pair = &conf.Certificates[0]
	case conf.GetCertificate != nil:
		var err error
		if pair, err = conf.GetCertificate(&tls.ClientHelloInfo{}); err != nil {
			return nil
		}
	default:
		return nil
	}
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		return nil
	}
	raw, err := hkdf.Key(sha256.New, der, nil, "tranship quic stateless reset", 32)
	if err != nil {
		return nil
	}
	return (*quic.StatelessResetKey)(raw)
}

// Addr is the address that the server is bound to.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Serve takes connections until ctx ends, whose cause it then returns, or until
// Close is called, when it returns nil. Either way the server is closed.
func (s *Server) Serve(ctx context.Context) error {
	defer s.Close()
	stop := context.AfterFunc(ctx, s.cancel)
	defer stop()
	for {
		conn, err := s.listener.Accept(s.ctx)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case s.ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("accept peers on %v: %w", s.Addr(), err)
		}
		if !s.start(conn) {
			conn.CloseWithError(codeGoingAway, "stopping")
			continue
		}
		go func() {
			defer s.running.Done()
			s.serveConn(conn)
		}()
	}
}

// start enters a connection, unless the server is closing.
func (s *Server) start(conn *quic.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.conns[conn] = struct{}{}
	s.running.Add(1)
	return true
}

// Close ends all connections, waits until their last call has returned from
// handlers and Sinks, and frees the socket. It may be called more than once.
func (s *Server) Close() error {
	var err error
	s.once.Do(func() {
		s.mu.Lock()
		s.closing = true
		conns := make([]*quic.Conn, 0, len(s.conns))
		for conn := range s.conns {
			conns = append(conns, conn)
		}
		s.mu.Unlock()
		s.cancel()
		for _, conn := range conns {
			conn.CloseWithError(codeGoingAway, "stopping")
		}
		s.running.Wait()
		s.mu.Lock()
		for _, in := range s.sessions {
			if in.retained != nil {
				in.retained.Stop()
			}
		}
		clear(s.sessions)
		s.mu.Unlock()
		err = errors.Join(s.api.Close(), s.listener.Close(), s.transport.Close(), s.socket.Close())
	})
	return err
}

// serveConn serves one connection to its end.
func (s *Server) serveConn(conn *quic.Conn) {
	peer := peerName(conn)
	log := s.log.With("peer", peer)
	defer func() {
		s.mu.Lock()
		delete(s.conns, conn)
		s.mu.Unlock()
	}()
	if peer == "" {
		log.Warn("connection refused: its certificate names no node")
		conn.CloseWithError(codeRefused, "the certificate names no node")
		return
	}
	if !s.enter(peer) {
		log.Warn("connection refused: too many", "limit", maxPeerConns)
		conn.CloseWithError(codeRefused, fmt.Sprintf("%d connections are open", maxPeerConns))
		return
	}
	defer s.leave(peer)
	if conn.ConnectionState().TLS.NegotiatedProtocol == alpnAPI {
		if err := s.api.ServeQUICConn(conn); err != nil {
			log.Debug("API connection ended", "err", err)
		}
		return
	}
	s.servePages(conn, peer, log)
}

func (s *Server) enter(peer string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.perPeer[peer] >= maxPeerConns {
		return false
	}
	s.perPeer[peer]++
	return true
}

func (s *Server) leave(peer string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.perPeer[peer]--; s.perPeer[peer] == 0 {
		delete(s.perPeer, peer)
	}
}

// counted makes Close wait for API requests: http3 does not.
func (s *Server) counted(api http.Handler) http.Handler {
	if api == nil {
		api = http.NotFoundHandler()
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		closing := s.closing
		if !closing {
			s.running.Add(1)
		}
		s.mu.Unlock()
		if closing {
			http.Error(w, "stopping", http.StatusServiceUnavailable)
			return
		}
		defer s.running.Done()
		api.ServeHTTP(w, r)
	})
}

type peerKey struct{}

// PeerFrom returns the node name of the peer that an API request came from, ""
// for a request that came another way.
func PeerFrom(ctx context.Context) string { return nameIn(CertificateFrom(ctx)) }

// CertificateFrom returns what the peer of an API request showed in the handshake,
// nil for a request that came another way.
func CertificateFrom(ctx context.Context) *x509.Certificate {
	cert, _ := ctx.Value(peerKey{}).(*x509.Certificate)
	return cert
}

func peerName(conn *quic.Conn) string { return nameIn(peerCertificate(conn)) }

func peerCertificate(conn *quic.Conn) *x509.Certificate {
	if certs := conn.ConnectionState().TLS.PeerCertificates; len(certs) > 0 {
		return certs[0]
	}
	return nil
}

// nameIn is the name that the handshake verified: a certificate of a node has
// exactly one (pki refuses the others during the handshake).
func nameIn(cert *x509.Certificate) string {
	if cert == nil || len(cert.DNSNames) != 1 {
		return ""
	}
	return cert.DNSNames[0]
}
