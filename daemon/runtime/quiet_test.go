package runtime

import (
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/osthread"
	"github.com/tranship/tranship/internal/testenv"
)

// holder is a process with a network namespace of its own, its loopback up.
func holder(t *testing.T) uint32 {
	t.Helper()
	cmd := exec.Command("cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	pid := uint32(cmd.Process.Pid)
	inNetns(t, pid, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return pid
}

func inNetns(t *testing.T, pid uint32, f func() error) {
	t.Helper()
	err := osthread.Do(func() error {
		ns, err := netns.GetFromPid(int(pid))
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ask sends a datagram over loopback, and says whether it came.
func ask(t *testing.T, pid uint32) (came bool) {
	t.Helper()
	inNetns(t, pid, func() error {
		to, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return err
		}
		defer to.Close()
		from, err := net.DialUDP("udp4", nil, to.LocalAddr().(*net.UDPAddr))
		if err != nil {
			return err
		}
		defer from.Close()
		// A datagram socket may be told that the queue is full; both are a loss.
		_, _ = from.Write([]byte{1})
		// Loopback delivers within the call that sends: what is not there has been
		// dropped.
		if err := to.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			return err
		}
		n, err := to.Read(make([]byte, 2))
		came = err == nil && n == 1
		return nil
	})
	return came
}

func TestAQuietLoopbackDropsEverythingUntilItIsFree(t *testing.T) {
	testenv.NeedRoot(t)
	pid := holder(t)
	for _, twice := range []int{1, 2} { // what an interrupted migration did may be done again
		for range twice {
			if err := QuietLoopback(pid); err != nil {
				t.Fatal(err)
			}
		}
		if ask(t, pid) {
			t.Error("a datagram came through a quiet loopback")
		}
		for range twice {
			if err := FreeLoopback(pid); err != nil {
				t.Fatal(err)
			}
		}
		if !ask(t, pid) {
			t.Error("no datagram comes through a free loopback")
		}
	}
	if err := FreeLoopback(uint32(os.Getpid())); err != nil {
		t.Errorf("one that was never quiet: %v", err)
	}
}

func TestAQueueOfSomebodyElseStays(t *testing.T) {
	testenv.NeedRoot(t)
	pid := holder(t)
	inNetns(t, pid, func() error {
		return netlink.QdiscAdd(&netlink.GenericQdisc{
			QdiscAttrs: netlink.QdiscAttrs{LinkIndex: loopbackIndex, Parent: netlink.HANDLE_ROOT, Handle: netlink.MakeHandle(1, 0)},
			QdiscType:  "pfifo",
		})
	})
	if err := QuietLoopback(pid); err != nil {
		t.Fatal(err)
	}
	if err := FreeLoopback(pid); err != nil {
		t.Fatal(err)
	}
	inNetns(t, pid, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		list, err := netlink.QdiscList(lo)
		if err == nil && (len(list) != 1 || list[0].Attrs().Handle != netlink.MakeHandle(1, 0)) {
			t.Errorf("%v", list)
		}
		return err
	})
	if !ask(t, pid) {
		t.Error("no datagram comes through")
	}
}
