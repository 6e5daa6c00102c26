package transfer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// rawPeer is a member of the cluster that writes what it likes.
type rawPeer struct {
	t    *testing.T
	conn *quic.Conn
}

func (h *host) raw(t *testing.T, alpn string) *rawPeer {
	t.Helper()
	socket, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	tr := &quic.Transport{Conn: socket}
	conf := h.client("destination").Clone()
	conf.NextProtos = []string{alpn}
	conn, err := tr.Dial(t.Context(), h.Addr(), conf, quicConfig(DefaultIdleTimeout, DefaultKeepAlive))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.CloseWithError(codeIncomplete, "")
		tr.Close()
		socket.Close()
	})
	return &rawPeer{t, conn}
}

// say writes raw bytes to a new stream and ends it.
func (p *rawPeer) say(raw []byte) *quic.Stream {
	p.t.Helper()
	stream, err := p.conn.OpenStreamSync(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := stream.Write(raw); err != nil && p.conn.Context().Err() == nil {
		p.t.Fatal(err)
	}
	stream.Close()
	return stream
}

func (p *rawPeer) hello() {
	p.t.Helper()
	stream := p.say(wire.Hello{Version: wire.Version, Session: wire.SessionID{1}, Attempt: 1, Migration: "m-1"}.Append(nil))
	typ, body, err := readOne(stream)
	if err != nil || typ != wire.TypeWelcome {
		p.t.Fatalf("%v, %v", typ, err)
	}
	if w, err := wire.ParseWelcome(body); err != nil || w.Code != "" || w.Resumed {
		p.t.Fatalf("%+v, %v", w, err)
	}
}

// closedWith waits for the end of the connection and returns its code.
func (p *rawPeer) closedWith() quic.ApplicationErrorCode {
	p.t.Helper()
	select {
	case <-p.conn.Context().Done():
	case <-time.After(20 * time.Second):
		p.t.Fatal("the connection is still open")
	}
	var app *quic.ApplicationError
	if err := context.Cause(p.conn.Context()); !errors.As(err, &app) || !app.Remote {
		p.t.Fatalf("the connection ended with %v", err)
	}
	return app.ErrorCode
}

func join(frames ...interface{ Append([]byte) []byte }) []byte {
	var raw []byte
	for _, f := range frames {
		raw = f.Append(raw)
	}
	return raw
}

// pagesFrame is a batch of process 1, as deltaFrame is, from address 0 on.
func pagesFrame(content []byte) wire.Batch {
	return wire.Batch{
		Segments: []wire.Segment{{PID: 1, Pages: checkpoint.Pages(len(content) / page)}},
		Block:    wire.Block{Raw: len(content), Sum: xxh3.Hash(content), Payload: content},
	}
}

func deltaFrame(addr uint64, pages checkpoint.Pages, deltas []byte) wire.Batch {
	return wire.Batch{
		Segments: []wire.Segment{{PID: 1, Addr: addr, Pages: pages, Delta: len(deltas)}},
		Block:    wire.Block{Raw: len(deltas), Sum: xxh3.Hash(deltas), Payload: deltas},
	}
}

func TestAPeerThatBreaksTheProtocolLosesItsConnection(t *testing.T) {
	one := bytes.Repeat([]byte{1}, page)
	open := wire.OpenRound{Epoch: 1}
	blob := wire.OpenBlob{Kind: "k", Size: -1}
	bomb := pagesFrame(one)
	bomb.Encoding, bomb.Payload = byte(encoding.S2), []byte{0xff, 0xff, 0xff, 0xff, 0x0f, 0, 0}
	noChange, _ := encoding.AppendDelta(nil, make([]byte, page), make([]byte, page))
	unknown := pagesFrame(one)
	unknown.Encoding = 77
	tests := []struct {
		name string
		raw  []byte
	}{
		{"with an unknown frame", []byte{0xee, 1, 2, 3}},
		{"with noise", func() []byte { b := make([]byte, 5000); fillNoise(b, 1); return b }()},
		{"with a frame that has no place there", join(wire.EndRound{})},
		{"with a second hello", join(wire.Hello{Version: wire.Version, Attempt: 1, Migration: "m"})},
		{"with a blob's block in a round", join(open, wire.Block{Raw: 1, Payload: []byte{1}})},
		{"with a batch in a blob", join(blob, pagesFrame(one))},
		{"with copies in a blob", join(blob, wire.Copies{Runs: []wire.Copy{{PID: 1, FromPID: 1, From: page, Pages: 1}}, Sums: make([]byte, 16)})},
		{"with copies without hashes", join(open, wire.Copies{Runs: []wire.Copy{{PID: 1, FromPID: 1, From: page, Pages: 1}}})},
		{"with a frame over the limit", append(join(open), wire.AppendHeader(nil, wire.TypeBatch, wire.MaxBody+1)...)},
		{"with a batch that names the kernel's half", join(open, wire.Batch{Segments: []wire.Segment{{PID: 1, Addr: 1 << 62, Pages: 1, Zero: true}}})},
		{"with a bomb", join(open, bomb)},
		{"with an unknown encoding", join(open, unknown)},
		{"with a delta that runs out of its page", join(open, deltaFrame(0, 1, append(make([]byte, 8), 200, 4, 1, 2, 3, 4, 5, 6, 7, 8)))},
		{"with fewer deltas than pages", join(open, deltaFrame(0, 3, noChange))},
		{"with more deltas than pages", join(open, deltaFrame(0, 1, append(bytes.Clone(noChange), noChange...)))},
		{"with bytes after the end", append(join(open, wire.EndRound{}), 1)},
		{"with bytes after a blob's end", append(join(blob, wire.EndBlob{}), 1)},
		{"with more blob than it declared", join(wire.OpenBlob{Kind: "k", Size: 3}, wire.Block{Raw: 5, Sum: xxh3.HashString("bytes"), Payload: []byte("bytes")})},
		{"with less blob than it declared", join(wire.OpenBlob{Kind: "k", Size: 3}, wire.EndBlob{})},
		{"with an end that counts otherwise", join(blob, wire.Block{Raw: 5, Sum: xxh3.HashString("bytes"), Payload: []byte("bytes")}, wire.EndBlob{Bytes: 6})},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sink := newStore()
			h := newHost(t, hostOptions{accept: sink.accept})
			p := h.raw(t, alpnPages)
			p.hello()
			p.say(test.raw)
			if code := p.closedWith(); code != codeProtocol {
				t.Errorf("closed with %d", code)
			}
			sink.mu.Lock()
			defer sink.mu.Unlock()
			if sink.puts > 0 || len(sink.blobs) > 0 {
				t.Errorf("the sink took %d pages and %d blobs", sink.puts, len(sink.blobs))
			}
		})
	}
	t.Run("with a unidirectional stream", func(t *testing.T) {
		h := newHost(t, hostOptions{accept: newStore().accept})
		p := h.raw(t, alpnPages)
		p.hello()
		stream, err := p.conn.OpenUniStreamSync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if code := p.closedWith(); code != codeProtocol {
			t.Errorf("closed with %d", code)
		}
	})
	for name, raw := range map[string][]byte{
		"with noise in place of a hello":   {0xee, 0xee},
		"with a round in place of a hello": join(open),
		"with half a hello":                wire.Hello{Version: wire.Version, Attempt: 1, Migration: "m-1"}.Append(nil)[:10],
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, hostOptions{accept: newStore().accept})
			p := h.raw(t, alpnPages)
			p.say(raw)
			if code := p.closedWith(); code != codeProtocol {
				t.Errorf("closed with %d", code)
			}
		})
	}
}

