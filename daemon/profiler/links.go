package profiler

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/internal/osthread"
)

// links reads the counters of a network namespace's interfaces: one dump of
// RTM_GETSTATS, 200 bytes an interface, on a socket that was opened inside and
// stays open. So the namespace lives as long as links does.
//
// A shard whose only interface is one end of a veth pair, of which the host has
// the other, need not be asked: the host's dump has the same counts, as what one
// end sent the other received (veth_get_stats64 of the kernel).
type links struct {
	fd  int
	all []linkCounters // of the last dump
	// hostEnd is the index of the host's interface that is a shard's other end; 0
	// if there is none such. changes can be read once interfaces of a shard have
	// come, gone or changed: hostEnd is to be looked for anew.
	hostEnd uint32
	changes int
	// snmp is read instead of programs for TCP; nil when they count.
	snmp *os.File
}

// loopback is the number of lo in every network namespace (LOOPBACK_IFINDEX of
// the kernel).
const loopback = 1

// openLinks enters the namespace of a process, by its pidfd, for the time it
// takes to open what is read. host is the host's namespace.
func openLinks(pidfd, host int, tcp bool) (*links, error) {
	l := &links{fd: -1, changes: -1}
	err := inside(pidfd, func() error {
		var err error
		if l.fd, err = openRoute(0); err != nil {
			return err
		}
		if l.changes, err = openRoute(unix.RTMGRP_LINK); err != nil {
			return err
		}
		if tcp {
			if l.snmp, err = os.Open("/proc/thread-self/net/snmp"); err != nil {
				return err
			}
		}
		l.hostEnd = findHostEnd(host)
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, l.close())
	}
	return l, nil
}

// inside runs f in the network namespace of a process.
func inside(pidfd int, f func() error) error {
	return osthread.Do(func() error {
		if err := unix.Setns(pidfd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter a network namespace: %w", err)
		}
		return f()
	})
}

// openRoute opens a socket that is asked, or one that is told of a group.
func openRoute(group uint32) (int, error) {
	kind := unix.SOCK_RAW | unix.SOCK_CLOEXEC
	if group != 0 {
		kind |= unix.SOCK_NONBLOCK
	}
	fd, err := unix.Socket(unix.AF_NETLINK, kind, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("netlink: %w", err)
	}
	if group != 0 {
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: group})
	} else {
		// The kernel answers at once; a bound against what nobody has thought of.
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("netlink: %w", err), unix.Close(fd))
	}
	return fd, nil
}

// findHostEnd looks, from inside a shard's namespace, for the interface of the
// host's that is the other end of the only one here besides loopback. 0 is none,
// or not to be found: then the shard is asked itself.
func findHostEnd(host int) uint32 {
	all, err := netlink.LinkList()
	if err != nil {
		return 0
	}
	// The dump has given numbers to the namespaces that it names.
	id, err := netlink.GetNetNsIdByFd(host)
	if err != nil || id < 0 {
		return 0
	}
	end := 0
	for _, link := range all {
		at := link.Attrs()
		if at.Index == loopback {
			continue
		}
		if end != 0 || link.Type() != "veth" || at.NetNsID != id {
			return 0
		}
		end = at.ParentIndex
	}
	return uint32(end)
}

// maxChanges bounds what is read of changes in a second. A shard that makes more
// of them is asked itself until it stops.
const maxChanges = 64

// changed looks for the host's end again.
func (l *links) changed(pidfd, host int, buf []byte) {
	l.hostEnd = 0
	for range maxChanges {
		// Lost ones (ENOBUFS) are changes as well.
		if _, err := unix.Read(l.changes, buf); !errors.Is(err, unix.EAGAIN) {
			continue
		}
		// Once the process has ended there is no way in any more, and no need.
		_ = inside(pidfd, func() error {
			l.hostEnd = findHostEnd(host)
			return nil
		})
		return
	}
}

// hostLinks reads the daemon's own namespace.
func hostLinks(tcp bool) (*links, error) {
	fd, err := openRoute(0)
	if err != nil {
		return nil, err
	}
	l := &links{fd: fd, changes: -1}
	if tcp {
		if l.snmp, err = os.Open("/proc/self/net/snmp"); err != nil {
			return nil, errors.Join(err, l.close())
		}
	}
	return l, nil
}

func (l *links) close() error {
	var errs []error
	for _, fd := range []*int{&l.fd, &l.changes} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	if l.snmp != nil {
		errs = append(errs, l.snmp.Close())
		l.snmp = nil
	}
	return errors.Join(errs...)
}

// linkCounters are those of one interface.
type linkCounters struct {
	index                                  uint32
	rxPackets, txPackets, rxBytes, txBytes uint64
}

func (c *linkCounters) add(o *linkCounters) {
	c.rxPackets += o.rxPackets
	c.txPackets += o.txPackets
	c.rxBytes += o.rxBytes
	c.txBytes += o.txBytes
}

