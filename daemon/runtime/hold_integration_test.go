//go:build integration

package runtime_test

import (
	"context"
	"net"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/vishvananda/netns"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/osthread"
)

// udpIn opens a UDP socket in a network namespace; the socket stays there.
func udpIn(t *testing.T, path string, at netip.AddrPort) *net.UDPConn {
	t.Helper()
	var conn *net.UDPConn
	must(t, osthread.Do(func() error {
		ns, err := netns.GetFromPath(path)
		if err != nil {
			return err
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			return err
		}
		conn, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
		return err
	}))
	t.Cleanup(func() { conn.Close() })
	return conn
}

func heard(t *testing.T, conn *net.UDPConn, within time.Duration) string {
	t.Helper()
	must(t, conn.SetReadDeadline(time.Now().Add(within)))
	b := make([]byte, 64)
	n, err := conn.Read(b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// A shard works on what came during the blackout before its link is up, nothing
// that it says leaves before, and nothing of either is lost or comes twice.
func TestHeldFramesArePassedBeforeTheLinkIsUp(t *testing.T) {
	h := newHost(t, "a")
	h.addImage(t)
	h.run(t, runtime.RunSpec{Name: "first"}) // makes the bridge
	own, stranger := netip.MustParsePrefix("10.89.1.9/16"), netip.MustParseAddr("10.89.7.7")
	h.neighbour(t, netip.PrefixFrom(stranger, own.Bits()).String())
	sn := runtime.ShardNet{Namespace: namespace, Name: "web", IP: own, MAC: runtime.MACFor(own.Addr()), Staged: true}
	must(t, h.Network().Create(t.Context(), sn))
	t.Cleanup(func() { must(t, h.Network().Delete(context.Background(), sn)) })
	out, err := exec.Command("ip", "-n", "stranger", "neigh", "add", own.Addr().String(), "lladdr", sn.MAC, "dev", "st1").CombinedOutput()
	if err != nil {
		t.Fatalf("%v %s", err, out)
	}
	hold, err := h.Network().Hold(sn)
	must(t, err)
	t.Cleanup(func() { must(t, hold.Close()) })
	must(t, hold.Redirect())

	shard := udpIn(t, h.Network().Path(namespace, "web"), netip.AddrPortFrom(own.Addr(), 9))
	client := udpIn(t, "/run/netns/stranger", netip.AddrPortFrom(stranger, 9))
	say := func(from *net.UDPConn, to netip.Addr, what string) {
		t.Helper()
		_, err := from.WriteToUDPAddrPort([]byte(what), netip.AddrPortFrom(to, 9))
		must(t, err)
	}
	say(client, own.Addr(), "one")
	if got := heard(t, shard, 50*time.Millisecond); got != "" {
		t.Fatalf("the shard heard %q", got)
	}
	must(t, hold.Pass())
	if got := heard(t, shard, time.Second); got != "one" {
		t.Fatalf("the shard heard %q", got)
	}
	say(shard, stranger, "answer")
	say(client, own.Addr(), "two")
	if got := heard(t, client, 50*time.Millisecond); got != "" {
		t.Fatalf("the client heard %q of a shard whose link is down", got)
	}
	must(t, h.Network().Activate(t.Context(), sn))
	must(t, hold.Deliver())
	if got := heard(t, shard, time.Second); got != "two" {
		t.Errorf("the shard heard %q", got)
	}
	if got := heard(t, client, 500*time.Millisecond); got != "answer" {
		t.Errorf("the client heard %q", got)
	}
	for name, conn := range map[string]*net.UDPConn{"shard": shard, "client": client} {
		if got := heard(t, conn, 50*time.Millisecond); got != "" {
			t.Errorf("the %s heard %q once more", name, got)
		}
	}
}
