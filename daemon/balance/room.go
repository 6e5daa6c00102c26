package balance

import (
	"context"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/time/rate"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/internal/failpoint"
)

// booking is room that was promised to a shard of another host.
type booking struct {
	shard    allocate.Shard
	from     string
	reason   allocate.Reason
	expires  time.Time
	landed   bool // it runs here
	landedAt time.Time
	told     bool      // its source has said what the move cost
	seen     bool      // it has run here, whatever its source says
	charged  time.Time // until when its source's debt counts it
}

// debt of a peer is for how long room was kept for shards of it that were not on
// their way.
type debt struct {
	kept time.Duration
	at   time.Time
}

// Vetoes of the daemon's own, beside allocate's.
const (
	vetoNotReady allocate.VetoCode = "not-ready" // nothing has been planned here yet, or lately
	vetoTaken    allocate.VetoCode = "taken"     // a shard of this name is here, or promised a place to another host
	vetoIdle     allocate.VetoCode = "idle"      // room that was kept for the peer lately was not used
)

const (
	// stale: forecasts that are older say nothing of the room there is.
	stale = 2 * time.Minute
	// slower than this host thinks may a move be: a source that names hours would
	// keep room from others.
	slower = 4
	// A host asks another some times in a round, and rounds are a second apart at
	// least. Each answer is work with b.mu held.
	questionsPerSecond, questionsBurst = 20, 40
	// idleMost, a few promises that ran out, is the debt from which on a peer is
	// refused; of the time that passes the forgiven-th part is taken off it. A host
	// whose moves fail pauses for so long that it stays below (allocate).
	idleMost, forgiven = 2 * time.Minute, 10
)

// owed is a peer's debt. b.mu is held.
func (b *Balancer) owed(now time.Time, peer string) time.Duration {
	d := b.debts[peer]
	return max(0, d.kept-now.Sub(d.at)/forgiven)
}

// charge adds to the debt of who asked for x the time since it was last looked at.
// b.mu is held.
func (b *Balancer) charge(now time.Time, id allocate.ShardID, x *booking) {
	until := x.ends()
	if now.Before(until) {
		until = now
	}
	if idle := until.Sub(x.charged); idle > 0 && !x.seen && !b.facts.Arriving[id] {
		b.debts[x.from] = debt{b.owed(now, x.from) + idle, now}
		b.counts.idle += idle
	}
	x.charged = now
}

// ends is until when x counts, unless its shard is on its way.
func (x *booking) ends() time.Time {
	if x.landed {
		return x.landedAt.Add(settling)
	}
	return x.expires
}

// hear says whether a peer's question is one too many. The peers are those that
// the cluster's CA named, so there are not many.
func (b *Balancer) hear(peer string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.heard[peer] == nil {
		b.heard[peer] = rate.NewLimiter(questionsPerSecond, questionsBurst)
	}
	if b.heard[peer].AllowN(b.now(), 1) {
		return nil
	}
	return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("%s answers no more than %d questions a second of %s", b.facts.Name, questionsPerSecond, peer))
}

// Room is what this host tells a peer of itself.
func (b *Balancer) Room(ctx context.Context, peer string, m *v1.RoomRequest) (*v1.RoomResponse, error) {
	if err := b.hear(peer); err != nil {
		return nil, err
	}
	if n := len(m.GetData()); n > maxWords {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d layers and volumes, and %d may be named", n, maxWords))
	}
	var volumes []string
	for _, name := range m.GetData() {
		if isVolume(name) && checkText("path", name) == nil {
			volumes = append(volumes, name)
		}
	}
	if len(volumes) > 0 {
		volumes = b.cfg.Host.Volumes(ctx, volumes)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.viewAt.IsZero() {
		return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("%s has not looked at its own shards yet", b.facts.Name))
	}
	view := b.view
	view.Held = b.ledger.Held(b.now())
	self := b.acting.Self(&view)
	self.Leaving = self.Leaving || b.facts.Draining
	if err := failpoint.Hit(ctx, "balance.lie."+peer); err != nil {
		// A host that claims to be empty.
		self.Load, self.Usage, self.Shards = allocate.Demand{}, allocate.Amount{}, 0
	}
	resp := roomMessage(&self)
	for _, name := range m.GetData() {
		if b.facts.Layers[name] || slices.Contains(volumes, name) {
			resp.Data = append(resp.Data, name)
		}
	}
	return resp, nil
}

