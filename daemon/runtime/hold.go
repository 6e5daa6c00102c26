package runtime

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// A shard that stands still misses frames, and TCP backs off from what is
// missed: a peer may be silent for twice the blackout and more. So the frames
// are kept, first by the source, then by the destination, and delivered when
// the shard runs:
//
//  1. both open a Hold before the freeze: opening and closing a packet socket
//     waits for RCU grace periods
//  2. the source takes (Take), then isolates the shard
//  3. the destination takes and announces the address (Redirect)
//  4. the source sends what came in between (Drain); the destination adds it (Add)
//  5. its sockets are back: the destination hands over what there is (Pass). What
//     it answers waits in its kernel, which does not know its neighbours yet
//  6. the shard runs for good: the destination delivers the rest (Deliver)
//
// A frame may be delivered twice, at the seams, or be late, as in any network.
type Hold struct {
	n      *Network
	s      ShardNet
	mac    net.HardwareAddr
	bridge netlink.Link
	fd     int
	taking bool

	mu    sync.Mutex
	added [][]byte // by Add, older than what fd has
	size  int
}

const (
	// holdBytes bounds what is kept for one shard: half a second of 100 Mbit/s. A
	// full hold drops what comes later, as a full queue of any switch.
	holdBytes = 8 << 20
	// maxFrame is the kernel's largest segmentation-offload packet, 64 KiB, with
	// headers and the virtio-net header.
	maxFrame = 68 << 10
	// vnetHeader is sizeof(struct virtio_net_hdr): frames of local peers come
	// with checksums unfilled and segments unsplit, and leave the same way.
	vnetHeader  = 10
	etherHeader = 14
)

// Hold prepares to keep what is meant for the shard. It keeps nothing until Take.
func (n *Network) Hold(s ShardNet) (*Hold, error) {
	mac, err := net.ParseMAC(s.MAC)
	if err != nil {
		return nil, fmt.Errorf("hold frames of %s: %w", s.Name, err)
	}
	bridge, err := n.bridge()
	if err != nil {
		return nil, fmt.Errorf("hold frames of %s: %w", s.Name, err)
	}
	h := &Hold{n: n, s: s, mac: mac, bridge: bridge}
	// Protocol 0 receives nothing until bind names one.
	if h.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		return nil, fmt.Errorf("hold frames of %s: packet socket: %w", s.Name, err)
	}
	if err := h.configure(); err != nil {
		return nil, errors.Join(fmt.Errorf("hold frames of %s: %w", s.Name, err), h.Close())
	}
	return h, nil
}

func (h *Hold) configure() error {
	if err := h.filter(holdFilter(h.mac)); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(h.fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return fmt.Errorf("virtio-net headers: %w", err)
	}
	// What this host sends to the bridge itself is not for the shard.
	if err := unix.SetsockoptInt(h.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return fmt.Errorf("ignore outgoing: %w", err)
	}
	// The kernel doubles the value, for its own overhead.
	if err := unix.SetsockoptInt(h.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, holdBytes); err != nil {
		return fmt.Errorf("receive buffer: %w", err)
	}
	return nil
}

func (h *Hold) filter(program []bpf.Instruction) error {
	assembled, err := bpf.Assemble(program)
	if err != nil {
		return err
	}
	raw := make([]unix.SockFilter, len(assembled))
	for i, f := range assembled {
		raw[i] = unix.SockFilter{Code: f.Op, Jt: f.Jt, Jf: f.Jf, K: f.K}
	}
	prog := &unix.SockFprog{Len: uint16(len(raw)), Filter: &raw[0]}
	if err := unix.SetsockoptSockFprog(h.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, prog); err != nil {
		return fmt.Errorf("filter: %w", err)
	}
	return nil
}

// holdFilter passes frames to the MAC address, and the questions for its owner:
// ARP, and IPv6's neighbour discovery, which goes to multicast groups.
func holdFilter(mac net.HardwareAddr) []bpf.Instruction {
	const drop, pass = 0, maxFrame
	return []bpf.Instruction{
		bpf.LoadAbsolute{Off: 0, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(mac[:4]), SkipTrue: 3},
		bpf.LoadAbsolute{Off: 4, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: uint32(binary.BigEndian.Uint16(mac[4:])), SkipTrue: 1},
		bpf.RetConstant{Val: pass},
		bpf.LoadAbsolute{Off: 0, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: 1, SkipTrue: 4}, // not a group's address
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_ARP, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_IPV6, SkipTrue: 1},
		bpf.RetConstant{Val: pass},
		bpf.RetConstant{Val: drop},
	}
}

