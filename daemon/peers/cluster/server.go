package cluster

import (
	"context"
	"crypto/hmac"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// A person joins a host at a time, a script some tens: what is more is noise.
	joinsPerSecond, joinsBurst     = 20, 50
	perHostPerSecond, perHostBurst = 1, 10
	// maxSources bounds the memory for limits; when it is full all begin anew.
	maxSources = 4096
	// maxJoining bounds handshakes and requests at a time.
	maxJoining = 32
	// joinPatience ends connections that say nothing.
	joinPatience = 10 * time.Second
)

// Server takes joining hosts, on TCP beside the peers' UDP port. It hangs up
// before the handshake while no token is open.
type Server struct {
	Authority *Authority
	// Name is this host's; Seeds are whom a new host shall ask first.
	Name  string
	Seeds func() []Seed
	// Taken knows of hosts besides the register; nil knows of none.
	Taken func(name string) bool
	// Certificate is this host's, as its peers see it.
	Certificate func() (*tls.Certificate, error)
	Log         *slog.Logger

	mu    sync.Mutex
	until time.Time // when the last open token ends
	all   *rate.Limiter
	from  map[netip.Addr]*rate.Limiter
}

// Expect opens the door until a token's end.
func (s *Server) Expect(until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if until.After(s.until) {
		s.until = until
	}
}

// Serve takes connections until ctx ends, and closes l.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	until, err := s.Authority.OpenUntil()
	if err != nil {
		return errors.Join(err, l.Close())
	}
	s.Expect(until)
	conf := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			own, err := s.Certificate()
			if err != nil {
				return nil, err
			}
			// The joining host knows the CA's hash; here is what to hash.
			with := *own
			with.Certificate = append(append([][]byte(nil), own.Certificate...), s.Authority.ca.Cert().Raw)
			return &with, nil
		},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+joinPath, s.join)
	srv := &http.Server{
		Handler: mux, ReadTimeout: joinPatience, WriteTimeout: joinPatience, MaxHeaderBytes: 8 << 10,
		// A stranger could fill the disk with what http has to say.
		ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	srv.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	err = srv.Serve(tls.NewListener(&door{Listener: l, s: s, places: make(chan struct{}, maxJoining)}, conf))
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("joining hosts: %w", err)
}

// door is a listener that lets in only whom there is a reason to hear.
type door struct {
	net.Listener
	s      *Server
	places chan struct{}
}

func (d *door) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if !d.s.open(conn.RemoteAddr()) {
			conn.Close()
			continue
		}
		select {
		case d.places <- struct{}{}:
			return &guest{Conn: conn, leave: sync.OnceFunc(func() { <-d.places })}, nil
		default:
			conn.Close()
		}
	}
}

type guest struct {
	net.Conn
	leave func()
}

func (g *guest) Close() error {
	g.leave()
	return g.Conn.Close()
}

// open says whether a connection from there is worth a handshake.
func (s *Server) open(from net.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.Authority.now().Before(s.until) {
		return false
	}
	if s.all == nil {
		s.all = rate.NewLimiter(joinsPerSecond, joinsBurst)
	}
	at, err := netip.ParseAddrPort(from.String())
	if err != nil {
		return false
	}
	if s.from == nil || len(s.from) >= maxSources {
		s.from = map[netip.Addr]*rate.Limiter{}
	}
	one := s.from[at.Addr()]
	if one == nil {
		one = rate.NewLimiter(perHostPerSecond, perHostBurst)
		s.from[at.Addr()] = one
	}
	return one.Allow() && s.all.Allow()
}

// join answers one joining host.
func (s *Server) join(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxJoinRequest))
	if err != nil {
		refuseJoin(w, http.StatusRequestEntityTooLarge, errors.New("the request is too long, or was cut"))
		return
	}
	raw, proofOf, name, err := s.answer(r.TLS, r.Header.Get(proofHeader), body)
	if err != nil {
		// The name is the stranger's word: quoted, and cut.
		s.Log.Warn("a host did not join", "name", fmt.Sprintf("%.64q", name), "from", r.RemoteAddr, "err", err)
		refuseJoin(w, statusOf(err), err)
		return
	}
	s.Log.Info("a host joined", "name", name, "from", r.RemoteAddr)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set(proofHeader, base64.StdEncoding.EncodeToString(proofOf))
	_, _ = w.Write(raw) // who does not hear it asks for another token
}

func (s *Server) answer(conn *tls.ConnectionState, shown string, body []byte) (raw, proofOf []byte, name string, err error) {
	var req joinRequest
	if err := json.Unmarshal(body, &req); err != nil {
		return nil, nil, "", &badRequest{errors.New("no request to join")}
	}
	if req.Version != joinVersion {
		return nil, nil, req.Name, &badRequest{fmt.Errorf("version %d of joining, this host knows %d: install the same tranship on both", req.Version, joinVersion)}
	}
	id, err := hex.DecodeString(req.Token)
	if err != nil || len(id) != tokenIDLen {
		return nil, nil, req.Name, ErrTokenUnknown
	}
	mac, err := base64.StdEncoding.DecodeString(shown)
	if err != nil {
		return nil, nil, req.Name, ErrTokenUnknown
	}
	channel, err := conn.ExportKeyingMaterial(channelLabel, nil, 32)
	if err != nil {
		return nil, nil, req.Name, err
	}
	cert, secret, _, err := s.Authority.admit(id, func(secret []byte) bool {
		return hmac.Equal(mac, proof(secret, proofOfRequest, channel, body))
	}, req.Name, req.Request, s.Taken)
	if err != nil {
		return nil, nil, req.Name, err
	}
	signed, key, err := s.Authority.Papers()
	if err != nil {
		return nil, nil, req.Name, err
	}
	raw, err = json.Marshal(joinAnswer{
		Version: joinVersion, Certificate: cert, Authority: s.Name, Seeds: bound(s.Seeds()),
		Signed: signed, Key: key, UnixMs: s.Authority.now().UnixMilli(),
	})
	if err != nil {
		return nil, nil, req.Name, err
	}
	return raw, proof(secret, proofOfAnswer, channel, raw), req.Name, nil
}

// badRequest is what the other end did wrong before its token counted.
type badRequest struct{ error }

func statusOf(err error) int {
	var bad *badRequest
	switch {
	case errors.As(err, &bad):
		return http.StatusBadRequest
	case errors.Is(err, ErrTokenUnknown), errors.Is(err, ErrTokenUsed), errors.Is(err, ErrTokenExpired):
		return http.StatusForbidden
	}
	return http.StatusConflict
}

func refuseJoin(w http.ResponseWriter, status int, err error) {
	raw, _ := json.Marshal(joinRefusal{Error: err.Error()}) // a string always encodes
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(raw)
}

func encodePEM(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}
