package sim

import (
	"cmp"
	"container/heap"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"

	"github.com/tranship/tranship/allocate"
)

// world is the simulated pool: who runs where, moves under way, and the
// accounts. Between two events every load is constant; settle books the time
// since the last one. Time is in seconds from the end of the warm-up.
type world struct {
	sc    *Scenario
	specs []spec
	hosts []host
	state []shardState
	now   float64
	cell  int // step whose load is wanted now

	flights flightHeap
	order   int // of flights begun at the same time

	report    Report
	served    [allocate.MaxPriority + 1]float64 // under-served shard-seconds
	lostBy    []float64                         // by shard, work lost to moves
	askedBy   []float64
	movesStep int
	landed    func(id, from, to int, moved bool) // tells the policy
}

type host struct {
	name     string
	cpu, mem float64
	link     float64 // bytes/s for moves
	cost     float64
	curve    *[11]float64
	up       bool

	shards   []int
	coming   int     // moves to it under way
	load     float64 // CPU wanted by its shards
	used     float64 // memory of its shards and of those coming
	linkFree float64 // when the moves queued on its link are done
	since    float64 // accounts are booked until then

	active, full float64 // seconds in use, and of those at full load
	overloaded   bool
}

type shardState struct {
	host    int // -1: down
	target  int // -1: not moving
	movedAt float64
	last    int // host it left
	limit   float64
	downAt  float64
	flight  int // order of the one under way
}

type flight struct {
	shard, from, to int
	end             float64
	cost            allocate.MoveCost
	reason          string
	order           int
}

type flightHeap []flight

func (h flightHeap) Len() int { return len(h) }
func (h flightHeap) Less(i, j int) bool {
	return h[i].end < h[j].end || h[i].end == h[j].end && h[i].order < h[j].order
}
func (h flightHeap) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *flightHeap) Push(x any)   { *h = append(*h, x.(flight)) }
func (h *flightHeap) Pop() any {
	old := *h
	f := old[len(old)-1]
	*h = old[:len(old)-1]
	return f
}

// never is before everything.
const never = -1e18

func newWorld(sc *Scenario, specs []spec, policy string) (*world, error) {
	w := &world{sc: sc, specs: specs, cell: sc.warm(), lostBy: make([]float64, len(specs)), askedBy: make([]float64, len(specs))}
	for _, g := range sc.Hosts {
		var curve *[11]float64
		if c, ok := watts[g.Power]; ok {
			curve = &c
		}
		for range g.Count {
			w.hosts = append(w.hosts, host{
				name: fmt.Sprintf("%s-%d", g.Name, len(w.hosts)), cpu: g.CPU, mem: float64(g.Memory),
				link: float64(g.Link) * sc.LinkShare, cost: g.Cost, curve: curve, up: true,
			})
		}
	}
	for i := range specs {
		w.state = append(w.state, shardState{host: -1, target: -1, movedAt: never, last: -1, limit: specs[i].limit, downAt: never})
	}
	w.report = Report{
		Scenario: sc.Name, Policy: policy, Seed: sc.Seed, Hosts: len(w.hosts), Shards: len(specs), DurationS: time.Duration(sc.Duration).Seconds(),
		UnderServed: map[string]float64{}, MovesByReason: map[string]int{}, VetoedBy: map[string]int{},
	}
	if err := w.place(); err != nil {
		return nil, err
	}
	return w, nil
}

func (w *world) enforced() bool { return w.sc.Memory == "enforced" }

// memoryOf is what counts of a shard's memory.
func (w *world) memoryOf(i int) float64 {
	if w.enforced() {
		return w.specs[i].mem
	}
	return 0
}

// place puts every shard somewhere by what it asks for, as an orchestrator does
// that knows nothing else: the largest first, on the host with the most CPU
// unasked for (spread) or the least that is enough (pack).
func (w *world) place() error {
	asked := make([]float64, len(w.hosts))
	order := make([]int, len(w.specs))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(w.specs[b].cpu, w.specs[a].cpu) })
	for _, i := range order {
		s := &w.specs[i]
		best, bestFree := -1, 0.0
		for h := range w.hosts {
			x := &w.hosts[h]
			free := x.cpu*w.sc.Overcommit - asked[h] - s.cpu
			if free < 0 || x.used+w.memoryOf(i) > x.mem {
				continue
			}
			free /= x.cpu
			if best < 0 || w.sc.Placement == "spread" && free > bestFree || w.sc.Placement == "pack" && free < bestFree {
				best, bestFree = h, free
			}
		}
		if best < 0 {
			return fmt.Errorf("%s (cpu %.4g, memory %.4g) finds no host with that much left: more hosts, a larger overcommit or smaller sizes", s.id, s.cpu, s.mem)
		}
		asked[best] += s.cpu
		w.arrive(i, best)
	}
	return nil
}

