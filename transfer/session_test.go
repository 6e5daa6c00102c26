package transfer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// quick notices a cut link within a second.
func quick(opt Options) Options {
	opt.IdleTimeout, opt.KeepAlive = time.Second, 200*time.Millisecond
	return opt
}

// neverWithin bounds the wait for what must not happen: long enough for it to
// happen where the code that prevents it is taken out.
const neverWithin = 200 * time.Millisecond

func TestDialIsRefused(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: func(_ context.Context, peer, migration string) (Sink, error) {
		switch {
		case peer != "source":
			return nil, fmt.Errorf("peer is %q", peer)
		case migration == "full":
			return nil, &RemoteError{Code: "no-space", Text: "3 MiB are free"}
		case migration == "nil":
			return nil, nil
		case migration != "m-1":
			return nil, fmt.Errorf("no migration %s", migration)
		}
		return sink, nil
	}})
	stranger := newCluster(t)
	_, strangers := stranger.node("source")
	tests := []struct {
		name      string
		node      string
		tls       func(string) *tls.Config
		migration string
		is        error
		code      string
	}{
		{"by a host of another cluster", "destination", strangers, "m-1", ErrUntrusted, ""},
		{"by a host of another cluster that trusts ours", "destination", func(node string) *tls.Config {
			conf := strangers(node)
			conf.RootCAs = h.client(node).RootCAs
			return conf
		}, "m-1", ErrUntrusted, ""},
		{"when another node answers", "host-9", h.client, "m-1", ErrUntrusted, ""},
		{"for an unknown migration", "destination", h.client, "m-2", nil, CodeRefused},
		{"with the accepting side's own code", "destination", h.client, "full", nil, "no-space"},
		{"without a sink", "destination", h.client, "nil", nil, CodeRefused},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, err := Dial(t.Context(), h.addr, test.node, test.tls, test.migration, Options{})
			if err == nil {
				s.Close()
				t.Fatal("accepted")
			}
			var remote *RemoteError
			switch {
			case test.is != nil && !errors.Is(err, test.is):
				t.Errorf("err = %v, want %v", err, test.is)
			case test.code != "" && (!errors.As(err, &remote) || remote.Code != test.code):
				t.Errorf("err = %v, want code %s", err, test.code)
			case errors.Is(err, ErrLinkLost):
				t.Errorf("err = %v: a refusal is not a lost link", err)
			}
		})
	}
}

