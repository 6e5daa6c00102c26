package transfer

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"

	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"
)

// groBuffer is the largest thing that UDP_GRO hands over in one piece.
const groBuffer = 64 << 10

// groConn reads with UDP_GRO: the kernel joins packets of one flow, and one
// system call brings up to 44 of them instead of 8. quic-go uses GSO for sending
// by itself; receiving this way is worth a good half more throughput on one
// core. It is a ReadBatch for quic-go, which otherwise sees the net.UDPConn.
type groConn struct {
	*net.UDPConn

	mu   sync.Mutex // quic-go reads from one goroutine; this makes it no condition
	buf  []byte
	oob  []byte
	rest []byte // packets received and not yet handed over
	size int    // of each of them but the last
	addr *net.UDPAddr
	oobn int
}

// newGRO returns conn with UDP_GRO, or conn itself where the kernel has none
// (before Linux 5.0).
func newGRO(conn *net.UDPConn) (net.PacketConn, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.SOL_UDP, unix.UDP_GRO, 1)
	}); err != nil {
		return nil, err
	}
	if serr != nil {
		return conn, nil //nolint:nilerr // a slower socket is no failure
	}
	return &groConn{UDPConn: conn, buf: make([]byte, groBuffer), oob: make([]byte, 128)}, nil
}

// ReadBatch fills ms with single packets, as recvmmsg would have.
func (c *groConn) ReadBatch(ms []ipv4.Message, _ int) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.rest) == 0 {
		n, oobn, _, addr, err := c.ReadMsgUDP(c.buf, c.oob)
		if err != nil {
			return 0, err
		}
		size, err := groSize(c.oob[:oobn])
		if err != nil {
			return 0, err
		}
		if size <= 0 || size > n {
			size = n
		}
		c.rest, c.size, c.addr, c.oobn = c.buf[:n], size, addr, oobn
	}
	filled := 0
	for filled < len(ms) && len(c.rest) > 0 {
		m := &ms[filled]
		packet := c.rest[:min(c.size, len(c.rest))]
		c.rest = c.rest[len(packet):]
		m.N = copy(m.Buffers[0], packet)
		m.NN = copy(m.OOB, c.oob[:c.oobn]) // ECN and destination are those of all packets of the run
		m.Addr = c.addr
		filled++
	}
	return filled, nil
}

// groSize finds the size of the packets that were joined; 0 is a single packet.
func groSize(oob []byte) (int, error) {
	for len(oob) > 0 {
		header, data, rest, err := unix.ParseOneSocketControlMessage(oob)
		if err != nil {
			return 0, fmt.Errorf("control message of a UDP packet: %w", err)
		}
		if header.Level == unix.SOL_UDP && header.Type == unix.UDP_GRO && len(data) >= 4 {
			return int(binary.NativeEndian.Uint32(data)), nil
		}
		oob = rest
	}
	return 0, nil
}

// listenUDP binds a UDP socket that reads with GRO.
func listenUDP(network string, addr *net.UDPAddr) (net.PacketConn, error) {
	conn, err := net.ListenUDP(network, addr)
	if err != nil {
		return nil, err
	}
	wrapped, err := newGRO(conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return wrapped, nil
}