// TestWhatIsIncompleteIsNeverAnsweredWithSuccess ends streams where their
// sender could have died.
func TestWhatIsIncompleteIsNeverAnsweredWithSuccess(t *testing.T) {
	one := bytes.Repeat([]byte{1}, page)
	corrupt := pagesFrame(one)
	corrupt.Sum++
	ofOne, _ := encoding.AppendDelta(nil, one, append([]byte{9}, one[1:]...))
	block := wire.Block{Raw: 5, Sum: xxh3.HashString("bytes"), Payload: []byte("bytes")}
	badBlock := block
	badBlock.Sum++
	round := join(wire.OpenRound{Epoch: 5}, pagesFrame(one), wire.EndRound{Tally: wire.Tally{Batches: 1, Pages: 1}})
	blob := join(wire.OpenBlob{Kind: "k", Size: 5}, block, wire.EndBlob{Bytes: 5})
	tests := []struct {
		name string
		raw  []byte
		code string
	}{
		{"a whole round", round, ""},
		{"a whole blob", blob, ""},
		{"a round without its end", round[:len(round)-5], CodeCut},
		{"a round whose end is cut", round[:len(round)-1], CodeCut},
		{"a batch that is cut", round[:100], CodeCut},
		{"a blob without its end", blob[:len(blob)-3], CodeCut},
		{"a block that is cut", blob[:len(blob)-5], CodeCut},
		{"a round with fewer batches than it counts", join(wire.OpenRound{Epoch: 5}, pagesFrame(one), wire.EndRound{Tally: wire.Tally{Batches: 2, Pages: 2}}), CodeCorrupt},
		{"pages that are not what was hashed", join(wire.OpenRound{Epoch: 5}, corrupt, wire.EndRound{Tally: wire.Tally{Batches: 1, Pages: 1}}), CodeCorrupt},
		{"a delta of another page", join(wire.OpenRound{Epoch: 5}, deltaFrame(0, 1, ofOne), wire.EndRound{Tally: wire.Tally{Batches: 1, Pages: 1}}), CodeCorrupt},
		{"a block that is not what was hashed", join(wire.OpenBlob{Kind: "k", Size: 5}, badBlock, wire.EndBlob{Bytes: 5}), CodeCorrupt},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sink := newStore()
			h := newHost(t, hostOptions{accept: sink.accept})
			p := h.raw(t, alpnPages)
			p.hello()
			answer, err := readAnswer(t.Context(), p.say(test.raw))
			var remote *RemoteError
			switch {
			case test.code == "" && err != nil:
				t.Errorf("err = %v", err)
			case test.code != "" && (!errors.As(err, &remote) || remote.Code != test.code):
				t.Errorf("answered %+v, %v, want code %s", answer, err, test.code)
			}
			sink.mu.Lock()
			defer sink.mu.Unlock()
			if test.code != "" && len(sink.blobs) > 0 {
				t.Error("the sink kept a blob that is not whole")
			}
			if page0 := sink.pages[1][0]; test.code != "" && strings.Contains(test.name, "hashed") && page0[0] != 0 {
				t.Error("the sink got pages that are not what was hashed")
			}
		})
	}
}

