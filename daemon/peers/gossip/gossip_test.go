package gossip

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"log/slog"
	"math"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/tranship/tranship/daemon/peers/pki"
)

func newKey() []byte {
	key := make([]byte, 32)
	rand.Read(key)
	return key
}

// freePort finds a port of loopback that is free for UDP and TCP.
func freePort(t *testing.T) netip.AddrPort {
	t.Helper()
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		at := netip.MustParseAddrPort(l.Addr().String())
		u, err := net.ListenPacket("udp", at.String())
		l.Close()
		if err != nil {
			continue
		}
		u.Close()
		return at
	}
	t.Fatal("no free port")
	return netip.AddrPort{}
}

func briefOf(n int) Brief {
	return Brief{ID: fmt.Sprintf("%032x", n+1), Address: fmt.Sprintf("127.0.0.1:%d", 1+n%65000), Zone: "rack-1", CPUs: 4, MemoryMiB: 1 << 14}
}

// member starts one on loopback; it is closed when the test ends.
func member(t *testing.T, n int, key []byte, change func(*Config)) (*Gossip, string) {
	t.Helper()
	at := freePort(t)
	cfg := Config{
		Name: "host-" + strconv.Itoa(n), Bind: at, Advertise: at, Key: key,
		Brief: func() Brief { return briefOf(n) }, Log: slog.New(slog.DiscardHandler),
	}
	if change != nil {
		change(&cfg)
	}
	g, err := Start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g, cfg.Name + "/" + at.String()
}

func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	from := time.Now()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Since(from) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		<-tick.C
	}
	return time.Since(from)
}

func state(g *Gossip, name string) string {
	m, ok := g.Member(name)
	if !ok {
		return "unknown"
	}
	return m.State
}

func TestMembersKnowEachOtherAndWhatTheySay(t *testing.T) {
	key := newKey()
	var load atomic.Int32
	a, seed := member(t, 1, key, func(c *Config) {
		c.Brief = func() Brief { b := briefOf(1); b.CPULoad = int(load.Load()); b.Cordoned = b.CPULoad > 0; return b }
	})
	b, _ := member(t, 2, key, nil)
	c, _ := member(t, 3, key, nil)
	for _, g := range []*Gossip{b, c} {
		if n, err := g.Join([]string{seed}); err != nil || n != 1 {
			t.Fatalf("%d, %v", n, err)
		}
	}
	for _, g := range []*Gossip{a, b, c} {
		eventually(t, 20*time.Second, "everybody is known", func() bool { return len(g.Members()) == 2 })
	}
	m, _ := c.Member("host-1")
	if m.Brief != briefOf(1) || m.State != Alive {
		t.Errorf("%+v", m)
	}
	load.Store(7)
	if err := a.Tell(); err != nil {
		t.Fatal(err)
	}
	for _, g := range []*Gossip{b, c} {
		eventually(t, 20*time.Second, "the new brief is known", func() bool { m, _ := g.Member("host-1"); return m.CPULoad == 7 && m.Cordoned })
	}
}

