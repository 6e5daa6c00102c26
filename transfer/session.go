package transfer

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// Compression says what a session does with what can be made smaller.
type Compression string

const (
	// CompressAuto compresses with s2, with zstd or not at all, whichever moves
	// memory fastest over this link, and backs off from what does not shrink.
	CompressAuto Compression = ""
	// CompressOff sends all content raw.
	CompressOff Compression = "off"
)

// Options of a session; the zero value is a good one.
type Options struct {
	// Bandwidth in bits a second, of all streams together; 0 is unlimited. It is
	// kept, within 5 %, by the IP packets that leave this host: QUIC's, UDP's and
	// IP's headers count, what is sent again after loss does not, nor does what a
	// link adds below IP (Ethernet: 38 bytes a packet, 2.6 %).
	Bandwidth int64
	// Streams that a round spreads over, 0 is DefaultStreams. Each encodes on its
	// own, so this is also how many cores may compress.
	Streams int
	// Connections that the streams spread over, 0 is one for each, up to
	// DefaultConnections.
	Connections int
	Compression Compression
	// NoDeltas sends every page whole: for a Sink that cannot read its pages.
	NoDeltas bool
	// IdleTimeout and KeepAlive say how soon a cut link is noticed; 0 is the
	// default.
	IdleTimeout time.Duration
	KeepAlive   time.Duration

	// socket makes the socket of a connection to addr, several at once after the
	// first, and encodeTime runs work and returns the processor time it took, for
	// tests.
	socket     func(addr *net.UDPAddr) (net.PacketConn, error)
	encodeTime func(work func()) time.Duration
}

const (
	// DefaultStreams suits hosts of two to four cores.
	DefaultStreams = 4
	// DefaultConnections: one connection encrypts, and decrypts, on one core. But four
	// are better than one even on two cores that are busy with all else: more packets
	// are on their way, so goroutines at both ends are woken for more of them at once
	// (ADR 20). More than four gained nothing.
	DefaultConnections = 4
)

func (o *Options) defaults() error {
	if o.Streams == 0 {
		o.Streams = DefaultStreams
	}
	if o.Connections == 0 {
		o.Connections = min(DefaultConnections, o.Streams)
	}
	if o.IdleTimeout == 0 {
		o.IdleTimeout = DefaultIdleTimeout
	}
	if o.KeepAlive == 0 {
		o.KeepAlive = DefaultKeepAlive
	}
	if o.encodeTime == nil {
		o.encodeTime = threadTime
	}
	if o.socket == nil {
		o.socket = func(addr *net.UDPAddr) (net.PacketConn, error) {
			network := "udp6"
			if addr.IP.To4() != nil {
				network = "udp4"
			}
			return net.ListenUDP(network, nil) // what a sender receives is acknowledgements: GRO has nothing to join
		}
	}
	switch {
	case o.Bandwidth < 0:
		return fmt.Errorf("bandwidth of %d bit/s", o.Bandwidth)
	case o.Streams < 1 || o.Streams > maxStreams/2:
		return fmt.Errorf("%d streams, want 1 to %d", o.Streams, maxStreams/2)
	case o.Connections < 1 || o.Connections > wire.MaxConnections:
		return fmt.Errorf("%d connections, want 1 to %d", o.Connections, wire.MaxConnections)
	case o.Compression != CompressAuto && o.Compression != CompressOff:
		return fmt.Errorf("compression %q", o.Compression)
	}
	return nil
}

// Session sends one migration's rounds and blobs to one peer. Rounds come one
// after the other; blobs may run beside them and each other.
type Session struct {
	addr, node, migration string
	tls                   func(node string) *tls.Config
	opt                   Options

	id     wire.SessionID
	memory *pageMemory
	// versions are what deltas are made of.
	versions versions
	pace     pacer
	link     linkMeter
	// Memory and files differ in what they shrink to.
	pageChoice, blobChoice *encoding.Choice
	// encoders are one a lane; they remember between rounds what shrinks.
	encoders []encoding.Encoder
	turn     atomic.Uint64 // of connections, for blobs
	sent     atomic.Int64  // bytes into streams

	mu      sync.Mutex
	links   []*link // of the current attempt
	attempt uint64
	epoch   uint64
	busy    bool // a round is open, or the session reconnects
	closed  bool
	stats   Stats
}

// Stats count over the life of a session, reconnects included.
type Stats struct {
	Rounds int // acknowledged
	// Pages, Zeros and Unchanged are of acknowledged rounds: what came, and what of
	// it was sent as zero and not at all.
	Pages, Zeros, Unchanged checkpoint.Pages
	// BytesRaw is what came into rounds and blobs, BytesSent what went into
	// streams for it, BytesWire all of UDP's payload, handshakes and what was sent
	// again included. The last two grow while a round is open, and count broken
	// rounds and blobs as well.
	BytesRaw, BytesSent, BytesWire checkpoint.Bytes
	// PacketsLost is QUIC's estimate.
	PacketsLost int64
	// Remembered is how many pages the peer is known to have.
	Remembered checkpoint.Pages
	RTT        time.Duration
}

