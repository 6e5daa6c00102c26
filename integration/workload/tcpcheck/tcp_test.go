package tcpcheck

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
	"github.com/tranship/tranship/integration/workload/check/faulty"
)

func options() Options { return Options{Timeout: 5 * time.Second, Payload: 4096} }

// frames renders n frames and a farewell.
func frames(n int) []byte {
	s := stream{key: 9}
	var raw []byte
	for range n {
		raw = s.next(raw, 100, Peer{Frames: 3})
	}
	return s.farewell(raw, Peer{})
}

// drain reads frames until the end.
func drain(raw []byte) (n int, err error) {
	s := stream{key: 9}
	in := bufio.NewReader(bytes.NewReader(raw))
	var scratch []byte
	for {
		_, _, buf, err := s.read(in, scratch)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		scratch = buf
		n++
	}
}

func TestAStreamRoundTrips(t *testing.T) {
	if n, err := drain(frames(50)); n != 50 || err != nil {
		t.Errorf("%d frames, %v", n, err)
	}
}

func TestAStreamThatIsCutAnywhereIsAnError(t *testing.T) {
	raw := frames(5)
	for n := range len(raw) {
		if _, err := drain(raw[:n]); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("after %d of %d bytes: %v", n, len(raw), err)
		}
	}
}

func TestABitThatIsFlippedAnywhereIsAnError(t *testing.T) {
	raw := frames(3)
	for i := range raw {
		if inReport(raw, i) {
			continue // what a side says about itself is not part of the chain
		}
		raw[i] ^= 0x10
		if _, err := drain(raw); err == nil {
			t.Errorf("byte %d of %d", i, len(raw))
		}
		raw[i] ^= 0x10
	}
}

// inReport says whether byte i lies in the Peer of some frame.
func inReport(raw []byte, i int) bool {
	for at := 0; at < len(raw); {
		size := int(raw[at+4])<<24 | int(raw[at+5])<<16 | int(raw[at+6])<<8 | int(raw[at+7])
		if i >= at+24 && i < at+headerSize {
			return true
		}
		at += headerSize + size
	}
	return false
}

func TestAFrameThatIsLostOrDoubledOrSwappedIsAnError(t *testing.T) {
	s := stream{key: 9}
	var f [3][]byte
	for i := range f {
		f[i] = s.next(nil, 100, Peer{})
	}
	for name, order := range map[string][]int{"lost": {0, 2}, "doubled": {0, 0, 1}, "swapped": {1, 0, 2}} {
		var raw []byte
		for _, i := range order {
			raw = append(raw, f[i]...)
		}
		if _, err := drain(raw); !errors.Is(err, ErrStream) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(frames(2))
	f.Add([]byte("TSF1\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if n, err := drain(raw); err == nil && n*headerSize > len(raw) {
			t.Errorf("%d frames from %d bytes", n, len(raw))
		}
	})
}

// pair runs a server and, through proxied, a client, until ctx is done.
func pair(t *testing.T, ctx context.Context, o Options, fault faulty.Fault) (server, client check.Report, serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serverRec, clientRec := check.NewRecorder("server"), check.NewRecorder("client")
	serverCtx, stopServer := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServer()
	done := make(chan error, 1)
	go func() { done <- Server(serverCtx, l, o, serverRec) }()
	clientErr = Client(ctx, faulty.Proxy(t, l.Addr().String(), fault), o, clientRec)
	stopServer()
	serverErr = <-done
	return serverRec.Report(true), clientRec.Report(true), serverErr, clientErr
}

func TestBothSidesSeeEveryFrame(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	server, client, serverErr, clientErr := pair(t, ctx, options(), nil)
	if serverErr != nil || clientErr != nil || !server.OK || !client.OK || server.Reconnects != 0 {
		t.Errorf("server %+v, %v\nclient %+v, %v", server, serverErr, client, clientErr)
	}
	if server.Requests < 10 || client.Requests < 10 {
		t.Errorf("%d and %d frames", server.Requests, client.Requests)
	}
}

// flipBeyondReports changes a byte, and one that is as far from it as a Peer is
// long: where frames begin is random, and what a side says about itself is not
// part of the chain, so one of the two may go unnoticed, but never both.
func flipBeyondReports(d faulty.Direction, at int64) faulty.Fault {
	const peerSize = headerSize - 24
	one, other := faulty.FlipAt(d, at), faulty.FlipAt(d, at+peerSize)
	return func(dir faulty.Direction, offset int64, piece []byte) error {
		return errors.Join(one(dir, offset, piece), other(dir, offset, piece))
	}
}

func TestFaultsOnTheWayAreFoundOutside(t *testing.T) {
	for name, fault := range map[string]faulty.Fault{
		"a byte to the server":     flipBeyondReports(faulty.ToServer, 300_005),
		"a byte to the shard":      flipBeyondReports(faulty.ToClient, 300_005),
		"a connection that is cut": faulty.CutAfter(faulty.ToServer, 300_000),
	} {
		t.Run(name, func(t *testing.T) {
			server, _, serverErr, clientErr := pair(t, t.Context(), options(), fault)
			if serverErr == nil && server.OK {
				t.Errorf("the server noticed nothing: %+v", server)
			}
			if clientErr == nil {
				t.Error("the client noticed nothing")
			}
		})
	}
}

// What the kernel of a dead process sends is not a good end.
func TestAFINWithoutFarewellIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	rec := check.NewRecorder("server")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Server(ctx, l, options(), rec) }()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	hello := make([]byte, 24)
	binary.BigEndian.PutUint64(hello, magic) // and 0 for both keys
	out := stream{}
	if _, err := conn.Write(out.next(hello, 100, Peer{})); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Fatal(err)
	}
	conn.Close()
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if rep := rec.Report(true); rep.OK || len(rep.Errors) != 1 || !strings.Contains(rep.Errors[0], "unexpected EOF") {
		t.Errorf("report: %+v", rep)
	}
}

func TestAServerThatNobodyCameToIsNotOK(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Server(ctx, l, options(), check.NewRecorder("server")); err == nil {
		t.Error("no client, no error")
	}
}
