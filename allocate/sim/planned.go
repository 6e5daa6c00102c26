package sim

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/tranship/tranship/allocate"
	"github.com/tranship/tranship/predict"
)

// planned runs a Planner and a Ledger on every host, as the daemon does. Hosts
// plan at once, knowing of each other what was told after the round before;
// then their requests reach the targets one by one, in an order that the seed
// gives. An oracle differs in nothing but where the demands come from.
type planned struct {
	w      *world
	oracle bool
	rng    *rand.Rand
	clock  func() time.Duration // nil: planning is not measured
	cpu    func() time.Duration // of the calling thread

	nodes []node
	peers []allocate.Peer // as told after the last round
	busy  []int
	idle  []int
	plans []allocate.Plan
	order []int

	forecasters []*predict.Forecaster
	demands     []allocate.Demand
	peaks       []allocate.Curve // of CPU
	sampled     time.Time
	resizes     int
}

type node struct {
	planner *allocate.Planner
	ledger  *allocate.Ledger
	view    allocate.View
	index   []int // of view.Shards, in the world
	err     error
	told    allocate.Peer
	full    time.Duration // for which the samples say that the host was overloaded
	took    []float32     // of rounds, ms
	used    []float32     // of a processor, ms
}

func newPlanned(w *world, oracle bool, o Options) (*planned, error) {
	p := &planned{
		w: w, oracle: oracle, clock: o.Clock, cpu: o.CPU, rng: rand.New(rand.NewPCG(w.sc.Seed, 3)),
		nodes: make([]node, len(w.hosts)), peers: make([]allocate.Peer, len(w.hosts)), plans: make([]allocate.Plan, len(w.hosts)),
		demands: make([]allocate.Demand, len(w.specs)), peaks: make([]allocate.Curve, len(w.specs)),
	}
	cfg := allocate.Config{Consolidate: w.sc.Consolidate}
	for h := range w.hosts {
		x, n := &w.hosts[h], &p.nodes[h]
		planner, err := allocate.NewPlanner(allocate.HostID(x.name), cfg, w.sc.Seed)
		if err != nil {
			return nil, err
		}
		n.planner, n.ledger = planner, allocate.NewLedger(planner.Config())
		n.view.Host = allocate.Host{
			ID: allocate.HostID(x.name), Cost: x.cost, Link: x.link,
			Capacity: allocate.Amount{allocate.CPU: w.room(h), allocate.Memory: x.mem},
		}
		n.view.Peers = pool{p}
		p.order = append(p.order, h)
		n.told = allocate.Peer{Host: n.view.Host, Shards: len(x.shards)}
	}
	for i := range w.specs {
		// Until something is known, what it asks for.
		for s := range p.demands[i] {
			p.demands[i][s][allocate.CPU] = allocate.Certain(w.specs[i].cpu)
			p.demands[i][s][allocate.Memory] = allocate.Certain(w.memoryOf(i))
		}
		if !oracle {
			f, err := predict.New(predict.Config{Step: time.Duration(w.sc.Step), Horizons: allocate.Horizons()})
			if err != nil {
				return nil, fmt.Errorf("forecaster of %s: %w", w.specs[i].id, err)
			}
			p.forecasters = append(p.forecasters, f)
		}
		if h := w.state[i].host; h >= 0 {
			p.add(i, h)
		}
	}
	p.tell()
	return p, nil
}

// add puts shard i into the view of host h.
func (p *planned) add(i, h int) {
	s, st := &p.w.specs[i], &p.w.state[i]
	v := allocate.Shard{
		ID: allocate.ShardID(s.id), Workload: allocate.Workload(s.workload), Tenant: allocate.Tenant(s.tenant), Priority: s.priority,
		Request: allocate.Amount{allocate.CPU: s.cpu, allocate.Memory: p.w.memoryOf(i)}, Bytes: s.mem,
	}
	v.Limit[allocate.CPU] = st.limit
	if st.movedAt > never {
		v.MovedAt = p.w.date()
		v.LastHost = p.nodes[st.last].view.Host.ID
	}
	n := &p.nodes[h]
	n.view.Shards = append(n.view.Shards, v)
	n.index = append(n.index, i)
	p.refresh(n, len(n.index)-1)
}

