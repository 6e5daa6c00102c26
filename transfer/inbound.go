package transfer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/tranship/tranship/transfer/wire"
)

// inboundKey: a migration has one sender, and nobody else can end its session.
type inboundKey struct{ peer, migration string }

// inbound is what a receiver remembers of a sender's session, over several
// attempts to connect it.
type inbound struct {
	key inboundKey
	// gate lets one hello in at a time.
	gate chan struct{}

	// users are the hellos under way, the connections, and the retention: as long
	// as there is one, whoever asks for this key finds this session. Under the
	// server's lock, as is retained.
	users    int
	retained *time.Timer

	mu      sync.Mutex
	id      wire.SessionID
	sink    Sink
	current *attempt
	// epoch is that of the newest round, active how many of its streams are being
	// applied, waiting how many of later rounds are not yet; idle is closed when
	// active becomes none.
	epoch   uint64
	active  int
	waiting int
	idle    chan struct{}
	twins   *twins // that the sender was told of, or nil

	asking sync.Mutex // held while twins are looked for
}

// attempt is one time that a session was connected.
type attempt struct {
	number uint64
	conns  map[*quic.Conn]struct{}
	clean  bool          // the sender said that it is done
	ended  chan struct{} // closed when its last connection has left
}

// attach enters a connection into the session that its hello names. Whatever it
// refuses it says in the welcome; then the session is nil.
func (s *Server) attach(conn *quic.Conn, peer string, hello wire.Hello) (*inbound, Sink, wire.Welcome) {
	refuse := func(code, text string) (*inbound, Sink, wire.Welcome) {
		return nil, nil, wire.Welcome{Version: wire.Version, Code: code, Text: text}
	}
	ctx, cancel := context.WithTimeoutCause(conn.Context(), drainTimeout, errors.New("an earlier connection of this session does not end"))
	defer cancel()
	in, ok := s.session(inboundKey{peer, hello.Migration})
	if !ok {
		return refuse(CodeBusy, fmt.Sprintf("%d migrations from %s are on their way", maxPeerSessions, peer))
	}
	attached := false
	defer func() {
		if !attached {
			s.release(in)
		}
	}()
	select {
	case in.gate <- struct{}{}:
		defer func() { <-in.gate }()
	case <-ctx.Done():
		return refuse(CodeBusy, context.Cause(ctx).Error())
	}
	if hello.Index > 0 {
		sink, ok := in.join(conn, hello)
		if !ok {
			return refuse(CodeSuperseded, "this connection belongs to an attempt that is over")
		}
		attached = true
		return in, sink, wire.Welcome{Version: wire.Version, Resumed: true}
	}

	// The calls of the earlier attempt must have returned before the sink is
	// asked for again: a page of theirs may not overtake one of ours.
	if err := in.supersede(ctx, hello); err != nil {
		return refuse(asRemote(err, CodeBusy))
	}
	sink, err := s.accept(conn.Context(), peer, hello.Migration)
	if err != nil {
		return refuse(asRemote(err, CodeRefused))
	}
	if sink == nil || !reflect.TypeOf(sink).Comparable() {
		return refuse(CodeRefused, fmt.Sprintf("no usable sink for migration %s: %T", hello.Migration, sink))
	}
	attached = true
	return in, sink, wire.Welcome{Version: wire.Version, Resumed: s.begin(in, conn, hello, sink)}
}

// session finds or makes the memory of a session, for one more user.
func (s *Server) session(key inboundKey) (*inbound, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if in := s.sessions[key]; in != nil {
		in.users++
		return in, true
	}
	count := 0
	for other := range s.sessions {
		if other.peer == key.peer {
			count++
		}
	}
	if count >= maxPeerSessions {
		return nil, false
	}
	in := &inbound{key: key, gate: make(chan struct{}, 1), users: 1}
	s.sessions[key] = in
	return in, true
}

// release takes a user away, and with the last one the session.
func (s *Server) release(in *inbound) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.releaseLocked(in)
}

func (s *Server) releaseLocked(in *inbound) {
	if in.users--; in.users == 0 {
		delete(s.sessions, in.key)
	}
}

// join adds a further connection to the attempt that it names.
func (in *inbound) join(conn *quic.Conn, hello wire.Hello) (Sink, bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	a := in.current
	if a == nil || len(a.conns) == 0 || in.id != hello.Session || a.number != hello.Attempt {
		return nil, false
	}
	a.conns[conn] = struct{}{}
	return in.sink, true
}

