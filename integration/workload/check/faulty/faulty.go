// Package faulty is a TCP proxy for tests that damages what passes through it:
// it stands in for a migration that goes wrong, so that each checker can be
// shown to notice.
package faulty

import (
	"errors"
	"net"
	"sync"
	"testing"
)

// Direction of bytes.
type Direction int

// The two directions.
const (
	ToServer Direction = iota
	ToClient
)

// A Fault sees every piece that passes, with its offset in the stream of its
// connection, and may change it in place. An error cuts the connection. It is
// called from several goroutines.
type Fault func(d Direction, offset int64, piece []byte) error

// ErrCut is a reason to cut, for a Fault that has no better one.
var ErrCut = errors.New("cut")

// Proxy forwards connections to target until the test ends, and returns its own
// address. A nil fault forwards as it is.
func Proxy(t testing.TB, target string, fault Fault) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if fault == nil {
		fault = func(Direction, int64, []byte) error { return nil }
	}
	p := &proxy{target: target, fault: fault, open: map[net.Conn]struct{}{}}
	p.wg.Add(1)
	go p.accept(l)
	t.Cleanup(func() {
		l.Close()
		p.closeAll()
		p.wg.Wait()
	})
	return l.Addr().String()
}

type proxy struct {
	target string
	fault  Fault
	wg     sync.WaitGroup

	mu     sync.Mutex
	open   map[net.Conn]struct{}
	closed bool
}

func (p *proxy) accept(l net.Listener) {
	defer p.wg.Done()
	for {
		client, err := l.Accept()
		if err != nil {
			return // closed by the end of the test
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			client.Close()
			continue
		}
		if !p.keep(client, server) {
			return
		}
		p.wg.Add(2)
		go p.pipe(ToServer, server, client)
		go p.pipe(ToClient, client, server)
	}
}

func (p *proxy) keep(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		if p.closed {
			c.Close()
		}
		p.open[c] = struct{}{}
	}
	return !p.closed
}

func (p *proxy) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for c := range p.open {
		c.Close()
	}
}

func (p *proxy) pipe(d Direction, to, from net.Conn) {
	defer p.wg.Done()
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for offset := int64(0); ; {
		n, err := from.Read(buf)
		if n > 0 {
			if p.fault(d, offset, buf[:n]) != nil {
				return
			}
			offset += int64(n)
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return // the end of one direction is the end of both
		}
	}
}

// FlipAt changes one bit of the byte at offset of one direction, on every connection.
func FlipAt(d Direction, at int64) Fault {
	return func(dir Direction, offset int64, piece []byte) error {
		if dir == d && at >= offset && at < offset+int64(len(piece)) {
			piece[at-offset] ^= 0x20
		}
		return nil
	}
}

// CutAfter cuts the connection when so many bytes have passed in one direction.
func CutAfter(d Direction, n int64) Fault {
	return func(dir Direction, offset int64, piece []byte) error {
		if dir == d && offset+int64(len(piece)) > n {
			return ErrCut
		}
		return nil
	}
}
