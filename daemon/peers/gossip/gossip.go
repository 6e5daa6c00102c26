// Package gossip finds out who of the pool is there, and is the only door to
// memberlist. All its traffic is sealed with the cluster's gossip key, which
// comes and changes with the CA's statements. It refuses members whose name or
// brief is impossible or who were revoked, and to be believed where it matters:
// whoever acts on what a brief says asks that host itself, over TLS.
//
// Flow: Start → Join the seeds → events keep the table that Members shows →
// Tell spreads a changed brief → Rekey follows a revocation.
package gossip

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/tranship/tranship/daemon/peers/pki"
)

// States of a member.
const (
	Alive = "alive"
	// Suspected: it answers nobody, directly or by others, and did not protest in
	// time. It may be dead, or cut off.
	Suspected = "suspected"
)

const (
	// probeInterval and suspicion: a host that stops is asked within two
	// intervals, suspected at the end of that one, and has about suspicion to
	// protest. Together they stay below the 15 s in which all have to know.
	probeInterval = time.Second
	probeTimeout  = 700 * time.Millisecond
	suspicion     = 8 * time.Second
	// minMult is for large pools, where memberlist multiplies by log10(n).
	minMult, maxMult = 3, 8
	// reclaimAfter lets a host come back with another address.
	reclaimAfter = 10 * time.Second
	// forgetAfter is how long a suspected member is shown.
	forgetAfter = 24 * time.Hour
	// keyGrace is how long the last key is still understood: a statement takes
	// that long to reach everybody at worst.
	keyGrace = time.Minute
	// maxMembers bounds what a member that invents names can make of this host's
	// memory, at a few kilobytes a name; twice what was simulated.
	maxMembers = 10_000
)

// Config is what Start needs.
type Config struct {
	Name string
	// Bind is the address for UDP and TCP; Advertise what others are told.
	Bind, Advertise netip.AddrPort
	// Key is AES-256.
	Key []byte
	// Brief is what this host says of itself; asked at Start and by Tell.
	Brief func() Brief
	// Gone says who was revoked; nil is nobody.
	Gone func(pki.Identity) bool
	// Suspect is called when a member becomes suspected; nil is nobody. It must
	// not block, nor call back.
	Suspect func(name string)
	Log     *slog.Logger
}

// Member is a host as gossip has it.
type Member struct {
	Name   string
	State  string
	Since  time.Time
	Gossip string
	Brief
	meta string // the Brief as it came
}

// Gossip is this host's part. Safe for concurrent use.
type Gossip struct {
	cfg  Config
	list *memberlist.Memberlist
	conf *memberlist.Config
	ring *memberlist.Keyring

	mu      sync.Mutex
	members map[string]Member // without this host
	alive   int               // of members
	said    Brief
	saidAt  time.Time
	brief   []byte // said, encoded
	retire  *time.Timer
	closed  bool
}

// Start binds the address. Nobody is known before Join.
func Start(cfg Config) (*Gossip, error) {
	g := &Gossip{cfg: cfg, members: map[string]Member{}}
	var err error
	g.said, g.saidAt = cfg.Brief(), time.Now()
	if g.brief, err = g.said.encode(); err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	if g.ring, err = memberlist.NewKeyring(nil, cfg.Key); err != nil {
		return nil, fmt.Errorf("gossip: key: %w", err)
	}
	c := memberlist.DefaultLANConfig()
	c.Name = cfg.Name
	c.BindAddr, c.BindPort = cfg.Bind.Addr().String(), int(cfg.Bind.Port())
	c.AdvertiseAddr, c.AdvertisePort = cfg.Advertise.Addr().String(), int(cfg.Advertise.Port())
	c.ProbeInterval, c.ProbeTimeout = probeInterval, probeTimeout
	c.SuspicionMult, c.GossipNodes = multFor(1), fanOut(1)
	c.DeadNodeReclaimTime = reclaimAfter
	c.RequireNodeNames = true
	// Messages are small, and memberlist makes a new LZW table for each.
	c.EnableCompression = false
	c.Keyring, c.GossipVerifyIncoming, c.GossipVerifyOutgoing = g.ring, true, true
	c.Delegate, c.Events, c.Alive = (*delegate)(g), (*events)(g), (*gate)(g)
	// What comes over the network can make memberlist log as much as it likes.
	c.LogOutput = logWriter{cfg.Log}
	g.conf = c
	t, err := listen(cfg.Bind)
	if err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	c.Transport = t
	if g.list, err = memberlist.Create(c); err != nil {
		_ = t.Shutdown()
		return nil, fmt.Errorf("gossip on %v: %w", cfg.Bind, err)
	}
	return g, nil
}