// refresh puts the newest sample and forecast into a view.
func (p *planned) refresh(n *node, k int) {
	i, v := n.index[k], &n.view.Shards[k]
	v.Demand, v.Peak = p.demands[i], p.peaks[i]
	v.Usage = allocate.Amount{allocate.CPU: p.w.sample(i), allocate.Memory: p.w.memoryOf(i)}
	v.Dirty = p.w.dirty(i)
	v.SampledAt = p.sampled
}

// heed makes the nearest span of a host that was overloaded for allocate.SeenFor no
// less than what its shards use.
func (p *planned) heed(n *node) {
	used := 0.0
	for k := range n.view.Shards {
		used += n.view.Shards[k].Usage[allocate.CPU]
	}
	if used <= n.view.Host.Capacity[allocate.CPU]*(1+1e-9) {
		n.full = 0
		return
	}
	if n.full += time.Duration(p.w.sc.Step); n.full < allocate.SeenFor {
		return
	}
	for k := range n.view.Shards {
		s := &n.view.Shards[k]
		s.Demand[0][allocate.CPU].AtLeast(s.Usage[allocate.CPU])
	}
}

func (p *planned) remove(i, h int) {
	n := &p.nodes[h]
	k := slices.Index(n.index, i)
	n.index = slices.Delete(n.index, k, k+1)
	n.view.Shards = slices.Delete(n.view.Shards, k, k+1)
}

// parallel runs f for every index, on all processors.
func parallel(n int, f func(i int)) {
	workers := runtime.GOMAXPROCS(0)
	var wg sync.WaitGroup
	for k := range workers {
		wg.Go(func() {
			for i := n * k / workers; i < n*(k+1)/workers; i++ {
				f(i)
			}
		})
	}
	wg.Wait()
}

func (p *planned) observe(c int) error {
	w := p.w
	step := time.Duration(w.sc.Step)
	end := origin.Add(time.Duration(c+1) * step)
	last := c >= w.sc.warm()-1 // nothing plans in the warm-up
	errs := make([]error, len(w.specs))
	parallel(len(w.specs), func(i int) {
		if p.oracle {
			if last {
				p.foresee(i, c+1)
			}
			return
		}
		f := p.forecasters[i]
		f.Observe(end.Add(-step/2), w.specs[i].at(c))
		f.Advance(end.Add(1))
		if last {
			errs[i] = p.forecast(i)
		}
	})
	for i, err := range errs {
		if err != nil {
			return fmt.Errorf("forecast of %s: %w", w.specs[i].id, err)
		}
	}
	p.sampled = end
	if last {
		for h := range p.nodes {
			for k := range p.nodes[h].index {
				p.refresh(&p.nodes[h], k)
			}
			p.heed(&p.nodes[h])
		}
	}
	return nil
}

func (p *planned) forecast(i int) error {
	o, err := allocate.Foresee(p.forecasters[i])
	if err != nil {
		return err
	}
	for s := range o.Spans {
		p.demands[i][s][allocate.CPU] = o.Spans[s]
	}
	p.peaks[i] = o.Peak
	return nil
}

// foresee is the oracle's forecast: the largest load of each span, from step c on.
func (p *planned) foresee(i, c int) {
	from := 0
	for s := range p.demands[i] {
		until := max(from+1, int(allocate.SpanEnd(s)/time.Duration(p.w.sc.Step)))
		top := 0.0
		for k := from; k < until; k++ {
			top = max(top, p.w.specs[i].at(c+k))
		}
		p.demands[i][s][allocate.CPU] = allocate.Certain(top)
		from = until
	}
}

