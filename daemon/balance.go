package daemon

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/http"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/singleflight"

	"github.com/tranship/tranship/allocate"
	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/daemon/balance"
	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/migrate"
	"github.com/tranship/tranship/daemon/peers/gossip"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/transfer"
)

// startBalance begins to plan. A host that cannot is one that neither moves its
// shards nor takes others' by itself.
func (h *host) startBalance() {
	if h.profiles == nil || h.forecasts == nil {
		h.log.Warn("nothing is planned here: shards are not profiled or not forecast")
		return
	}
	seed := fnv.New64a()
	_, _ = seed.Write([]byte(h.cfg.Node)) // never fails
	conf := balance.Config{
		Autopilot: balance.Mode(h.cfg.Autopilot), Every: time.Duration(h.cfg.Balance.EverySeconds) * time.Second,
		Consolidate: h.cfg.Balance.Consolidate, Reactive: h.cfg.Balance.Policy == policyReactive, StorePath: filepath.Join(h.cfg.StateDir, "balance.db"),
		Host: &balanced{h: h, stat: make(chan struct{}, maxStats)}, Forecasts: h.forecasts, Log: h.log, Seed: seed.Sum64(), Weights: map[allocate.Tenant]float64{},
	}
	for name, t := range h.cfg.Tenants {
		conf.Weights[allocate.Tenant(name)] = t.Weight
	}
	if h.peers != nil {
		conf.Peers = &roomPeers{h: h}
	}
	b, err := balance.New(conf)
	if err != nil {
		h.log.Warn("nothing is planned here", "err", err)
		return
	}
	h.balance = b
	h.onClose(b.Close)
	h.metrics.MustRegister(b.NewCollector())
}

// mountBalance serves plans locally.
func (h *host) mountBalance(mux *http.ServeMux) {
	if h.balance != nil {
		mux.Handle(transhipv1connect.NewBalanceHandler(&balance.Handler{B: h.balance}, handlerOptions()...))
	}
}

// balanced is this host for package balance.
type balanced struct {
	h *host

	mu     sync.Mutex
	rest   float64 // CPUs that the host itself uses, smoothed
	free   float64 // bytes that shards have or could have
	link   float64
	looked time.Time
	known  map[string]map[string]runtime.Settings // by namespace and name
	came   map[[2]string]migrate.Arrival
	images map[string]map[string][]allocate.Data // layers, by namespace and image's name
	layers map[string]bool                       // of them all
	read   map[string][]runtime.Layer            // as Runtime.Layers remembers them

	stats singleflight.Group
	stat  chan struct{} // as many at once
}

var _ balance.Host = (*balanced)(nil)

const (
	// lookEvery is how often labels and limits are read again, which somebody may
	// have changed.
	lookEvery = 15 * time.Second
	// restWeight smooths what the host itself uses: a migration is no reason to
	// take the host for a smaller one.
	restWeight = 0.05
	// memoryReserve is what pre-flight keeps free on a target, too.
	memoryReserve = 128 << 20
)

