package runtime

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// LeaseState says what became of an address that this host handed out.
type LeaseState string

const (
	// LeaseHere: a shard on this host has the address.
	LeaseHere LeaseState = "here"
	// LeaseMoved: the shard took the address to another host, where it may
	// still be in use.
	LeaseMoved LeaseState = "moved"
)

// addressLease is one entry of the address book.
type addressLease struct {
	Namespace string     `json:"namespace"`
	Name      string     `json:"name"`
	State     LeaseState `json:"state"`
	At        time.Time  `json:"at"`
}

// leaseBook remembers on disk which addresses shards of this host have or took
// elsewhere. Two shards with one address would each see half of the packets.
type leaseBook struct{ db *bolt.DB }

var leaseBucket = []byte("addresses")

func openLeases(path string) (*leaseBook, error) {
	// The lock is held by another transhipd on the same state directory.
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("address book %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(leaseBucket)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("address book %s: %w", path, err), db.Close())
	}
	return &leaseBook{db: db}, nil
}

func (b *leaseBook) Close() error { return b.db.Close() }

// take writes the lease unless another shard has the address here. A moved
// lease gives way to any taker: who asks has shown that the address is free.
func (b *leaseBook) take(ip netip.Addr, l addressLease) error {
	return b.db.Update(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(leaseBucket)
		if raw := bucket.Get([]byte(ip.String())); raw != nil {
			var have addressLease
			if err := json.Unmarshal(raw, &have); err != nil {
				return fmt.Errorf("address book: %s: %w", ip, err)
			}
			if have.State == LeaseHere && (have.Namespace != l.Namespace || have.Name != l.Name) {
				return fmt.Errorf("%w: address %s belongs to shard %s in namespace %s", ErrExists, ip, have.Name, have.Namespace)
			}
		}
		raw, err := json.Marshal(l)
		if err != nil {
			return err
		}
		return bucket.Put([]byte(ip.String()), raw)
	})
}

// drop forgets the address if the shard has it.
func (b *leaseBook) drop(ip netip.Addr, namespace, name string) error {
	return b.db.Update(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(leaseBucket)
		raw := bucket.Get([]byte(ip.String()))
		if raw == nil {
			return nil
		}
		var have addressLease
		if err := json.Unmarshal(raw, &have); err != nil {
			return fmt.Errorf("address book: %s: %w", ip, err)
		}
		if have.Namespace != namespace || have.Name != name {
			return nil
		}
		return bucket.Delete([]byte(ip.String()))
	})
}