func TestStreamsOfAnEarlierRoundAreDropped(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	p := h.raw(t, alpnPages)
	p.hello()
	content := bytes.Repeat([]byte{9}, page)
	round := func(epoch uint64, value byte) []byte {
		return join(wire.OpenRound{Epoch: epoch}, pagesFrame(bytes.Repeat([]byte{value}, page)), wire.EndRound{Tally: wire.Tally{Batches: 1, Pages: 1}})
	}
	if _, err := readAnswer(t.Context(), p.say(round(7, 9))); err != nil {
		t.Fatal(err)
	}
	if _, err := readAnswer(t.Context(), p.say(round(6, 1))); err == nil {
		t.Error("a stream of an earlier round was answered with success")
	}
	sink.mu.Lock()
	defer sink.mu.Unlock()
	if got := sink.pages[1][0]; !bytes.Equal(got[:], content) {
		t.Error("it overwrote the later one's page")
	}
}

func TestAHelloOfAnotherVersionIsToldSo(t *testing.T) {
	h := newHost(t, hostOptions{accept: newStore().accept})
	p := h.raw(t, alpnPages)
	typ, body, err := readOne(p.say(wire.Hello{Version: wire.Version + 1, Attempt: 1, Migration: "m-1"}.Append(nil)))
	if err != nil || typ != wire.TypeWelcome {
		t.Fatalf("%v, %v", typ, err)
	}
	if w, err := wire.ParseWelcome(body); err != nil || w.Code != CodeVersion {
		t.Errorf("%+v, %v", w, err)
	}
}

func TestAConnectionOfAnAttemptThatIsOverIsRefused(t *testing.T) {
	h := newHost(t, hostOptions{accept: newStore().accept})
	s := h.dial(t, Options{})
	hellos := map[string]wire.Hello{
		"a joining connection of another session": {Version: wire.Version, Session: wire.SessionID{9}, Attempt: 1, Index: 1, Migration: "m-1"},
		"a joining connection of an old attempt":  {Version: wire.Version, Session: s.id, Attempt: 9, Index: 1, Migration: "m-1"},
		"a late hello of the same attempt":        {Version: wire.Version, Session: s.id, Attempt: 1, Migration: "m-1"},
	}
	for name, hello := range hellos {
		t.Run(name, func(t *testing.T) {
			typ, body, err := readOne(h.raw(t, alpnPages).say(hello.Append(nil)))
			if err != nil || typ != wire.TypeWelcome {
				t.Fatalf("%v, %v", typ, err)
			}
			if w, err := wire.ParseWelcome(body); err != nil || w.Code != CodeSuperseded {
				t.Errorf("%+v, %v", w, err)
			}
		})
	}
	newMemory(1, 1, 10).round(t, s, 0, 10, 10) // and the session has not noticed
}