// arrive and depart keep a host's sums; the caller has settled it.
func (w *world) arrive(i, h int) {
	x := &w.hosts[h]
	w.state[i].host = h
	x.shards = append(x.shards, i)
	x.load += w.want(i)
	x.used += w.memoryOf(i)
}

func (w *world) depart(i int) {
	x := &w.hosts[w.state[i].host]
	x.shards = slices.DeleteFunc(x.shards, func(o int) bool { return o == i })
	x.load -= w.want(i)
	x.used -= w.memoryOf(i)
	if len(x.shards) == 0 {
		x.load = 0
	}
	w.state[i].host = -1
}

func (w *world) want(i int) float64 { return w.specs[i].at(w.cell) }

// sample is what was measured of a shard in the step that has just ended.
func (w *world) sample(i int) float64 { return w.specs[i].at(max(0, w.cell-1)) }

// room is what a host may use before it counts as overloaded.
func (w *world) room(h int) float64 { return w.hosts[h].cpu * w.sc.OverloadAt }

// settle books a host's time until now.
func (w *world) settle(h int) {
	x := &w.hosts[h]
	dt := w.now - x.since
	x.since = w.now
	over := x.load > w.room(h)*(1+1e-9)
	x.overloaded = over && x.up
	if dt <= 0 || !x.up {
		return
	}
	if len(x.shards) == 0 && x.coming == 0 {
		if w.sc.Consolidate {
			return // it is off
		}
	} else {
		x.active += dt
	}
	w.report.HostHours += dt / 3600
	w.report.Cost += dt / 3600 * x.cost
	if x.curve != nil {
		w.report.EnergyKWh += power(x.curve, x.load/x.cpu) * dt / 3.6e6
	}
	if x.load >= x.cpu {
		x.full += dt
	}
	if over {
		w.report.OverloadHostMinutes += dt / 60
	}
	w.starve(h, dt)
}

// starve books who got less than wanted: CPU is shared by weight, as cgroups do,
// and what one does not use goes to the others.
func (w *world) starve(h int, dt float64) {
	x := &w.hosts[h]
	limited := false
	for _, i := range x.shards {
		if l := w.state[i].limit; l > 0 && w.want(i) > l*(1+1e-9) {
			limited = true
		}
	}
	if x.load <= x.cpu && !limited {
		return
	}
	type claim struct{ want, weight float64 }
	claims := make([]claim, len(x.shards))
	left, weights := x.cpu, 0.0
	for k, i := range x.shards {
		claims[k] = claim{w.want(i), 1 + float64(w.specs[i].priority)}
		if l := w.state[i].limit; l > 0 {
			claims[k].want = min(claims[k].want, l)
		}
		weights += claims[k].weight
	}
	got := make([]float64, len(claims))
	done := make([]bool, len(claims))
	for again := true; again; {
		again = false
		for k, c := range claims {
			if !done[k] && c.want <= left*c.weight/weights+1e-12 {
				got[k], done[k], again = c.want, true, true
				left -= c.want
				if weights -= c.weight; weights <= 1e-9 {
					again = false
					break
				}
			}
		}
	}
	for k, i := range x.shards {
		if !done[k] {
			got[k] = left * claims[k].weight / weights
		}
		// A hundredth less is not noticed.
		if got[k] < 0.99*w.want(i) {
			w.served[w.specs[i].priority] += dt
		}
	}
}

// step enters the load of the next step.
func (w *world) step(c int) {
	for h := range w.hosts {
		w.settle(h)
	}
	w.cell = c
	for h := range w.hosts {
		x := &w.hosts[h]
		x.load = 0
		for _, i := range x.shards {
			x.load += w.want(i)
		}
		x.overloaded = x.up && x.load > w.room(h)*(1+1e-9)
	}
	dt := time.Duration(w.sc.Step).Seconds()
	for i := range w.specs {
		w.askedBy[i] += w.want(i) * dt
	}
}

// start begins a move; it waits for its turn on both links. False: impossible.
func (w *world) start(i, to int, reason string) bool {
	st := &w.state[i]
	from := st.host
	if from < 0 || st.target >= 0 || to == from || !w.hosts[to].up {
		return false
	}
	x, y := &w.hosts[from], &w.hosts[to]
	if y.used+w.memoryOf(i) > y.mem*(1+1e-9) {
		return false
	}
	w.settle(to) // it is on from now on
	cost := w.cost(i, from, to)
	begin := max(w.now, x.linkFree, y.linkFree)
	end := begin + cost.Takes.Seconds()
	x.linkFree, y.linkFree = end, end
	y.coming++
	y.used += w.memoryOf(i)
	w.order++
	st.target, st.flight = to, w.order
	heap.Push(&w.flights, flight{i, from, to, end, cost, reason, w.order})
	return true
}

