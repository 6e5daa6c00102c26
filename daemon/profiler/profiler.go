// Package profiler profiles every shard of the host and the host itself, second
// by second. Its flow:
//
//	containerd's events → subjects (a slot of the probe, files, a netlink socket)
//	→ a Sample a second → ebpf/profile's roll-up → minutes into the Store;
//	the last sample is what metrics and the API show
//
// It refuses to decide anything: forecasts and moves are made elsewhere of what
// is here. A source that fails costs its signals, never the daemon.
package profiler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/daemon/forecasts"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/probe"
	"github.com/tranship/tranship/ebpf/profile"
)

// Labels of a container that say whose shard it is.
const (
	LabelTenant   = runtime.LabelTenant
	LabelWorkload = runtime.LabelWorkload
)

// Tasks is what the profiler needs of daemon/runtime. *runtime.Runtime is one.
type Tasks interface {
	WatchTasks(ctx context.Context, emit func(runtime.TaskEvent)) error
	Tasks(ctx context.Context) ([]runtime.Task, error)
	Labels(ctx context.Context, namespace, name string) (map[string]string, error)
}

var _ Tasks = (*runtime.Runtime)(nil)

// Config of a Profiler.
type Config struct {
	// Node is this host's name.
	Node  string
	Tasks Tasks
	// PinDir keeps programs and counts over a restart; see probe.Config.
	PinDir string
	// BTF is a file with the kernel's types; "" is the kernel's own.
	BTF string
	// StorePath is the file of the store, Retention how far it goes back.
	StorePath string
	Retention time.Duration
	// TrackerWhy says why written pages cannot be tracked here; "" if they can.
	TrackerWhy string
	// CameFrom names the migration that brought a shard here and the node that
	// it came from; false when it did not come, or is still on its way. nil is
	// a host without migrations.
	CameFrom func(namespace, name string) (migration, node string, ok bool)
	// Fetch asks a node for a shard's history.
	Fetch func(ctx context.Context, node, namespace, name string) (Travelling, error)
	// Forecasts is told what shards use; nil without any.
	Forecasts Forecasts
	// Dirty measures a shard's dirty rate; see DirtyRate.
	Dirty func(ctx context.Context, namespace, name string, window time.Duration) (pagesPerSecond float64, err error)
	// DirtyEvery is how often each shard's dirty rate is measured without being
	// asked; 0 is never.
	DirtyEvery time.Duration
	Log        *slog.Logger
}

// Forecasts is what the profiler needs of daemon/forecasts. Run returns when its
// ctx ends; the profiler, which feeds it, starts it. Offer and End do not block;
// Adopt takes what State returned on the host that a shard came from, and
// may be called again with the same.
type Forecasts interface {
	Run(ctx context.Context) error
	Offer(key string, labels forecasts.Labels, ten *profile.Point)
	End(key string)
	Adopt(ctx context.Context, key string, state []byte) error
	State(key string) ([]byte, error)
	Forecaster
}

var _ Forecasts = (*forecasts.Keeper)(nil)

// Profiler profiles one host. Its methods may be called concurrently.
type Profiler struct {
	cfg      Config
	log      *slog.Logger
	probe    *probe.Probe // nil when there is none at all
	probeWhy error
	place    runtime.Place // the host's
	sources  []Source
	instead  profile.Mask
	store    *Store

	mu       sync.Mutex
	subjects map[string]*subject // by NAMESPACE/NAME
	host     *hostSubject
	gaps     map[profile.GapReason]float64
	spent    time.Duration // in sampling
	tick     int
	unwatch  int // tasks that ended before they could be profiled
	// births are the counts of provisional slots as of the last sample; they are
	// the host's until a shard claims the slot.
	births map[int]probe.Usage
	brief  map[string]int // shards that had ended when they were heard of: their pid
	// What is read goes here, and what is polled.
	buf      []byte
	polled   []unix.PollFd
	polledOf []*subject // two of polled are each's

	writes  chan map[string][]profile.Point
	dropped int
	pulls   chan string
}