func TestDialToNobodyIsALostLinkOrTheCallersEnd(t *testing.T) {
	c := newCluster(t)
	_, client := c.node("source")
	silent, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, silent.LocalAddr().String(), "destination", client, "m-1", Options{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := Dial(t.Context(), silent.LocalAddr().String(), "destination", client, "m-1", Options{}); !errors.Is(err, ErrLinkLost) {
		t.Errorf("timed out: %v", err)
	}
}

func TestAStreamHasAConnectionOfItsOwn(t *testing.T) {
	for _, test := range []struct {
		opt  Options
		want int
	}{
		{Options{}, DefaultStreams},
		{Options{Streams: 1}, 1},
		{Options{Streams: DefaultConnections + 2}, DefaultConnections},
		{Options{Connections: 3}, 3},
	} {
		h := newHost(t, hostOptions{accept: newStore().accept})
		s := h.dial(t, test.opt)
		if n := len(s.links); n != test.want {
			t.Errorf("%+v: %d connections, want %d", test.opt, n, test.want)
		}
	}
}

func TestImpossibleOptionsAreRefused(t *testing.T) {
	for _, opt := range []Options{{Bandwidth: -1}, {Streams: 1000}, {Streams: -1}, {Connections: 17}, {Compression: "lz4"}} {
		if _, err := Dial(t.Context(), "127.0.0.1:1", "n", nil, "m", opt); err == nil {
			t.Errorf("%+v was accepted", opt)
		}
	}
	for _, migration := range []string{"", strings.Repeat("m", 129)} {
		if _, err := Dial(t.Context(), "127.0.0.1:1", "n", nil, migration, Options{}); err == nil {
			t.Errorf("migration %q was accepted", migration)
		}
	}
}

func TestACutLinkBreaksTheRoundAndRedialMendsIt(t *testing.T) {
	for _, test := range []struct {
		connections int
		after       int64
	}{{1, 40_000}, {1, 400_000}, {1, 1_500_000}, {DefaultConnections, 40_000}, {DefaultConnections, 200_000}} {
		t.Run(fmt.Sprintf("one of %d is cut after %d bytes", test.connections, test.after), func(t *testing.T) {
			sink := newStore()
			h := newHost(t, hostOptions{accept: sink.accept})
			faulty, err := newFaultyConn(nil)
			if err != nil {
				t.Fatal(err)
			}
			opt := quick(Options{Connections: test.connections})
			sockets := []*faultyConn{faulty}
			opt.socket = func(*net.UDPAddr) (net.PacketConn, error) {
				if len(sockets) == 0 {
					return newFaultyConn(nil)
				}
				next := sockets[0]
				sockets = sockets[1:]
				return next, nil
			}
			s := h.dial(t, opt)
			const pages = 800
			m := newMemory(2, 1, pages)
			m.round(t, s, 0, 100, 10)

			for pid := range m.procs {
				m.write(pid, 50, pages-50)
			}
			faulty.limit.Store(faulty.out.Load() + test.after)
			r, err := s.Round(t.Context(), 1)
			if err != nil {
				t.Fatal(err)
			}
			sendErr := m.send(r, 0, pages, 10)
			if _, err := r.Close(); !errors.Is(err, ErrLinkLost) {
				t.Fatalf("close: %v (send: %v)", err, sendErr)
			}
			if err := s.Redial(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := s.Stats().Rounds; got != 1 {
				t.Errorf("%d rounds count as sent", got)
			}
			stats := m.round(t, s, 1, pages, 10)
			sink.equal(t, m)
			// The 50 untouched pages of round 0 need not go again, and of the broken
			// round nothing is believed.
			if stats.Unchanged < 50 || stats.Unchanged > 100 {
				t.Errorf("%d pages were held for sent", stats.Unchanged)
			}
		})
	}
}

func TestARedialToAReceiverThatForgotStartsOver(t *testing.T) {
	first, second := newStore(), newStore()
	var calls atomic.Int32
	h := newHost(t, hostOptions{accept: func(context.Context, string, string) (Sink, error) {
		if calls.Add(1) == 1 {
			return first, nil
		}
		return second, nil
	}})
	s := h.dial(t, Options{})
	m := newMemory(3, 1, 50)
	m.round(t, s, 0, 50, 10)
	if err := s.Redial(t.Context()); !errors.Is(err, ErrForgotten) {
		t.Fatalf("redial: %v", err)
	}
	if _, err := s.Round(t.Context(), 1); !errors.Is(err, ErrClosed) {
		t.Errorf("round: %v", err)
	}
	fresh := h.dial(t, Options{})
	if stats := m.round(t, fresh, 0, 50, 10); stats.Unchanged != 0 {
		t.Errorf("%d pages were left out", stats.Unchanged)
	}
	second.equal(t, m)
}

func TestADaemonThatCameBackSaysThatItKnowsNothing(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{IdleTimeout: time.Minute, KeepAlive: 100 * time.Millisecond})
	newMemory(3, 1, 50).round(t, s, 0, 50, 10)

	h.socket.cut.Store(true) // it dies without a word
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	socket, err := newFaultyConn(h.Addr().(*net.UDPAddr))
	if err != nil {
		t.Fatal(err)
	}
	again, err := listen(socket, h.server, quicConfig(DefaultIdleTimeout, DefaultKeepAlive), nil, sink.accept, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- again.Serve(t.Context()) }()
	defer func() {
		if err := again.Close(); err != nil {
			t.Error(err)
		}
		<-served
	}()
	select {
	case <-s.Lost():
	case <-time.After(20 * time.Second):
		t.Fatal("the session waits for the idle timeout")
	}
	if _, err := s.Round(t.Context(), 1); !errors.Is(err, ErrLinkLost) {
		t.Error(err)
	}
}

func TestASecondSessionTakesTheMigrationOverAfterTheFirstOnesCalls(t *testing.T) {
	first, second := newStore(), newStore()
	first.gate, first.entered = make(chan struct{}), make(chan struct{}, 100)
	var calls atomic.Int32
	var overlapped atomic.Bool
	h := newHost(t, hostOptions{accept: func(context.Context, string, string) (Sink, error) {
		if calls.Add(1) == 1 {
			return first, nil
		}
		overlapped.Store(first.running.Load() > 0)
		return second, nil
	}})
	old := h.dial(t, Options{Streams: 1})
	m := newMemory(4, 1, 50)
	r, err := old.Round(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.send(r, 0, 50, 50); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { _, err := r.Close(); closed <- err }()
	<-first.entered

	dialled := make(chan error, 1)
	var fresh *Session
	go func() {
		var err error
		fresh, err = Dial(t.Context(), h.addr, "destination", h.client, "m-1", Options{})
		dialled <- err
	}()
	var remote *RemoteError
	if err := <-closed; !errors.As(err, &remote) || remote.Code != CodeSuperseded {
		t.Errorf("the round of the first session: %v", err)
	}
	select {
	case err := <-dialled:
		t.Fatalf("the second session began while a call of the first was running: %v", err)
	case <-time.After(neverWithin):
	}
	close(first.gate)
	if err := <-dialled; err != nil {
		t.Fatal(err)
	}
	defer fresh.Close()
	if overlapped.Load() {
		t.Error("the sink was asked for while a call of the first session was running")
	}
	m.round(t, fresh, 0, 50, 50)
	second.equal(t, m)
}

func TestClosedSessionsRefuse(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{Connections: 2})
	select {
	case <-s.Lost():
		t.Error("lost from the beginning")
	default:
	}
	lost := s.Lost()
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	<-lost
	_, roundErr := s.Round(t.Context(), 0)
	_, blobErr := s.Blob(t.Context(), "k", "n", -1, strings.NewReader(""))
	for _, err := range []error{roundErr, blobErr, s.Redial(t.Context())} {
		if !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
	eventually(t, "the receiver forgets a session that was closed", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.sessions) == 0 && len(h.perPeer) == 0
	})
}
