// Package balance is the daemon's balance loop, and the road of a load sample
// from the profile on:
//
//	profile and forecasts of this host's shards, the word of a few peers
//	(view.go) → allocate.Planner → decisions, kept with their reasons
//	(decisions.go, store.go) → room at the target, which may veto (room.go) →
//	resize or migration (act.go) → what it really cost, for the next plan (costs.go)
//
// It refuses to know how a shard is measured, resized or moved, to act where
// the autopilot is not on, and to believe a peer where a target's own word counts.
package balance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/ebpf/profile"
)

// Mode is how far the autopilot goes.
type Mode string

// The modes.
const (
	Off    Mode = "off"    // plans nothing
	Advise Mode = "advise" // plans and tells
	On     Mode = "on"     // plans and does it
)

// ParseMode reads a mode.
func ParseMode(s string) (Mode, error) {
	switch m := Mode(s); m {
	case Off, Advise, On:
		return m, nil
	}
	return "", fmt.Errorf("%.40q is none of off, advise and on", s)
}

// Facts are what this host is now.
type Facts struct {
	Name, Zone  string
	Labels      map[string]string
	CostPerHour float64
	// CPUs and Memory (bytes) are what shards may have of it, Link its bytes/s, 0
	// unknown.
	CPUs, Memory, Link float64
	Cordoned, Draining bool
	// Arriving are the shards that migrations are bringing here.
	Arriving map[allocate.ShardID]bool
	// Layers of images that are here, as Shard.Layers names them.
	Layers map[string]bool
}

// Shard is one that runs here.
type Shard struct {
	Namespace, Name string
	Labels          map[string]string
	CPULimit        float64 // in force; 0 none
	// Rates are what it uses, by signal's name.
	Rates map[string]float64
	// DirtyBytes/s as last measured; nil never.
	DirtyBytes *float64
	// Migration has it; Foreign: its namespace is another orchestrator's.
	Migration string
	Foreign   bool
	// MovedAt is when a migration brought it here, from LastHost.
	MovedAt  time.Time
	LastHost string
	// Layers of its image are named the same on every host; none: unknown.
	Layers []allocate.Data
	// Volumes are the paths, the same on every host, of those that it shares with
	// its host.
	Volumes []string
}

// ID is the shard's name in plans.
func (s *Shard) ID() allocate.ShardID { return shardID(s.Namespace, s.Name) }

func shardID(namespace, name string) allocate.ShardID {
	return allocate.ShardID(namespace + "/" + name)
}

// Host is the host that plans. Its methods are called by one goroutine at a
// time, but for Migrate and Volumes.
type Host interface {
	Facts() Facts
	// Shards lists those that run here, by name.
	Shards(ctx context.Context) ([]Shard, error)
	// Resize sets the CPU limit of a running shard.
	Resize(ctx context.Context, namespace, name string, cpus float64) error
	// Check is pre-flight: why the shard cannot move to node, "" if it can.
	Check(ctx context.Context, namespace, name, node string) (string, error)
	// Migrate moves a shard and returns when the migration has ended, or ctx.
	Migrate(ctx context.Context, namespace, name, node string) (*v1.Migration, error)
	// Volumes are those of the paths that are here, as far as that is known soon.
	Volumes(ctx context.Context, paths []string) []string
}

// Forecasts answer for this host's shards; *forecasts.Keeper is one.
type Forecasts interface {
	// Newest is when a signal was sampled last.
	Newest(namespace, name string, signal profile.Signal) (time.Time, error)
	// Outlook is what a signal will be, from the newest sample on.
	Outlook(namespace, name string, signal profile.Signal) (allocate.Outlook, error)
}

// Peer is another host, as far as it is known without asking.
type Peer struct {
	Name string
	Idle bool // by what it last spread; a claim
}

// Peers are the other hosts.
type Peers interface {
	// Peers lists those that might take shards; it does not block.
	Peers() []Peer
	Room(ctx context.Context, node string, req *v1.RoomRequest) (*v1.RoomResponse, error)
	Book(ctx context.Context, node string, req *v1.BookRequest) (*v1.BookResponse, error)
	Unbook(ctx context.Context, node string, req *v1.UnbookRequest) error
}

