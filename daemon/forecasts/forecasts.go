// Package forecasts keeps the forecasters of every shard of the host. Its flow:
//
//	ten seconds of a shard (daemon/profiler) → a queue → its forecasters, one
//	a signal, a constant time each → the API and metrics read them;
//	each minute what came goes to the disk, each hour a shard's whole state
//
// A shard that moves takes its state along, a cold one borrows from shards like
// it, and what ended is forgotten. It refuses to decide anything.
package forecasts

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/tranship/tranship/allocate"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/predict"
)

// Signals are forecast, of every shard: CPU, memory, network and block I/O.
var Signals = [...]profile.Signal{
	profile.CPU, profile.WorkingSet, profile.ReceiveBytes, profile.TransmitBytes, profile.ReadBytes, profile.WriteBytes,
}

const signals = len(Signals)

// step is the forecasters' grid: what the profiler rolls up to first.
const step = profile.DecaSecond

// horizons: those that `tranship backtest` measures, and a week.
func horizons() []time.Duration { return append(predict.DefaultHorizons(), week) }

const (
	week = 7 * 24 * time.Hour
	// queueLength: a thousand shards end their ten seconds in the same moment.
	// What finds no place is a gap.
	queueLength = 4096
	// saveEvery bounds what kill -9 costs.
	saveEvery = time.Minute
	// snapshotEvery so many saves a shard's whole state is written: some 350 KB,
	// where what came in a minute are 200 bytes.
	snapshotEvery = 60
	// idleSaves without a sample: the shard has ended without a word.
	idleSaves = 15
	// shortLife: of a shard that was there for less than five minutes the samples
	// are kept, which take a hundredth of the room of what they taught.
	shortLife  = 30
	pruneEvery = time.Hour
)

// Labels of a shard decide from whom it borrows.
type Labels struct{ Tenant, Workload string }

// cell is ten seconds of one shard.
type cell struct {
	start time.Time
	has   uint8 // by place in Signals
	mean  [signals]float32
}

// shard is one shard's forecasters.
type shard struct {
	labels   Labels
	series   [signals]*predict.Forecaster // nil until the signal was measured
	until    time.Time                    // the end of the newest cell
	borrowed string                       // scope of the nearest lenders
	pending  []cell                       // not on disk yet
	idle     int                          // saves since the newest cell
	ended    bool
	short    bool // ended after a shortLife: it is its samples
}

// Keeper keeps the forecasters of one host. Its methods may be called
// concurrently.
type Keeper struct {
	node  string
	log   *slog.Logger
	store *store
	queue chan any // observation, gone, adoption

	mu      sync.Mutex
	shards  map[string]*shard // by NAMESPACE/NAME
	lenders map[scope]lent
	counts  counts
	saves   int
}

type counts struct {
	cells, dropped, adopted, lost float64
	borrowed                      map[string]float64
}

// What is queued.
type (
	observation struct {
		key    string
		labels Labels
		cell   cell
	}
	gone     struct{ key string }
	adoption struct {
		key   string
		state []byte
		done  chan error
	}
)

// Open opens or makes the store at path.
func Open(path, node string, log *slog.Logger) (*Keeper, error) {
	s, err := openStore(path)
	if err != nil {
		return nil, err
	}
	return &Keeper{
		node: node, log: log, store: s, queue: make(chan any, queueLength),
		shards: map[string]*shard{}, lenders: map[scope]lent{}, counts: counts{borrowed: map[string]float64{}},
	}, nil
}

// Close releases the store. Run must have returned.
func (k *Keeper) Close() error { return k.store.Close() }

// Offer hands over ten seconds of a shard. It does not block: if Run is behind,
// they are lost and counted.
func (k *Keeper) Offer(key string, labels Labels, pt *profile.Point) {
	c := cellOf(pt)
	select {
	case k.queue <- observation{key, labels, c}:
	default:
		k.mu.Lock()
		k.counts.dropped++
		k.mu.Unlock()
	}
}

func cellOf(pt *profile.Point) cell {
	c := cell{start: pt.Start}
	for i, s := range Signals {
		if pt.Has.Has(s) {
			c.has |= 1 << i
			c.mean[i] = pt.Mean[s]
		}
	}
	return c
}

// End says that a shard is gone. If the word is lost, silence says it later.
func (k *Keeper) End(key string) {
	select {
	case k.queue <- gone{key}:
	default:
	}
}