// Take begins to keep frames. While the shard's port is on the bridge, it gets
// them as well.
func (h *Hold) Take() error {
	if h.taking {
		return nil
	}
	index := h.bridge.Attrs().Index
	// The bridge passes what is for others to its own host only when told to.
	mreq := &unix.PacketMreq{Ifindex: int32(index), Type: unix.PACKET_MR_PROMISC}
	if err := unix.SetsockoptPacketMreq(h.fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, mreq); err != nil {
		return fmt.Errorf("hold frames of %s: promiscuous %s: %w", h.s.Name, h.bridge.Attrs().Name, err)
	}
	if err := unix.Bind(h.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: index}); err != nil {
		return fmt.Errorf("hold frames of %s: %w", h.s.Name, err)
	}
	h.taking = true
	return nil
}

// Redirect takes, and tells the segment that the address is here now.
func (h *Hold) Redirect() error {
	if err := h.Take(); err != nil {
		return err
	}
	if err := h.n.send(h.bridge, announcement(h.mac, h.s.IP.Addr())); err != nil {
		return fmt.Errorf("announce %s of %s: %w", h.s.IP.Addr(), h.s.Name, err)
	}
	return nil
}

// frameHeader precedes a frame, its virtio-net header included, in a stream.
const frameHeader = 4

// Drain writes what was kept, for Add at the other end.
func (h *Hold) Drain(w io.Writer) error {
	return h.each(func(frame []byte) error {
		if _, err := w.Write(binary.LittleEndian.AppendUint32(nil, uint32(len(frame)))); err != nil {
			return err
		}
		_, err := w.Write(frame)
		return err
	})
}

// Add keeps what Drain wrote. What exceeds the bound is read and dropped.
func (h *Hold) Add(r io.Reader) error {
	var header [frameHeader]byte
	for {
		if _, err := io.ReadFull(r, header[:]); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("held frames: %w", err)
		}
		n := binary.LittleEndian.Uint32(header[:])
		if n < vnetHeader+etherHeader || n > maxFrame {
			return fmt.Errorf("%w: held frame of %d bytes", ErrInvalid, n)
		}
		frame := make([]byte, n)
		if _, err := io.ReadFull(r, frame); err != nil {
			return fmt.Errorf("held frames: %w", err)
		}
		h.keep(frame)
	}
}

func (h *Hold) keep(frame []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.size+len(frame) > holdBytes {
		return
	}
	h.size += len(frame)
	h.added = append(h.added, frame)
}

// Pass hands to the shard what was kept until now, and goes on keeping.
func (h *Hold) Pass() error {
	if err := h.handOver(); err != nil {
		return fmt.Errorf("pass held frames to %s: %w", h.s.Name, err)
	}
	return nil
}

// Deliver hands everything that was kept to the shard and ends the taking. The
// network must be active, so that nothing is missed in between.
func (h *Hold) Deliver() error {
	// A filter that passes nothing ends it; unbinding would wait for RCU.
	err := h.filter([]bpf.Instruction{bpf.RetConstant{Val: 0}})
	if err := errors.Join(err, h.handOver()); err != nil {
		return fmt.Errorf("deliver held frames of %s: %w", h.s.Name, err)
	}
	return nil
}

// handOver sends what was kept to the shard's interface.
func (h *Hold) handOver() error {
	hostEnd, err := h.n.hostEnd(h.s)
	if err != nil {
		return err
	}
	var errs []error
	to := &unix.SockaddrLinklayer{Ifindex: hostEnd.Attrs().Index, Halen: 6}
	deliver := func(frame []byte) error {
		to.Protocol = htons(binary.BigEndian.Uint16(frame[vnetHeader+12:]))
		return unix.Sendto(h.fd, frame, 0, to)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, frame := range h.added {
		errs = append(errs, deliver(frame))
	}
	h.added, h.size = nil, 0
	return errors.Join(append(errs, h.each(deliver))...)
}

// each calls f with every frame that the socket keeps, its header before it.
func (h *Hold) each(f func(frame []byte) error) error {
	buf := make([]byte, maxFrame)
	for {
		n, _, err := unix.Recvfrom(h.fd, buf, unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("held frames: %w", err)
		case n < vnetHeader+etherHeader || n > len(buf):
			continue // cut off: it is as if the network had lost it
		}
		if err := f(buf[:n]); err != nil {
			return err
		}
	}
}

// Close drops what is still kept. It waits for an RCU grace period.
func (h *Hold) Close() error {
	if h.fd < 0 {
		return nil
	}
	fd := h.fd
	h.fd = -1
	return unix.Close(fd)
}
