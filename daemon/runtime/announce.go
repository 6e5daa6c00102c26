package runtime

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// announce tells the segment where the shard's address is now: a gratuitous ARP
// reply and request (RFC 5227 section 3; some stacks heed only one of them), or
// an unsolicited neighbour advertisement (RFC 4861 section 7.2.6).
//
// The frames leave from the host's side of the bridge under the shard's MAC,
// rather than from inside: closing a packet socket waits for an RCU grace period
// (2–16 ms), and this one stays open. The local bridge does not learn from its
// own frames, so it is told (its entry may still point to where the shard was).
// Last it asks, in the shard's name, what the shard's own kernel waits for.
func (n *Network) announce(ctx context.Context, s ShardNet, hostEnd, bridge netlink.Link) error {
	mac, err := net.ParseMAC(s.MAC)
	if err != nil {
		return err
	}
	if err := learn(ctx, mac, hostEnd); err != nil {
		return fmt.Errorf("forwarding entry: %w", err)
	}
	ip := s.IP.Addr()
	if err := n.send(bridge, announcement(mac, ip)); err != nil {
		return err
	}
	awaited, err := n.awaited(s)
	if err != nil {
		return fmt.Errorf("neighbours that it waits for: %w", err)
	}
	var frames [][]byte
	for _, neighbour := range awaited {
		if neighbour.Is4() && ip.Is4() {
			frames = append(frames, arpFrame(broadcast, arpRequest, mac, ip, make(net.HardwareAddr, 6), neighbour))
		} else if neighbour.Is6() && ip.Is6() {
			frames = append(frames, neighbourSolicitation(mac, ip, neighbour))
		}
	}
	return n.send(bridge, frames)
}

// announcement is what tells neighbours and switches who has the address.
func announcement(mac net.HardwareAddr, ip netip.Addr) [][]byte {
	if !ip.Is4() {
		return [][]byte{neighbourAdvertisement(mac, ip)}
	}
	return [][]byte{
		arpFrame(broadcast, arpReply, mac, ip, broadcast, ip),
		arpFrame(broadcast, arpRequest, mac, ip, make(net.HardwareAddr, 6), ip),
	}
}