// multFor makes memberlist's time-out, mult · max(1, log10 n) · interval, about
// suspicion whatever the size of the pool.
func multFor(n int) int {
	mult := math.Round(suspicion.Seconds() / probeInterval.Seconds() / max(1, math.Log10(max(1, float64(n)))))
	return int(min(max(mult, minMult), maxMult))
}

// fanOut is how many members hear the news every 200 ms. If each tells two more
// instead of three, a thousand know it after seven times instead of five, and
// the rush is a third less.
func fanOut(n int) int {
	if n > 100 {
		return 2
	}
	return 3
}

// loadPace is how long a host of a pool of n keeps a new load to itself: all
// together say two and a half a second. Each member sends each piece of news
// up to 16 times (memberlist's retransmissions in a pool of a thousand), and about 60 of
// them a second at most (two packets in 200 ms). Beyond that news crowds out
// news, and a host that protests against a suspicion is not heard in time.
func loadPace(n int) time.Duration { return time.Duration(n) * 400 * time.Millisecond }

// Join asks hosts, as NAME/ADDRESS:PORT, for the pool. One that answers is
// enough; the error is of those that did not when none did.
func (g *Gossip) Join(seeds []string) (int, error) {
	n, err := g.list.Join(seeds)
	if n > 0 {
		return n, nil
	}
	if err != nil {
		return 0, fmt.Errorf("gossip: %w", err)
	}
	return 0, nil
}