func (p *planned) round(bool) error {
	now := p.w.date()
	parallel(len(p.nodes), func(h int) {
		n := &p.nodes[h]
		n.view.Held = n.ledger.Held(now)
		p.plans[h] = allocate.Plan{}
		if !p.w.hosts[h].up {
			return
		}
		if len(n.view.Shards)+len(n.view.Held) == 0 && !n.planner.Leaving() {
			n.told = allocate.Peer{Host: n.view.Host}
			return
		}
		p.measure(n, func() {
			p.plans[h], n.err = n.planner.Round(now, &n.view)
			n.told = n.planner.Self(&n.view)
		})
	})
	p.rng.Shuffle(len(p.order), func(i, j int) { p.order[i], p.order[j] = p.order[j], p.order[i] })
	for _, h := range p.order {
		if err := p.nodes[h].err; err != nil {
			return err
		}
		p.do(now, h)
	}
	p.tell()
	return nil
}

// measure runs a host's round on one thread, whose time on a processor it is then.
func (p *planned) measure(n *node, round func()) {
	if p.clock == nil {
		round()
		return
	}
	begin, used := p.clock(), time.Duration(0)
	if p.cpu != nil {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		used = p.cpu()
	}
	round()
	if p.cpu != nil {
		n.used = append(n.used, float32((p.cpu()-used).Seconds()*1e3))
	}
	n.took = append(n.took, float32((p.clock()-begin).Seconds()*1e3))
}

// do carries a plan out: resizes at once, moves if a target grants them.
func (p *planned) do(now time.Time, h int) {
	n := &p.nodes[h]
	for _, r := range p.plans[h].Resizes {
		k := slices.IndexFunc(n.view.Shards, func(s allocate.Shard) bool { return s.ID == r.Shard })
		n.view.Shards[k].Limit[allocate.CPU] = r.To
		p.w.settle(h)
		p.w.state[n.index[k]].limit = r.To
		p.resizes++
	}
	for _, m := range p.plans[h].Moves {
		k := slices.IndexFunc(n.view.Shards, func(s allocate.Shard) bool { return s.ID == m.Shard })
		req := allocate.Request{Shard: n.view.Shards[k], From: m.From, Reason: m.Reason, Takes: m.Takes}
		for _, c := range m.Targets {
			to := p.hostOf(c.Host)
			p.w.report.Asked++
			if !p.w.hosts[to].up {
				p.veto("down")
				continue
			}
			if v := p.ask(now, to, req); v != nil {
				p.veto(string(v.Code))
				continue
			}
			if !p.w.start(n.index[k], to, string(m.Reason)) {
				p.nodes[to].ledger.Release(m.Shard)
				continue
			}
			n.planner.Started(now, m.Shard, c.Host)
			p.audit(to)
			break
		}
	}
}

func (p *planned) veto(code string) {
	p.w.report.Vetoed++
	p.w.report.VetoedBy[code]++
}

func (p *planned) ask(now time.Time, to int, req allocate.Request) *allocate.Veto {
	t := &p.nodes[to]
	// A move waits for its turn on the links; the reservation must last.
	if wait := p.w.hosts[to].linkFree - p.w.now; wait > 0 {
		req.Takes += time.Duration(wait * 1e9)
	}
	_, veto := t.ledger.Reserve(now, allocate.Own{
		Host: &t.view.Host, Shards: t.view.Shards,
		Leaving: t.planner.Leaving(), Correlation: t.planner.Correlation(),
	}, req)
	return veto
}

// audit counts, from the world's own accounts, how many of the moves that a
// target has accepted are beyond its room as measured.
func (p *planned) audit(to int) {
	w := p.w
	load, mem := 0.0, 0.0
	for _, i := range w.hosts[to].shards {
		load += w.sample(i)
		mem += w.memoryOf(i)
	}
	beyond := 0
	for _, f := range w.flights {
		if f.to != to {
			continue
		}
		load += w.sample(f.shard)
		mem += w.memoryOf(f.shard)
		if load > w.room(to)*(1+1e-9) || mem > w.hosts[to].mem*(1+1e-9) {
			beyond++
		}
	}
	w.report.BeyondRoom = max(w.report.BeyondRoom, beyond)
}