// link is one QUIC connection with its own socket.
type link struct {
	socket    net.PacketConn
	transport *quic.Transport
	conn      *quic.Conn
}

// Dial connects to the server of node at addr for a migration that its
// AcceptFunc knows. It answers ErrUntrusted, ErrLinkLost or a *RemoteError when
// it cannot. The session lives until Close, whatever becomes of ctx.
func Dial(ctx context.Context, addr, node string, tls func(node string) *tls.Config, migration string, opt Options) (*Session, error) {
	if err := opt.defaults(); err != nil {
		return nil, fmt.Errorf("page session with %s: %w", node, err)
	}
	if migration == "" || len(migration) > wire.MaxMigration {
		return nil, fmt.Errorf("page session with %s: migration %q: want 1 to %d bytes", node, migration, wire.MaxMigration)
	}
	s := &Session{addr: addr, node: node, migration: migration, tls: tls, opt: opt, memory: newPageMemory()}
	rand.Read(s.id[:]) // never fails
	s.pageChoice, s.blobChoice = encoding.NewChoice(s.road), encoding.NewChoice(s.road)
	s.encoders = make([]encoding.Encoder, opt.Streams)
	for i := range s.encoders {
		s.encoders[i] = encoding.Encoder{Off: opt.Compression == CompressOff, Choice: s.pageChoice, Time: opt.encodeTime}
	}
	s.pace.set(opt.Bandwidth)
	if _, err := s.connect(ctx); err != nil {
		return nil, fmt.Errorf("page session with %s at %s: %w", node, addr, err)
	}
	return s, nil
}

// Redial connects the session again after ErrLinkLost. What earlier rounds
// acknowledged stays sent; the round that broke must be given again from its
// beginning. It answers ErrForgotten when the receiver has lost what it
// acknowledged, and then the session is of no more use. No round may be open.
func (s *Session) Redial(ctx context.Context) error {
	s.mu.Lock()
	if s.closed || s.busy {
		defer s.mu.Unlock()
		if s.closed {
			return fmt.Errorf("redial %s: %w", s.node, ErrClosed)
		}
		return fmt.Errorf("redial %s: a round is open", s.node)
	}
	s.busy = true
	old := s.links
	s.links = nil
	s.account(old)
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.busy = false
		s.mu.Unlock()
	}()

	for _, l := range old {
		l.close(codeIncomplete, "reconnecting")
	}
	resumed, err := s.connect(ctx)
	if err != nil {
		return fmt.Errorf("redial %s at %s: %w", s.node, s.addr, err)
	}
	if !resumed {
		s.memory.reset()
		return errors.Join(fmt.Errorf("redial %s at %s: %w", s.node, s.addr, ErrForgotten), s.Close())
	}
	return nil
}

// connect makes the connections of a new attempt: the first, which the receiver
// begins the attempt with, and then the others at once.
func (s *Session) connect(ctx context.Context) (resumed bool, err error) {
	s.mu.Lock()
	s.attempt++
	attempt := s.attempt
	s.mu.Unlock()
	links := make([]*link, s.opt.Connections)
	defer func() {
		if err != nil {
			for _, l := range links {
				if l != nil {
					l.close(codeIncomplete, "could not connect")
				}
			}
		}
	}()
	introduce := func(ctx context.Context, i int) (wire.Welcome, error) {
		l, err := s.dial(ctx)
		if err != nil {
			return wire.Welcome{}, err
		}
		links[i] = l
		return l.hello(ctx, wire.Hello{
			Version: wire.Version, Session: s.id, Attempt: attempt, Index: uint64(i), Migration: s.migration,
		})
	}
	welcome, err := introduce(ctx, 0)
	if err != nil {
		return false, err
	}
	others, othersCtx := errgroup.WithContext(ctx)
	for i := 1; i < len(links); i++ {
		others.Go(func() error {
			_, err := introduce(othersCtx, i)
			return err
		})
	}
	if err := others.Wait(); err != nil {
		return false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false, ErrClosed
	}
	s.links = links
	return welcome.Resumed, nil
}

func (s *Session) dial(ctx context.Context) (*link, error) {
	addr, err := net.ResolveUDPAddr("udp", s.addr)
	if err != nil {
		return nil, err
	}
	socket, err := s.opt.socket(addr)
	if err != nil {
		return nil, err
	}
	conf := s.tls(s.node).Clone()
	conf.NextProtos = []string{alpnPages}
	quicConf := quicConfig(s.opt.IdleTimeout, s.opt.KeepAlive)
	quicConf.MaxIncomingStreams, quicConf.MaxIncomingUniStreams = -1, -1 // the receiver only answers
	transport := &quic.Transport{Conn: socket}
	conn, err := transport.Dial(ctx, addr, conf, quicConf)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, errors.Join(linkError(err), transport.Close(), socket.Close())
	}
	return &link{socket: socket, transport: transport, conn: conn}, nil
}

