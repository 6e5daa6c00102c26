package runtime

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestAMACFollowsFromItsAddress(t *testing.T) {
	seen := map[string]string{}
	for _, ip := range []string{"10.89.1.7", "10.89.1.8", "10.88.1.7", "fd00::1", "fd00::a59:107", "::ffff:10.89.1.9"} {
		mac := MACFor(netip.MustParseAddr(ip))
		hw, err := net.ParseMAC(mac)
		if err != nil || hw[0]&1 != 0 || hw[0]&2 == 0 {
			t.Errorf("%s: %s is not a local unicast address (%v)", ip, mac, err)
		}
		if other := seen[mac]; other != "" {
			t.Errorf("%s and %s share %s", ip, other, mac)
		}
		seen[mac] = ip
	}
	if got := MACFor(netip.MustParseAddr("10.89.1.7")); got != "02:74:0a:59:01:07" {
		t.Errorf("%s: hosts of another version would disagree", got)
	}
}

func TestShardsOfTwoNamespacesDoNotShareANetwork(t *testing.T) {
	n := newNetwork(Config{RunDir: "/run/tranship"})
	if a, b := n.Path("a-b", "c"), n.Path("a", "b-c"); a == b {
		t.Errorf("both are %s", a)
	}
}

// Checked with tcpdump -XX, then kept as bytes.
func TestAnnouncementsAreOnTheWireWhatTheRFCsSay(t *testing.T) {
	mac, _ := net.ParseMAC("02:74:0a:59:01:07")
	ip := netip.MustParseAddr("10.89.1.7")
	got := arpFrame(broadcast, arpReply, mac, ip, broadcast, ip)
	want := "ffffffffffff" + "02740a590107" + "0806" + "0001" + "0800" + "06" + "04" + "0002" +
		"02740a590107" + "0a590107" + "ffffffffffff" + "0a590107" + strings.Repeat("00", 18)
	if hex.EncodeToString(got) != want {
		t.Errorf("ARP %x", got)
	}
	op, sender, from, ok := parseARP(got)
	if !ok || op != arpReply || !bytes.Equal(sender, mac) || from != ip {
		t.Errorf("read back %d %v %v %v", op, sender, from, ok)
	}
	for i := range 42 {
		if _, _, _, ok := parseARP(got[:i]); ok {
			t.Errorf("cut at %d it still is ARP", i)
		}
	}
	na := neighbourAdvertisement(mac, netip.MustParseAddr("fd00::7"))
	if !bytes.Equal(na[:6], []byte{0x33, 0x33, 0, 0, 0, 1}) || na[54] != 136 || na[58] != 0x20 {
		t.Errorf("neighbour advertisement %x", na)
	}
	ns := neighbourSolicitation(mac, netip.MustParseAddr("fd00::7"), netip.MustParseAddr("fd00::12:3456"))
	if !bytes.Equal(ns[:6], []byte{0x33, 0x33, 0xff, 0x12, 0x34, 0x56}) || ns[54] != 135 || ns[77] != 0x56 || ns[78] != 1 {
		t.Errorf("neighbour solicitation %x", ns)
	}
	for _, frame := range [][]byte{na, ns} {
		if len(frame) != 14+40+32 || frame[21] != 255 {
			t.Errorf("neighbour discovery %x", frame)
		}
		// A receiver sums pseudo-header and message, checksum included, to zero.
		sum := append(append([]byte{}, frame[22:54]...), 0, 0, 0, 32, 0, 0, 0, 58)
		if c := internetChecksum(append(sum, frame[54:]...)); c != 0 {
			t.Errorf("the checksum of %x is off by %#x", frame, c)
		}
	}
}

func FuzzParseARP(f *testing.F) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	f.Add(arpFrame(broadcast, arpRequest, mac, netip.MustParseAddr("10.0.0.1"), mac, netip.MustParseAddr("10.0.0.2")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, mac, ip, ok := parseARP(b); ok && (len(mac) != 6 || !ip.Is4()) {
			t.Errorf("%v %v", mac, ip)
		}
	})
}

