package lab

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The network: one bridge in the switch, a cable (veth) from it to every host,
// and in every host a bridge of its own with the cable in it, so that hosts
// and shards share one layer-2 segment and a shard's address can move.
//
//	switch: trs-lab ── host-1 ─cable─ eth0 ── tranship0 :host-1
//	                └─ client ─cable─ eth0 ── tranship0 :client

// inNode opens netlink in the network namespace of a node's init.
func inNode(pid int) (*netlink.Handle, error) {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	return h, nil
}

func wireSwitch(pid int) error {
	h, err := inNode(pid)
	if err != nil {
		return err
	}
	defer h.Close()
	_, err = ensureBridge(h, switchBridge)
	return err
}

// wireHost connects a host to the switch, as far as it is not yet.
func wireHost(switchPID, pid int, node nodePlan, rate BitRate) error {
	hub, err := inNode(switchPID)
	if err != nil {
		return err
	}
	defer hub.Close()
	host, err := inNode(pid)
	if err != nil {
		return err
	}
	defer host.Close()

	if err := linkUp(host, "lo"); err != nil {
		return err
	}
	bridge, err := ensureBridge(host, hostBridge)
	if err != nil {
		return err
	}
	for _, prefix := range []*net.IPNet{ipNet(node.Host.Addr().AsSlice(), node.Host.Bits()), ipNet(node.Shard.Addr().AsSlice(), node.Shard.Bits())} {
		err := host.AddrReplace(bridge, &netlink.Addr{IPNet: prefix})
		if err != nil {
			return fmt.Errorf("address %v: %w", prefix, err)
		}
	}
	port, err := ensureCable(hub, host, pid, node.Name)
	if err != nil {
		return err
	}
	uplink, err := host.LinkByName(hostUplink)
	if err != nil {
		return fmt.Errorf("%s of %s: %w", hostUplink, node.Name, err)
	}
	if err := limit(hub, port, rate); err != nil {
		return err
	}
	if err := limit(host, uplink, rate); err != nil {
		return err
	}
	trunk, err := hub.LinkByName(switchBridge)
	if err != nil {
		return fmt.Errorf("the switch's bridge: %w", err)
	}
	return errors.Join(plug(hub, port, trunk), plug(host, uplink, bridge))
}

// ensureBridge makes a bridge that forwards at once: no spanning tree, no
// delay, no multicast snooping, or the first seconds of every link are silent.
func ensureBridge(h *netlink.Handle, name string) (netlink.Link, error) {
	if link, err := h.LinkByName(name); err == nil {
		return link, h.LinkSetUp(link)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	snooping := false
	if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
		return nil, fmt.Errorf("bridge %s: %w", name, err)
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("bridge %s: %w", name, err)
	}
	return link, linkUp(h, name)
}

// ensureCable makes the veth pair between switch and host.
func ensureCable(hub, host *netlink.Handle, pid int, name string) (netlink.Link, error) {
	port, err := hub.LinkByName(name)
	if err == nil {
		if _, err := host.LinkByName(hostUplink); err == nil {
			return port, nil
		}
		// The other end is in a namespace that is about to go.
		if err := hub.LinkDel(port); err != nil {
			return nil, fmt.Errorf("old cable to %s: %w", name, err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err = hub.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: hostUplink, PeerNamespace: netlink.NsPid(pid)})
	if err != nil {
		return nil, fmt.Errorf("cable to %s: %w", name, err)
	}
	port, err = hub.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("cable to %s: %w", name, err)
	}
	return port, nil
}

func plug(h *netlink.Handle, port, bridge netlink.Link) error {
	if err := h.LinkSetMaster(port, bridge); err != nil {
		return fmt.Errorf("putting %s into %s: %w", port.Attrs().Name, bridge.Attrs().Name, err)
	}
	return linkUp(h, port.Attrs().Name)
}

// awaitLink waits until packets pass between a host and the switch. The kernel
// looks at a new link's carrier some time later, up to a second, and a bridge
// forwards nothing to a port without one.
func awaitLink(ctx context.Context, switchPID, pid int, node string) error {
	hub, err := inNode(switchPID)
	if err != nil {
		return err
	}
	defer hub.Close()
	host, err := inNode(pid)
	if err != nil {
		return err
	}
	defer host.Close()
	return poll(ctx, func() (bool, error) {
		for _, end := range []struct {
			h    *netlink.Handle
			name string
		}{{hub, switchBridge}, {hub, node}, {host, hostUplink}, {host, hostBridge}} {
			link, err := end.h.LinkByName(end.name)
			if err != nil {
				return false, fmt.Errorf("link %s: %w", end.name, err)
			}
			if state := link.Attrs().OperState; state != netlink.OperUp {
				return false, fmt.Errorf("link %s is %v", end.name, state)
			}
		}
		return true, nil
	})
}

// tbfLatency is how long a packet may wait in a limited link's queue: as much
// as an ordinary switch port holds, and well below TCP's first retransmission.
const tbfLatency = 0.05

// limit sets or removes the speed limit of what a link sends.
func limit(h *netlink.Handle, link netlink.Link, rate BitRate) error {
	attrs := netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}
	if rate == 0 {
		err := h.QdiscDel(&netlink.Tbf{QdiscAttrs: attrs})
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("removing the limit of %s: %w", link.Attrs().Name, err)
		}
		return nil
	}
	bytes := float64(rate) / 8
	// The bucket has to hold what is due within one timer tick (250 Hz at the
	// slowest), and one of the 64 KiB packets that offloads make.
	burst := max(bytes/250, 128<<10)
	tbf := &netlink.Tbf{
		QdiscAttrs: attrs,
		Rate:       uint64(bytes),
		Limit:      uint32(min(bytes*tbfLatency+burst, math.MaxUint32)),
		Buffer:     burstTicks(uint64(bytes), burst),
	}
	if err := h.QdiscReplace(tbf); err != nil {
		return fmt.Errorf("limiting %s to %v: %w", link.Attrs().Name, rate, err)
	}
	return nil
}

// burstTicks converts a bucket's bytes into what the kernel wants, the time
// they take in ticks of its packet scheduler.
func burstTicks(bytesPerSecond uint64, burst float64) uint32 {
	return netlink.Xmittime(bytesPerSecond, uint32(min(burst, math.MaxUint32)))
}

// setLink takes the switch's end of a host's cable up or down.
func setLink(switchPID int, node string, up bool) error {
	h, err := inNode(switchPID)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(node)
	if err != nil {
		return fmt.Errorf("cable to %s: %w", node, err)
	}
	if up {
		return h.LinkSetUp(link)
	}
	return h.LinkSetDown(link)
}

func linkUp(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err == nil {
		err = h.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	return nil
}

func ipNet(ip net.IP, bits int) *net.IPNet {
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, 32)}
}

// bridgeNetfilterOff keeps the machine's br_netfilter, where it is loaded, from
// showing every bridged frame to iptables. It runs inside a node, after /proc is its own.
func bridgeNetfilterOff() error {
	for _, name := range []string{"iptables", "ip6tables", "arptables"} {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+name, []byte("0"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