// send puts frames on a bridge, from the host's side.
func (n *Network) send(bridge netlink.Link, frames [][]byte) error {
	if len(frames) == 0 {
		return nil
	}
	fd, err := n.packetSocket()
	if err != nil {
		return err
	}
	for _, frame := range frames {
		to := &unix.SockaddrLinklayer{
			Ifindex: bridge.Attrs().Index, Protocol: htons(binary.BigEndian.Uint16(frame[12:14])), Halen: 6,
		}
		if err := unix.Sendto(fd, frame, 0, to); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// awaited lists the neighbours whose MAC address the shard's kernel waits for.
// While its interface led nowhere, restored sockets have sent (TCP's window
// probe at the latest), the question who has their peer's address was lost, and
// the kernel asks again a full second after it first did (retrans_time of
// arp(7)); until then everything queues behind it. So the question is asked
// anew, in the shard's name: its kernel takes the answer for one to its own.
func (n *Network) awaited(s ShardNet) ([]netip.Addr, error) {
	var awaited []netip.Addr
	err := n.inside(s, func(h *netlink.Handle) error {
		link, err := h.LinkByName(shardIface)
		if err != nil {
			return err
		}
		list, err := h.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, neigh := range list {
			if ip, ok := netip.AddrFromSlice(neigh.IP); ok && neigh.State&netlink.NUD_INCOMPLETE != 0 {
				awaited = append(awaited, ip.Unmap())
			}
		}
		return nil
	})
	return awaited, err
}

const (
	// A port that was set up forwards once the kernel's link watch has seen the
	// carrier, within a millisecond or two.
	forwardPoll    = 200 * time.Microsecond
	forwardTimeout = 2 * time.Second
)

// learn makes the bridge forward to the port what is for mac. The bridge refuses
// entries for a port that does not forward yet, so when learn returns, it does.
func learn(ctx context.Context, mac net.HardwareAddr, port netlink.Link) error {
	ctx, cancel := context.WithTimeout(ctx, forwardTimeout)
	defer cancel()
	tick := time.NewTicker(forwardPoll)
	defer tick.Stop()
	for {
		err := netlink.NeighSet(&netlink.Neigh{
			LinkIndex: port.Attrs().Index, Family: unix.AF_BRIDGE,
			State: netlink.NUD_REACHABLE, Flags: netlink.NTF_MASTER, HardwareAddr: mac,
		})
		if !errors.Is(err, unix.EPERM) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("port %s does not forward: %w", port.Attrs().Name, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// packetSocket returns the one socket for announcements, which receives nothing.
func (n *Network) packetSocket() (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.socket < 0 {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return -1, fmt.Errorf("packet socket: %w", err)
		}
		n.socket = fd
	}
	return n.socket, nil
}

func (n *Network) close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.socket < 0 {
		return nil
	}
	fd := n.socket
	n.socket = -1
	return unix.Close(fd)
}

const (
	arpRequest = 1
	arpReply   = 2
)

// arpFrame builds an Ethernet frame with an ARP packet for IPv4 (RFC 826).
func arpFrame(to net.HardwareAddr, op uint16, senderMAC net.HardwareAddr, sender netip.Addr, targetMAC net.HardwareAddr, target netip.Addr) []byte {
	b := make([]byte, 0, 60)
	b = append(b, to...)
	b = append(b, senderMAC...)
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_ARP)
	b = binary.BigEndian.AppendUint16(b, 1) // Ethernet
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP)
	b = append(b, 6, 4)
	b = binary.BigEndian.AppendUint16(b, op)
	b = append(b, senderMAC...)
	b = append(b, sender.AsSlice()...)
	b = append(b, targetMAC...)
	b = append(b, target.AsSlice()...)
	return append(b, make([]byte, 60-len(b))...) // Ethernet's minimum
}

// parseARP reads an Ethernet frame; ok is false for anything but ARP for IPv4.
func parseARP(b []byte) (op uint16, senderMAC net.HardwareAddr, sender netip.Addr, ok bool) {
	if len(b) < 42 || binary.BigEndian.Uint16(b[12:]) != unix.ETH_P_ARP ||
		binary.BigEndian.Uint16(b[14:]) != 1 || binary.BigEndian.Uint16(b[16:]) != unix.ETH_P_IP ||
		b[18] != 6 || b[19] != 4 {
		return 0, nil, netip.Addr{}, false
	}
	sender, _ = netip.AddrFromSlice(b[28:32])
	return binary.BigEndian.Uint16(b[20:]), net.HardwareAddr(b[22:28]), sender, true
}

// neighbourAdvertisement builds an Ethernet frame with an unsolicited, overriding
// neighbour advertisement to all nodes (RFC 4861 section 4.4).
func neighbourAdvertisement(mac net.HardwareAddr, ip netip.Addr) []byte {
	const target = 2                            // option: target link-layer address
	icmp := []byte{136, 0, 0, 0, 0x20, 0, 0, 0} // override, not solicited, not a router
	return discoveryFrame(netip.MustParseAddr("ff02::1"), mac, ip, icmp, ip, target)
}

// neighbourSolicitation builds an Ethernet frame that asks who has an address
// (RFC 4861 section 4.3).
func neighbourSolicitation(mac net.HardwareAddr, ip, who netip.Addr) []byte {
	const source = 1 // option: source link-layer address
	group := netip.MustParseAddr("ff02::1:ff00:0").As16()
	raw := who.As16()
	copy(group[13:], raw[13:]) // solicited-node multicast: RFC 4291 section 2.7.1
	return discoveryFrame(netip.AddrFrom16(group), mac, ip, []byte{135, 0, 0, 0, 0, 0, 0, 0}, who, source)
}

// discoveryFrame wraps a message of neighbour discovery about one address, from
// mac and ip to a multicast group, with mac as its one option.
func discoveryFrame(group netip.Addr, mac net.HardwareAddr, ip netip.Addr, icmp []byte, about netip.Addr, option byte) []byte {
	src, dst, target := ip.As16(), group.As16(), about.As16()
	icmp = append(icmp, target[:]...)
	icmp = append(icmp, option, 1)
	icmp = append(icmp, mac...)
	pseudo := append(append([]byte{}, src[:]...), dst[:]...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(icmp)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_ICMPV6)
	binary.BigEndian.PutUint16(icmp[2:], internetChecksum(append(pseudo, icmp...)))

	b := append([]byte{0x33, 0x33}, dst[12:]...) // RFC 2464: multicast
	b = append(b, mac...)
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IPV6)
	b = append(b, 0x60, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(len(icmp)))
	b = append(b, unix.IPPROTO_ICMPV6, 255) // receivers drop any other hop limit
	b = append(b, src[:]...)
	b = append(b, dst[:]...)
	return append(b, icmp...)
}

// internetChecksum is RFC 1071's.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