// Book keeps room for a shard of peer, or says why not. What cannot be computed
// with is InvalidArgument.
func (b *Balancer) Book(peer string, m *v1.BookRequest) (*v1.BookResponse, error) {
	if err := b.hear(peer); err != nil {
		return nil, err
	}
	req, err := requestOf(peer, m)
	if err != nil {
		b.mu.Lock()
		b.counts.garbage++
		b.mu.Unlock()
		b.log.Warn("balance: a request for room cannot be computed with", "peer", peer, "err", err)
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	bound(&req.Shard, &b.view.Host.Capacity)
	r, veto := b.reserve(now, peer, req)
	if veto != nil {
		b.counts.vetoes[veto.Code]++
		b.log.Info("balance: no room", "peer", peer, "shard", req.Shard.ID, "err", veto)
		return &v1.BookResponse{Veto: string(veto.Code), Words: vetoWords(veto)}, nil
	}
	if x := b.booked[req.Shard.ID]; x != nil {
		b.charge(now, req.Shard.ID, x)
	}
	b.booked[req.Shard.ID] = &booking{shard: req.Shard, from: peer, reason: req.Reason, expires: r.Expires, charged: now}
	b.counts.granted++
	b.log.Info("balance: room is kept", "peer", peer, "shard", req.Shard.ID, "until", r.Expires)
	return &v1.BookResponse{HoldsMs: r.Expires.Sub(now).Milliseconds()}, nil
}

// bound keeps what a source says that a shard will need from being more than twice
// what this host has: that is as much as can count, and the chance that it does
// not fit is the same. A larger lie would be lost in no other's rounding and in
// no plan of this host, which flees from what is expected.
func bound(s *allocate.Shard, capacity *allocate.Amount) {
	for r, most := range capacity {
		if most <= 0 {
			continue
		}
		for i := range s.Demand {
			atMost(&s.Demand[i][r], 2*most)
		}
		if allocate.Resource(r) == allocate.CPU {
			atMost(&s.Peak, 2*most)
		}
	}
}

func atMost(c *allocate.Curve, most float64) {
	for q := range c {
		c[q] = min(c[q], float32(most))
	}
}

// reserve asks the ledger. b.mu is held.
func (b *Balancer) reserve(now time.Time, peer string, req allocate.Request) (allocate.Reservation, *allocate.Veto) {
	no := func(code allocate.VetoCode) (allocate.Reservation, *allocate.Veto) {
		return allocate.Reservation{}, &allocate.Veto{Host: allocate.HostID(b.facts.Name), Code: code}
	}
	facts := b.cfg.Host.Facts()
	switch {
	case b.viewAt.IsZero() || now.Sub(b.viewAt) > stale || b.trouble != "":
		return no(vetoNotReady)
	case facts.Draining:
		return no(allocate.VetoLeaving)
	case b.owed(now, peer) > idleMost:
		return no(vetoIdle)
	}
	if other := b.booked[req.Shard.ID]; other != nil && other.from != peer {
		return no(vetoTaken)
	}
	for i := range b.view.Shards {
		if b.view.Shards[i].ID == req.Shard.ID {
			return no(vetoTaken)
		}
	}
	host := b.view.Host
	host.Cordoned = facts.Cordoned
	// Memory that it uses has to fit here; what it says that a move carries does not.
	bytes := min(req.Shard.Bytes, req.Shard.Usage[allocate.Memory])
	req.Takes = min(req.Takes, slower*allocate.CostOf(bytes, req.Shard.Dirty, host.Link).Takes+b.acting.Config().Hold)
	r, veto := b.ledger.Reserve(now, allocate.Own{
		Host: &host, Shards: b.withArriving(now, b.view.Shards), Leaving: b.acting.Leaving(), Correlation: b.acting.Correlation(),
	}, req)
	if veto == nil {
		return r, nil
	}
	// Of an earlier request for the shard the ledger has let go.
	switch x := b.booked[req.Shard.ID]; {
	case x != nil && b.facts.Arriving[req.Shard.ID]:
		x.expires = now // it is on its way all the same
	case x != nil:
		b.charge(now, req.Shard.ID, x)
		delete(b.booked, req.Shard.ID)
	}
	return r, veto
}

// withArriving adds shards whose promise has run out while they were still on
// their way.
func (b *Balancer) withArriving(now time.Time, shards []allocate.Shard) []allocate.Shard {
	for id, x := range b.booked {
		if !x.expires.After(now) && (b.facts.Arriving[id] || x.landed) && !b.here(id) {
			shards = append(shards[:len(shards):len(shards)], x.shard)
		}
	}
	return shards
}

func (b *Balancer) here(id allocate.ShardID) bool {
	for i := range b.view.Shards {
		if b.view.Shards[i].ID == id {
			return true
		}
	}
	return false
}

// Unbook ends a promise. Only who asked for it may.
func (b *Balancer) Unbook(peer string, m *v1.UnbookRequest) (*v1.UnbookResponse, error) {
	if err := b.hear(peer); err != nil {
		return nil, err
	}
	id := shardID(m.GetNamespace(), m.GetName())
	b.mu.Lock()
	defer b.mu.Unlock()
	x := b.booked[id]
	if x == nil {
		return &v1.UnbookResponse{}, nil // it ended by itself
	}
	if x.from != peer {
		return nil, connect.NewError(connect.CodePermissionDenied, fmt.Errorf("room for %s was asked for by another host than %s", id, peer))
	}
	c := m.GetCost()
	if c == nil {
		b.charge(b.now(), id, x)
		b.ledger.Release(id)
		delete(b.booked, id)
		return &v1.UnbookResponse{}, nil
	}
	if x.told {
		return &v1.UnbookResponse{}, nil
	}
	// It is kept until the shard is seen here, or runs out.
	x.told = true
	if !x.landed {
		x.landed, x.landedAt = true, b.now()
	}
	if good(c.GetDirtyBytesPerSecond()) && good(c.GetBytes()) {
		b.costs.adopt(b.now(), id, c.GetDirtyBytesPerSecond())
		if err := b.store.writeCosts(&b.costs); err != nil {
			b.log.Warn("balance: costs", "err", err)
		}
	}
	return &v1.UnbookResponse{}, nil
}

// tend drops promises whose shard is here, or will not come. b.mu is held.
func (b *Balancer) tend(now time.Time, shards []allocate.Shard) {
	running := map[allocate.ShardID]bool{}
	for i := range shards {
		running[shards[i].ID] = true
	}
	b.ledger.Held(now)
	for id, x := range b.booked {
		if running[id] && !b.facts.Arriving[id] {
			if !x.landed {
				x.landed, x.landedAt = true, now // the source's word was lost
			}
			x.seen = true
			b.ledger.Release(id)
		}
		b.charge(now, id, x)
		if !x.ends().After(now) && (x.landed || !b.facts.Arriving[id]) {
			if !x.seen {
				b.counts.expired++
			}
			b.ledger.Release(id)
			delete(b.booked, id)
		}
	}
}

func vetoWords(v *allocate.Veto) string {
	switch v.Code {
	case vetoNotReady:
		return fmt.Sprintf("%s refuses: it has not looked at its own shards lately", v.Host)
	case vetoTaken:
		return fmt.Sprintf("%s refuses: a shard of this name is there, or was promised a place for another host", v.Host)
	case vetoIdle:
		return fmt.Sprintf("%s refuses: it kept room lately for shards of the same host, and they did not come", v.Host)
	case allocate.VetoUsage:
		return fmt.Sprintf("%s refuses: what its shards use now leaves too little, %.3g are missing", v.Host, v.Value)
	case allocate.VetoMemory:
		return fmt.Sprintf("%s refuses: %.0f MiB of memory would be missing", v.Host, v.Value/(1<<20))
	case allocate.VetoSpread:
		return fmt.Sprintf("%s refuses: it runs as many shards of the workload as allowed, or one to keep away from", v.Host)
	case allocate.VetoInFlight:
		return fmt.Sprintf("%s refuses: as many shards as allowed are on their way there", v.Host)
	case allocate.VetoCordoned:
		return fmt.Sprintf("%s refuses: it is cordoned", v.Host)
	case allocate.VetoLeaving:
		return fmt.Sprintf("%s refuses: it is being emptied", v.Host)
	}
	return v.Error()
}
