package profiler

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/internal/testenv"
)

// keepThread keeps the thread that processes are started on, with which they die
// (Pdeathsig): one that enters a namespace ends.
func keepThread(t testing.TB) {
	runtime.LockOSThread()
	t.Cleanup(runtime.UnlockOSThread)
}

// namespace is a process in a network namespace of its own.
type namespace struct{ pid, pidfd int }

func newNamespace(t *testing.T) namespace {
	t.Helper()
	cmd := exec.Command("/bin/sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = unix.Close(fd)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return namespace{cmd.Process.Pid, fd}
}

func (n namespace) do(t *testing.T, f func() error) {
	t.Helper()
	if err := inside(n.pidfd, f); err != nil {
		t.Fatal(err)
	}
}

// veth makes a pair, one end here.
func (n namespace) veth(t *testing.T, name, peer string, at namespace) {
	t.Helper()
	n.do(t, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: peer, PeerNamespace: netlink.NsPid(at.pid)})
	})
}

func (n namespace) up(t *testing.T, name string) (index int) {
	t.Helper()
	n.do(t, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		index = link.Attrs().Index
		return netlink.LinkSetUp(link)
	})
	return index
}

// send sends frames that nobody understands, once the interface takes them: one
// whose peer came up later drops them until the kernel's linkwatch has run.
func (n namespace) send(t *testing.T, index, frames, size int) {
	t.Helper()
	eventually(t, fmt.Sprintf("interface %d is up", index), func() (up bool) {
		n.do(t, func() error {
			link, err := netlink.LinkByIndex(index)
			up = err == nil && link.Attrs().OperState == netlink.OperUp
			return err
		})
		return up
	})
	n.do(t, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		frame := make([]byte, size)
		for i := range 6 {
			frame[i] = 0xff
		}
		frame[12], frame[13] = 0x88, 0xb5 // an experimental EtherType (IEEE 802)
		for range frames {
			if err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: index}); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestTheHostsEndCountsWhatTheShardsDoes compares what is read at the host's end
// with what the shard's own interface says, and changes the shard's interfaces.
func TestTheHostsEndCountsWhatTheShardsDoes(t *testing.T) {
	testenv.NeedRoot(t)
	keepThread(t)
	host, shard := newNamespace(t), newNamespace(t)
	netns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", host.pid))
	if err != nil {
		t.Fatal(err)
	}
	defer netns.Close()
	host.veth(t, "other", "other-peer", host) // so that the ends' numbers differ
	host.veth(t, "end", "eth0", shard)
	hostEnd, eth0 := host.up(t, "end"), shard.up(t, "eth0")
	if hostEnd == eth0 {
		t.Fatalf("both ends have the number %d", eth0)
	}
	links := func(n namespace) *links {
		l, err := openLinks(n.pidfd, int(netns.Fd()), false)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := l.close(); err != nil {
				t.Error(err)
			}
		})
		return l
	}
	hosts, its := links(host), links(shard)
	p := &Profiler{
		buf: make([]byte, readSize), host: &hostSubject{links: hosts, netns: int(netns.Fd()), interfaces: map[uint32]linkCounters{}},
		subjects: map[string]*subject{"default/s": {key: "default/s", pidfd: shard.pidfd, links: its}},
	}
	if its.hostEnd != uint32(hostEnd) || hosts.hostEnd != 0 {
		t.Fatalf("the host's end is %d, not %d; the host's own is %d", its.hostEnd, hostEnd, hosts.hostEnd)
	}
	// Each reads five and three frames at least, beside what the kernel sends by itself.
	both := func(n float64) (same bool) {
		interfaces, err := p.host.readInterfaces(p.buf)
		if err != nil {
			t.Fatal(err)
		}
		if its.hostEnd != 0 {
			if _, ok := interfaces[its.hostEnd]; !ok {
				t.Fatalf("the host has no interface %d", its.hostEnd)
			}
		}
		var there, here profile.Sample
		for s, of := range map[*profile.Sample]map[uint32]linkCounters{&there: interfaces, &here: nil} {
			if err := its.read(s, of, p.buf); err != nil {
				t.Fatal(err)
			}
		}
		return there.Has == here.Has && there.Values == here.Values && here.Has.Len() == 4 &&
			here.Values[profile.TransmitBytes] >= 5*1000*n && here.Values[profile.TransmitPackets] >= 5*n &&
			here.Values[profile.ReceiveBytes] >= 3*100*n && here.Values[profile.ReceivePackets] >= 3*n &&
			here.Values[profile.TransmitBytes] != here.Values[profile.ReceiveBytes]
	}
	shard.send(t, eth0, 5, 1000)
	host.send(t, hostEnd, 3, 100)
	eventually(t, "both ends say the same", func() bool { return both(1) })

	// news takes notice of what has changed, and says that nobody has ended.
	noticed := func(want uint32) func() bool {
		return func() bool {
			if ended := p.news(); len(ended) != 0 {
				t.Fatalf("%v ended", ended)
			}
			return its.hostEnd == want
		}
	}
	// Frames between two interfaces of the shard pass no end of the host's.
	shard.veth(t, "a", "b", shard)
	eventually(t, "a second interface is noticed", noticed(0))
	a := shard.up(t, "a")
	shard.up(t, "b")
	before := profile.Sample{}
	if err := its.read(&before, nil, p.buf); err != nil {
		t.Fatal(err)
	}
	shard.send(t, a, 7, 500)
	after := profile.Sample{}
	interfaces, err := p.host.readInterfaces(p.buf)
	if err != nil {
		t.Fatal(err)
	}
	if err := its.read(&after, interfaces, p.buf); err != nil {
		t.Fatal(err)
	}
	if n := after.Values[profile.TransmitPackets] - before.Values[profile.TransmitPackets]; n < 7 {
		t.Errorf("%v packets of 7 through the second interface", n)
	}
	shard.do(t, func() error {
		link, err := netlink.LinkByName("a")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	eventually(t, "the host's end is found again", noticed(uint32(hostEnd)))
	shard.send(t, eth0, 5, 1000)
	host.send(t, hostEnd, 3, 100)
	eventually(t, "both ends say the same again", func() bool { return both(2) })
	// The pair goes, with both its ends, and so does what it counted.
	host.do(t, func() error {
		link, err := netlink.LinkByName("end")
		if err != nil {
			return err
		}
		return netlink.LinkDel(link)
	})
	eventually(t, "that there is none left is noticed", noticed(0))
}
