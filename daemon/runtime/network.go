package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/osthread"
)

// Network owns the network namespaces of shards. A namespace outlives its task:
// the daemon makes it, runc and CRIU only enter it, and it goes with Delete.
//
// The states of a shard's network are positions of the veth's host end, so that
// any daemon finds them in the system:
//
//	staged:   up, on the staging bridge, which leads nowhere
//	active:   up, on the shards' bridge
//	isolated: down, on no bridge
type Network struct {
	cfg    NetworkConfig
	runDir string
	cni    *libcni.CNIConfig

	mu     sync.Mutex
	socket int // of packetSocket, -1 before its first use
}

// ShardNet is one shard's network.
type ShardNet struct {
	Namespace, Name string
	// IP is the address with the prefix length of the subnet. An invalid one
	// makes a namespace with loopback only.
	IP  netip.Prefix
	MAC string
	// Staged keeps the interface off the shards' bridge until Activate. The
	// bridge plugin announces an address as soon as it is set, which at a
	// destination would steal it from the shard that still runs at the source.
	Staged bool
}

const (
	// stagingBridge has no uplink.
	stagingBridge = "tranship-stage0"
	// shardIface is the interface inside; CRIU's restore does not care.
	shardIface = "eth0"
)

func newNetwork(cfg Config) *Network {
	return &Network{
		cfg: cfg.Network, runDir: cfg.RunDir, socket: -1,
		// A cache of our own: libcni's default is one file a container name,
		// and the hosts of a lab share their /var.
		cni: libcni.NewCNIConfigWithCacheDir(cfg.Network.CNIBin, filepath.Join(cfg.RunDir, "cni"), nil),
	}
}

// Path is where the shard's network namespace is mounted. Two dashes, because
// containerd's identifiers never hold two separators in a row: a-b/c and a/b-c
// are two shards.
func (n *Network) Path(namespace, name string) string {
	return filepath.Join(n.runDir, "netns", namespace+"--"+name)
}

// MACFor derives the interface address from the IP address, so that it is as
// unique, and the same on every host.
func MACFor(ip netip.Addr) string {
	ip = ip.Unmap()
	mac := net.HardwareAddr{0x02, 0x74, 0, 0, 0, 0} // locally administered, unicast
	raw := ip.AsSlice()
	copy(mac[2:], raw[len(raw)-4:])
	if ip.Is6() {
		mac[1] = 0x76 // apart from the IPv4 address with the same last 32 bits
	}
	return mac.String()
}

// Create makes the namespace and its interface. When everything is there
// already it does nothing, but for moving a staged interface of a Create that
// asks for an active one (see Activate).
func (n *Network) Create(ctx context.Context, s ShardNet) error {
	path := n.Path(s.Namespace, s.Name)
	if err := makeNetns(path); err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	if !s.IP.IsValid() {
		return nil
	}
	if _, err := n.hostEnd(s); err == nil {
		if err := n.matches(s); err != nil {
			return fmt.Errorf("network of %s: %w", s.Name, err)
		}
		if s.Staged {
			return nil
		}
		return n.Activate(ctx, s)
	} else if !errors.Is(err, errNoInterface) {
		return fmt.Errorf("network of %s: %w", s.Name, err)
	}
	list, rt, err := n.attachment(s)
	if err != nil {
		return fmt.Errorf("network of %s: %w", s.Name, err)
	}
	if _, err := n.cni.AddNetworkList(ctx, list, rt); err != nil {
		return fmt.Errorf("network of %s: CNI: %w", s.Name, err)
	}
	return nil
}

// Activate puts the host end on the shards' bridge, up, and announces address
// and MAC, so that switches and neighbours learn the new place.
func (n *Network) Activate(ctx context.Context, s ShardNet) error {
	if !s.IP.IsValid() {
		return nil
	}
	hostEnd, bridge, err := n.connect(s)
	if err != nil {
		return fmt.Errorf("activate network of %s: %w", s.Name, err)
	}
	if err := n.announce(ctx, s, hostEnd, bridge); err != nil {
		return fmt.Errorf("announce %s of %s: %w", s.IP.Addr(), s.Name, err)
	}
	return nil
}