func TestAddressesAreHandedOutInOrder(t *testing.T) {
	addr := netip.MustParseAddr
	cfg := NetworkConfig{
		Subnet: netip.MustParsePrefix("10.89.0.0/16"), Pool: netip.MustParsePrefix("10.89.1.0/29"), Gateway: addr("10.89.1.1"),
	}
	for _, tt := range []struct {
		name     string
		cfg      NetworkConfig
		used     []string
		leases   map[netip.Addr]addressLease
		complete bool
		want     string
	}{
		{name: "network, broadcast and gateway are skipped", cfg: cfg, want: "10.89.1.2 10.89.1.3 10.89.1.4 10.89.1.5 10.89.1.6"},
		{name: "what a peer uses is skipped", cfg: cfg, used: []string{"10.89.1.2", "10.89.1.4"}, want: "10.89.1.3 10.89.1.5 10.89.1.6"},
		{
			name: "one that moved away is skipped while a peer is silent", cfg: cfg,
			leases: map[netip.Addr]addressLease{addr("10.89.1.3"): {State: LeaseMoved}, addr("10.89.1.5"): {State: LeaseHere}},
			want:   "10.89.1.2 10.89.1.4 10.89.1.6",
		},
		{
			name: "one that moved away and is nowhere comes last", cfg: cfg, complete: true,
			leases: map[netip.Addr]addressLease{addr("10.89.1.3"): {State: LeaseMoved}, addr("10.89.1.5"): {State: LeaseHere}},
			want:   "10.89.1.2 10.89.1.4 10.89.1.6 10.89.1.3",
		},
		{
			name: "one that moved away and is in use never comes", cfg: cfg, complete: true, used: []string{"10.89.1.3"},
			leases: map[netip.Addr]addressLease{addr("10.89.1.3"): {State: LeaseMoved}},
			want:   "10.89.1.2 10.89.1.4 10.89.1.5 10.89.1.6",
		},
		{
			name: "a pool of one", cfg: NetworkConfig{Subnet: netip.MustParsePrefix("10.0.0.0/8"), Pool: netip.MustParsePrefix("10.0.0.7/32")},
			want: "10.0.0.7",
		},
		{
			name: "the end of the address space ends the pool",
			cfg:  NetworkConfig{Subnet: netip.MustParsePrefix("255.255.255.252/30"), Pool: netip.MustParsePrefix("255.255.255.252/30")},
			want: "255.255.255.253 255.255.255.254",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			used := map[netip.Addr]bool{}
			for _, ip := range tt.used {
				used[addr(ip)] = true
			}
			var got []string
			for ip := range candidates(tt.cfg, used, tt.leases, tt.complete) {
				got = append(got, ip.String())
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("%s, want %s", s, tt.want)
			}
		})
	}
}