const (
	// period is how often everything is sampled.
	period = time.Second
	// readSize is above what the kernel's files hold that are read here, and what
	// it puts into one datagram of a dump (NLMSG_GOODSIZE, 32 KiB at most).
	readSize = 32 << 10
	// writeQueue bounds the batches of minutes that wait for the disk. A disk
	// that takes longer than so many minutes loses the oldest.
	writeQueue = 8
	// pullQueue bounds the shards whose history is to be fetched; what finds no
	// place is found again by the next reconcile.
	pullQueue = 256
	// reconcileEvery: containerd's events may be lost without notice.
	reconcileEvery = time.Minute
	pruneEvery     = time.Hour
	// retryWatch paces the attempts to hear of containerd again.
	retryWatch = 2 * time.Second
)

// New loads the probe and opens the store. A kernel that refuses the probe makes
// a profiler with fewer signals, which Sources shows.
func New(cfg Config) (*Profiler, error) {
	p := &Profiler{
		cfg: cfg, log: cfg.Log, subjects: map[string]*subject{}, gaps: map[profile.GapReason]float64{},
		births: map[int]probe.Usage{}, brief: map[string]int{}, buf: make([]byte, readSize),
		writes: make(chan map[string][]profile.Point, writeQueue), pulls: make(chan string, pullQueue),
	}
	var unified bool
	var err error
	if p.place, unified, err = runtime.HostPlace(); err != nil {
		return nil, fmt.Errorf("profiles: %w", err)
	}
	if p.store, err = OpenStore(cfg.StorePath, cfg.Retention); err != nil {
		return nil, err
	}
	p.probe, p.probeWhy = probe.Open(probe.Config{
		PinDir: cfg.PinDir, Unified: unified, BTF: cfg.BTF,
		Host: probe.Identity{Tasks: p.place.Dirs["cpu"].ID, Block: p.place.Dirs["blkio"].ID, Netns: p.place.Netns},
	})
	p.sources = sources(p.probe, p.probeWhy, p.place, cfg.TrackerWhy)
	for _, s := range p.sources {
		if !strings.HasPrefix(s.From, "bpf:") {
			p.instead = p.instead.With(s.Signal)
		}
	}
	if p.host, err = newHost(p); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	p.say()
	return p, nil
}

// say logs once what is missing, by cause.
func (p *Profiler) say() {
	byWhy := map[string][]string{}
	for _, s := range p.sources {
		if strings.HasPrefix(s.From, "bpf:") || s.Why == "" || s.Signal == profile.DirtyPages {
			continue
		}
		byWhy[s.Why] = append(byWhy[s.Why], s.Signal.String()+" ("+s.From+")")
	}
	for why, signals := range byWhy {
		p.log.Info("profiles: without a program", "signals", signals, "err", why)
	}
	if p.probe != nil && p.probe.Pinned() != nil {
		p.log.Warn("profiles: nothing is counted while the daemon is down", "err", p.probe.Pinned())
	}
}

// Close releases what New took. Run must have returned.
func (p *Profiler) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, s := range p.subjects {
		errs = append(errs, s.close())
	}
	if p.host != nil {
		errs = append(errs, p.host.close())
	}
	if p.probe != nil {
		errs = append(errs, p.probe.Close())
	}
	return errors.Join(append(errs, p.store.Close())...)
}

// Sources says where every signal comes from.
func (p *Profiler) Sources() []Source { return slices.Clone(p.sources) }

// Run profiles until ctx ends, then files what the last minutes have so far.
func (p *Profiler) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.watch(ctx) })
	if p.cfg.Forecasts != nil {
		g.Go(func() error { return p.cfg.Forecasts.Run(ctx) })
	}
	g.Go(func() error { return p.pull(ctx) })
	g.Go(func() error {
		p.measureDirty(ctx)
		return nil
	})
	g.Go(func() error {
		defer close(p.writes)
		p.sampleLoop(ctx)
		p.finish()
		return nil
	})
	g.Go(func() error {
		p.writeLoop()
		return nil
	})
	return g.Wait()
}

// watch follows containerd, with a reconcile at every start and each minute.
func (p *Profiler) watch(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		for ctx.Err() == nil {
			err := p.cfg.Tasks.WatchTasks(ctx, func(e runtime.TaskEvent) {
				if e.Ended {
					p.end(e.Namespace+"/"+e.Name, e.PID)
				} else {
					p.begin(ctx, e.Task)
				}
			})
			if ctx.Err() != nil {
				return nil
			}
			p.log.Warn("profiles: shards that come and go are seen late", "err", err)
			wait(ctx, retryWatch)
		}
		return nil
	})
	g.Go(func() error {
		for ctx.Err() == nil {
			if err := p.reconcile(ctx); err != nil && ctx.Err() == nil {
				p.log.Warn("profiles: reconcile", "err", err)
			}
			wait(ctx, reconcileEvery)
		}
		return nil
	})
	return g.Wait()
}