func TestInALargePoolLoadsAreToldSeldom(t *testing.T) {
	var now atomic.Pointer[Brief]
	say := func(change func(*Brief)) {
		b := briefOf(1)
		change(&b)
		now.Store(&b)
	}
	say(func(*Brief) {})
	g, _ := member(t, 1, newKey(), func(c *Config) { c.Brief = func() Brief { return *now.Load() } })
	tell := func(others int, ago time.Duration) Brief {
		t.Helper()
		g.mu.Lock()
		g.alive, g.saidAt = others, time.Now().Add(-ago)
		g.mu.Unlock()
		if err := g.Tell(); err != nil {
			t.Fatal(err)
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		b, err := decodeBrief(g.brief)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	say(func(b *Brief) { b.CPULoad = 3 })
	if got := tell(999, 15*time.Second); got.CPULoad != 0 {
		t.Error("among a thousand a load is told after 15 s: 67 a second, and each host passes on 16 times what it hears")
	}
	if got := tell(999, 7*time.Minute); got.CPULoad != 3 {
		t.Error("a load is not told after 7 min")
	}
	say(func(b *Brief) { b.CPULoad, b.MemoryLoad = 3, 4 })
	if got := tell(2, 10*time.Second); got.MemoryLoad != 4 {
		t.Error("among three a load is not told after 10 s")
	}
	say(func(b *Brief) { b.CPULoad, b.MemoryLoad, b.Cordoned = 9, 4, true })
	if got := tell(999, 0); !got.Cordoned || got.CPULoad != 9 {
		t.Errorf("a cordon is not told at once: %+v", got)
	}
}

func TestWithoutTheKeyNobodyGetsIn(t *testing.T) {
	a, seed := member(t, 1, newKey(), nil)
	stranger, _ := member(t, 2, newKey(), nil)
	if n, err := stranger.Join([]string{seed}); err == nil || n != 0 {
		t.Errorf("joined %d, %v", n, err)
	}
	// Garbage, and sealed garbage of another key, on both transports.
	at := seed[strings.Index(seed, "/")+1:]
	for _, network := range []string{"udp", "tcp"} {
		conn, err := net.Dial(network, at)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{0, 1, 13, 1400} {
			conn.Write(bytes.Repeat([]byte{byte(n)}, n))
		}
		conn.Close()
	}
	if got := a.Members(); len(got) != 0 {
		t.Errorf("%+v", got)
	}
	friend, _ := member(t, 3, a.ring.GetPrimaryKey(), nil)
	if _, err := friend.Join([]string{seed}); err != nil {
		t.Errorf("after garbage: %v", err)
	}
}

func TestARevokedHostIsForgottenAndItsKeyIsOfNoUse(t *testing.T) {
	old, next := newKey(), newKey()
	var revoked atomic.Bool
	gone := func(c *Config) {
		c.Gone = func(i pki.Identity) bool { return revoked.Load() && i.ID == briefOf(3).ID }
	}
	a, seed := member(t, 1, old, gone)
	b, _ := member(t, 2, old, gone)
	c, _ := member(t, 3, old, nil)
	for _, g := range []*Gossip{b, c} {
		if _, err := g.Join([]string{seed}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 20*time.Second, "everybody is known", func() bool { return len(a.Members()) == 2 && len(b.Members()) == 2 })
	revoked.Store(true)
	for _, g := range []*Gossip{a, b} {
		if err := g.Rekey(next); err != nil {
			t.Fatal(err)
		}
		if state(g, "host-3") != "unknown" {
			t.Error("host-3 is still a member")
		}
		g.dropOldKeys() // what happens after keyGrace
	}
	if n, err := c.Join([]string{seed}); err == nil {
		t.Errorf("with the old key it joined %d", n)
	}
	// The two others go on with the new key.
	var said atomic.Bool
	a.cfg.Brief = func() Brief { b := briefOf(1); b.Cordoned = said.Load(); return b }
	said.Store(true)
	if err := a.Tell(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "news over the new key", func() bool { m, _ := b.Member("host-1"); return m.Cordoned })
}

func TestAMemberThatStopsIsSuspected(t *testing.T) {
	key := newKey()
	a, seed := member(t, 1, key, nil)
	b, _ := member(t, 2, key, nil)
	c, at := member(t, 3, key, nil)
	for _, g := range []*Gossip{b, c} {
		if _, err := g.Join([]string{seed}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 20*time.Second, "everybody is known", func() bool { return len(a.Members()) == 2 && len(b.Members()) == 2 })
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	took := eventually(t, 15*time.Second, "both suspect it", func() bool {
		return state(a, "host-3") == Suspected && state(b, "host-3") == Suspected
	})
	t.Logf("suspected after %v", took)
	if took < suspicion {
		t.Errorf("suspected after %v: it had no time to protest", took)
	}
	// It comes back where it was, as a restarted daemon does.
	again := netip.MustParseAddrPort(at[strings.Index(at, "/")+1:])
	back, err := Start(Config{Name: "host-3", Bind: again, Advertise: again, Key: key, Brief: func() Brief { return briefOf(3) }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	if _, err := back.Join([]string{seed}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "it is alive again", func() bool { return state(a, "host-3") == Alive && state(b, "host-3") == Alive })
}

func TestABriefThatIsImpossibleIsRefused(t *testing.T) {
	good := briefOf(1)
	if raw, err := good.encode(); err != nil {
		t.Fatal(err)
	} else if got, err := decodeBrief(raw); err != nil || got != good {
		t.Errorf("round trip: %+v, %v", got, err)
	}
	for name, change := range map[string]func(*Brief){
		"no ID":                   func(b *Brief) { b.ID = "" },
		"an ID of words":          func(b *Brief) { b.ID = "the best host of them all, really!!" },
		"no address":              func(b *Brief) { b.Address = "" },
		"an address of everybody": func(b *Brief) { b.Address = "224.0.0.1:7443" },
		"an address of nobody":    func(b *Brief) { b.Address = "0.0.0.0:7443" },
		"a name for an address":   func(b *Brief) { b.Address = "evil.example:7443" },
		"a zone for a terminal":   func(b *Brief) { b.Zone = "\x1b[2J" },
		"a zone without end":      func(b *Brief) { b.Zone = strings.Repeat("z", 64) },
		"negative CPUs":           func(b *Brief) { b.CPUs = -1 },
		"a million CPUs":          func(b *Brief) { b.CPUs = 1e6 },
		"negative memory":         func(b *Brief) { b.MemoryMiB = -1 },
		"all the memory there is": func(b *Brief) { b.MemoryMiB = math.MaxInt64 },
		"a load below nothing":    func(b *Brief) { b.CPULoad = -3 },
		"a load above everything": func(b *Brief) { b.MemoryLoad = 11 },
		"a negative cost":         func(b *Brief) { b.CostPerHour = -1 },
	} {
		bad := good
		change(&bad)
		if _, err := bad.encode(); err == nil {
			t.Errorf("%s: encoded", name)
		}
		if bad.check() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	raw, err := good.encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, meta := range map[string][]byte{
		"nothing":           nil,
		"no JSON":           []byte("\x00\x01\x02"),
		"half of one":       raw[:len(raw)/2],
		"more than one":     append(bytes.Clone(raw), raw...),
		"one without end":   append(bytes.Clone(raw), bytes.Repeat([]byte(" "), memberlist.MetaMaxSize)...),
		"a load of NaN":     bytes.Replace(raw, []byte(`"c":4`), []byte(`"l":NaN`), 1),
		"an endless load":   bytes.Replace(raw, []byte(`"c":4`), []byte(`"l":1e999`), 1),
		"an endless cost":   bytes.Replace(raw, []byte(`"c":4`), []byte(`"h":1e999`), 1),
		"a load in words":   bytes.Replace(raw, []byte(`"c":4`), []byte(`"l":"low"`), 1),
		"a half of a tenth": bytes.Replace(raw, []byte(`"c":4`), []byte(`"l":0.5`), 1),
	} {
		if b, err := decodeBrief(meta); err == nil {
			t.Errorf("%s: read as %+v", name, b)
		}
	}
	worst := good
	worst.Zone, worst.Version, worst.CPUs, worst.MemoryMiB, worst.CostPerHour = strings.Repeat("z", 63), strings.Repeat("v", 80), maxCPUs, maxMemoryMiB, 123456.789012345
	worst.Address, worst.Cordoned, worst.Authority, worst.CPULoad, worst.MemoryLoad = "[2001:db8:1234:5678:9abc:def0:1234:5678]:65535", true, true, 10, 10
	if raw, err := worst.encode(); err != nil {
		t.Errorf("the longest brief: %v", err)
	} else if len(raw) > 512 {
		t.Errorf("the longest brief is %d bytes", len(raw))
	}
}

func TestWhoSaysToBeAnotherTakesNothingFromIt(t *testing.T) {
	key := newKey()
	revoked := pki.Identity{Name: "host-4", ID: briefOf(2).ID}
	a, seed := member(t, 1, key, func(c *Config) { c.Gone = func(i pki.Identity) bool { return i == revoked } })
	b, at := member(t, 2, key, nil)
	if _, err := b.Join([]string{seed}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "host-2 is known", func() bool { return state(a, "host-2") == Alive })
	// One of its name, elsewhere; one of its ID, which was revoked under another name.
	for _, name := range []string{"host-2", "host-4"} {
		liar, _ := member(t, 3, key, func(c *Config) {
			c.Name, c.Brief = name, func() Brief { b := briefOf(2); b.Zone = "liar"; return b }
		})
		_, _ = liar.Join([]string{seed}) // it is answered before it is judged
	}
	c, _ := member(t, 5, key, nil) // when this is known, what came before was heard
	if _, err := c.Join([]string{seed}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "host-5 is known", func() bool { return state(a, "host-5") == Alive })
	m, _ := a.Member("host-2")
	if want := at[strings.Index(at, "/")+1:]; m.Gossip != want || m.Brief != briefOf(2) || m.State != Alive || len(a.Members()) != 2 {
		t.Errorf("host-2 is at %s and says %+v, of %d members", m.Gossip, m.Brief, len(a.Members()))
	}
}

func TestAMemberThatInventsNamesIsBounded(t *testing.T) {
	g := &Gossip{cfg: Config{Name: "host-0"}, conf: &memberlist.Config{}, members: map[string]Member{}}
	hear := func(n int) error {
		t.Helper()
		meta, err := briefOf(n).encode()
		if err != nil {
			t.Fatal(err)
		}
		node := &memberlist.Node{Name: "host-" + strconv.Itoa(n), Addr: net.IPv4(127, 0, 0, 1), Port: 1, Meta: meta}
		if err := (*gate)(g).NotifyAlive(node); err != nil {
			return err
		}
		(*events)(g).NotifyJoin(node)
		return nil
	}
	for n := range maxMembers {
		if err := hear(n + 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := hear(maxMembers + 1); err == nil || len(g.Members()) != maxMembers {
		t.Errorf("one more: %v, %d members", err, len(g.Members()))
	}
	if err := hear(7); err != nil {
		t.Errorf("news of one that is known: %v", err)
	}
	// None of them answers, and a host that does is not kept out for a day.
	for n := range maxMembers {
		(*events)(g).NotifyLeave(&memberlist.Node{Name: "host-" + strconv.Itoa(n+1), Addr: net.IPv4(127, 0, 0, 1), Port: 1})
	}
	if err := hear(maxMembers + 2); err != nil || state(g, "host-"+strconv.Itoa(maxMembers+2)) != Alive {
		t.Errorf("a host that is there: %v", err)
	}
}

func FuzzDecodeBrief(f *testing.F) {
	raw, err := briefOf(1).encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"i":"","l":1e99}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if b, err := decodeBrief(raw); err == nil {
			if err := b.check(); err != nil {
				t.Errorf("accepted, and impossible: %v", err)
			}
		}
	})
}

func TestTheSuspicionIsAboutTheSameInAnyPool(t *testing.T) {
	for n, want := range map[int]int{1: 8, 3: 8, 10: 8, 100: 4, 400: 3, 1000: 3, 5000: 3} {
		if got := multFor(n); got != want {
			t.Errorf("%d members: %d, want %d", n, got, want)
		}
	}
	for n := 1; n <= 2000; n++ {
		if s := float64(multFor(n)) * max(1, math.Log10(float64(n))); s < 6.8 || s > 10 {
			t.Errorf("%d members: %.1f s", n, s)
		}
	}
}

// TRANSHIP_MEMBERS=1000 TRANSHIP_MEMBERS_CALM=10m make this the large one: so
// many members over loopback, with as many busy loops as there are processors,
// and so long without a false death.
func TestALargePoolNoticesOneDeathAndNoOther(t *testing.T) {
	members, calm, busy := 20, time.Second, false
	if v := os.Getenv("TRANSHIP_MEMBERS"); v != "" {
		var err error
		if members, err = strconv.Atoi(v); err != nil {
			t.Fatal(err)
		}
		busy = true
		// A thousand hosts have a thousand heaps of a megabyte. These share one of a
		// gigabyte, and collecting it makes all of them wait at once.
		defer debug.SetGCPercent(debug.SetGCPercent(-1))
		defer debug.SetMemoryLimit(debug.SetMemoryLimit(10 << 30))
	}
	if v := os.Getenv("TRANSHIP_MEMBERS_CALM"); v != "" {
		var err error
		if calm, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	const victim = "host-7"
	var deaths, early, suspecters atomic.Int64
	var killed atomic.Bool
	gather := gathered
	if busy {
		gather = introduced
	}
	all := gather(t, members, func(name string) {
		switch {
		case name != victim:
			deaths.Add(1)
		case !killed.Load():
			early.Add(1)
		default:
			suspecters.Add(1)
		}
	})
	if busy {
		runtime.GC()
		defer burn(t)()
	}
	gathering, before := deaths.Load()+early.Load(), used(t)
	<-time.After(calm) // the time in which nothing may happen is what is tested
	t.Logf("%d false deaths while they gathered, %d in the %v after; the members used %.2f processors", gathering,
		deaths.Load()+early.Load()-gathering, calm, (used(t)-before).Seconds()/calm.Seconds())
	if d, e := deaths.Load(), early.Load(); d+e > 0 {
		t.Errorf("%d false deaths", d+e)
	}
	killed.Store(true)
	if err := all[7].Close(); err != nil {
		t.Fatal(err)
	}
	from := time.Now()
	first := eventually(t, time.Minute, "somebody suspects it", func() bool { return suspecters.Load() > 0 })
	eventually(t, time.Minute, "everybody suspects it", func() bool { return suspecters.Load() >= int64(members-1) })
	last := time.Since(from)
	for i, g := range all {
		if i != 7 && state(g, victim) != Suspected {
			t.Errorf("to host-%d it is %s", i, state(g, victim))
		}
	}
	t.Logf("%d members: killed, suspected by the first after %v, by all after %v", members, first, last)
	if last > 15*time.Second {
		t.Errorf("suspected after %v", last)
	}
	if d := deaths.Load(); d > 0 {
		t.Errorf("%d false deaths", d)
	}
	var work sync.WaitGroup
	for _, g := range all {
		work.Go(func() { g.Close() })
	}
	work.Wait()
}

// gathered starts members that all know each other.
func gathered(t *testing.T, members int, suspect func(name string)) []*Gossip {
	t.Helper()
	key := newKey()
	var all []*Gossip
	var seeds []string
	for len(all) < members {
		g, at := member(t, len(all), key, func(c *Config) { c.Suspect = suspect })
		if len(all) > 0 {
			join(t, g, seeds[mrand.IntN(len(seeds))])
		}
		all, seeds = append(all, g), append(seeds, at)
	}
	acquainted(t, all)
	return all
}

// introduced is the same for more members than one machine could tell each
// other's joins: of a thousand that come, each tells each news 16 times, which is
// three million packets. So they hear of each other from the first one, by TCP,
// and what they would pass on of that is dropped.
func introduced(t *testing.T, members int, suspect func(name string)) []*Gossip {
	t.Helper()
	key := newKey()
	var all []*Gossip
	var first string
	for i := range members {
		g, at := member(t, i, key, func(c *Config) { c.Suspect = suspect })
		all = append(all, g)
		if i == 0 {
			first = at
			continue
		}
		join(t, g, first)
		hush(all)
	}
	for _, g := range all[1:] {
		join(t, g, first)
		hush(all)
	}
	acquainted(t, all)
	return all
}

func join(t *testing.T, g *Gossip, seed string) {
	t.Helper()
	eventually(t, time.Minute, g.cfg.Name+" joins", func() bool {
		n, err := g.Join([]string{seed})
		return err == nil && n == 1
	})
}

// hush drops what the members would pass on.
func hush(all []*Gossip) {
	for _, g := range all {
		queue := reflect.ValueOf(g.list).Elem().FieldByName("broadcasts")
		(*memberlist.TransmitLimitedQueue)(queue.UnsafePointer()).Reset()
	}
}

func acquainted(t *testing.T, all []*Gossip) {
	t.Helper()
	took := eventually(t, 5*time.Minute, "all know each other", func() bool {
		return !slices.ContainsFunc(all, func(g *Gossip) bool { return g.count() < len(all)-1 })
	})
	t.Logf("%d members know each other %v after the last joined; %v of processors", len(all), took.Round(time.Millisecond), used(t).Round(time.Second))
}

// used is the processors' time that this process has had.
func used(t *testing.T) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// burn keeps every processor busy until its result is called, by programs of
// their own: the kernel shares a processor fairly between them and the members,
// as it does on a host that is full. A busy goroutine instead would take most of
// it, 10 ms for each that the scheduler finds in its queue of all processors.
func burn(t *testing.T) (stop func()) {
	t.Helper()
	var loops []*exec.Cmd
	for range runtime.NumCPU() {
		loop := exec.Command("sh", "-c", "while :; do :; done")
		loop.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := loop.Start(); err != nil {
			t.Fatal(err)
		}
		loops = append(loops, loop)
	}
	return func() {
		for _, loop := range loops {
			_ = loop.Process.Kill()
			_ = loop.Wait() // says that it was killed
		}
	}
}

func (g *Gossip) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.alive
}