// Adopt takes over what another host knows of a shard that came from there: a
// state that its State returned. What was seen here meanwhile is added to it. A
// state that knows less than this host does is left out.
func (k *Keeper) Adopt(ctx context.Context, key string, state []byte) error {
	a := adoption{key, state, make(chan error, 1)}
	select {
	case k.queue <- a:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-a.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Run feeds the forecasters until ctx ends, then saves what the last minute has.
func (k *Keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	pruned := time.Time{}
	for {
		select {
		case item := <-k.queue:
			k.take(item)
		case now := <-tick.C:
			k.save()
			if now.Sub(pruned) > pruneEvery {
				pruned = now
				if err := k.store.prune(now, k.alive()); err != nil {
					k.log.Warn("forecasts: prune", "err", err)
				}
			}
		case <-ctx.Done():
			for {
				select {
				case item := <-k.queue:
					k.take(item)
					continue
				default:
				}
				k.save()
				return nil
			}
		}
	}
}

func (k *Keeper) take(item any) {
	switch item := item.(type) {
	case observation:
		k.observe(item)
	case gone:
		k.end(item.key)
	case adoption:
		item.done <- k.adopt(item.key, item.state)
	}
}

// observe feeds one cell; a shard that is not known yet comes from the disk, or
// is cold and borrows.
func (k *Keeper) observe(o observation) {
	k.mu.Lock()
	sh := k.shards[o.key]
	k.mu.Unlock()
	switch {
	case sh == nil:
		sh = k.recall(o.key, o.labels)
	case sh.ended && sh.labels != o.labels:
		sh = &shard{} // another workload's of the same name
	case sh.short:
		sh = k.relive(o.key, sh)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.shards[o.key] = sh
	sh.labels, sh.ended = o.labels, false
	k.feed(sh, o.cell)
	sh.pending = append(sh.pending, o.cell)
	sh.idle = 0
	k.counts.cells++
}

// recall makes a shard of what the disk has of it, nothing in doubt.
func (k *Keeper) recall(key string, labels Labels) *shard {
	raw, cells, err := k.store.read(key)
	if err != nil {
		k.log.Warn("forecasts: state", "shard", key, "err", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	sh := &shard{labels: labels}
	if raw != nil {
		switch old, err := parseShard(raw); {
		case err != nil:
			k.counts.lost++
			k.log.Warn("forecasts: a shard begins cold", "shard", key, "err", err)
		case old.labels == labels:
			sh = old
		default:
			cells = nil // another workload's of the same name
		}
	}
	for _, c := range cells {
		k.feed(sh, c)
	}
	return sh
}

// feed gives a cell to the forecasters, which know what to do with one that is
// older than the last: the clock was set back. k.mu is held.
func (k *Keeper) feed(sh *shard, c cell) {
	end := c.start.Add(step)
	for i := range Signals {
		if c.has>>i&1 == 0 {
			continue
		}
		f := sh.series[i]
		if f == nil {
			f = newForecaster()
			k.borrow(sh, i, f)
			sh.series[i] = f
		}
		f.Observe(c.start.Add(step/2), float64(c.mean[i]))
		f.Advance(end)
	}
	sh.until = end
}

func newForecaster() *predict.Forecaster {
	f, err := predict.New(predict.Config{Step: step, Horizons: horizons()})
	if err != nil {
		panic(fmt.Sprintf("forecasts: %v", err)) // the configuration is a constant
	}
	return f
}

// samples is how much a shard's forecasters have seen.
func (sh *shard) samples() int64 {
	var n int64
	for _, f := range sh.series {
		if f != nil {
			n = max(n, f.Samples())
		}
	}
	return n
}

// end keeps what a shard has taught until the next save; then it is on the disk,
// where the host that it may have moved to asks for it.
func (k *Keeper) end(key string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	sh := k.shards[key]
	if sh == nil {
		return
	}
	sh.ended = true
	if sh.samples() < shortLife {
		// Hundreds may come and go in a minute: their memory goes at once.
		sh.short, sh.series = true, [signals]*predict.Forecaster{}
	}
}

// relive makes a shard of a short life what it was.
func (k *Keeper) relive(key string, short *shard) *shard {
	sh := k.recall(key, short.labels)
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range short.pending {
		k.feed(sh, c)
	}
	sh.pending = short.pending
	return sh
}

// adopt replaces a shard's forecasters by those of another host, and feeds them
// what was seen here since.
func (k *Keeper) adopt(key string, raw []byte) error {
	came, err := parseShard(raw)
	if err != nil {
		return fmt.Errorf("forecasts of %s: %w", key, err)
	}
	_, cells, err := k.store.read(key)
	if err != nil {
		return fmt.Errorf("forecasts of %s: %w", key, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if have := k.shards[key]; have != nil && !have.ended {
		if have.samples() >= came.samples() {
			return nil
		}
		cells = append(cells, have.pending...)
		came.labels = have.labels
	}
	for _, c := range cells {
		if c.start.After(came.until.Add(-step)) {
			k.feed(came, c)
		}
	}
	// All of it is saved at once; from here on cells follow it.
	snapshot := encodeShard(came)
	if err := k.store.write(map[string][]byte{key: snapshot}, nil); err != nil {
		return fmt.Errorf("forecasts of %s: %w", key, err)
	}
	k.shards[key] = came
	k.counts.adopted++
	return nil
}

// State is what travels with a shard; nil for one of which nothing is known.
func (k *Keeper) State(key string) ([]byte, error) {
	k.mu.Lock()
	var pending []cell
	if sh := k.shards[key]; sh != nil && !sh.short {
		defer k.mu.Unlock()
		return encodeShard(sh), nil
	} else if sh != nil {
		pending = slices.Clone(sh.pending)
	}
	k.mu.Unlock()
	raw, cells, err := k.store.read(key)
	cells = append(cells, pending...)
	if err != nil || len(cells) == 0 {
		return raw, err
	}
	sh := &shard{}
	if raw != nil {
		if sh, err = parseShard(raw); err != nil {
			return nil, err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range cells {
		k.feed(sh, c)
	}
	return encodeShard(sh), nil
}

// save writes what came since the last save, and whole states in turn, so that
// not all of them are written in the same minute.
func (k *Keeper) save() {
	snapshots, logs := map[string][]byte{}, map[string][]cell{}
	k.mu.Lock()
	k.saves++
	k.forgetLenders()
	for key, sh := range k.shards {
		if sh.idle++; sh.idle > idleSaves {
			sh.ended = true
		}
		switch {
		case sh.short:
			if len(sh.pending) > 0 {
				logs[key] = sh.pending
			}
		case sh.ended, len(sh.pending) > 0 && (k.saves+turn(key))%snapshotEvery == 0:
			snapshots[key] = encodeShard(sh)
		case len(sh.pending) > 0:
			logs[key] = sh.pending
		}
	}
	k.mu.Unlock()
	var err error
	if len(snapshots)+len(logs) > 0 {
		err = k.store.write(snapshots, logs)
	}
	if err != nil {
		k.log.Warn("forecasts: a minute is lost if the daemon ends now", "err", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, sh := range k.shards {
		// Only Run's goroutine feeds shards, and this is it: nothing came between.
		switch {
		case err != nil:
			sh.pending = sh.pending[max(0, len(sh.pending)-maxPending):]
		case sh.ended:
			delete(k.shards, key)
		default:
			sh.pending = nil
		}
	}
}

// maxPending bounds what waits for a disk that takes nothing: an hour.
const maxPending = 360

// turn spreads shards over the saves of an hour.
func turn(key string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(key)) // never fails
	return int(h.Sum32() % snapshotEvery)
}

func (k *Keeper) alive() map[string]bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := map[string]bool{}
	for key := range k.shards {
		out[key] = true
	}
	return out
}

// Sentinels for what callers branch on.
var (
	// ErrUnknown: no shard of this name has been here for ten seconds.
	ErrUnknown = errors.New("nothing is known of it on this host yet")
	// ErrReach: the history does not reach far enough for so far ahead.
	ErrReach = errors.New("the history is too short to forecast so far ahead")
	// ErrSignal: this signal is not forecast, or was not measured.
	ErrSignal = errors.New("the signal is not forecast")
)

// Forecast returns the quantiles of a signal of a shard, h ahead of the newest
// ten seconds.
func (k *Keeper) Forecast(namespace, name string, signal profile.Signal, h time.Duration, target predict.Target) (predict.Quantiles, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, _, err := k.find(namespace+"/"+name, signal)
	if err != nil {
		return predict.Quantiles{}, err
	}
	if h > reach(f) {
		return predict.Quantiles{}, ErrReach
	}
	return f.Forecast(h, target)
}

// Newest is the end of the newest ten seconds of a signal of a shard.
func (k *Keeper) Newest(namespace, name string, signal profile.Signal) (time.Time, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, sh, err := k.find(namespace+"/"+name, signal)
	if err != nil {
		return time.Time{}, err
	}
	return sh.until, nil
}

// Outlook is what is planned with of a signal of a shard, from its newest ten
// seconds on.
func (k *Keeper) Outlook(namespace, name string, signal profile.Signal) (allocate.Outlook, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f, _, err := k.find(namespace+"/"+name, signal)
	if err != nil {
		return allocate.Outlook{}, err
	}
	return allocate.Foresee(f)
}

// find looks a forecaster up. k.mu is held.
func (k *Keeper) find(key string, signal profile.Signal) (*predict.Forecaster, *shard, error) {
	sh := k.shards[key]
	if sh == nil || sh.ended {
		return nil, nil, ErrUnknown
	}
	for i, s := range Signals {
		if s == signal && sh.series[i] != nil {
			return sh.series[i], sh, nil
		}
	}
	return nil, nil, ErrSignal
}

// reach is how far ahead a forecaster may be asked: a week only once it has seen
// what came of one.
func reach(f *predict.Forecaster) time.Duration {
	if f.Settled(week) > 0 {
		return week
	}
	return 24 * time.Hour
}