// wait returns when d has passed or ctx ended.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// reconcile compares what is profiled with what containerd runs.
func (p *Profiler) reconcile(ctx context.Context) error {
	tasks, err := p.cfg.Tasks.Tasks(ctx)
	if err != nil {
		return err
	}
	running := map[string]bool{}
	for _, t := range tasks {
		running[t.Namespace+"/"+t.Name] = true
		p.begin(ctx, t)
	}
	if p.probe == nil {
		return nil
	}
	// Slots of shards that ended while no daemon ran.
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, slot := range p.probe.Tracked() {
		if p.subjects[name] == nil && !running[name] {
			if err := p.probe.Release(slot); err != nil {
				return err
			}
		}
	}
	return nil
}

// sampleLoop samples once a second, on the wall clock's seconds as far as the
// scheduler allows, so that points and intervals agree.
func (p *Profiler) sampleLoop(ctx context.Context) {
	pruned := time.Time{}
	for ctx.Err() == nil {
		now := time.Now()
		wait(ctx, now.Truncate(period).Add(period).Sub(now))
		if ctx.Err() != nil {
			return
		}
		if err := p.sample(); err != nil {
			p.log.Warn("profiles: sample", "err", err)
		}
		if now.Sub(pruned) > pruneEvery {
			pruned = now
			if err := p.store.Prune(now); err != nil {
				p.log.Warn("profiles: prune", "err", err)
			}
		}
	}
}

// sample takes a sample of everything and queues the minutes that ended.
func (p *Profiler) sample() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	begun := now()
	defer func() { p.spent += now().Monotonic - begun.Monotonic }()
	p.tick++
	var err error
	if p.probe != nil {
		err = p.probe.Refresh()
	}
	r := &round{at: now()}
	var unread error
	if r.interfaces, unread = p.host.readInterfaces(p.buf); unread != nil {
		err = errors.Join(err, fmt.Errorf("network of the host: %w", unread))
	}
	minutes := map[string][]profile.Point{}
	for _, key := range p.news() {
		p.remove(key, minutes)
	}
	for _, s := range p.subjects {
		p.observe(s, r, minutes)
	}
	err = errors.Join(err, p.observeBirths())
	p.observeHost(r, minutes)
	p.queue(minutes)
	return err
}

// round is one moment, of which all samples of a second are: the programs'
// counts are as of it, the host's interfaces were read just then, and what is
// read of files follows within milliseconds.
type round struct {
	at         profile.Instant
	interfaces map[uint32]linkCounters // the host's, by index; nil if they are not known
}

// queue hands minutes to the writer. When it is full the oldest batch is lost
// rather than the sampler held up.
func (p *Profiler) queue(minutes map[string][]profile.Point) {
	if len(minutes) == 0 {
		return
	}
	for {
		select {
		case p.writes <- minutes:
			return
		default:
		}
		select {
		case <-p.writes:
			p.dropped++
		default:
		}
	}
}

func (p *Profiler) writeLoop() {
	for minutes := range p.writes {
		if err := p.store.Put(minutes); err != nil {
			p.log.Warn("profiles: minutes are lost", "err", err)
		}
	}
}

// finish queues what the minutes under way have.
func (p *Profiler) finish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	minutes := map[string][]profile.Point{}
	for key, s := range p.subjects {
		if pt, ok := s.profile.Flush(); ok {
			minutes[key] = append(minutes[key], pt)
		}
	}
	if pt, ok := p.host.profile.Flush(); ok {
		minutes[hostKey] = append(minutes[hostKey], pt)
	}
	p.queue(minutes)
}

// now reads the three clocks, close together.
func now() profile.Instant {
	var mono, boot, wall unix.Timespec
	// These clocks exist on every kernel that is supported.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &mono)
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	_ = unix.ClockGettime(unix.CLOCK_REALTIME, &wall)
	return profile.Instant{
		Wall: time.Unix(wall.Unix()), Monotonic: time.Duration(mono.Nano()), Boot: time.Duration(boot.Nano()),
	}
}

// cpus is the host's capacity.
func cpus() int { return goruntime.NumCPU() }
