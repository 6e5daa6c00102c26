package balance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/profile"
)

// known is what the loop keeps of a shard between rounds.
type known struct {
	at     time.Time // of the sample that demand was made with
	demand allocate.Demand
	peak   allocate.Curve
	seen   time.Time
}

// bar is why a shard is not moved for a while.
type bar struct {
	why   string
	until time.Time
}

const (
	// cell is how often a shard of which nothing is forecast yet is looked at.
	cell = 10 * time.Second
	// heldBack: a shard that its quota held back for more than a twentieth of the
	// time would use more; how much more nothing says, so limits grow in steps. So
	// would those of a host that has less than a twentieth left: of what was wanted
	// beyond it nothing is seen, and a host that is full would look as if it was
	// just enough.
	heldBack, heldBackMore = 0.05, 1.25
	// settling: so long after an arrival the source's forecasts, which it was
	// booked with, are better than what was seen here.
	settling = 2 * time.Minute
	// unknownDirty is the share of its memory that a shard is taken to write each
	// second before it was measured: a busy Redis writes 1 to 2 hundredths.
	unknownDirty = 0.02
	// unknownCost of an hour of a host that was given none: hosts of a pool without
	// costs are all worth the same, and worth to be spared.
	unknownCost = 1
	// leftFor: the profile of a shard that was moved away ends within this.
	leftFor = 15 * time.Second
	// forgetShards that were not seen for so long.
	forgetShards = time.Hour
)

