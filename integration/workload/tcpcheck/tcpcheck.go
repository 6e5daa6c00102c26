package tcpcheck

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/integration/workload/check"
)

// Options are those of Client and Server.
type Options struct {
	Timeout time.Duration // without a frame, a blackout included
	Payload int           // bytes of a frame, at most
	Rate    float64       // frames a second in each direction; 0: as fast as it goes
}

// Client connects to the server at addr, streams in both directions until ctx
// is done, and ends in good order: the server sees every frame that was sent.
func Client(ctx context.Context, addr string, o Options, rec *check.Recorder) error {
	var d net.Dialer
	d.Timeout = o.Timeout
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	// The client chooses the keys of both directions.
	up, down := rand.Uint64(), rand.Uint64()
	var hello [24]byte
	binary.BigEndian.PutUint64(hello[:], magic)
	binary.BigEndian.PutUint64(hello[8:], up)
	binary.BigEndian.PutUint64(hello[16:], down)
	if _, err := conn.Write(hello[:]); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	rec.Begin()
	return newSession(conn.(*net.TCPConn), up, down, o, rec).run(ctx)
}

// Server accepts one client after the other on l until ctx is done. It notes
// what it sees itself and what the client says, and counts clients: when one
// comes back, its connection has broken, however well that went for it.
func Server(ctx context.Context, l net.Listener, o Options, rec *check.Recorder) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for clients := 0; ; {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				if clients == 0 {
					return errors.New("no client ever came")
				}
				return nil
			}
			return err
		}
		if clients++; clients > 1 {
			rec.Reconnected()
		} else {
			rec.Begin()
		}
		if err := serve(ctx, conn.(*net.TCPConn), o, rec); err != nil {
			rec.Fail(fmt.Errorf("client %d at %s: %w", clients, conn.RemoteAddr(), err))
		}
		rec.Fact("clients", clients)
	}
}

// Loop is a Client and a Server in one process, over loopback.
func Loop(ctx context.Context, o Options, rec *check.Recorder) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return Server(gctx, l, o, check.NewRecorder("loop server")) })
	g.Go(func() error { return Client(gctx, l.Addr().String(), o, rec) })
	return g.Wait()
}

func serve(ctx context.Context, conn *net.TCPConn, o Options, rec *check.Recorder) error {
	defer conn.Close()
	var hello [24]byte
	if err := conn.SetReadDeadline(time.Now().Add(o.Timeout)); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, hello[:]); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	if binary.BigEndian.Uint64(hello[:]) != magic {
		return fmt.Errorf("hello: %w", ErrStream)
	}
	up, down := binary.BigEndian.Uint64(hello[8:]), binary.BigEndian.Uint64(hello[16:])
	return newSession(conn, down, up, o, rec).run(ctx)
}

// session is one connection, the same at both ends.
type session struct {
	conn *net.TCPConn
	o    Options
	rec  *check.Recorder
	out  stream
	in   stream

	sent       atomic.Uint64
	received   atomic.Uint64
	failures   atomic.Uint64
	longestGap atomic.Uint64
	ended      chan struct{} // closed when the other side has ended
}

func newSession(conn *net.TCPConn, out, in uint64, o Options, rec *check.Recorder) *session {
	return &session{conn: conn, o: o, rec: rec, out: stream{key: out}, in: stream{key: in}, ended: make(chan struct{})}
}

// run sends until ctx is done or the other side has said farewell, says farewell
// itself, and reads until the other side's.
func (s *session) run(ctx context.Context) error {
	var wg sync.WaitGroup
	var receiveErr error
	wg.Add(1)
	go func() {
		defer wg.Done()
		defer close(s.ended)
		if receiveErr = s.receive(); receiveErr != nil {
			s.failures.Add(1)
			s.conn.Close() // so that the sender does not block on a dead stream
		}
	}()
	sendErr := s.send(ctx)
	if sendErr != nil {
		s.conn.Close()
	}
	wg.Wait()
	if receiveErr != nil {
		return receiveErr // the cause, where there are both
	}
	return sendErr
}

func (s *session) send(ctx context.Context) error {
	pace := check.NewPacer(s.o.Rate)
	var frame []byte
	for last := false; !last; {
		select {
		case <-s.ended:
			last = true
		default:
			last = !pace.Wait(ctx)
		}
		me := Peer{Errors: s.failures.Load(), LongestGapNS: s.longestGap.Load(), Frames: s.received.Load()}
		if last {
			frame = s.out.farewell(frame[:0], me)
		} else {
			frame = s.out.next(frame[:0], s.o.Payload, me)
		}
		s.sent.Store(s.out.seq) // before they go out: the other side may not claim more
		if err := s.conn.SetWriteDeadline(time.Now().Add(s.o.Timeout)); err != nil {
			return err
		}
		if _, err := s.conn.Write(frame); err != nil {
			return fmt.Errorf("send frame %d: %w", s.out.seq-1, err)
		}
	}
	return nil
}

func (s *session) receive() error {
	in := bufio.NewReaderSize(s.conn, 64<<10)
	var scratch []byte
	last := time.Now()
	for {
		if err := s.conn.SetReadDeadline(time.Now().Add(s.o.Timeout)); err != nil {
			return err
		}
		p, n, buf, err := s.in.read(in, scratch)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("no frame after %d for %s: %w", s.in.seq, s.o.Timeout, err)
		}
		if err != nil {
			return err
		}
		scratch = buf
		now := time.Now()
		if gap := uint64(now.Sub(last)); gap > s.longestGap.Load() {
			s.longestGap.Store(gap)
		}
		last = now
		s.received.Add(1)
		s.rec.Done(n)
		s.rec.Fact("peer_longest_gap_ms", float64(p.LongestGapNS)/1e6)
		s.rec.Fact("peer_frames", p.Frames)
		if p.Errors > 0 {
			return fmt.Errorf("the other side reports %d errors", p.Errors)
		}
		if sent := s.sent.Load(); p.Frames > sent {
			return fmt.Errorf("the other side claims %d frames, %d were sent", p.Frames, sent)
		}
	}
}
