package gossip

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

const (
	// largestPacket that can come by UDP.
	largestPacket = 1 << 16
	// receiveBuffer holds the answers and news of a second in a pool of a
	// thousand; the kernel may grant less.
	receiveBuffer = 2 << 20
	// failurePause is after a failure to read or accept, such as of a kernel
	// without memory or a process without descriptors.
	failurePause = 100 * time.Millisecond
)

// transport is UDP and TCP on one port. memberlist's own makes 64 KiB of
// garbage of each packet that it reads, and resolves an address for each that it
// writes: 45 µs of a processor for a packet sent and received, and 15 here.
type transport struct {
	udp     *net.UDPConn
	tcp     *net.TCPListener
	packets chan *memberlist.Packet
	streams chan net.Conn
	stop    chan struct{}
	once    sync.Once
	work    sync.WaitGroup
}

var _ memberlist.Transport = (*transport)(nil)

func listen(at netip.AddrPort) (*transport, error) {
	t := &transport{packets: make(chan *memberlist.Packet), streams: make(chan net.Conn), stop: make(chan struct{})}
	var err error
	if t.tcp, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at)); err != nil {
		return nil, err
	}
	if t.udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at)); err != nil {
		return nil, errors.Join(err, t.tcp.Close())
	}
	if err := t.udp.SetReadBuffer(receiveBuffer); err != nil {
		return nil, errors.Join(err, t.udp.Close(), t.tcp.Close())
	}
	t.work.Go(t.receive)
	t.work.Go(t.accept)
	return t, nil
}

func (t *transport) receive() {
	buf := make([]byte, largestPacket)
	for {
		n, from, err := t.udp.ReadFromUDPAddrPort(buf)
		if err != nil {
			if !t.goOn(err) {
				return
			}
			continue
		}
		p := &memberlist.Packet{Buf: bytes.Clone(buf[:n]), From: net.UDPAddrFromAddrPort(from), Timestamp: time.Now()}
		select {
		case t.packets <- p:
		case <-t.stop:
			return
		}
	}
}

func (t *transport) accept() {
	for {
		conn, err := t.tcp.Accept()
		if err != nil {
			if !t.goOn(err) {
				return
			}
			continue
		}
		select {
		case t.streams <- conn:
		case <-t.stop:
			conn.Close()
			return
		}
	}
}

// goOn says after err whether there is more to come, and when.
func (t *transport) goOn(err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	select {
	case <-time.After(failurePause):
		return true
	case <-t.stop:
		return false
	}
}

// FinalAdvertiseAddr is what the configuration says.
func (t *transport) FinalAdvertiseAddr(ip string, port int) (net.IP, int, error) {
	addr, err := netip.ParseAddr(ip)
	if err != nil {
		return nil, 0, fmt.Errorf("address to advertise: %w", err)
	}
	return addr.Unmap().AsSlice(), port, nil
}

func (t *transport) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, err
	}
	_, err = t.udp.WriteToUDPAddrPort(b, to)
	return time.Now(), err
}

func (t *transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	return net.DialTimeout("tcp", addr, timeout)
}

func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packets }
func (t *transport) StreamCh() <-chan net.Conn           { return t.streams }

// Shutdown returns when nothing is received any more.
func (t *transport) Shutdown() error {
	var err error
	t.once.Do(func() {
		close(t.stop)
		err = errors.Join(t.udp.Close(), t.tcp.Close())
	})
	t.work.Wait()
	return err
}
