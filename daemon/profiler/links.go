package profiler

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/internal/osthread"
)

// links reads the counters of a network namespace's interfaces: one dump of
// RTM_GETSTATS, 200 bytes an interface, on a socket that was opened inside and
// stays open. So the namespace lives as long as links does.
type links struct {
	fd  int
	buf []byte
	all []linkCounters // of the last dump
	// snmp is read instead of programs for TCP; nil when they count.
	snmp *os.File
}

// loopback is the number of lo in every network namespace (LOOPBACK_IFINDEX of
// the kernel).
const loopback = 1

// openLinks enters the namespace of a process for the time it takes to open the
// socket.
func openLinks(pid int, tcp bool) (*links, error) {
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	defer unix.Close(ns)
	l := &links{buf: make([]byte, 32<<10)}
	err = osthread.Do(func() error {
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", path, err)
		}
		var err error
		l.fd, err = openRoute()
		return err
	})
	if err != nil {
		return nil, err
	}
	if tcp {
		if l.snmp, err = os.Open(fmt.Sprintf("/proc/%d/net/snmp", pid)); err != nil {
			return nil, errors.Join(err, l.close())
		}
	}
	return l, nil
}

func openRoute() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return -1, fmt.Errorf("netlink: %w", err)
	}
	// The kernel answers at once; a bound against what nobody has thought of.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		return -1, errors.Join(fmt.Errorf("netlink: %w", err), unix.Close(fd))
	}
	return fd, nil
}

// hostLinks reads the daemon's own namespace.
func hostLinks(tcp bool) (*links, error) {
	fd, err := openRoute()
	if err != nil {
		return nil, err
	}
	l := &links{fd: fd, buf: make([]byte, 32<<10)}
	if tcp {
		if l.snmp, err = os.Open("/proc/self/net/snmp"); err != nil {
			return nil, errors.Join(err, l.close())
		}
	}
	return l, nil
}

func (l *links) close() error {
	if l.fd < 0 {
		return nil
	}
	err := unix.Close(l.fd)
	l.fd = -1
	if l.snmp != nil {
		err = errors.Join(err, l.snmp.Close())
	}
	return err
}

// linkCounters are those of one interface.
type linkCounters struct {
	index                                  uint32
	rxPackets, txPackets, rxBytes, txBytes uint64
}

// read adds up all interfaces that wanted takes; nil takes all but loopback.
func (l *links) read(s *profile.Sample, wanted func(index uint32) bool) error {
	all, err := l.dump()
	if err != nil {
		return err
	}
	var sum linkCounters
	for _, c := range all {
		if c.index == loopback || wanted != nil && !wanted(c.index) {
			continue
		}
		sum.rxPackets += c.rxPackets
		sum.txPackets += c.txPackets
		sum.rxBytes += c.rxBytes
		sum.txBytes += c.txBytes
	}
	s.Set(profile.ReceiveBytes, float64(sum.rxBytes))
	s.Set(profile.TransmitBytes, float64(sum.txBytes))
	s.Set(profile.ReceivePackets, float64(sum.rxPackets))
	s.Set(profile.TransmitPackets, float64(sum.txPackets))
	if l.snmp != nil {
		l.readSNMP(s)
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
func (l *links) dump() ([]linkCounters, error) {
	if _, err := unix.Write(l.fd, askStats); err != nil {
		return nil, fmt.Errorf("counters of interfaces: %w", err)
	}
	l.all = l.all[:0]
	for {
		n, err := unix.Read(l.fd, l.buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("counters of interfaces: %w", err)
		}
		var done bool
		done, l.all, err = parseStats(l.all, l.buf[:n])
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
func (l *links) readSNMP(s *profile.Sample) {
	n, _ := l.snmp.ReadAt(l.buf, 0)
	var names []string
	for line := range strings.Lines(string(l.buf[:n])) {
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
