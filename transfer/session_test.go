package transfer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tranship/tranship/checkpoint"
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
	for _, after := range []int64{40_000, 400_000, 1_500_000} {
		t.Run(fmt.Sprintf("cut after %d bytes", after), func(t *testing.T) {
			sink := newStore()
			h := newHost(t, hostOptions{accept: sink.accept})
			faulty, err := newFaultyConn(nil)
			if err != nil {
				t.Fatal(err)
			}
			opt := quick(Options{})
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
			m.round(t, s, 0, 0, 100, 10)

			for pid := range m.procs {
				m.write(pid, 50, pages-50)
			}
			faulty.limit.Store(faulty.out.Load() + after)
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
			stats := m.round(t, s, 1, 0, pages, 10)
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
	m.round(t, s, 0, 0, 50, 10)
	if err := s.Redial(t.Context()); !errors.Is(err, ErrForgotten) {
		t.Fatalf("redial: %v", err)
	}
	if _, err := s.Round(t.Context(), 1); !errors.Is(err, ErrClosed) {
		t.Errorf("round: %v", err)
	}
	fresh := h.dial(t, Options{})
	if stats := m.round(t, fresh, 0, 0, 50, 10); stats.Unchanged != 0 {
		t.Errorf("%d pages were left out", stats.Unchanged)
	}
	second.equal(t, m)
}

func TestADaemonThatCameBackSaysThatItKnowsNothing(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{IdleTimeout: time.Minute, KeepAlive: 100 * time.Millisecond})
	newMemory(3, 1, 50).round(t, s, 0, 0, 50, 10)

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
	m.round(t, fresh, 0, 0, 50, 50)
	second.equal(t, m)
}

func TestAnErrorOfTheSinkReachesTheSenderAndTheNextRoundMendsIt(t *testing.T) {
	noSpace := &RemoteError{Code: "no-space", Text: "the page store is full"}
	tests := []struct {
		name string
		op   func(*store) *error
		err  error
		code string
		text string
	}{
		{"of pages", func(s *store) *error { return &s.putErr }, errors.New("disk on fire"), CodeSink, "disk on fire"},
		{"of zero pages", func(s *store) *error { return &s.zeroErr }, errors.New("disk on fire"), CodeSink, "disk on fire"},
		{"with a code of its own", func(s *store) *error { return &s.putErr }, fmt.Errorf("put: %w", noSpace), "no-space", "the page store is full"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sink := newStore()
			h := newHost(t, hostOptions{accept: sink.accept})
			s := h.dial(t, Options{})
			m := newMemory(5, 1, 400)
			m.round(t, s, 0, 0, 100, 10)
			sink.fail(test.op(sink), test.err)
			r, err := s.Round(t.Context(), 1)
			if err != nil {
				t.Fatal(err)
			}
			sendErr := m.send(r, 0, 400, 10) // may see it already
			_, err = r.Close()
			var remote *RemoteError
			if !errors.As(err, &remote) || remote.Code != test.code || !strings.Contains(remote.Text, test.text) || errors.Is(err, ErrLinkLost) {
				t.Fatalf("close: %v (send: %v)", err, sendErr)
			}
			if sendErr != nil && !errors.As(sendErr, &remote) {
				t.Errorf("send: %v", sendErr)
			}
			sink.fail(test.op(sink), nil)
			m.round(t, s, 1, 0, 400, 10)
			sink.equal(t, m)
		})
	}
}