func (w *world) cost(i, from, to int) allocate.MoveCost {
	return allocate.CostOf(w.specs[i].mem, w.dirty(i), min(w.hosts[from].link, w.hosts[to].link))
}

// dirty bytes/s: more the busier it is.
func (w *world) dirty(i int) float64 {
	s := &w.specs[i]
	return s.dirty * s.mem * min(1, w.sample(i)/s.cpu)
}

// advance runs the moves that end before t.
func (w *world) advance(t float64) {
	for len(w.flights) > 0 && w.flights[0].end <= t {
		f := heap.Pop(&w.flights).(flight)
		w.now = f.end
		w.land(&f)
	}
	w.now = t
}

// land ends a move.
func (w *world) land(f *flight) {
	st := &w.state[f.shard]
	y := &w.hosts[f.to]
	w.settle(f.to)
	y.coming--
	y.used -= w.memoryOf(f.shard)
	if st.flight != f.order || st.target < 0 {
		w.landed(f.shard, f.from, f.to, false)
		return // it ended when a host failed
	}
	st.target = -1
	if st.host != f.from || !y.up {
		w.report.MovesFailed++
		w.landed(f.shard, f.from, f.to, false)
		return
	}
	w.settle(f.from)
	w.depart(f.shard)
	w.arrive(f.shard, f.to)
	r := &w.report
	r.Moves++
	w.movesStep++
	r.MovesByReason[f.reason]++
	r.BytesMoved += f.cost.Bytes
	r.BlackoutS += f.cost.Blackout.Seconds()
	// Ten percent of its work while it moves, as Beloglazov & Buyya estimate,
	// and all of it in the blackout.
	w.lostBy[f.shard] += w.want(f.shard) * (0.1*f.cost.Takes.Seconds() + 0.9*f.cost.Blackout.Seconds())
	if w.now-st.movedAt < 30*60 {
		r.Thrash++
	}
	st.movedAt, st.last = w.now, f.from
	w.landed(f.shard, f.from, f.to, true)
}

// fail takes hosts down; their shards are returned.
func (w *world) fail(n int, rng *rand.Rand) (down, orphans []int) {
	up := make([]int, 0, len(w.hosts))
	for h := range w.hosts {
		if w.hosts[h].up {
			up = append(up, h)
		}
	}
	rng.Shuffle(len(up), func(i, j int) { up[i], up[j] = up[j], up[i] })
	for _, h := range up[:min(n, len(up))] {
		w.settle(h)
		for _, i := range slices.Clone(w.hosts[h].shards) {
			w.depart(i)
			w.state[i].target = -1
			w.state[i].downAt = w.now
			orphans = append(orphans, i)
		}
		w.hosts[h].up = false
		w.hosts[h].overloaded = false
		down = append(down, h)
	}
	slices.Sort(orphans)
	return down, orphans
}

// revive starts a shard that was down.
func (w *world) revive(i, h int) bool {
	if x := &w.hosts[h]; !x.up || x.used+w.memoryOf(i) > x.mem*(1+1e-9) {
		return false
	}
	w.settle(h)
	w.report.DownShardMinutes += (w.now - w.state[i].downAt) / 60
	w.arrive(i, h)
	return true
}

// mark adds a point to the timeline.
func (w *world) mark() {
	p := Point{Minute: w.now / 60, Moves: w.movesStep}
	for h := range w.hosts {
		x := &w.hosts[h]
		if x.overloaded {
			p.Overloaded++
		}
		if x.up && (len(x.shards) > 0 || x.coming > 0) {
			p.Used++
		}
	}
	w.movesStep = 0
	w.report.Timeline = append(w.report.Timeline, p)
	w.report.HostsUsedMax = max(w.report.HostsUsedMax, p.Used)
}

// finish closes the accounts.
func (w *world) finish() *Report {
	r := &w.report
	for h := range w.hosts {
		w.settle(h)
	}
	n, over := 0, 0.0
	for h := range w.hosts {
		if x := &w.hosts[h]; x.active > 0 {
			n++
			over += x.full / x.active
		}
	}
	r.SLATAH = over / math.Max(1, float64(n))
	n = 0
	for i := range w.specs {
		if w.state[i].host < 0 {
			r.DownShardMinutes += (w.now - w.state[i].downAt) / 60
		}
		if w.askedBy[i] > 0 {
			n++
			r.PDM += w.lostBy[i] / w.askedBy[i]
		}
	}
	r.PDM /= math.Max(1, float64(n))
	r.SLAV = r.SLATAH * r.PDM
	for p, s := range w.served {
		if s > 0 {
			r.UnderServed[strconv.Itoa(p)] = s / 60
		}
	}
	for _, p := range r.Timeline {
		r.HostsUsedMean += float64(p.Used) / float64(len(r.Timeline))
	}
	if r.Moves > 0 {
		r.ThrashShare = float64(r.Thrash) / float64(r.Moves)
	}
	return r
}