// hello introduces a connection. With TLS 1.3 it is here that the client learns
// whether the server accepted its certificate.
func (l *link) hello(ctx context.Context, hello wire.Hello) (wire.Welcome, error) {
	stream, err := l.conn.OpenStreamSync(ctx)
	if err != nil {
		return wire.Welcome{}, linkError(err)
	}
	stop := abortOn(ctx, stream)
	defer stop()
	welcome, err := func() (wire.Welcome, error) {
		if _, err := stream.Write(hello.Append(nil)); err != nil {
			return wire.Welcome{}, err
		}
		if err := stream.Close(); err != nil {
			return wire.Welcome{}, err
		}
		t, body, err := readOne(stream)
		if err != nil {
			return wire.Welcome{}, err
		}
		if t != wire.TypeWelcome {
			return wire.Welcome{}, &RemoteError{Code: CodeProtocol, Text: fmt.Sprintf("%v in place of a welcome", t)}
		}
		return wire.ParseWelcome(body)
	}()
	switch {
	case ctx.Err() != nil:
		return wire.Welcome{}, context.Cause(ctx)
	case err != nil:
		return wire.Welcome{}, linkError(err)
	case welcome.Code != "":
		return wire.Welcome{}, &RemoteError{Code: welcome.Code, Text: welcome.Text}
	}
	return welcome, nil
}

// abortOn resets both sides of a stream when ctx ends, which is what wakes up
// whoever reads or writes it.
func abortOn(ctx context.Context, stream *quic.Stream) (stop func() bool) {
	return context.AfterFunc(ctx, func() {
		stream.CancelWrite(streamAborted)
		stream.CancelRead(streamAborted)
	})
}

func (l *link) close(code quic.ApplicationErrorCode, text string) error {
	l.conn.CloseWithError(code, text)
	return errors.Join(l.transport.Close(), l.socket.Close())
}

// usable returns the connections of the current attempt.
func (s *Session) usable() ([]*link, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return nil, ErrClosed
	case len(s.links) == 0:
		return nil, fmt.Errorf("%w: not connected", ErrLinkLost)
	}
	for _, l := range s.links {
		if l.conn.Context().Err() != nil {
			return nil, linkError(context.Cause(l.conn.Context()))
		}
	}
	return s.links, nil
}

// Lost is closed when a connection of the current attempt ends, also by Close.
func (s *Session) Lost() <-chan struct{} {
	lost := make(chan struct{})
	end := sync.OnceFunc(func() { close(lost) })
	links, err := s.usable()
	if err != nil {
		end()
	}
	for _, l := range links {
		context.AfterFunc(l.conn.Context(), end)
	}
	return lost
}

// RTT is the smoothed round-trip time, 0 without a connection.
func (s *Session) RTT() time.Duration {
	links, err := s.usable()
	if err != nil {
		return 0
	}
	return links[0].conn.ConnectionStats().SmoothedRTT
}

// SetBandwidth changes the limit, in bits a second; 0 lifts it.
func (s *Session) SetBandwidth(bitsPerSecond int64) { s.pace.set(bitsPerSecond) }

// Forget drops what is known of a process's pages: for a caller that has made
// the receiver drop them.
func (s *Session) Forget(pid checkpoint.PID) {
	s.memory.forget(pid, 0, wire.MaxAddr/checkpoint.PageSize)
}

// Stats returns the counts so far. It is cheap enough for every progress report.
func (s *Session) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := s.stats
	for _, l := range s.links {
		cs := l.conn.ConnectionStats()
		stats.BytesWire += checkpoint.Bytes(cs.BytesSent)
		stats.PacketsLost += int64(cs.PacketsLost)
		stats.RTT = cs.SmoothedRTT
	}
	stats.BytesSent = checkpoint.Bytes(s.sent.Load())
	stats.Remembered = s.memory.pages()
	return stats
}

// account keeps the counts of connections that go. Under mu.
func (s *Session) account(links []*link) {
	for _, l := range links {
		cs := l.conn.ConnectionStats()
		s.stats.BytesWire += checkpoint.Bytes(cs.BytesSent)
		s.stats.PacketsLost += int64(cs.PacketsLost)
	}
}

// Close ends the session. A round or a blob that is under way breaks with
// ErrClosed, and then the receiver is not told that the session is complete.
func (s *Session) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	links := s.links
	s.links = nil
	s.account(links)
	code, text := codeDone, "done"
	if s.busy {
		code, text = codeIncomplete, "given up"
	}
	s.mu.Unlock()
	var errs []error
	for _, l := range links {
		errs = append(errs, l.close(code, text))
	}
	return errors.Join(errs...)
}
