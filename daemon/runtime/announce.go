package runtime

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// announce tells the segment where the shard's address is now: a gratuitous ARP
// reply and request (RFC 5227 section 3; some stacks heed only one of them), or
// an unsolicited neighbour advertisement (RFC 4861 section 7.2.6).
func (n *Network) announce(s ShardNet) error {
	mac, err := net.ParseMAC(s.MAC)
	if err != nil {
		return err
	}
	ip := s.IP.Addr()
	frames := [][]byte{neighbourAdvertisement(mac, ip)}
	if ip.Is4() {
		frames = [][]byte{
			arpFrame(broadcast, arpReply, mac, ip, broadcast, ip),
			arpFrame(broadcast, arpRequest, mac, ip, make(net.HardwareAddr, 6), ip),
		}
	}
	index := 0
	if err := n.inside(s, func(h *netlink.Handle) error {
		link, err := h.LinkByName(shardIface)
		if err != nil {
			return err
		}
		index = link.Attrs().Index
		return nil
	}); err != nil {
		return err
	}
	fd, err := n.packetSocket(s)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, frame := range frames {
		to := &unix.SockaddrLinklayer{Ifindex: index, Protocol: htons(binary.BigEndian.Uint16(frame[12:14])), Halen: 6}
		if err := unix.Sendto(fd, frame, 0, to); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// packetSocket opens a raw socket inside the shard's namespace. Frames that the
// shard's own interface sends carry its MAC, which is what bridges learn from.
func (n *Network) packetSocket(s ShardNet) (int, error) {
	runtime.LockOSThread()
	here, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return -1, err
	}
	defer here.Close()
	there, err := netns.GetFromPath(n.Path(s.Namespace, s.Name))
	if err != nil {
		runtime.UnlockOSThread()
		return -1, err
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		runtime.UnlockOSThread()
		return -1, fmt.Errorf("enter network namespace: %w", err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0) // protocol 0: receives nothing
	if back := netns.Set(here); back != nil {
		// A thread in the wrong namespace must not serve other goroutines: it
		// stays locked and ends with this one.
		if err == nil {
			unix.Close(fd)
		}
		return -1, fmt.Errorf("leave network namespace: %w", back)
	}
	runtime.UnlockOSThread()
	return fd, err
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
	src := ip.As16()
	dst := netip.MustParseAddr("ff02::1").As16()
	icmp := []byte{136, 0, 0, 0, 0x20, 0, 0, 0} // override, not solicited, not a router
	icmp = append(icmp, src[:]...)
	icmp = append(icmp, 2, 1) // target link-layer address option
	icmp = append(icmp, mac...)
	pseudo := append(append([]byte{}, src[:]...), dst[:]...)
	pseudo = binary.BigEndian.AppendUint32(pseudo, uint32(len(icmp)))
	pseudo = append(pseudo, 0, 0, 0, unix.IPPROTO_ICMPV6)
	binary.BigEndian.PutUint16(icmp[2:], internetChecksum(append(pseudo, icmp...)))

	b := []byte{0x33, 0x33, 0, 0, 0, 1} // RFC 2464: multicast to ff02::1
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