func TestTheAddressBookRemembers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "leases.db")
	open := func() *leaseBook {
		b, err := openLeases(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	ip := netip.MustParseAddr("10.89.1.7")
	lease := func(name string, state LeaseState) addressLease {
		return addressLease{Namespace: "default", Name: name, State: state, At: time.Unix(1, 0).UTC()}
	}
	b := open()
	for _, step := range []struct {
		name string
		do   func() error
		want error
	}{
		{"a free address", func() error { return b.take(ip, lease("web", LeaseHere)) }, nil},
		{"its own address again", func() error { return b.take(ip, lease("web", LeaseHere)) }, nil},
		{"another's address", func() error { return b.take(ip, lease("db", LeaseHere)) }, ErrExists},
		{"dropping another's address changes nothing", func() error { return b.drop(ip, "default", "db") }, nil},
		{"another's address still", func() error { return b.take(ip, lease("db", LeaseHere)) }, ErrExists},
		{"moving away", func() error { return b.take(ip, lease("web", LeaseMoved)) }, nil},
		{"coming back", func() error { return b.take(ip, lease("web", LeaseHere)) }, nil},
		{"forgetting a shard forgets where it is", func() error { return b.dropShard("default", "web") }, nil},
		{"its address is free then", func() error { return b.take(ip, lease("db", LeaseHere)) }, nil},
		{"giving it back", func() error { return b.drop(ip, "default", "db") }, nil},
		{"moving away again", func() error { return b.take(ip, lease("web", LeaseMoved)) }, nil},
	} {
		if err := step.do(); !errors.Is(err, step.want) {
			t.Errorf("%s: %v", step.name, err)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b = open()
	defer b.Close()
	if err := b.dropShard("default", "web"); err != nil { // what moved away is remembered
		t.Error(err)
	}
	all, err := b.all()
	if err != nil || len(all) != 1 || all[ip] != lease("web", LeaseMoved) {
		t.Errorf("after a restart: %v %v", all, err)
	}
	if err := b.drop(ip, "default", "web"); err != nil {
		t.Error(err)
	}
	if all, err := b.all(); err != nil || len(all) != 0 {
		t.Errorf("after drop: %v %v", all, err)
	}
}

func TestNamesThatContainerdTakesAreSafe(t *testing.T) {
	for _, name := range []string{"web", "web-1", "a.b_c", strings.Repeat("x", 76)} {
		if err := CheckName("shard", name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", "a/b", "-a", "a-", "a--b", "a b", "ü", strings.Repeat("x", 77)} {
		if err := CheckName("shard", name); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q passed", name)
		}
	}
}

func TestARunThatCannotBeIsRefused(t *testing.T) {
	good := RunSpec{Namespace: "default", Name: "web", Network: NetworkShard}
	if err := good.validate(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(*RunSpec)
	}{
		{"a name that does not fit a hostname", func(s *RunSpec) { s.Name = strings.Repeat("x", 64) }},
		{"an unknown network", func(s *RunSpec) { s.Network = "wifi" }},
		{"an address on the host's network", func(s *RunSpec) { s.Network, s.IP = NetworkHost, netip.MustParseAddr("10.89.1.7") }},
		{"less memory than runc needs", func(s *RunSpec) { s.Memory = 4096 }},
		{"less than a hundredth of a CPU", func(s *RunSpec) { s.CPUs = 0.001 }},
		{"an environment without a key", func(s *RunSpec) { s.Env = []string{"=x"} }},
		{"a label that is tranship's own", func(s *RunSpec) { s.Labels = map[string]string{LabelIncoming: "m1"} }},
		{"a label that is containerd's own", func(s *RunSpec) { s.Labels = map[string]string{labelRestartStatus: "running"} }},
		{"a relative mount", func(s *RunSpec) { s.Mounts = []Mount{{Source: "data", Destination: "/data"}} }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := good
			tt.change(&s)
			if err := s.validate(); !errors.Is(err, ErrInvalid) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestTheTailOfALogIsItsLastLines(t *testing.T) {
	long := strings.Repeat("x", logChunk)
	for _, tt := range []struct {
		name, log string
		n         int64
		want      string
	}{
		{"two of three", "a\nb\nc\n", 2, "b\nc\n"},
		{"a last line without its end", "a\nb\nc", 2, "b\nc"},
		{"more than there are", "a\nb\n", 9, "a\nb\n"},
		{"none", "a\nb\n", 0, ""},
		{"of an empty log", "", 3, ""},
		{"empty lines count", "a\n\n\n", 2, "\n\n"},
		{"lines across chunks", "a\n" + long + "\n" + long + "\nz\n", 2, long + "\nz\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := strings.NewReader(tt.log)
			if err := seekTail(r, tt.n); err != nil {
				t.Fatal(err)
			}
			rest := make([]byte, r.Len())
			r.Read(rest)
			if string(rest) != tt.want {
				t.Errorf("%.40q, want %.40q", rest, tt.want)
			}
		})
	}
}