// set fills them in.
func (c *linkCounters) set(s *profile.Sample) {
	s.Set(profile.ReceiveBytes, float64(c.rxBytes))
	s.Set(profile.TransmitBytes, float64(c.txBytes))
	s.Set(profile.ReceivePackets, float64(c.rxPackets))
	s.Set(profile.TransmitPackets, float64(c.txPackets))
}

// read fills in the sum of a shard's interfaces but loopback. host are the
// counters of the host's, if they are known. buf is read into.
func (l *links) read(s *profile.Sample, host map[uint32]linkCounters, buf []byte) error {
	var sum linkCounters
	if c, ok := host[l.hostEnd]; ok {
		sum = linkCounters{rxPackets: c.txPackets, txPackets: c.rxPackets, rxBytes: c.txBytes, txBytes: c.rxBytes}
	} else {
		all, err := l.dump(buf)
		if err != nil {
			return err
		}
		for i := range all {
			if all[i].index != loopback {
				sum.add(&all[i])
			}
		}
	}
	sum.set(s)
	if l.snmp != nil {
		l.readSNMP(s, buf)
	}
	return nil
}

const (
	statsHeader = 12 // struct if_stats_msg, include/uapi/linux/if_link.h
	link64      = 1  // IFLA_STATS_LINK_64
)

// askStats is the request for the 64-bit counters of every interface (Linux 4.7).
var askStats = func() []byte {
	req := make([]byte, unix.NLMSG_HDRLEN+statsHeader)
	binary.NativeEndian.PutUint32(req, uint32(len(req)))
	binary.NativeEndian.PutUint16(req[4:], unix.RTM_GETSTATS)
	binary.NativeEndian.PutUint16(req[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	binary.NativeEndian.PutUint32(req[unix.NLMSG_HDRLEN+8:], 1<<(link64-1))
	return req
}()

// dump asks the kernel, to which a netlink socket writes by default. What it
// returns is valid until the next call.
func (l *links) dump(buf []byte) ([]linkCounters, error) {
	if _, err := unix.Write(l.fd, askStats); err != nil {
		return nil, fmt.Errorf("counters of interfaces: %w", err)
	}
	l.all = l.all[:0]
	for {
		n, err := unix.Read(l.fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("counters of interfaces: %w", err)
		}
		var done bool
		done, l.all, err = parseStats(l.all, buf[:n])
		if err != nil || done {
			return l.all, err
		}
	}
}

// parseStats adds what one datagram of a dump holds to out.
func parseStats(out []linkCounters, raw []byte) (done bool, _ []linkCounters, err error) {
	for len(raw) >= unix.NLMSG_HDRLEN {
		size := int(binary.NativeEndian.Uint32(raw))
		if size < unix.NLMSG_HDRLEN || size > len(raw) {
			return false, out, errors.New("counters of interfaces: a message is cut")
		}
		kind, body := binary.NativeEndian.Uint16(raw[4:]), raw[unix.NLMSG_HDRLEN:size]
		raw = raw[min(len(raw), align4(size)):]
		switch kind {
		case unix.NLMSG_DONE:
			return true, out, nil
		case unix.NLMSG_ERROR:
			if len(body) < 4 {
				return false, out, errors.New("counters of interfaces: a message is cut")
			}
			return true, out, fmt.Errorf("counters of interfaces: %w", unix.Errno(-int32(binary.NativeEndian.Uint32(body))))
		}
		if len(body) < statsHeader {
			return false, out, errors.New("counters of interfaces: a message is cut")
		}
		c := linkCounters{index: binary.NativeEndian.Uint32(body[4:])}
		for attrs := body[statsHeader:]; len(attrs) >= 4; {
			n := int(binary.NativeEndian.Uint16(attrs))
			if n < 4 || n > len(attrs) {
				return false, out, errors.New("counters of interfaces: an attribute is cut")
			}
			// struct rtnl_link_stats64 begins with these four.
			if v := attrs[4:n]; binary.NativeEndian.Uint16(attrs[2:]) == link64 && len(v) >= 32 {
				c.rxPackets, c.txPackets = binary.NativeEndian.Uint64(v), binary.NativeEndian.Uint64(v[8:])
				c.rxBytes, c.txBytes = binary.NativeEndian.Uint64(v[16:]), binary.NativeEndian.Uint64(v[24:])
			}
			attrs = attrs[min(len(attrs), align4(n)):]
		}
		out = append(out, c)
	}
	return false, out, nil
}

func align4(n int) int { return (n + 3) &^ 3 }

// readSNMP takes TCP's counters of the namespace (proc_net_snmp(5)).
func (l *links) readSNMP(s *profile.Sample, buf []byte) {
	n, _ := l.snmp.ReadAt(buf, 0)
	var names []string
	for line := range strings.Lines(string(buf[:n])) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i := 1; i < min(len(names), len(f)); i++ {
			v, err := strconv.ParseUint(f[i], 10, 64)
			switch {
			case err != nil:
			case names[i] == "RetransSegs":
				s.Set(profile.Retransmits, float64(v))
			case names[i] == "CurrEstab":
				s.Set(profile.Connections, float64(v))
			}
		}
	}
}