func TestACancelledRoundIsNeverASuccess(t *testing.T) {
	sink := newStore()
	sink.gate, sink.entered = make(chan struct{}), make(chan struct{}, 1000)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	m := newMemory(6, 1, 300)
	reason := errors.New("the operator changed their mind")

	ctx, cancel := context.WithCancelCause(t.Context())
	r, err := s.Round(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.send(r, 0, 300, 10); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { _, err := r.Close(); closed <- err }()
	<-sink.entered
	cancel(reason)
	if err := <-closed; !errors.Is(err, reason) {
		t.Errorf("close: %v", err)
	}
	if err := r.Pages(1, 0, make([]byte, page)); err == nil {
		t.Error("a closed round takes pages")
	}
	if _, err := r.Close(); err == nil {
		t.Error("a second Close succeeds")
	}
	close(sink.gate)

	// The calls of the cancelled round still run; the next round's come after.
	if stats := m.round(t, s, 0, 0, 300, 10); stats.Unchanged != 0 {
		t.Errorf("%d pages of the cancelled round were held for sent", stats.Unchanged)
	}
	sink.equal(t, m)

	ctx, cancel = context.WithCancelCause(t.Context())
	cancel(reason)
	r, err = s.Round(ctx, 2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Close(); !errors.Is(err, reason) {
		t.Errorf("an empty round with a context that has ended: %v", err)
	}
}

// TestPagesOfALaterRoundWaitForThoseOfACancelledOne holds a call of a cancelled
// round in the sink while the next round sends newer content.
func TestPagesOfALaterRoundWaitForThoseOfACancelledOne(t *testing.T) {
	sink := newStore()
	sink.gate, sink.entered = make(chan struct{}), make(chan struct{}, 1000)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{Streams: 1})
	m := newMemory(7, 1, 20)
	ctx, cancel := context.WithCancel(t.Context())
	r, err := s.Round(ctx, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.send(r, 0, 20, 20); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() { _, err := r.Close(); closed <- err }()
	<-sink.entered
	cancel()
	<-closed

	m.write(1, 0, 20)
	next, err := s.Round(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.send(next, 0, 20, 20); err != nil {
		t.Fatal(err)
	}
	go func() { _, err := next.Close(); closed <- err }()
	// The receiver has the second round's stream once it waits for its turn.
	eventually(t, "the next round's stream has arrived", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		in := h.sessions[inboundKey{"source", "m-1"}]
		in.mu.Lock()
		defer in.mu.Unlock()
		return in.waiting > 0
	})
	select {
	case <-sink.entered:
		t.Fatal("a page of the next round reached the sink beside one of the cancelled round")
	case err := <-closed:
		t.Fatalf("the next round ended: %v", err)
	case <-time.After(neverWithin):
	}
	close(sink.gate)
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	sink.equal(t, m)
}

func TestMisuseOfARoundBreaksIt(t *testing.T) {
	tests := []struct {
		name string
		do   func(*Round) error
	}{
		{"a page twice", func(r *Round) error {
			return errors.Join(r.Pages(1, 0x1000, make([]byte, page)), r.Pages(1, 0x1000, make([]byte, page)))
		}},
		{"a page in a hole", func(r *Round) error {
			return errors.Join(r.Zero(1, 0, 100), r.Pages(1, 0x1000, make([]byte, page)))
		}},
		{"half a page", func(r *Round) error { return r.Pages(1, 0x1000, make([]byte, 100)) }},
		{"nothing", func(r *Round) error { return r.Pages(1, 0x1000, nil) }},
		{"an odd address", func(r *Round) error { return r.Pages(1, 0x1001, make([]byte, page)) }},
		{"no process", func(r *Round) error { return r.Pages(0, 0x1000, make([]byte, page)) }},
		{"an empty hole", func(r *Round) error { return r.Zero(1, 0x1000, 0) }},
		{"a hole that wraps around", func(r *Round) error { return r.Zero(1, 0x1000, 1<<52) }},
		{"an address outside", func(r *Round) error { return r.Zero(1, 1<<60, 1) }},
	}
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	for n, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r, err := s.Round(t.Context(), n)
			if err != nil {
				t.Fatal(err)
			}
			if err := test.do(r); err == nil {
				t.Error("it is accepted")
			}
			if _, err := r.Close(); err == nil {
				t.Error("the round succeeds all the same")
			}
		})
	}
	r, err := s.Round(t.Context(), 100)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Round(t.Context(), 101); err == nil {
		t.Error("two rounds are open")
	}
	if err := s.Redial(t.Context()); err == nil {
		t.Error("the session redials with a round open")
	}
	if _, err := r.Close(); err != nil {
		t.Error(err)
	}
}

