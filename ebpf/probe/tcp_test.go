package probe

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// inNetns runs f on a thread in a network namespace of its own, with loopback
// up. Sockets that f opens itself are in it.
func inNetns(t *testing.T, f func(inum uint32)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread ends with the goroutine, and the namespace
		// with the last socket.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Errorf("%v %s", err, out)
			return
		}
		f(uint32(inode(t, "/proc/thread-self/ns/net")))
	}()
	<-done
}

// snmp reads a counter of TCP of the calling thread's namespace.
func snmp(t *testing.T, name string) float64 {
	t.Helper()
	var names []string
	for line := range strings.Lines(text(t, "/proc/thread-self/net/snmp")) {
		f := strings.Fields(line)
		if f[0] != "Tcp:" {
			continue
		}
		if names == nil {
			names = f
			continue
		}
		for i := range names {
			if names[i] == name {
				n, err := strconv.ParseFloat(f[i], 64)
				if err != nil {
					t.Error(err)
				}
				return n
			}
		}
	}
	t.Errorf("TCP counts no %s", name)
	return 0
}

// withListener runs use in a network namespace that is tracked, where somebody
// listens.
func withListener(t *testing.T, use func(p *Probe, slot int, l net.Listener)) {
	t.Helper()
	r := newRig(t)
	p := r.open("")
	inNetns(t, func(inum uint32) {
		slot, err := p.Track("net", Identity{Netns: inum})
		if err != nil {
			t.Error(err)
			return
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Error(err)
			return
		}
		defer l.Close()
		use(p, slot, l)
	})
}

func TestTCPOfANetworkNamespace(t *testing.T) {
	withListener(t, func(p *Probe, slot int, l net.Listener) {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { _, _ = io.Copy(c, c); c.Close() }()
			}
		}()
		var conns []net.Conn
		for range 3 {
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			if _, err := c.Write([]byte("x")); err != nil {
				t.Error(err)
			}
			if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
				t.Error(err)
			}
			conns = append(conns, c)
		}
		now := connections(t, p, slot)
		if now.Open != 6 || now.Measured != 6 || float64(now.Open) != snmp(t, "CurrEstab") {
			t.Errorf("%+v; the kernel says %v", now, snmp(t, "CurrEstab"))
		}
		if now.RTTSum == 0 || now.RTTMax > 1e6 || now.RTTMax*now.Measured < now.RTTSum {
			t.Errorf("round-trip times %+v", now)
		}
		lose(t, l.Addr().(*net.TCPAddr).Port)
		before := snmp(t, "RetransSegs")
		slotBefore, _, _ := p.Read(slot)
		for _, c := range conns {
			if _, err := c.Write(make([]byte, 100<<10)); err != nil {
				t.Error(err)
			}
		}
		for deadline := time.Now().Add(20 * time.Second); snmp(t, "RetransSegs") < before+6; {
			if time.Now().After(deadline) {
				t.Error("nothing is sent again")
				return
			}
		}
		// It may go on between two readings: the probe's lies between the kernel's.
		from := snmp(t, "RetransSegs")
		u, _, err := p.Read(slot)
		if err != nil {
			t.Error(err)
		}
		to := snmp(t, "RetransSegs")
		if got := before + float64(u.Retransmits-slotBefore.Retransmits); got < from || got > to {
			t.Errorf("%v segments sent again, the kernel says %v to %v", got, from, to)
		}
		for _, c := range conns {
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
		// The resets are lost as well: the other three stay open.
		if now := connections(t, p, slot); now.Open != 3 {
			t.Errorf("after closing %+v", now)
		}
	})
}

func TestConnectionsThatFindNoPlaceAreCountedAsLost(t *testing.T) {
	withListener(t, func(p *Probe, slot int, l net.Listener) {
		dial := func() {
			t.Helper()
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { _ = c.Close() })
			peer, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { _ = peer.Close() })
		}
		lost := func() uint64 {
			t.Helper()
			st, err := p.Stats()
			if err != nil {
				t.Error(err)
			}
			return st.ConnectionsLost
		}
		// Others' connections, in a namespace that is nobody's, take every place.
		full := p.maps[tcpMapConnections]
		var taken []uint64
		for key := uint64(8); ; key += 8 {
			if err := full.Put(key, uint32(1)); err != nil {
				break
			}
			if taken = append(taken, key); len(taken) > int(full.MaxEntries()) {
				t.Errorf("%d entries in a map of %d", len(taken), full.MaxEntries())
				return
			}
		}
		before := lost()
		dial()
		if n := lost() - before; n != 2 {
			t.Errorf("%d lost of the two ends of a connection", n)
		}
		if now := connections(t, p, slot); now.Open != 0 {
			t.Errorf("%+v", now)
		}
		for _, key := range taken {
			if err := full.Delete(key); err != nil {
				t.Error(err)
				return
			}
		}
		before = lost()
		dial()
		if n := lost() - before; n != 0 {
			t.Errorf("%d lost though there is room", n)
		}
		if now := connections(t, p, slot); now.Open != 2 {
			t.Errorf("%+v", now)
		}
	})
}

func connections(t *testing.T, p *Probe, slot int) Connections {
	t.Helper()
	if err := p.Refresh(); err != nil {
		t.Error(err)
	}
	_, now, err := p.Read(slot)
	if err != nil {
		t.Error(err)
	}
	return now
}

// lose drops what comes for a port.
func lose(t *testing.T, port int) {
	t.Helper()
	rules := fmt.Sprintf("add table inet lose\nadd chain inet lose in { type filter hook input priority 0; }\nadd rule inet lose in tcp dport %d drop\n", port)
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("nft: %v %s", err, out)
	}
}