// see turns what runs here into what is planned with. b.mu is held.
func (b *Balancer) see(now time.Time, shards []Shard, modes map[allocate.ShardID]Mode) []allocate.Shard {
	out := make([]allocate.Shard, 0, len(shards))
	switch full := b.isFull(shards); {
	case !full:
		b.fullAt = time.Time{}
	case b.fullAt.IsZero():
		b.fullAt = now
	}
	needed := anchors(shards)
	for i := range shards {
		s := &shards[i]
		id := s.ID()
		if at, gone := b.left[id]; gone && now.Sub(at) < leftFor {
			continue
		}
		a := b.shardOf(now, s)
		mode, pinned := b.policyOf(now, s, &a)
		if by := needed[id]; pinned == "" && by != "" {
			pinned = by + " is to stay near it"
		}
		if pinned != "" && a.Pinned == "" {
			a.Pinned = pinned
		}
		modes[id] = mode
		out = append(out, a)
	}
	for id, k := range b.shards {
		if now.Sub(k.seen) > forgetShards {
			delete(b.shards, id)
			delete(b.most, id)
		}
	}
	for id, at := range b.left {
		if now.Sub(at) >= leftFor {
			delete(b.left, id)
		}
	}
	for id, x := range b.bars {
		if !now.Before(x.until) {
			delete(b.bars, id)
		}
	}
	slices.SortFunc(out, func(a, b allocate.Shard) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return out
}

// anchors are the shards that stay because others here are to be near their
// workload: of each such workload one, the first by name. The result names who
// needs it.
func anchors(shards []Shard) map[allocate.ShardID]string {
	out := map[allocate.ShardID]string{}
	for i := range shards {
		s := &shards[i]
		for _, near := range words(s.Labels[runtime.LabelNear]) {
			var first *Shard
			for j := range shards {
				o := &shards[j]
				if o.Namespace == s.Namespace && o.Labels[runtime.LabelWorkload] == near && (first == nil || o.Name < first.Name) {
					first = o
				}
			}
			if first != nil {
				out[first.ID()] = s.Name
			}
		}
	}
	return out
}

// isFull says that the host's shards together use all its CPUs.
func (b *Balancer) isFull(shards []Shard) bool {
	used := 0.0
	for i := range shards {
		used += usageOf(shards[i].Rates)[allocate.CPU]
	}
	return b.facts.CPUs > 0 && used > (1-heldBack)*b.facts.CPUs
}

// shardOf is a shard's numbers.
func (b *Balancer) shardOf(now time.Time, s *Shard) allocate.Shard {
	id := s.ID()
	k := b.shards[id]
	if k == nil {
		k = &known{}
		b.shards[id] = k
	}
	k.seen = now
	a := allocate.Shard{
		ID: id, Workload: workloadOf(s), Tenant: allocate.Tenant(s.Labels[runtime.LabelTenant]),
		Usage:   usageOf(s.Rates),
		MovedAt: s.MovedAt, LastHost: allocate.HostID(s.LastHost),
	}
	a.Request[allocate.CPU] = decimalLabel(s.Labels, runtime.LabelRequestCPUs)
	a.Request[allocate.Memory] = decimalLabel(s.Labels, runtime.LabelRequestMemory)
	a.Data = slices.Clip(s.Layers)
	for _, path := range s.Volumes {
		a.Data = append(a.Data, allocate.Data{Name: path, Needed: true})
	}
	b.foresee(now, s, k, &a)
	a.SampledAt, a.Demand, a.Peak = k.at, k.demand, k.peak
	// A limit moves between what the shard counts on and what it may use at most.
	// Whoever gave it neither gave it a limit to stay.
	most := decimalLabel(s.Labels, runtime.LabelLimitCPUs)
	switch b.most[id] = most; {
	case most == 0 || s.Migration != "" || s.Foreign:
		a.Request[allocate.CPU] = 0
	case s.CPULimit > 0 && most > s.CPULimit*1.001:
		a.Limit[allocate.CPU] = s.CPULimit
	}
	used := a.Usage[allocate.Memory]
	a.Bytes = used * b.costs.share(id)
	switch dirty, ok := b.costs.dirty(now, id); {
	case ok:
		a.Dirty = dirty
	case s.DirtyBytes != nil && good(*s.DirtyBytes):
		a.Dirty = *s.DirtyBytes
	default:
		a.Dirty = used * unknownDirty
	}
	return a
}

func workloadOf(s *Shard) allocate.Workload {
	if w := s.Labels[runtime.LabelWorkload]; w != "" {
		return allocate.Workload(w)
	}
	return allocate.Workload(s.ID()) // its own
}

func decimalLabel(labels map[string]string, key string) float64 {
	if v, err := strconv.ParseFloat(labels[key], 64); err == nil && good(v) {
		return v
	}
	return 0
}

func good(v float64) bool { return v >= 0 && v <= 1e30 } // false for NaN

func usageOf(rates map[string]float64) (u allocate.Amount) {
	at := func(sig ...profile.Signal) float64 {
		most := 0.0
		for _, s := range sig {
			if v := rates[s.String()]; good(v) {
				most = max(most, v)
			}
		}
		return most
	}
	u[allocate.CPU] = at(profile.CPU)
	u[allocate.Memory] = at(profile.WorkingSet)
	u[allocate.Network] = at(profile.ReceiveBytes, profile.TransmitBytes)
	u[allocate.Disk] = at(profile.ReadBytes, profile.WriteBytes)
	return u
}

// forecastOf says which signals a resource is made of. A link carries as much in
// each direction, so the busier one counts.
var forecastOf = [allocate.Resources][]profile.Signal{
	allocate.CPU:     {profile.CPU},
	allocate.Memory:  {profile.WorkingSet},
	allocate.Network: {profile.ReceiveBytes, profile.TransmitBytes},
	allocate.Disk:    {profile.ReadBytes, profile.WriteBytes},
}

// foresee fills in a shard's demand. It changes only with the newest sample.
func (b *Balancer) foresee(now time.Time, s *Shard, k *known, a *allocate.Shard) {
	if b.cfg.Reactive {
		k.at = now
		k.expect(&a.Usage)
		return
	}
	at, err := b.cfg.Forecasts.Newest(s.Namespace, s.Name, profile.CPU)
	booked := b.booked[a.ID]
	switch {
	case booked != nil && booked.landed && now.Sub(booked.landedAt) < settling:
		k.at, k.demand, k.peak = booked.landedAt, booked.shard.Demand, booked.shard.Peak
		return
	case err != nil:
		// Nothing is known: what it asks for, or uses.
		if at = now.Truncate(cell); at.Equal(k.at) {
			return
		}
		k.at = at
		most := a.Usage
		for r := range most {
			most[r] = max(most[r], a.Request[r])
		}
		k.expect(&most)
		return
	case at.Equal(k.at):
		return
	}
	k.at = at
	k.expect(&a.Usage)
	for r, signals := range forecastOf {
		for n, sig := range signals {
			o, err := b.cfg.Forecasts.Outlook(s.Namespace, s.Name, sig)
			if err != nil {
				continue // not measured here: as it is now
			}
			for i, c := range o.Spans {
				if n > 0 {
					c = larger(k.demand[i][r], c)
				}
				k.demand[i][r] = c
			}
			if allocate.Resource(r) == allocate.CPU {
				k.peak = o.Peak
			}
		}
	}
	full := !b.fullAt.IsZero()
	if full && now.Sub(b.fullAt) >= allocate.SeenFor {
		k.demand[0][allocate.CPU].AtLeast(a.Usage[allocate.CPU])
	}
	if full || s.Rates[profile.Throttled.String()] > heldBack && s.CPULimit > 0 {
		for i := range k.demand {
			more(&k.demand[i][allocate.CPU])
		}
		more(&k.peak)
	}
}

// expect that nothing changes.
func (k *known) expect(u *allocate.Amount) {
	for i := range k.demand {
		for r, v := range u {
			k.demand[i][r] = allocate.Certain(v)
		}
	}
	k.peak = allocate.Certain(u[allocate.CPU])
}

func more(c *allocate.Curve) {
	for q := range c {
		c[q] *= heldBackMore
	}
}

func larger(a, b allocate.Curve) allocate.Curve {
	for i := range a {
		a[i] = max(a[i], b[i])
	}
	return a
}

// policyOf reads a shard's labels into a: how far the autopilot goes, and why it
// may not move now.
func (b *Balancer) policyOf(now time.Time, s *Shard, a *allocate.Shard) (mode Mode, pinned string) {
	mode = b.cfg.Autopilot
	l := s.Labels
	if v := l[runtime.LabelAutopilot]; v != "" {
		own, err := ParseMode(v)
		switch {
		case err != nil:
			return Off, fmt.Sprintf("label %s: %v", runtime.LabelAutopilot, err)
		case mode != Off:
			mode = own
		}
	}
	if v := l[runtime.LabelPriority]; v != "" {
		p, err := strconv.Atoi(v)
		if err != nil || p < 0 || p > allocate.MaxPriority {
			return Off, fmt.Sprintf("label %s: %.40q is not a number from 0 to %d", runtime.LabelPriority, v, allocate.MaxPriority)
		}
		a.Priority = p
	}
	windows, err := runtime.ParseWindows(l[runtime.LabelWindows])
	if err != nil {
		return Off, fmt.Sprintf("label %s: %v", runtime.LabelWindows, err)
	}
	a.Zones = words(l[runtime.LabelZones])
	for _, w := range words(l[runtime.LabelAvoid]) {
		a.Avoid = append(a.Avoid, allocate.Workload(w))
	}
	for _, kv := range words(l[runtime.LabelHostLabels]) {
		k, v, _ := strings.Cut(kv, "=")
		if a.Labels == nil {
			a.Labels = map[string]string{}
		}
		a.Labels[k] = v
	}
	a.Spread.PerHost = int(decimalLabel(l, runtime.LabelSpreadHost))
	if decimalLabel(l, runtime.LabelSpreadZone) > 0 {
		// Within its zone a move changes no zone's count, and nobody has to be asked.
		a.Zones = []string{b.facts.Zone}
	}
	return mode, b.pinned(now, s, windows)
}

func (b *Balancer) pinned(now time.Time, s *Shard, windows []runtime.Window) string {
	switch x := b.bars[s.ID()]; {
	case s.Foreign:
		return "namespace " + s.Namespace + " belongs to another orchestrator"
	case s.Migration != "":
		return "migration " + s.Migration + " has it"
	case s.Labels[runtime.LabelPinned] == "true":
		return "it is pinned"
	case s.Labels[runtime.LabelNear] != "":
		return "it stays near " + s.Labels[runtime.LabelNear]
	case b.facts.Draining:
		return b.facts.Name + " is being drained"
	case len(windows) > 0 && !slices.ContainsFunc(windows, func(w runtime.Window) bool { return w.Holds(now) }):
		return "outside its windows " + s.Labels[runtime.LabelWindows]
	case now.Before(x.until):
		return x.why
	}
	return ""
}

func words(s string) (out []string) {
	for _, w := range strings.Split(s, ",") {
		if w = strings.TrimSpace(w); w != "" {
			out = append(out, w)
		}
	}
	return out
}

// viewOf is what the planner sees. b.mu is held.
func (b *Balancer) viewOf(now time.Time, shards []allocate.Shard) allocate.View {
	f := &b.facts
	h := allocate.Host{
		ID: allocate.HostID(f.Name), Zone: f.Zone, Labels: f.Labels, Cost: f.CostPerHour, Cordoned: f.Cordoned,
		Link: b.costs.link(f.Link), Blackout: b.costs.blackout(),
	}
	if h.Cost == 0 {
		h.Cost = unknownCost
	}
	h.Capacity[allocate.CPU], h.Capacity[allocate.Memory], h.Capacity[allocate.Network] = f.CPUs, f.Memory, f.Link
	v := allocate.View{Host: h, Shards: shards, Held: slices.Clone(b.ledger.Held(now)), Peers: b.peers.pool(), Dominant: map[allocate.Tenant]float64{}}
	sums := map[allocate.Tenant]*allocate.Amount{}
	for i := range shards {
		s := &shards[i]
		if sums[s.Tenant] == nil {
			sums[s.Tenant] = &allocate.Amount{}
		}
		for r, u := range s.Usage {
			if sums[s.Tenant][r] += u; h.Capacity[r] > 0 {
				v.Dominant[s.Tenant] = max(v.Dominant[s.Tenant], sums[s.Tenant][r]/h.Capacity[r])
			}
		}
	}
	for tenant, weight := range b.cfg.Weights {
		if share, here := v.Dominant[tenant]; here && weight > 0 {
			v.Dominant[tenant] = share / weight
		}
	}
	return v
}

// peerSample is a few hosts and what they last said.
type peerSample struct {
	names []string
	since time.Time
	said  map[string]*allocate.Peer
	// faults are words that could not be used, or were not heard.
	faults map[string]string
	again  bool // others are wanted
}

const (
	// sampleFor: the same few are asked for a minute, so that a large pool does
	// not keep a connection from everybody to everybody.
	sampleFor = time.Minute
	// idleAsked beside Config.Peers at random.
	idleAsked = 2
	// peerTimeout bounds a question.
	peerTimeout = 2 * time.Second
)

// askPeers asks a few hosts for their word, all at once.
func (b *Balancer) askPeers(ctx context.Context) {
	if b.cfg.Peers == nil {
		return
	}
	all := b.cfg.Peers.Peers()
	b.mu.Lock()
	if now := b.now(); b.peers.again || now.Sub(b.peers.since) > sampleFor || slices.ContainsFunc(b.peers.names, func(n string) bool {
		return !slices.ContainsFunc(all, func(p Peer) bool { return p.Name == n })
	}) || len(b.peers.names) < min(len(all), b.acting.Config().Peers) {
		b.peers.names, b.peers.since, b.peers.again = b.choose(all), now, false
	}
	names, data := b.peers.names, b.data()
	b.mu.Unlock()
	said, faults := map[string]*allocate.Peer{}, map[string]string{}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, name := range names {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, peerTimeout)
			defer cancel()
			p, err := b.ask(ctx, name, data)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				faults[name] = err.Error()
				return
			}
			said[name] = p
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for name, why := range faults {
		if b.peers.faults[name] == "" {
			b.log.Info("balance: a host is no target", "peer", name, "err", why)
		}
		b.counts.faults++
	}
	b.peers.said, b.peers.faults = said, faults
}