// Members lists the other hosts by name. Those that were revoked are not among them.
func (g *Gossip) Members() []Member {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := make([]Member, 0, len(g.members))
	for name, m := range g.members {
		switch {
		case m.State == Suspected && time.Since(m.Since) > forgetAfter:
			delete(g.members, name)
		case g.gone(m):
		default:
			out = append(out, m)
		}
	}
	slices.SortFunc(out, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Member looks one host up.
func (g *Gossip) Member(name string) (Member, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	m, ok := g.members[name]
	return m, ok && !g.gone(m)
}

func (g *Gossip) gone(m Member) bool {
	return g.cfg.Gone != nil && g.cfg.Gone(pki.Identity{Name: m.Name, ID: m.ID})
}

// Tell spreads this host's brief if it differs from what was last said. What
// differs in its load alone waits until a pool of this size has room for it.
func (g *Gossip) Tell() error {
	now := g.cfg.Brief()
	raw, err := now.encode()
	if err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	g.mu.Lock()
	same := g.closed || string(raw) == string(g.brief)
	if !same && now.withLoadOf(g.said) == g.said && time.Since(g.saidAt) < loadPace(g.alive+1) {
		same = true
	}
	if !same {
		g.said, g.saidAt, g.brief = now, time.Now(), raw
	}
	g.mu.Unlock()
	if same {
		return nil
	}
	// Without anybody to wait for it, the news waits for whoever comes.
	if err := g.list.UpdateNode(time.Second); err != nil && g.list.NumMembers() > 1 {
		return fmt.Errorf("gossip: %w", err)
	}
	return nil
}

// Rekey makes key the one to seal with. The others are understood a little
// longer, for hosts that have not heard of it yet.
func (g *Gossip) Rekey(key []byte) error {
	if slices.Equal(g.ring.GetPrimaryKey(), key) {
		return nil
	}
	if err := errors.Join(g.ring.AddKey(key), g.ring.UseKey(key)); err != nil {
		return fmt.Errorf("gossip: key: %w", err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.retire != nil {
		g.retire.Stop()
	}
	if !g.closed {
		g.retire = time.AfterFunc(keyGrace, func() { g.dropOldKeys() })
	}
	return nil
}

func (g *Gossip) dropOldKeys() {
	primary := g.ring.GetPrimaryKey()
	for _, key := range g.ring.GetKeys() {
		if !slices.Equal(key, primary) {
			_ = g.ring.RemoveKey(key) // fails only for the primary
		}
	}
}

// Leave tells the others that this host goes, for as long as ctx lasts.
func (g *Gossip) Leave(ctx context.Context) error {
	wait := 5 * time.Second
	if end, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(end))
	}
	if err := g.list.Leave(wait); err != nil {
		return fmt.Errorf("gossip: leave: %w", err)
	}
	return nil
}

// Close ends this host's part without a word: a restart is nobody's business.
func (g *Gossip) Close() error {
	g.mu.Lock()
	closed := g.closed
	g.closed = true
	if g.retire != nil {
		g.retire.Stop()
	}
	g.mu.Unlock()
	if closed {
		return nil
	}
	if err := g.list.Shutdown(); err != nil {
		return fmt.Errorf("gossip: %w", err)
	}
	return nil
}

// changed runs under memberlist's lock, which is what makes the multiplier and
// the fan-out safe to write: memberlist reads them under the same.
func (g *Gossip) changed(n *memberlist.Node, state string) {
	if n.Name == g.cfg.Name {
		return
	}
	brief, err := decodeBrief(n.Meta)
	g.mu.Lock()
	last, known := g.members[n.Name]
	if err != nil {
		brief = last.Brief // gate refuses what cannot be read, so this is of a brief before
	}
	meta := last.meta
	if err == nil {
		meta = string(n.Meta)
	}
	since := time.Now()
	if known && last.State == state {
		since = last.Since
	}
	g.members[n.Name] = Member{
		Name: n.Name, State: state, Since: since, Brief: brief,
		Gossip: net.JoinHostPort(n.Addr.String(), strconv.Itoa(int(n.Port))), meta: meta,
	}
	switch {
	case state == Alive && last.State != Alive:
		g.alive++
	case state != Alive && last.State == Alive:
		g.alive--
	}
	alive := g.alive + 1
	g.mu.Unlock()
	g.conf.SuspicionMult, g.conf.GossipNodes = multFor(alive), fanOut(alive)
	if state != last.State && g.cfg.Log != nil {
		g.cfg.Log.Info("member", "peer", n.Name, "state", state)
	}
	if state == Suspected && g.cfg.Suspect != nil {
		g.cfg.Suspect(n.Name)
	}
}

type events Gossip

var _ memberlist.EventDelegate = (*events)(nil)

func (e *events) NotifyJoin(n *memberlist.Node)   { (*Gossip)(e).changed(n, Alive) }
func (e *events) NotifyUpdate(n *memberlist.Node) { (*Gossip)(e).changed(n, Alive) }
func (e *events) NotifyLeave(n *memberlist.Node)  { (*Gossip)(e).changed(n, Suspected) }

// gate keeps out who cannot be a member.
type gate Gossip

var _ memberlist.AliveDelegate = (*gate)(nil)

func (a *gate) NotifyAlive(n *memberlist.Node) error {
	g := (*Gossip)(a)
	// Most of what comes was heard before, in a large pool a dozen times.
	g.mu.Lock()
	m, known := g.members[n.Name]
	room := known || g.makeRoom()
	g.mu.Unlock()
	if !room {
		return fmt.Errorf("%s is one more than %d members", n.Name, maxMembers)
	}
	if !known || m.meta != string(n.Meta) {
		if err := pki.CheckName(n.Name); err != nil {
			return err
		}
		brief, err := decodeBrief(n.Meta)
		if err != nil {
			return fmt.Errorf("%s: %w", n.Name, err)
		}
		m = Member{Name: n.Name, Brief: brief}
	}
	if g.gone(m) {
		return fmt.Errorf("%s was revoked", n.Name)
	}
	return nil
}

// makeRoom for one more member, if need be by no longer showing the suspected:
// names that somebody invented do not answer. g.mu is held.
func (g *Gossip) makeRoom() bool {
	if len(g.members) >= maxMembers {
		maps.DeleteFunc(g.members, func(_ string, m Member) bool { return m.State == Suspected })
	}
	return len(g.members) < maxMembers
}

// delegate hands out this host's brief and has nothing else to say.
type delegate Gossip

var _ memberlist.Delegate = (*delegate)(nil)

func (d *delegate) NodeMeta(limit int) []byte {
	g := (*Gossip)(d)
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.brief[:min(len(g.brief), limit)]
}

func (d *delegate) NotifyMsg([]byte)                  {}
func (d *delegate) GetBroadcasts(int, int) [][]byte   { return nil }
func (d *delegate) LocalState(bool) []byte            { return nil }
func (d *delegate) MergeRemoteState(_ []byte, _ bool) {}

// logWriter passes memberlist's lines on.
type logWriter struct{ log *slog.Logger }

var _ io.Writer = logWriter{}

func (w logWriter) Write(line []byte) (int, error) {
	if w.log != nil {
		w.log.Debug("gossip", "line", strings.TrimSpace(string(line)))
	}
	return len(line), nil
}
