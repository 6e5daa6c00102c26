// Package httpcheck is an HTTP server with state in memory, in Go and in Python,
// and a client that checks it over one keep-alive connection.
//
// The protocol is small. Every answer carries Connection-Requests, how many
// requests this connection has made: a connection that was secretly made anew
// begins at one. PUT and GET /kv/KEY keep bytes in memory, GET /stat counts.
package httpcheck

import (
	"context"
	_ "embed" // the Python server
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// RequestsHeader numbers the requests of a connection.
const RequestsHeader = "Connection-Requests"

// PythonServer is the same server in Python, from its standard library alone.
// Its arguments are an address and a port.
//
//go:embed httpd.py
var PythonServer []byte

const maxValue = 64 << 20

// Server keeps keys in memory. Its zero value is not ready: use NewServer.
type Server struct {
	mu    sync.Mutex
	kv    map[string][]byte
	bytes int64

	requests    atomic.Int64
	connections atomic.Int64
	started     time.Time
}

// NewServer makes an empty server.
func NewServer() *Server { return &Server{kv: map[string][]byte{}, started: time.Now()} }

type connectionKey struct{}

// Serve answers on l until ctx is done.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /kv/{key}", s.put)
	mux.HandleFunc("GET /kv/{key}", s.get)
	mux.HandleFunc("GET /stat", s.stat)
	h := &http.Server{
		Handler: s.counted(mux),
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			s.connections.Add(1)
			return context.WithValue(ctx, connectionKey{}, new(atomic.Int64))
		},
		ReadHeaderTimeout: time.Minute, // longer than a blackout
	}
	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		// Idle connections are closed; a request under way has the grace.
		done <- h.Shutdown(grace)
	}()
	if err := h.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve http on %s: %w", l.Addr(), err)
	}
	if err := <-done; err != nil {
		return fmt.Errorf("end http on %s: %w", l.Addr(), err)
	}
	return nil
}

func (s *Server) counted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.requests.Add(1)
		n := r.Context().Value(connectionKey{}).(*atomic.Int64).Add(1)
		w.Header().Set(RequestsHeader, strconv.FormatInt(n, 10))
		next.ServeHTTP(w, r)
	})
}

func (s *Server) put(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxValue))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	key := r.PathValue("key")
	s.mu.Lock()
	s.bytes += int64(len(body)) - int64(len(s.kv[key]))
	s.kv[key] = body
	s.mu.Unlock()
	w.WriteHeader(http.StatusNoContent)
}

func (s *Server) get(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	value, ok := s.kv[r.PathValue("key")]
	s.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.Itoa(len(value)))
	_, _ = w.Write(value) // a client that went away counts that itself
}

// Stat is what GET /stat answers.
type Stat struct {
	Requests    int64   `json:"requests"`
	Connections int64   `json:"connections"`
	Keys        int     `json:"keys"`
	Bytes       int64   `json:"bytes"`
	UptimeMS    float64 `json:"uptime_ms"`
	PID         int     `json:"pid"`
}

func (s *Server) stat(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	st := Stat{Keys: len(s.kv), Bytes: s.bytes}
	s.mu.Unlock()
	st.Requests, st.Connections = s.requests.Load(), s.connections.Load()
	st.UptimeMS = float64(time.Since(s.started)) / float64(time.Millisecond)
	st.PID = os.Getpid()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(st) // as in get
}