// dropShard forgets every address that the shard has here.
func (b *leaseBook) dropShard(namespace, name string) error {
	leases, err := b.all()
	if err != nil {
		return err
	}
	for ip, l := range leases {
		if l.Namespace == namespace && l.Name == name && l.State == LeaseHere {
			if err := b.drop(ip, namespace, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *leaseBook) all() (map[netip.Addr]addressLease, error) {
	leases := map[netip.Addr]addressLease{}
	err := b.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(leaseBucket).ForEach(func(key, raw []byte) error {
			ip, err := netip.ParseAddr(string(key))
			if err != nil {
				return err
			}
			var l addressLease
			if err := json.Unmarshal(raw, &l); err != nil {
				return err
			}
			leases[ip] = l
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("address book: %w", err)
	}
	return leases, nil
}

// allocate leases the wanted address, or the next free one of the pool when
// wanted is invalid, after asking peers and the segment whether it is in use.
func (r *Runtime) allocate(ctx context.Context, namespace, name string, wanted netip.Addr) (netip.Prefix, error) {
	subnet := r.cfg.Network.Subnet
	used, complete := map[netip.Addr]bool{}, true
	if r.cfg.PeerAddresses != nil {
		var list []netip.Addr
		list, complete = r.cfg.PeerAddresses(ctx)
		for _, ip := range list {
			used[ip] = true
		}
	}
	own, err := hostAddresses()
	if err != nil {
		return netip.Prefix{}, err
	}
	for _, ip := range own {
		used[ip] = true
	}
	lease := addressLease{Namespace: namespace, Name: name, State: LeaseHere, At: time.Now()}
	if wanted.IsValid() {
		switch {
		case !subnet.Contains(wanted):
			return netip.Prefix{}, fmt.Errorf("%w: address %s is outside the pool's subnet %s", ErrInvalid, wanted, subnet)
		case wanted == r.cfg.Network.Gateway || reserved(r.cfg.Network, wanted):
			return netip.Prefix{}, fmt.Errorf("%w: address %s is the subnet's gateway, network or broadcast address", ErrInvalid, wanted)
		case used[wanted]:
			return netip.Prefix{}, fmt.Errorf("%w: address %s is in use, by a host or by a shard on another one", ErrExists, wanted)
		}
		if err := r.leases.take(wanted, lease); err != nil {
			return netip.Prefix{}, err
		}
		owner, err := r.probe(ctx, wanted)
		if err == nil && owner != nil {
			err = fmt.Errorf("%w: address %s is answered by %s", ErrExists, wanted, owner)
		}
		if err != nil {
			return netip.Prefix{}, errors.Join(err, r.leases.drop(wanted, namespace, name))
		}
		return netip.PrefixFrom(wanted, subnet.Bits()), nil
	}
	leases, err := r.leases.all()
	if err != nil {
		return netip.Prefix{}, err
	}
	for ip := range candidates(r.cfg.Network, used, leases, complete) {
		if err := r.leases.take(ip, lease); errors.Is(err, ErrExists) {
			continue // another Run was faster
		} else if err != nil {
			return netip.Prefix{}, err
		}
		owner, err := r.probe(ctx, ip)
		if err == nil && owner == nil {
			return netip.PrefixFrom(ip, subnet.Bits()), nil
		}
		if drop := r.leases.drop(ip, namespace, name); err != nil || drop != nil {
			return netip.Prefix{}, errors.Join(err, drop)
		}
		r.log.Warn("address of the pool is in use by somebody else", "ip", ip, "mac", owner.String())
	}
	return netip.Prefix{}, fmt.Errorf("no free address in network.pool %s: remove shards, or give this host a larger pool", r.cfg.Network.Pool)
}

// hostAddresses are this host's own: it would not answer its own probe.
func hostAddresses() ([]netip.Addr, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("this host's addresses: %w", err)
	}
	var own []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			own = append(own, ip.Unmap())
		}
	}
	return own, nil
}

// candidates yields the pool's addresses that nobody is known to use: first
// those never handed out; then, if every peer was asked, those whose shard
// moved away and lives nowhere any more.
func candidates(cfg NetworkConfig, used map[netip.Addr]bool, leases map[netip.Addr]addressLease, complete bool) func(func(netip.Addr) bool) {
	return func(yield func(netip.Addr) bool) {
		for _, reclaim := range []bool{false, true} {
			if reclaim && !complete {
				return
			}
			for ip := cfg.Pool.Masked().Addr(); ip.IsValid() && cfg.Pool.Contains(ip); ip = ip.Next() {
				lease, leased := leases[ip]
				if used[ip] || ip == cfg.Gateway || reserved(cfg, ip) || leased != reclaim ||
					leased && lease.State != LeaseMoved {
					continue
				}
				if !yield(ip) {
					return
				}
			}
		}
	}
}

// reserved: network and broadcast addresses, of the pool too, since somebody
// may have configured it as a network of its own.
func reserved(cfg NetworkConfig, ip netip.Addr) bool {
	for _, p := range []netip.Prefix{cfg.Subnet, cfg.Pool} {
		if p.Bits() >= ip.BitLen()-1 {
			continue // RFC 3021: no such addresses in a /31 or /32
		}
		if ip == p.Masked().Addr() || ip.Is4() && ip == lastAddr(p) {
			return true
		}
	}
	return false
}

func lastAddr(p netip.Prefix) netip.Addr {
	raw := p.Masked().Addr().As4()
	n := binary.BigEndian.Uint32(raw[:]) | uint32(1<<(32-p.Bits())-1)
	binary.BigEndian.PutUint32(raw[:], n)
	return netip.AddrFrom4(raw)
}

const (
	// RFC 5227 waits for seconds because Wi-Fi does; shards' hosts share a
	// switched segment, where an answer takes microseconds.
	probeWait  = 60 * time.Millisecond
	probeTries = 2
)

// probe asks the segment by ARP who has ip and returns the answering MAC, or
// nil. For IPv6 the kernel does the same (duplicate address detection), and the
// CNI plugin awaits it. Without the bridge there is nobody to ask.
func (r *Runtime) probe(ctx context.Context, ip netip.Addr) (net.HardwareAddr, error) {
	if !ip.Is4() {
		return nil, nil
	}
	link, err := netlink.LinkByName(r.cfg.Network.Bridge)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) || err == nil && link.Attrs().Flags&net.FlagUp == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("probe for %s: %w", ip, err)
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ARP)))
	if err != nil {
		return nil, fmt.Errorf("probe for %s: %w", ip, err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index, Protocol: htons(unix.ETH_P_ARP), Halen: 6}
	if err := unix.Bind(fd, to); err != nil {
		return nil, fmt.Errorf("probe for %s: %w", ip, err)
	}
	mac := link.Attrs().HardwareAddr
	frame := arpFrame(broadcast, arpRequest, mac, netip.IPv4Unspecified(), make(net.HardwareAddr, 6), ip)
	buf := make([]byte, 2048)
	for range probeTries {
		if err := unix.Sendto(fd, frame, 0, to); err != nil {
			return nil, fmt.Errorf("probe for %s: %w", ip, err)
		}
		for until := time.Now().Add(probeWait); ; {
			if err := ctx.Err(); err != nil {
				return nil, fmt.Errorf("probe for %s: %w", ip, context.Cause(ctx))
			}
			left := time.Until(until)
			if left <= 0 {
				break
			}
			// A timeout that rounds to zero would mean for ever.
			tv := unix.NsecToTimeval(max(left, time.Millisecond).Nanoseconds())
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
				return nil, fmt.Errorf("probe for %s: %w", ip, err)
			}
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("probe for %s: %w", ip, err)
			}
			// Any packet of that sender counts: somebody may just announce it.
			if _, from, sender, ok := parseARP(buf[:n]); ok && sender == ip {
				return append(net.HardwareAddr{}, from...), nil
			}
		}
	}
	return nil, nil
}

func htons(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}