func TestHolesOverwriteWhatWasThereAndMayBeHuge(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	m := newMemory(8, 1, 100)
	m.round(t, s, 0, 0, 100, 10)
	r, err := s.Round(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Zero(1, m.base, 50), r.Zero(1, m.base+100*page, 1<<30), r.Zero(2, 0, 1<<40)); err != nil {
		t.Fatal(err)
	}
	stats, err := r.Close()
	if err != nil {
		t.Fatal(err)
	}
	before := append([]byte(nil), m.procs[1]...)
	clear(m.procs[1][:50*page])
	sink.equal(t, m)
	if stats.Zeros != 50+1<<30+1<<40 || stats.BytesRaw != 0 || stats.BytesSent > 1000 {
		t.Errorf("%+v", stats)
	}
	// What was in the hole comes back: its old content must not count as there.
	copy(m.procs[1], before)
	m.round(t, s, 2, 0, 100, 10)
	sink.equal(t, m)
}

func TestPagesBlobsAndTheAPIShareASocket(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept, plain: true, api: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", PeerFrom(r.Context()), body)
	})})
	peers, err := HTTPClient(h.client, func(_ context.Context, node string) (string, error) {
		if node == "nobody" {
			return "", errors.New("no such node")
		}
		return h.addr, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	client := &http.Client{Transport: peers}
	s := h.dial(t, Options{Connections: 2})
	m := newMemory(9, 2, 300)
	blobs := map[string][]byte{}
	for i := range 40 {
		b := make([]byte, i*i*700)
		if i%2 == 0 {
			fillNoise(b, uint64(i))
		}
		blobs[fmt.Sprintf("b-%d", i)] = b
	}
	var wg sync.WaitGroup
	for name, content := range blobs {
		wg.Go(func() {
			size := int64(len(content))
			if len(name)%2 == 0 {
				size = -1
			}
			if _, err := s.Blob(t.Context(), "content", name, size, strings.NewReader(string(content))); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range 10 {
		wg.Go(func() {
			resp, err := client.Post("https://destination/x", "text/plain", strings.NewReader(fmt.Sprint(i)))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if want := fmt.Sprintf("source %d", i); err != nil || string(body) != want {
				t.Errorf("%q, %v, want %q", body, err, want)
			}
		})
	}
	for n := range 3 {
		m.write(1, 0, 100)
		m.round(t, s, n, 0, 300, 16)
	}
	wg.Wait()
	sink.equal(t, m)
	sink.mu.Lock()
	for name, content := range blobs {
		if got := sink.blobs["content "+name]; hash(got) != hash(content) {
			t.Errorf("blob %s: %d bytes, want %d", name, len(got), len(content))
		}
	}
	sink.mu.Unlock()
	for _, wrong := range []struct {
		url string
		is  error
	}{{"https://host-9/x", ErrUntrusted}, {"https://nobody/x", nil}} {
		resp, err := client.Get(wrong.url)
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s answered", wrong.url)
		} else if wrong.is != nil && !errors.Is(err, wrong.is) {
			t.Errorf("%s: %v", wrong.url, err)
		}
	}
}

func TestTheAPIReconnectsAfterItsLinkWasLost(t *testing.T) {
	conf := quicConfig(time.Second, 200*time.Millisecond)
	h := newHost(t, hostOptions{conf: conf, accept: newStore().accept, api: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {})})
	peers, err := HTTPClient(h.client, func(context.Context, string) (string, error) { return h.addr, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	get := func() error {
		resp, err := (&http.Client{Transport: peers}).Get("https://destination/")
		if err == nil {
			err = resp.Body.Close()
		}
		return err
	}
	if err := get(); err != nil {
		t.Fatal(err)
	}
	h.socket.cut.Store(true)
	if err := get(); !errors.Is(err, ErrLinkLost) {
		t.Errorf("over a cut link: %v", err)
	}
	h.socket.cut.Store(false)
	if err := get(); err != nil {
		t.Errorf("after it came back: %v", err)
	}
}

func TestBandwidthIsHonoured(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	faulty, err := newFaultyConn(nil)
	if err != nil {
		t.Fatal(err)
	}
	opt := over(faulty)
	const rate, pages = 8_000_000, 250
	opt.Bandwidth = rate
	s := h.dial(t, opt)
	m := newMemory(10, 1, pages)
	// Above the limit it may never be; below, only because the machine did not
	// let it run, and not three times.
	best := 0.0
	for n := 0; n < 3 && best < 0.95; n++ {
		fillNoise(m.procs[1], uint64(20+n))
		wire, began := faulty.out.Load(), time.Now()
		var blob sync.WaitGroup
		blob.Go(func() { // shares the limit
			noise := make([]byte, 512<<10)
			fillNoise(noise, uint64(30+n))
			if _, err := s.Blob(t.Context(), "image", "x", -1, strings.NewReader(string(noise))); err != nil {
				t.Error(err)
			}
		})
		m.round(t, s, n, 0, pages, 64)
		blob.Wait()
		ratio := float64(faulty.out.Load()-wire) * 8 / time.Since(began).Seconds() / rate
		if ratio > 1.03 {
			t.Errorf("%.3f of the limit", ratio)
		}
		best = max(best, ratio)
		t.Logf("%.3f of the limit", ratio)
	}
	if best < 0.95 {
		t.Errorf("at best %.3f of the limit", best)
	}
	sink.equal(t, m)

	s.SetBandwidth(0)
	fillNoise(m.procs[1], 13)
	stats := m.round(t, s, 9, 0, pages, 64)
	if unlimited := float64(stats.BytesSent) * 8 / stats.Duration.Seconds(); unlimited < 1.2*rate {
		t.Errorf("without the limit it is still %.0f bit/s", unlimited)
	}
}

func TestCloseOfTheServerWaitsForItsCalls(t *testing.T) {
	sink := newStore()
	sink.gate, sink.entered = make(chan struct{}), make(chan struct{}, 100)
	requested, release := make(chan struct{}), make(chan struct{})
	var handled atomic.Bool
	h := newHost(t, hostOptions{accept: sink.accept, api: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(requested)
		<-release
		handled.Store(true)
	})})
	s := h.dial(t, Options{})
	m := newMemory(14, 1, 10)
	r, err := s.Round(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.send(r, 0, 10, 10); err != nil {
		t.Fatal(err)
	}
	peers, err := HTTPClient(h.client, func(context.Context, string) (string, error) { return h.addr, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	asked := make(chan error, 1)
	go func() {
		_, err := (&http.Client{Transport: peers}).Get("https://destination/")
		asked <- err
	}()
	rounded := make(chan error, 1)
	go func() { _, err := r.Close(); rounded <- err }()
	<-requested
	<-sink.entered

	closed := make(chan error, 1)
	go func() { closed <- h.Close() }()
	if err := <-rounded; !errors.Is(err, ErrLinkLost) {
		t.Errorf("the round: %v", err)
	}
	if err := <-asked; err == nil {
		t.Error("the request succeeded")
	}
	for _, call := range []struct {
		name string
		end  func()
	}{
		{"an API request and a call of the sink", func() { close(release) }},
		{"a call of the sink", func() { close(sink.gate) }},
	} {
		select {
		case <-closed:
			t.Fatalf("the server closed with %s running", call.name)
		case <-time.After(neverWithin):
		}
		call.end()
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if !handled.Load() || sink.running.Load() != 0 {
		t.Error("Close did not wait")
	}
	select {
	case <-s.Lost():
	case <-time.After(10 * time.Second):
		t.Error("the session does not notice")
	}
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

func TestASinkThatAppendsToItsPagesDoesNotWriteOverTheNext(t *testing.T) {
	sink := &appender{newStore()}
	h := newHost(t, hostOptions{accept: func(context.Context, string, string) (Sink, error) { return sink, nil }})
	s := h.dial(t, Options{Streams: 1})
	r, err := s.Round(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 10 { // every second page: a segment each, in one batch
		p := make([]byte, page)
		p[0] = byte(i + 1)
		if err := r.Pages(1, uint64(2*i)*page, p); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Close(); err != nil {
		t.Fatal(err)
	}
	sink.mu.Lock()
	defer sink.mu.Unlock()
	for i := range 10 {
		if got := sink.pages[1][uint64(2*i)*page]; got[0] != byte(i+1) {
			t.Errorf("page %d begins with %d", i, got[0])
		}
	}
}

type appender struct{ *store }

func (a *appender) PutPages(pid checkpoint.PID, addr uint64, data []byte) error {
	err := a.store.PutPages(pid, addr, data)
	_ = append(data, make([]byte, page)...)
	return err
}