// data are the layers and volumes of the shards of the last round: as many as
// may be asked for, those that are needed first, then the largest.
func (b *Balancer) data() (out []string) {
	var all []allocate.Data
	seen := map[string]bool{}
	for i := range b.view.Shards {
		for _, d := range b.view.Shards[i].Data {
			if !seen[d.Name] && checkText("name", d.Name) == nil {
				seen[d.Name] = true
				all = append(all, d)
			}
		}
	}
	slices.SortFunc(all, func(a, b allocate.Data) int {
		switch {
		case a.Needed == b.Needed:
			return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), strings.Compare(a.Name, b.Name))
		case a.Needed:
			return -1
		}
		return 1
	})
	for _, d := range all[:min(len(all), maxWords)] {
		out = append(out, d.Name)
	}
	return out
}

// isVolume tells a volume's path from a layer's name.
func isVolume(name string) bool { return filepath.IsAbs(name) }

func (b *Balancer) ask(ctx context.Context, name string, data []string) (*allocate.Peer, error) {
	resp, err := b.cfg.Peers.Room(ctx, name, &v1.RoomRequest{Data: data})
	if err != nil {
		return nil, errors.New("does not say what room it has: " + plain(err))
	}
	p, err := peerOf(name, data, resp)
	if err != nil {
		return nil, fmt.Errorf("says of itself what cannot be: %w", err)
	}
	return p, nil
}

// choose samples peers, and beside them some that say that they are idle.
func (b *Balancer) choose(all []Peer) []string {
	order := b.rng.Perm(len(all))
	var out []string
	n := b.acting.Config().Peers
	for _, i := range order[:min(n, len(order))] {
		out = append(out, all[i].Name)
	}
	idle := 0
	for _, i := range order[min(n, len(order)):] {
		if all[i].Idle && idle < idleAsked {
			out = append(out, all[i].Name)
			idle++
		}
	}
	return out
}

func (s *peerSample) pool() *pool {
	p := &pool{}
	for _, name := range s.names {
		switch peer := s.said[name]; {
		case peer == nil:
		case peer.Shards > 0:
			p.busy = append(p.busy, peer)
		default:
			p.idle = append(p.idle, peer)
		}
	}
	return p
}

// pool is the sample as planners see it.
type pool struct{ busy, idle []*allocate.Peer }

var _ allocate.Pool = (*pool)(nil)

func (p *pool) Busy() int                   { return len(p.busy) }
func (p *pool) BusyAt(i int) *allocate.Peer { return p.busy[i] }
func (p *pool) Idle() int                   { return len(p.idle) }
func (p *pool) IdleAt(i int) *allocate.Peer { return p.idle[i] }