// Config of a Balancer.
type Config struct {
	// Autopilot is for shards that do not say it themselves. Off is off for all.
	Autopilot Mode
	// Every is the time between rounds.
	Every time.Duration
	// Consolidate allows hosts to be emptied to spare them.
	Consolidate bool
	// Reactive plans by a threshold on the last sample instead of forecasts, to
	// compare with.
	Reactive bool
	// Weights of tenants against each other; who is not among them has 1.
	Weights map[allocate.Tenant]float64
	// StorePath is the file of decisions and costs.
	StorePath string
	Host      Host
	Forecasts Forecasts
	Peers     Peers // nil: there are none
	Log       *slog.Logger
	Now       func() time.Time
	Seed      uint64
}

// Balancer is one host's. Its methods may be called concurrently.
type Balancer struct {
	cfg   Config
	log   *slog.Logger
	now   func() time.Time
	store *store
	work  sync.WaitGroup

	mu      sync.Mutex
	acting  *allocate.Planner // may move shards that say on
	advisor *allocate.Planner // may move all, and only tells
	ledger  *allocate.Ledger
	booked  map[allocate.ShardID]*booking
	heard   map[string]*rate.Limiter // by peer
	debts   map[string]debt          // by peer
	view    allocate.View            // of the last round, acting's
	viewAt  time.Time
	facts   Facts
	fullAt  time.Time     // since when its shards use all its CPUs; zero: they do not
	plan    allocate.Plan // acting's, or the advisor's where nothing may be done
	trouble string
	shards  map[allocate.ShardID]*known
	bars    map[allocate.ShardID]bar       // why a shard is not moved for a while
	most    map[allocate.ShardID]float64   // CPUs that a limit may become; 0 any
	left    map[allocate.ShardID]time.Time // moved away, still to be seen for a moment
	costs   costs
	peers   peerSample
	current map[string]*Decision // of the last round, and those under way
	counts  counts
	rng     *rand.Rand
}

// sustained is for how long a signal must hold, of so long a window: what the
// planner was chosen with, whose rounds were a minute (ADR 12).
const sustained, window = 2 * time.Minute, 3 * time.Minute

// mostRounds that a planner remembers.
const mostRounds = 64

// bounds of Config.Every.
const (
	MinEvery = time.Second
	MaxEvery = time.Minute
)

// New opens the store; Close it.
func New(cfg Config) (*Balancer, error) {
	if cfg.Every < MinEvery || cfg.Every > MaxEvery {
		return nil, fmt.Errorf("balance: a round every %v: want %v to %v", cfg.Every, MinEvery, MaxEvery)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	// Where so many rounds are more than a planner remembers, it is the same share
	// of those that it does.
	n := min(mostRounds, max(1, int(window/cfg.Every)))
	conf := allocate.Config{Consolidate: cfg.Consolidate, SustainK: max(1, int(sustained*time.Duration(n)/window)), SustainN: n}
	if cfg.Reactive {
		conf.Threshold = allocate.ReactiveThreshold
	}
	facts := cfg.Host.Facts()
	id := allocate.HostID(facts.Name)
	b := &Balancer{
		cfg: cfg, log: cfg.Log, now: cfg.Now, facts: facts, booked: map[allocate.ShardID]*booking{}, heard: map[string]*rate.Limiter{}, debts: map[string]debt{}, shards: map[allocate.ShardID]*known{},
		bars: map[allocate.ShardID]bar{}, left: map[allocate.ShardID]time.Time{}, current: map[string]*Decision{},
		rng: rand.New(rand.NewPCG(cfg.Seed, 5)), most: map[allocate.ShardID]float64{},
		counts: counts{decisions: map[[3]string]float64{}, vetoes: map[allocate.VetoCode]float64{}},
	}
	var err error
	if b.acting, err = allocate.NewPlanner(id, conf, cfg.Seed); err != nil {
		return nil, fmt.Errorf("balance: %w", err)
	}
	if b.advisor, err = allocate.NewPlanner(id, conf, cfg.Seed+1); err != nil {
		return nil, fmt.Errorf("balance: %w", err)
	}
	b.ledger = allocate.NewLedger(b.acting.Config())
	if b.store, err = openStore(cfg.StorePath); err != nil {
		return nil, err
	}
	if b.costs, err = b.store.readCosts(); err != nil {
		return nil, errors.Join(err, b.store.Close())
	}
	if err := b.store.interrupt(); err != nil {
		return nil, errors.Join(err, b.store.Close())
	}
	return b, nil
}

// Close releases the store. Run must have returned.
func (b *Balancer) Close() error { return b.store.Close() }

// Run plans until ctx ends, and waits for what it began. Migrations under way
// are the manager's to end.
func (b *Balancer) Run(ctx context.Context) error {
	defer b.work.Wait()
	for {
		// A tenth of jitter, so that hosts that were started together do not plan
		// together for ever.
		pause := b.cfg.Every + time.Duration((b.rng.Float64()-0.5)*0.2*float64(b.cfg.Every))
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			b.saveAll()
			return nil
		case <-t.C:
		}
		b.round(ctx)
	}
}