// supersede ends the attempt before this one and waits for it.
func (in *inbound) supersede(ctx context.Context, hello wire.Hello) error {
	in.mu.Lock()
	old := in.current
	if old == nil {
		in.mu.Unlock()
		return nil
	}
	if in.id == hello.Session && hello.Attempt <= old.number {
		in.mu.Unlock()
		return &RemoteError{Code: CodeSuperseded, Text: fmt.Sprintf("attempt %d came after attempt %d", hello.Attempt, old.number)}
	}
	conns := make([]*quic.Conn, 0, len(old.conns))
	for conn := range old.conns {
		conns = append(conns, conn)
	}
	in.mu.Unlock()
	for _, conn := range conns {
		conn.CloseWithError(codeSuperseded, "a later connection took this session over")
	}
	select {
	case <-old.ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// begin makes conn the first connection of a new attempt, and says whether the
// session's acknowledged pages are still here.
func (s *Server) begin(in *inbound, conn *quic.Conn, hello wire.Hello, sink Sink) (resumed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if in.retained != nil {
		in.retained.Stop()
		in.retained = nil
		s.releaseLocked(in) // never the last: conn is another
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	resumed = in.current != nil && !in.current.clean && in.id == hello.Session && in.sink == sink
	if !resumed {
		in.id, in.sink, in.epoch, in.twins = hello.Session, sink, 0, nil
	}
	in.current = &attempt{number: hello.Attempt, conns: map[*quic.Conn]struct{}{conn: {}}, ended: make(chan struct{})}
	return resumed
}

// detach takes a connection out after its last call has returned. The session
// is remembered for a while, unless the sender said that it is done.
func (s *Server) detach(in *inbound, conn *quic.Conn) {
	var app *quic.ApplicationError
	done := errors.As(context.Cause(conn.Context()), &app) && app.Remote && app.ErrorCode == codeDone
	s.mu.Lock()
	defer s.mu.Unlock()
	in.mu.Lock()
	defer in.mu.Unlock()
	a := in.current
	delete(a.conns, conn)
	a.clean = a.clean || done
	if len(a.conns) > 0 || a.clean || s.closing {
		if len(a.conns) == 0 {
			close(a.ended)
		}
		s.releaseLocked(in)
		return
	}
	close(a.ended)
	// This connection's use becomes the retention's.
	in.retained = time.AfterFunc(sessionRetention, func() { s.expire(in, a) })
}

// expire forgets a session that nobody came back for.
func (s *Server) expire(in *inbound, a *attempt) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.retained != nil && in.current == a {
		in.retained = nil
		s.releaseLocked(in)
	}
}

// errStale says that a stream belongs to a round that is over.
var errStale = errors.New("stream of a round that is over")

// enterRound lets a stream of a round in once no stream of an earlier round is
// being applied any more; a stream of an earlier round never again.
func (in *inbound) enterRound(ctx context.Context, epoch uint64) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	for epoch > in.epoch && in.active > 0 {
		idle := in.idle
		in.waiting++
		in.mu.Unlock()
		select {
		case <-idle:
		case <-ctx.Done():
		}
		in.mu.Lock()
		in.waiting--
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if epoch < in.epoch {
		return errStale
	}
	in.epoch = epoch
	if t := in.twins; t != nil && t.epoch == 0 {
		t.epoch = epoch
	} else if t != nil && t.epoch < epoch {
		in.twins = nil
	}
	if in.active == 0 {
		in.idle = make(chan struct{})
	}
	in.active++
	return nil
}

func (in *inbound) leaveRound() {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.active--; in.active == 0 {
		close(in.idle)
	}
}

// servePages serves a connection of a page session.
func (s *Server) servePages(conn *quic.Conn, peer string, log *slog.Logger) {
	ctx := conn.Context()
	hello, control, err := readHello(ctx, conn)
	if err != nil && !errors.Is(err, wire.ErrVersion) {
		log.Warn("page connection ended before its hello", "err", err)
		conn.CloseWithError(codeProtocol, wire.Clip(err.Error(), 256))
		return
	}
	log = log.With("migration", hello.Migration)
	var in *inbound
	var sink Sink
	welcome := wire.Welcome{Version: wire.Version, Code: CodeVersion, Text: fmt.Sprintf("this host speaks version %d of the transfer protocol, the peer %d", wire.Version, hello.Version)}
	if err == nil {
		in, sink, welcome = s.attach(conn, peer, hello)
	}
	if in != nil {
		defer s.detach(in, conn)
	}
	if err := answerHello(control, welcome); err != nil {
		log.Warn("page connection ended before it was welcome", "err", err)
		conn.CloseWithError(codeProtocol, "hello")
		return
	}
	if in == nil {
		log.Info("page session refused", "code", welcome.Code, "reason", welcome.Text)
		// The sender closes once it has read why; closing first could overtake it.
		lingering := time.NewTimer(helloTimeout)
		defer lingering.Stop()
		select {
		case <-ctx.Done():
		case <-lingering.C:
			conn.CloseWithError(codeRefused, welcome.Code)
		}
		return
	}

	r := &receiver{ctx: ctx, in: in, sink: sink, conn: conn, log: log}
	var streams sync.WaitGroup
	defer streams.Wait()
	streams.Go(func() {
		if _, err := conn.AcceptUniStream(ctx); err == nil {
			r.violated(errors.New("a unidirectional stream"))
		}
	})
	for {
		stream, err := conn.AcceptStream(ctx)
		if err != nil {
			log.Debug("page connection ended", "err", err)
			return
		}
		streams.Go(func() { r.serve(stream) })
	}
}

func readHello(ctx context.Context, conn *quic.Conn) (wire.Hello, *quic.Stream, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, helloTimeout, errors.New("no hello came"))
	defer cancel()
	stream, err := conn.AcceptStream(ctx)
	if err != nil {
		return wire.Hello{}, nil, errors.Join(context.Cause(ctx), err)
	}
	if err := stream.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return wire.Hello{}, nil, err
	}
	t, body, err := readOne(stream)
	if err != nil {
		return wire.Hello{}, nil, err
	}
	if t != wire.TypeHello {
		return wire.Hello{}, nil, fmt.Errorf("%v in place of a hello: %w", t, wire.ErrMalformed)
	}
	hello, err := wire.ParseHello(body)
	return hello, stream, err
}

func answerHello(stream *quic.Stream, welcome wire.Welcome) error {
	if err := stream.SetWriteDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	if _, err := stream.Write(welcome.Append(nil)); err != nil {
		return err
	}
	return stream.Close()
}