// Facts describe the host as of the last Shards.
func (b *balanced) Facts() balance.Facts {
	cfg := &b.h.cfg
	b.h.drains.mu.Lock()
	draining := b.h.drains.stop != nil
	b.h.drains.mu.Unlock()
	f := balance.Facts{
		Name: cfg.Node, Zone: cfg.Host.Zone, Labels: cfg.Host.Labels, CostPerHour: cfg.Host.CostPerHour,
		Cordoned: b.h.cordon.on(), Draining: draining, Arriving: map[allocate.ShardID]bool{},
		CPUs: cfg.Host.CPUs, Memory: float64(cfg.Host.MemoryBytes),
	}
	for at := range b.h.moves.Coming() {
		f.Arriving[allocate.ShardID(at[0]+"/"+at[1])] = true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	f.Link, f.Layers = b.link, b.layers
	if n := float64(goruntime.NumCPU()); f.CPUs == 0 {
		f.CPUs = max(n-b.rest, n/10)
	}
	if f.Memory == 0 {
		f.Memory = max(b.free-memoryReserve, memoryReserve)
	}
	return f
}

// Shards lists what is profiled, which is what runs.
func (b *balanced) Shards(ctx context.Context) ([]balance.Shard, error) {
	load := b.h.profiles.Load(0)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.measure(load)
	if err := b.look(ctx, load.GetShards()); err != nil {
		return nil, err
	}
	var out []balance.Shard
	for _, l := range load.GetShards() {
		at := [2]string{l.GetNamespace(), l.GetName()}
		s, known := b.known[at[0]][at[1]]
		if !known || s.Incoming != "" || !s.Running {
			continue // it has just ended, or is not here yet
		}
		o := balance.Shard{
			Namespace: at[0], Name: at[1], Labels: s.Labels, CPULimit: s.CPUs, Rates: l.GetRates(),
			Migration: b.h.moves.MigrationOf(at[0], at[1]), Foreign: runtime.ForeignNamespace(at[0]),
			MovedAt: b.came[at].At, LastHost: b.came[at].From, Layers: b.images[at[0]][s.Image], Volumes: s.Shared,
		}
		if l.DirtyPagesPerSecond != nil {
			bytes := l.GetDirtyPagesPerSecond() * checkpoint.PageSize
			o.DirtyBytes = &bytes
		}
		out = append(out, o)
	}
	return out, nil
}

// measure takes what is left of the host beside its shards. b.mu is held.
func (b *balanced) measure(load *v1.LoadResponse) {
	cpus, memory := 0.0, 0.0
	for _, s := range load.GetShards() {
		cpus += s.GetRates()[profile.CPU.String()]
		memory += s.GetRates()[profile.WorkingSet.String()]
	}
	for _, host := range load.GetHosts() {
		b.link = host.GetLinkBytesPerSecond()
		if all, ok := host.GetRates()[profile.CPU.String()]; ok {
			b.rest += restWeight * (max(0, all-cpus) - b.rest)
		}
	}
	if raw, err := os.ReadFile("/proc/meminfo"); err == nil {
		_, available := migrate.MemoryOf(string(raw))
		b.free = float64(available) + memory
	}
}

// look reads what containerd and the journal know of the shards, now and then,
// and when there is one that is not known. b.mu is held.
func (b *balanced) look(ctx context.Context, shards []*v1.ShardLoad) error {
	fresh := time.Since(b.looked) < lookEvery
	known := map[string]map[string]runtime.Settings{}
	for _, l := range shards {
		_, have := b.known[l.GetNamespace()][l.GetName()]
		fresh = fresh && have
		known[l.GetNamespace()] = nil
	}
	if fresh {
		return nil
	}
	came, err := b.h.moves.Arrivals()
	if err != nil {
		return err
	}
	for namespace := range known {
		if known[namespace], err = b.h.rt.Settings(ctx, namespace, b.known[namespace]); err != nil {
			return err
		}
	}
	b.known, b.came, b.looked = known, came, time.Now()
	return b.lookAtImages(ctx)
}

// lookAtImages lists what a shard that comes here does not have to bring.
func (b *balanced) lookAtImages(ctx context.Context) error {
	namespaces, err := b.h.rt.Namespaces(ctx)
	if err != nil {
		return err
	}
	if b.read == nil || len(b.read) > maxImages {
		b.read = map[string][]runtime.Layer{}
	}
	images, all := map[string]map[string][]allocate.Data{}, map[string]bool{}
	for _, ns := range namespaces {
		of, err := b.h.rt.Layers(ctx, ns, b.read)
		if err != nil {
			// Plans are worth having without them.
			b.h.log.Debug("balance: images", "err", err)
		}
		images[ns] = map[string][]allocate.Data{}
		for name, layers := range of {
			for _, l := range layers {
				images[ns][name] = append(images[ns][name], allocate.Data{Name: l.Key, Bytes: float64(l.Bytes)})
				all[l.Key] = true
			}
		}
	}
	b.images, b.layers = images, all
	return nil
}

const (
	// maxImages of which the layers are remembered.
	maxImages = 4096
	// statTimeout and maxStats keep a file server that is away from holding peers
	// that ask, and from holding all threads.
	statTimeout = 500 * time.Millisecond
	maxStats    = 32
)

// Volumes are those of the paths that are here. One that does not answer soon
// is not.
func (b *balanced) Volumes(ctx context.Context, paths []string) (here []string) {
	ctx, cancel := context.WithTimeout(ctx, statTimeout)
	defer cancel()
	asked := make([]<-chan singleflight.Result, len(paths))
	for i, path := range paths {
		asked[i] = b.stats.DoChan(path, func() (any, error) {
			select {
			case b.stat <- struct{}{}:
				defer func() { <-b.stat }()
				return os.Stat(path)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})
	}
	for i, path := range paths {
		var r singleflight.Result
		select {
		case r = <-asked[i]:
		case <-ctx.Done():
			select { // those behind one that does not answer have
			case r = <-asked[i]:
			default:
				continue
			}
		}
		if r.Err == nil {
			here = append(here, path)
		}
	}
	return here
}

// Resize sets a shard's CPU limit.
func (b *balanced) Resize(ctx context.Context, namespace, name string, cpus float64) error {
	_, err := b.h.rt.Resize(ctx, namespace, name, runtime.Resize{CPUs: &cpus})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.looked = time.Time{}
	return err
}

// Check runs pre-flight.
func (b *balanced) Check(ctx context.Context, namespace, name, node string) (string, error) {
	resp, err := b.h.moves.Check(ctx, connect.NewRequest(&v1.CheckRequest{Namespace: namespace, Shard: name, Node: node}))
	if err != nil {
		return "", err
	}
	return refusalOf(resp.Msg.GetFindings()), nil
}

func refusalOf(findings []*v1.Finding) string {
	var why []string
	for _, f := range findings {
		if !f.GetWarning() {
			why = append(why, f.GetMessage())
		}
	}
	return strings.Join(why, "; ")
}

// Migrate moves a shard by the same API as the command line.
func (b *balanced) Migrate(ctx context.Context, namespace, name, node string) (*v1.Migration, error) {
	client, err := control.NewClient("unix://" + b.h.cfg.API.Socket)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	req := &v1.MigrateRequest{Namespace: namespace, Shard: name, Node: node}
	stream, err := client.Migrations.Migrate(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	for stream.Receive() {
		r := stream.Msg().GetResult()
		if r == nil {
			continue
		}
		if why := refusalOf(stream.Msg().GetRefused()); why != "" {
			r.Reason = why
		}
		return r, nil
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return nil, errors.New("the migration ended without a result")
}

// roomPeers are the other hosts for package balance.
type roomPeers struct{ h *host }

var _ balance.Peers = (*roomPeers)(nil)

// Peers leaves out whom gossip suspects.
func (p *roomPeers) Peers() []balance.Peer {
	live := p.h.cluster.live.Load()
	var out []balance.Peer
	for _, name := range p.h.peers.Nodes() {
		peer := balance.Peer{Name: name}
		if live != nil {
			m, ok := live.Member(name)
			if ok && m.State != gossip.Alive {
				continue
			}
			peer.Idle = ok && m.CPULoad == 0
		}
		out = append(out, peer)
	}
	return out
}

func (p *roomPeers) Room(ctx context.Context, node string, req *v1.RoomRequest) (*v1.RoomResponse, error) {
	client, err := p.h.peers.Rooms(node)
	if err != nil {
		return nil, err
	}
	resp, err := client.Room(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

func (p *roomPeers) Book(ctx context.Context, node string, req *v1.BookRequest) (*v1.BookResponse, error) {
	client, err := p.h.peers.Rooms(node)
	if err != nil {
		return nil, err
	}
	resp, err := client.Book(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

func (p *roomPeers) Unbook(ctx context.Context, node string, req *v1.UnbookRequest) error {
	client, err := p.h.peers.Rooms(node)
	if err != nil {
		return err
	}
	_, err = client.Unbook(ctx, connect.NewRequest(req))
	return err
}

// roomsHandler is what other hosts ask of this one's room.
type roomsHandler struct{ h *host }

var _ transhipv1connect.RoomsHandler = (*roomsHandler)(nil)

func (r *roomsHandler) balance() (*balance.Balancer, error) {
	if r.h.balance == nil {
		return nil, connect.NewError(connect.CodeUnavailable, fmt.Errorf("%s plans nothing: it does not profile or forecast", r.h.cfg.Node))
	}
	return r.h.balance, nil
}

// Room tells of this host.
func (r *roomsHandler) Room(ctx context.Context, req *connect.Request[v1.RoomRequest]) (*connect.Response[v1.RoomResponse], error) {
	b, err := r.balance()
	if err != nil {
		return nil, err
	}
	return response(b.Room(ctx, transfer.PeerFrom(ctx), req.Msg))
}

// Book keeps room for a shard of the caller.
func (r *roomsHandler) Book(ctx context.Context, req *connect.Request[v1.BookRequest]) (*connect.Response[v1.BookResponse], error) {
	b, err := r.balance()
	if err != nil {
		return nil, err
	}
	return response(b.Book(transfer.PeerFrom(ctx), req.Msg))
}

// Unbook ends a promise to the caller.
func (r *roomsHandler) Unbook(ctx context.Context, req *connect.Request[v1.UnbookRequest]) (*connect.Response[v1.UnbookResponse], error) {
	b, err := r.balance()
	if err != nil {
		return nil, err
	}
	return response(b.Unbook(transfer.PeerFrom(ctx), req.Msg))
}

func response[T any](m *T, err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(m), nil
}