// Isolate takes the host end off its bridge and down: when it returns, nothing
// enters or leaves the shard, TCP retransmissions of the kernel included.
func (n *Network) Isolate(ctx context.Context, s ShardNet) error {
	if !s.IP.IsValid() {
		return nil
	}
	link, err := n.hostEnd(s)
	if err != nil {
		return fmt.Errorf("isolate network of %s: %w", s.Name, err)
	}
	if err := netlink.LinkSetDown(link); err != nil {
		return fmt.Errorf("isolate network of %s: %s down: %w", s.Name, link.Attrs().Name, err)
	}
	if err := netlink.LinkSetNoMaster(link); err != nil {
		return fmt.Errorf("isolate network of %s: %s off its bridge: %w", s.Name, link.Attrs().Name, err)
	}
	return nil
}

// Restore undoes Isolate.
func (n *Network) Restore(ctx context.Context, s ShardNet) error { return n.Activate(ctx, s) }

// Delete removes interface and namespace. A namespace that is gone is success.
func (n *Network) Delete(ctx context.Context, s ShardNet) error {
	path := n.Path(s.Namespace, s.Name)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if s.IP.IsValid() && isNetns(path) {
		list, rt, err := n.attachment(s)
		if err == nil {
			err = n.cni.DelNetworkList(ctx, list, rt)
		}
		if err != nil {
			return fmt.Errorf("network of %s: CNI: %w", s.Name, err)
		}
	}
	for isNetns(path) {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("network namespace %s: %w", path, err)
		}
	}
	if err := removeFile(path); err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	return nil
}

// attachment builds the CNI network and the arguments for one shard. The
// address is an argument rather than the plugin's choice: it moves.
func (n *Network) attachment(s ShardNet) (*libcni.NetworkConfigList, *libcni.RuntimeConf, error) {
	bridge := n.cfg.Bridge
	if s.Staged {
		bridge = stagingBridge
	}
	ipam := map[string]any{"type": "static"}
	if n.cfg.Gateway.IsValid() && n.cfg.Gateway.Is4() == s.IP.Addr().Is4() {
		dst := "0.0.0.0/0"
		if n.cfg.Gateway.Is6() {
			dst = "::/0"
		}
		ipam["routes"] = []map[string]any{{"dst": dst, "gw": n.cfg.Gateway.String()}}
	}
	plugin := map[string]any{
		"type": "bridge", "bridge": bridge,
		"isGateway": false, "ipMasq": false, "promiscMode": false, "hairpinMode": false,
		"capabilities": map[string]bool{"ips": true, "mac": true},
		"ipam":         ipam,
	}
	if n.cfg.MTU > 0 {
		plugin["mtu"] = n.cfg.MTU
	}
	raw, err := json.Marshal(map[string]any{"cniVersion": "0.4.0", "name": "tranship", "plugins": []any{plugin}})
	if err != nil {
		return nil, nil, err
	}
	list, err := libcni.NetworkConfFromBytes(raw)
	if err != nil {
		return nil, nil, err
	}
	return list, &libcni.RuntimeConf{
		ContainerID: s.Namespace + "--" + s.Name,
		NetNS:       n.Path(s.Namespace, s.Name),
		IfName:      shardIface,
		CapabilityArgs: map[string]any{
			"ips": []string{s.IP.String()},
			"mac": s.MAC,
		},
	}, nil
}

// connect puts the host end on the shards' bridge and up; nothing changes when
// it is there.
func (n *Network) connect(s ShardNet) (hostEnd, bridge netlink.Link, err error) {
	if hostEnd, err = n.hostEnd(s); err != nil {
		return nil, nil, err
	}
	if bridge, err = n.bridge(); err != nil {
		return nil, nil, err
	}
	if hostEnd.Attrs().MasterIndex != bridge.Attrs().Index {
		if err := netlink.LinkSetMasterByIndex(hostEnd, bridge.Attrs().Index); err != nil {
			return nil, nil, fmt.Errorf("%s on bridge %s: %w", hostEnd.Attrs().Name, n.cfg.Bridge, err)
		}
	}
	for _, link := range []netlink.Link{hostEnd, bridge} {
		if link.Attrs().Flags&net.FlagUp != 0 {
			continue
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return nil, nil, fmt.Errorf("%s up: %w", link.Attrs().Name, err)
		}
	}
	return hostEnd, bridge, nil
}

