package gossip

import (
	"net"
	"net/netip"
	"testing"
	"time"
)

func TestATransportKeepsPacketsApartAndEndsWhileOneWaits(t *testing.T) {
	open := func() (*transport, netip.AddrPort) {
		at := freePort(t)
		x, err := listen(at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = x.Shutdown() })
		return x, at
	}
	a, from := open()
	b, to := open()
	send := func(text string) {
		t.Helper()
		if _, err := a.WriteTo([]byte(text), to.String()); err != nil {
			t.Fatal(err)
		}
	}
	send("first")
	one := <-b.PacketCh()
	send("second, which is longer")
	two := <-b.PacketCh()
	if string(one.Buf) != "first" || string(two.Buf) != "second, which is longer" || one.From.String() != from.String() {
		t.Errorf("%q and %q from %v", one.Buf, two.Buf, one.From)
	}
	if _, err := listen(to); err == nil {
		t.Error("two on one port")
	}
	send("nobody takes this one")
	conn, err := b.DialTimeout(to.String(), time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 2 {
		if err := b.Shutdown(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := net.DialTimeout("tcp", to.String(), time.Second); err == nil {
		t.Error("it listens after its end")
	}
	again, err := listen(to)
	if err != nil {
		t.Fatalf("the port is not free: %v", err)
	}
	if err := again.Shutdown(); err != nil {
		t.Fatal(err)
	}
}

func TestWhatIsAdvertisedIsAnAddress(t *testing.T) {
	x := &transport{}
	for in, want := range map[string]string{"192.0.2.7": "192.0.2.7", "::ffff:192.0.2.7": "192.0.2.7", "2001:db8::7": "2001:db8::7"} {
		ip, port, err := x.FinalAdvertiseAddr(in, 7946)
		if err != nil || ip.String() != want || port != 7946 {
			t.Errorf("%s: %v, %d, %v", in, ip, port, err)
		}
	}
	if _, _, err := x.FinalAdvertiseAddr("host-1", 7946); err == nil {
		t.Error("a name")
	}
}