// round looks, plans and acts once.
func (b *Balancer) round(ctx context.Context) {
	begun := time.Now()
	shards, err := b.cfg.Host.Shards(ctx)
	if err == nil && b.cfg.Autopilot != Off {
		b.askPeers(ctx)
	}
	if ctx.Err() != nil {
		return
	}
	b.mu.Lock()
	b.counts.rounds++
	b.counts.looked += time.Since(begun)
	planned := time.Now()
	var todo turn
	if err == nil {
		todo, err = b.think(shards)
	}
	b.counts.planned += time.Since(planned)
	switch {
	case err != nil && b.trouble != err.Error():
		b.log.Warn("balance: no plan", "err", err)
		b.trouble = err.Error()
	case err == nil:
		b.trouble = ""
	}
	b.mu.Unlock()
	if err == nil {
		b.carry(ctx, todo)
	}
}

// turn is what a round came to.
type turn struct {
	at     time.Time
	acting allocate.Plan
	advice allocate.Plan
	acts   bool // some shard says on
	tells  bool // some shard says advise
	modes  map[allocate.ShardID]Mode
	view   allocate.View
}

// think plans. b.mu is held.
func (b *Balancer) think(shards []Shard) (turn, error) {
	now := b.now()
	b.facts = b.cfg.Host.Facts()
	t := turn{at: now, modes: map[allocate.ShardID]Mode{}}
	all := b.see(now, shards, t.modes)
	b.tend(now, all)
	view := b.viewOf(now, all)
	for _, m := range t.modes {
		t.acts = t.acts || m == On
		t.tells = t.tells || m == Advise
	}
	// The acting planner runs whether it may do anything or not: what it adds up
	// is what this host tells the others.
	view.Shards = pinUnless(all, t.modes, On)
	var err error
	if t.acting, err = b.acting.Round(now, &view); err != nil {
		return t, err
	}
	t.view, b.view, b.viewAt, b.plan = view, view, now, t.acting
	if t.tells {
		view.Shards = pinUnless(all, t.modes, On, Advise)
		t.advice, err = b.advisor.Round(now, &view)
		t.view.Shards = all
	}
	return t, err
}

// pinUnless is a copy in which shards of other modes stay where they are.
func pinUnless(all []allocate.Shard, modes map[allocate.ShardID]Mode, may ...Mode) []allocate.Shard {
	out := make([]allocate.Shard, len(all))
	copy(out, all)
	for i := range out {
		ok := false
		for _, m := range may {
			ok = ok || modes[out[i].ID] == m
		}
		if !ok {
			if out[i].Pinned == "" {
				out[i].Pinned = "its autopilot is " + string(modes[out[i].ID])
			}
			out[i].Limit, out[i].Request = allocate.Amount{}, allocate.Amount{} // and its limit what it is
		}
	}
	return out
}