func TestAPeerMayNotOpenStreamsWithoutEnd(t *testing.T) {
	h := newHost(t, hostOptions{accept: newStore().accept})
	p := h.raw(t, alpnPages)
	p.hello()
	for range maxStreams {
		stream, err := p.conn.OpenStreamSync(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Write([]byte{byte(wire.TypeBatch)}); err != nil {
			t.Fatal(err)
		}
	}
	var limit *quic.StreamLimitReachedError
	if _, err := p.conn.OpenStream(); !errors.As(err, &limit) {
		t.Errorf("one more: %v", err)
	}
}

func TestAPeerMayNotOpenConnectionsWithoutEnd(t *testing.T) {
	h := newHost(t, hostOptions{accept: newStore().accept})
	var peers []*rawPeer
	for range maxPeerConns {
		peers = append(peers, h.raw(t, alpnAPI))
	}
	eventually(t, "all connections are counted", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.perPeer["source"] == maxPeerConns
	})
	if code := h.raw(t, alpnPages).closedWith(); code != codeRefused {
		t.Errorf("closed with %d", code)
	}
	for _, p := range peers {
		if p.conn.Context().Err() != nil {
			t.Error("a connection within the limit was closed")
		}
	}
}

func TestBlobsThatFail(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: func(context.Context, string, string) (Sink, error) { return &pickyBlobs{sink}, nil }})
	s := h.dial(t, Options{})
	long := strings.Repeat("x", 3<<20)
	torn := errors.New("torn tape")
	tests := []struct {
		name, kind, blob string
		size             int64
		r                io.Reader
		is               error
		code             string
	}{
		{"when the sink refuses at once", "refuse", "b", -1, strings.NewReader(long), nil, "no-space"},
		{"when the sink refuses at the end", "late", "b", -1, strings.NewReader(long), nil, CodeSink},
		{"when the sink does not read to the end", "lazy", "b", -1, strings.NewReader(long), nil, CodeSink},
		{"when the source breaks", "k", "b", -1, io.MultiReader(strings.NewReader(long), iotest.ErrReader(torn)), torn, ""},
		{"when it is shorter than declared", "k", "b", 1 << 30, strings.NewReader(long), nil, ""},
		{"when it is longer than declared", "k", "b", 10, strings.NewReader(long), nil, ""},
		{"without a kind", "", "b", -1, strings.NewReader(long), nil, ""},
		{"with a name that is not UTF-8", "k", "\xff", -1, strings.NewReader(long), nil, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := s.Blob(t.Context(), test.kind, test.blob, test.size, test.r)
			var remote *RemoteError
			switch {
			case err == nil:
				t.Fatal("success")
			case test.is != nil && !errors.Is(err, test.is):
				t.Errorf("err = %v, want %v", err, test.is)
			case errors.As(err, &remote) != (test.code != "") || remote != nil && remote.Code != test.code:
				t.Errorf("err = %v, want code %q", err, test.code)
			}
		})
	}
	t.Run("when its context ends", func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		r, w := io.Pipe()
		done := make(chan error, 1)
		go func() { _, err := s.Blob(ctx, "k", "b", -1, r); done <- err }()
		if _, err := io.WriteString(w, long); err != nil {
			t.Fatal(err)
		}
		cancel(torn)
		w.Close()
		if err := <-done; !errors.Is(err, torn) {
			t.Errorf("err = %v", err)
		}
	})
	// None of it hurt the session, nor did any of it count as a blob.
	if _, err := s.Blob(t.Context(), "exact", "good", int64(len(long)), strings.NewReader(long)); err != nil {
		t.Error(err)
	}
	eventually(t, "only the good blob is kept", func() bool {
		sink.mu.Lock()
		defer sink.mu.Unlock()
		return len(sink.blobs) == 1 && string(sink.blobs["exact good"]) == long
	})
}

// pickyBlobs behaves as the kind of a blob says.
type pickyBlobs struct{ *store }

func (p *pickyBlobs) Blob(ctx context.Context, kind, name string, size int64, r io.Reader) error {
	switch kind {
	case "refuse":
		return &RemoteError{Code: "no-space", Text: "3 MiB are free"}
	case "late":
		_, err := io.Copy(io.Discard, r)
		return errors.Join(err, errors.New("digest differs"))
	case "lazy":
		_, err := io.CopyN(io.Discard, r, 1000)
		return err
	case "exact": // reads size bytes and never sees the end
		data := make([]byte, size)
		if _, err := io.ReadFull(r, data); err != nil {
			return err
		}
		return p.store.Blob(ctx, kind, name, size, bytes.NewReader(data))
	}
	return p.store.Blob(ctx, kind, name, size, r)
}