// bridge is the shards' bridge, made if need be.
func (n *Network) bridge() (netlink.Link, error) {
	bridge, err := netlink.LinkByName(n.cfg.Bridge)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		bridge, err = n.makeBridge()
	}
	if err != nil {
		return nil, fmt.Errorf("bridge %s: %w", n.cfg.Bridge, err)
	}
	return bridge, nil
}

// makeBridge makes the shards' bridge as the CNI plugin would: on a host whose
// first shard arrived by migration, the plugin has made the staging one only.
func (n *Network) makeBridge() (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = n.cfg.Bridge, n.cfg.MTU
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(bridge); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, err
	}
	return netlink.LinkByName(n.cfg.Bridge)
}

// errNoInterface: the namespace is there, its interface is not.
var errNoInterface = errors.New("no interface " + shardIface)

// hostEnd finds the veth's end in the host by asking the end inside for its
// peer's index: names can be lost, the pair cannot.
func (n *Network) hostEnd(s ShardNet) (netlink.Link, error) {
	index := 0
	err := n.inside(s, func(h *netlink.Handle) error {
		link, err := h.LinkByName(shardIface)
		var missing netlink.LinkNotFoundError
		if errors.As(err, &missing) {
			return errNoInterface
		}
		if err != nil {
			return err
		}
		index = link.Attrs().ParentIndex
		return nil
	})
	if err != nil {
		return nil, err
	}
	return netlink.LinkByIndex(index)
}

// matches is an error when the interface inside is not the one that s describes.
func (n *Network) matches(s ShardNet) error {
	return n.inside(s, func(h *netlink.Handle) error {
		link, err := h.LinkByName(shardIface)
		if err != nil {
			return err
		}
		if got := link.Attrs().HardwareAddr.String(); got != s.MAC {
			return fmt.Errorf("%s has MAC address %s instead of %s: %w", shardIface, got, s.MAC, ErrExists)
		}
		list, err := h.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range list {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap() == s.IP.Addr() {
				return nil
			}
		}
		return fmt.Errorf("%s lacks address %s: %w", shardIface, s.IP.Addr(), ErrExists)
	})
}

// inside calls f with a netlink socket in the shard's namespace.
func (n *Network) inside(s ShardNet, f func(*netlink.Handle) error) error {
	ns, err := netns.GetFromPath(n.Path(s.Namespace, s.Name))
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	defer h.Close()
	return f(h)
}

// LinksOf names the interfaces besides loopback that are up in a process's
// network namespace. Those that are down, as the kernel makes them for loaded
// tunnel modules, carry nothing.
func LinksOf(pid uint32) ([]string, error) {
	ns, err := netns.GetFromPid(int(pid))
	if err != nil {
		return nil, fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("network namespace of process %d: %w", pid, err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("interfaces of process %d: %w", pid, err)
	}
	var up []string
	for _, l := range links {
		if a := l.Attrs(); a.Flags&net.FlagUp != 0 && a.Flags&net.FlagLoopback == 0 {
			up = append(up, a.Name)
		}
	}
	return up, nil
}

// makeNetns makes a network namespace with loopback up and mounts it at path.
func makeNetns(path string) error {
	if isNetns(path) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	file.Close()
	err = osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("loopback up: %w", err)
		}
		// CRIU cannot dump multipath TCP sockets, which Go programs listen on
		// by default since 1.24 where the kernel has them. Refused one, they
		// fall back to TCP. A kernel without the file has no such sockets.
		err = os.WriteFile("/proc/sys/net/mptcp/enabled", []byte("0"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("no multipath TCP: %w", err)
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	if err != nil {
		return errors.Join(err, removeFile(path))
	}
	return nil
}

// isNetns: a file left by an interrupted makeNetns is not one yet.
func isNetns(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// Held lists the shards that this host holds network namespaces for, as
// namespace and name, so that leftovers can be found.
func (n *Network) Held() ([][2]string, error) {
	entries, err := os.ReadDir(filepath.Join(n.runDir, "netns"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network namespaces: %w", err)
	}
	var held [][2]string
	for _, e := range entries {
		if namespace, name, ok := strings.Cut(e.Name(), "--"); ok {
			held = append(held, [2]string{namespace, name})
		}
	}
	return held, nil
}