// tell publishes what hosts know of themselves.
func (p *planned) tell() {
	p.busy, p.idle = p.busy[:0], p.idle[:0]
	for h := range p.nodes {
		p.peers[h] = p.nodes[h].told
		switch {
		case !p.w.hosts[h].up:
		case p.peers[h].Shards > 0:
			p.busy = append(p.busy, h)
		default:
			p.idle = append(p.idle, h)
		}
	}
}

func (p *planned) hostOf(id allocate.HostID) int {
	// Names end in the index.
	h := 0
	for _, c := range id[lastDash(id)+1:] {
		h = h*10 + int(c-'0')
	}
	return h
}

func lastDash(id allocate.HostID) int {
	for i := len(id) - 1; i >= 0; i-- {
		if id[i] == '-' {
			return i
		}
	}
	return -1
}

func (p *planned) landed(i, from, to int, moved bool) {
	id := allocate.ShardID(p.w.specs[i].id)
	p.nodes[to].ledger.Release(id)
	if p.w.hosts[from].up {
		p.nodes[from].planner.Ended(p.w.date(), id, moved)
	}
	if moved {
		p.remove(i, from)
		p.add(i, to)
	}
}

func (p *planned) failed(hosts []int) {
	for _, h := range hosts {
		n := &p.nodes[h]
		n.view.Shards, n.index = n.view.Shards[:0], n.index[:0]
		for _, r := range slices.Clone(n.ledger.Held(p.w.date())) {
			n.ledger.Release(r.Shard.ID)
		}
		// Its memory of the past went with it.
		if planner, err := allocate.NewPlanner(n.view.Host.ID, n.planner.Config(), p.w.sc.Seed); err == nil {
			n.planner = planner
		}
		n.told = allocate.Peer{Host: n.view.Host}
	}
	p.tell()
}

func (p *planned) revived([]int) { p.tell() }

// revive asks a few hosts, busy ones first, by their ledgers.
func (p *planned) revive(i int) int {
	w := p.w
	s := &w.specs[i]
	req := allocate.Request{Reason: allocate.Overload, Shard: allocate.Shard{
		ID: allocate.ShardID(s.id), Workload: allocate.Workload(s.workload),
		Tenant: allocate.Tenant(s.tenant), Priority: s.priority, Demand: p.demands[i], Peak: p.peaks[i], Bytes: s.mem,
		Usage: allocate.Amount{allocate.CPU: w.sample(i), allocate.Memory: w.memoryOf(i)},
	}}
	for _, from := range [][]int{p.busy, p.idle} {
		for range min(len(from), 16) {
			h := from[p.rng.IntN(len(from))]
			p.w.report.Asked++
			if v := p.ask(w.date(), h, req); v != nil {
				p.veto(string(v.Code))
				continue
			}
			p.nodes[h].ledger.Release(req.Shard.ID)
			p.add(i, h)
			return h
		}
	}
	return -1
}

func (p *planned) finish(r *Report) {
	r.Resizes = p.resizes
	var took, used []float32
	for h := range p.nodes {
		took, used = append(took, p.nodes[h].took...), append(used, p.nodes[h].used...)
	}
	if len(took) > 0 {
		r.Planning = &Planning{Rounds: len(took), Spread: spreadOf(took)}
	}
	if len(used) > 0 {
		cpu := spreadOf(used)
		r.Planning.CPU = &cpu
	}
}

// pool is what planners see of the others.
type pool struct{ p *planned }

var _ allocate.Pool = pool{}

func (p pool) Busy() int                   { return len(p.p.busy) }
func (p pool) BusyAt(i int) *allocate.Peer { return &p.p.peers[p.p.busy[i]] }
func (p pool) Idle() int                   { return len(p.p.idle) }
func (p pool) IdleAt(i int) *allocate.Peer { return &p.p.peers[p.p.idle[i]] }