func TestASinkThatHidesABrokenBlobDoesNotMakeItWhole(t *testing.T) {
	h := newHost(t, hostOptions{accept: func(context.Context, string, string) (Sink, error) { return &forgiving{newStore()}, nil }})
	p := h.raw(t, alpnPages)
	p.hello()
	raw := join(wire.OpenBlob{Kind: "k", Size: -1}, wire.Block{Raw: 5, Sum: xxh3.HashString("bytes"), Payload: []byte("bytes")})
	var remote *RemoteError
	if _, err := readAnswer(t.Context(), p.say(raw)); !errors.As(err, &remote) || remote.Code != CodeCut {
		t.Errorf("err = %v", err)
	}
}

type forgiving struct{ *store }

func (*forgiving) Blob(_ context.Context, _, _ string, _ int64, r io.Reader) error {
	io.Copy(io.Discard, r)
	return nil
}

// lyingServer is a peer with a valid certificate that answers as it likes.
func lyingServer(t *testing.T, answer func(*quic.Stream)) (addr string, client *cluster) {
	t.Helper()
	c := newCluster(t)
	conf, _ := c.node("destination")
	conf = conf.Clone()
	conf.NextProtos = []string{alpnPages}
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	tr := &quic.Transport{Conn: socket}
	ln, err := tr.Listen(conf, quicConfig(DefaultIdleTimeout, DefaultKeepAlive))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := ln.Accept(t.Context())
		if err != nil {
			return
		}
		control, err := conn.AcceptStream(t.Context())
		if err != nil {
			return
		}
		control.Write(wire.Welcome{Version: wire.Version}.Append(nil))
		control.Close()
		for {
			stream, err := conn.AcceptStream(t.Context())
			if err != nil {
				return
			}
			answer(stream)
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		tr.Close()
		socket.Close()
		<-done
	})
	return socket.LocalAddr().String(), c
}

func TestASenderBelievesOnlyACompleteAnswer(t *testing.T) {
	tests := []struct {
		name   string
		answer func(*quic.Stream)
	}{
		{"that never read", func(s *quic.Stream) { s.CancelRead(0); s.Close() }},
		{"that resets", func(s *quic.Stream) { s.CancelRead(0); s.CancelWrite(0) }},
		{"that ends without an answer", func(s *quic.Stream) { io.Copy(io.Discard, s); s.Close() }},
		{"that answers success with fewer pages", func(s *quic.Stream) {
			io.Copy(io.Discard, s)
			s.Write(wire.Answer{Tally: wire.Tally{Batches: 1, Pages: 1}, Bytes: 1}.Append(nil))
			s.Close()
		}},
		{"that answers success at once", func(s *quic.Stream) {
			s.Write(wire.Answer{}.Append(nil))
			s.Close()
			io.Copy(io.Discard, s)
		}},
		{"that answers with another frame", func(s *quic.Stream) {
			io.Copy(io.Discard, s)
			s.Write(wire.EndBlob{}.Append(nil))
			s.Close()
		}},
		{"that goes on after its answer", func(s *quic.Stream) {
			io.Copy(io.Discard, s)
			s.Write(append(wire.Answer{Tally: wire.Tally{Batches: 1, Pages: 2}, Bytes: 2 * page}.Append(nil), 1))
			s.Close()
		}},
		{"that answers noise", func(s *quic.Stream) {
			io.Copy(io.Discard, s)
			s.Write([]byte{0xee, 0xee})
			s.Close()
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			addr, c := lyingServer(t, test.answer)
			_, client := c.node("source")
			s, err := Dial(t.Context(), addr, "destination", client, "m-1", Options{Streams: 1})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			data := bytes.Repeat([]byte{1}, 2*page)
			r, err := s.Round(t.Context(), 0)
			if err != nil {
				t.Fatal(err)
			}
			pagesErr := r.Pages(1, 0, data)
			var remote *RemoteError
			if _, err := r.Close(); !errors.As(err, &remote) {
				t.Errorf("round: %v (pages: %v)", err, pagesErr)
			}
			if s.Stats().Remembered != 0 {
				t.Error("the round's pages are held for sent")
			}
			if _, err := s.Blob(t.Context(), "k", "n", -1, bytes.NewReader(data)); !errors.As(err, &remote) {
				t.Errorf("blob: %v", err)
			}
		})
	}
}
