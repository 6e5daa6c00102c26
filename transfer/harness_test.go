package transfer

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/daemon/peers/pki"
)

const page = checkpoint.PageSize

// cluster makes TLS configurations for the nodes of one pool.
type cluster struct {
	t  testing.TB
	ca *pki.CA
}

func newCluster(t testing.TB) *cluster {
	t.Helper()
	ca, err := pki.Init(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &cluster{t, ca}
}

func (c *cluster) node(name string) (*tls.Config, func(string) *tls.Config) {
	c.t.Helper()
	cert, key, err := c.ca.Issue(name, time.Hour)
	if err != nil {
		c.t.Fatal(err)
	}
	dir := c.t.TempDir()
	if err := pki.Write(dir, c.ca.CertPEM(), cert, key); err != nil {
		c.t.Fatal(err)
	}
	server, client, err := pki.TLS(filepath.Join(dir, pki.CACertFile), filepath.Join(dir, pki.CertFile), filepath.Join(dir, pki.KeyFile))
	if err != nil {
		c.t.Fatal(err)
	}
	return server, client
}

// host is a server that runs until its test ends.
type host struct {
	*Server
	addr   string
	client func(string) *tls.Config // of the sender "source"
	server *tls.Config
	socket *faultyConn
}

type hostOptions struct {
	accept AcceptFunc
	api    http.Handler
	conf   *quic.Config
	plain  bool // the server's own socket, with GSO and GRO
}

// newHost starts the node "destination" and the configuration of a "source".
func newHost(t testing.TB, opt hostOptions) *host {
	t.Helper()
	c := newCluster(t)
	serverConf, _ := c.node("destination")
	_, client := c.node("source")
	if opt.conf == nil {
		opt.conf = quicConfig(DefaultIdleTimeout, DefaultKeepAlive)
	}
	h := &host{client: client, server: serverConf}
	loopback := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}
	var socket net.PacketConn
	var err error
	if opt.plain {
		socket, err = listenUDP("udp4", loopback)
	} else {
		h.socket, err = newFaultyConn(loopback)
		socket = h.socket
	}
	if err != nil {
		t.Fatal(err)
	}
	h.Server, err = listen(socket, serverConf, opt.conf, opt.api, opt.accept, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	h.addr = h.Addr().String()
	served := make(chan error, 1)
	go func() { served <- h.Serve(context.Background()) }()
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return h
}

func (h *host) dial(t testing.TB, opt Options) *Session {
	t.Helper()
	s, err := Dial(t.Context(), h.addr, "destination", h.client, "m-1", opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// faultyConn is a UDP socket that can lose every packet, in both directions.
// Without the methods of a net.UDPConn it also has no GSO.
type faultyConn struct {
	conn *net.UDPConn
	cut  atomic.Bool
	out  atomic.Int64 // bytes written, with UDP's and IP's headers
	// limit cuts the link after so many bytes written, when it is above zero.
	limit atomic.Int64
}

func newFaultyConn(addr *net.UDPAddr) (*faultyConn, error) {
	conn, err := net.ListenUDP("udp4", addr)
	return &faultyConn{conn: conn}, err
}

func (f *faultyConn) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		n, addr, err := f.conn.ReadFrom(b)
		if err != nil || !f.cut.Load() {
			return n, addr, err
		}
	}
}

func (f *faultyConn) WriteTo(b []byte, addr net.Addr) (int, error) {
	n := f.out.Add(int64(len(b)) + 28)
	if limit := f.limit.Load(); limit > 0 && n > limit {
		f.cut.Store(true)
	}
	if f.cut.Load() {
		return len(b), nil
	}
	return f.conn.WriteTo(b, addr)
}

func (f *faultyConn) Close() error                       { return f.conn.Close() }
func (f *faultyConn) LocalAddr() net.Addr                { return f.conn.LocalAddr() }
func (f *faultyConn) SetDeadline(t time.Time) error      { return f.conn.SetDeadline(t) }
func (f *faultyConn) SetReadDeadline(t time.Time) error  { return f.conn.SetReadDeadline(t) }
func (f *faultyConn) SetWriteDeadline(t time.Time) error { return f.conn.SetWriteDeadline(t) }
func (f *faultyConn) SetReadBuffer(n int) error          { return f.conn.SetReadBuffer(n) }
func (f *faultyConn) SetWriteBuffer(n int) error         { return f.conn.SetWriteBuffer(n) }

// over makes a session's one connection run over f, once.
func over(f *faultyConn) Options {
	return Options{Connections: 1, socket: func(*net.UDPAddr) (net.PacketConn, error) { return f, nil }}
}

// store is a Sink that keeps what arrives, checks that rounds do not overlap,
// and can be told to fail.
type store struct {
	mu    sync.Mutex
	pages map[checkpoint.PID]map[uint64][page]byte
	blobs map[string][]byte
	puts  int

	// Errors of named operations, and a gate that PutPages waits at.
	putErr, readErr, zeroErr, blobErr error
	gate                              chan struct{}
	entered                           chan struct{} // one for each call at the gate
	running                           atomic.Int32
}

var _ Sink = (*store)(nil)

func newStore() *store {
	return &store{pages: map[checkpoint.PID]map[uint64][page]byte{}, blobs: map[string][]byte{}}
}

func (s *store) accept(context.Context, string, string) (Sink, error) { return s, nil }

func (s *store) PutPages(pid checkpoint.PID, addr uint64, data []byte) error {
	s.running.Add(1)
	defer s.running.Add(-1)
	if s.gate != nil {
		s.entered <- struct{}{}
		<-s.gate
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.putErr != nil {
		return s.putErr
	}
	s.puts++
	memory := s.pages[pid]
	if memory == nil {
		memory = map[uint64][page]byte{}
		s.pages[pid] = memory
	}
	for ; len(data) > 0; data, addr = data[page:], addr+page {
		memory[addr] = [page]byte(data)
	}
	return nil
}

func (s *store) ReadPages(pid checkpoint.PID, addr uint64, dst []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readErr != nil {
		return s.readErr
	}
	for ; len(dst) > 0; dst, addr = dst[page:], addr+page {
		stored := s.pages[pid][addr]
		copy(dst, stored[:])
	}
	return nil
}

func (s *store) ZeroPages(pid checkpoint.PID, addr uint64, n checkpoint.Pages) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.zeroErr != nil {
		return s.zeroErr
	}
	memory := s.pages[pid]
	end := addr + uint64(n.Bytes())
	for at := range memory {
		if at >= addr && at < end {
			delete(memory, at)
		}
	}
	return nil
}

func (s *store) Blob(_ context.Context, kind, name string, _ int64, r io.Reader) error {
	data, err := io.ReadAll(r)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		err = s.blobErr
	}
	if err != nil {
		return err
	}
	s.blobs[kind+" "+name] = data
	return nil
}

func (s *store) fail(op *error, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*op = err
}

// equal compares what is stored with a source's memory.
func (s *store) equal(t testing.TB, m *memory) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for pid, data := range m.procs {
		wrong := 0
		for at := 0; at < len(data); at += page {
			stored := s.pages[pid][m.base+uint64(at)] // zeros when there is none
			if !bytes.Equal(stored[:], data[at:at+page]) {
				wrong++
			}
		}
		if wrong > 0 {
			t.Errorf("pid %d: %d of %d pages are wrong", pid, wrong, len(data)/page)
		}
	}
}

// memory is a source's memory: a range for each process.
type memory struct {
	base  uint64
	procs map[checkpoint.PID][]byte
	rng   *rand.Rand
}

// newMemory makes memory in which each run of pages is noise, text, or zero.
func newMemory(seed uint64, procs int, pages int) *memory {
	m := &memory{base: 0x7f0000000000, procs: map[checkpoint.PID][]byte{}, rng: rand.New(rand.NewPCG(seed, 1))}
	for pid := range procs {
		m.procs[checkpoint.PID(pid+1)] = make([]byte, pages*page)
	}
	for pid := range m.procs {
		m.write(pid, 0, pages)
	}
	return m
}

// heapMemory is like the heap of a store of small values: pointers, short
// strings, counters, and a part of noise.
func heapMemory(pages int, seed uint64) *memory {
	m := &memory{base: 0x7f0000000000, procs: map[checkpoint.PID][]byte{}, rng: rand.New(rand.NewPCG(seed, 2))}
	data := make([]byte, 0, pages*page)
	for len(data) < pages*page {
		data = binary.LittleEndian.AppendUint64(data, 0x7f3a00000000+uint64(m.rng.IntN(1<<24))&^15)
		data = binary.LittleEndian.AppendUint32(data, m.rng.Uint32N(1000))
		data = append(strconv.AppendInt(append(data, "user:"...), 1e6+m.rng.Int64N(9e6), 10), ":session"...)
		if m.rng.IntN(4) == 0 {
			data = binary.LittleEndian.AppendUint64(data, m.rng.Uint64())
		}
		data = append(data, 0, 0, 0)
	}
	m.procs[1] = data[:pages*page]
	return m
}

// write changes n pages from page at.
func (m *memory) write(pid checkpoint.PID, at, n int) {
	for i := at; i < at+n; i++ {
		p := m.procs[pid][i*page : (i+1)*page]
		switch kind := m.rng.IntN(10); {
		case kind < 2:
			clear(p)
		case kind < 5:
			copy(p, bytes.Repeat(fmt.Appendf(nil, "text %d ", m.rng.Uint32()), page/6))
		default:
			fillNoise(p, m.rng.Uint64())
		}
	}
}

func fillNoise(p []byte, seed uint64) {
	r := rand.NewChaCha8([32]byte{0: byte(seed), 1: byte(seed >> 8), 2: byte(seed >> 16), 3: byte(seed >> 24), 4: byte(seed >> 32), 5: byte(seed >> 40)})
	r.Read(p)
}

// send gives pages from..to of every process to a round, from one goroutine a
// process, in runs of run pages.
func (m *memory) send(r *Round, from, to, run int) error {
	errs := make(chan error, len(m.procs))
	for pid, data := range m.procs {
		go func() {
			errs <- func() error {
				buf := make([]byte, run*page)
				for at := from; at < to; at += run {
					n := copy(buf, data[at*page:min(at+run, to)*page])
					if err := r.Pages(pid, m.base+uint64(at*page), buf[:n]); err != nil {
						return err
					}
					clear(buf) // the round may not look at it any more
				}
				return nil
			}()
		}()
	}
	var all []error
	for range m.procs {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

// round sends a whole round of the first pages.
func (m *memory) round(t testing.TB, s *Session, n, to, run int) RoundStats {
	t.Helper()
	r, err := s.Round(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	sendErr := m.send(r, 0, to, run)
	stats, err := r.Close()
	if err := errors.Join(sendErr, err); err != nil {
		t.Fatal(err)
	}
	return stats
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

var hashSeed = maphash.MakeSeed()

func hash(b []byte) uint64 { return maphash.Bytes(hashSeed, b) }
