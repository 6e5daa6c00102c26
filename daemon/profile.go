package daemon

import (
	"context"
	"errors"
	"net/http"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/forecasts"
	"github.com/tranship/tranship/daemon/migrate"
	"github.com/tranship/tranship/daemon/profiler"
	"github.com/tranship/tranship/ebpf/profile"
)

// ProfileConfig is the profiling of shards and host.
type ProfileConfig struct {
	Enabled bool `toml:"enabled"`
	// PinDir keeps programs and counts while the daemon is down; its parent is a
	// bpf file system. Removing it ends all counting.
	PinDir string `toml:"pin_dir"`
	// BTF is a file with the kernel's types, for kernels that have none of their own.
	BTF string `toml:"btf"`
	// HistoryDays is how far profiles go back on disk, at one point a minute.
	HistoryDays int `toml:"history_days"`
	// DirtyMinutes is how often the rate at which a shard writes to its memory is
	// measured, which stops it for a fraction of a millisecond; 0 is only on demand.
	DirtyMinutes int `toml:"dirty_minutes"`
}

func defaultProfileConfig() ProfileConfig {
	return ProfileConfig{Enabled: true, PinDir: "/sys/fs/bpf/tranship", HistoryDays: 14, DirtyMinutes: 15}
}

// startProfiles begins to profile. A host that cannot is a host without
// profiles, not one that does not start.
func (h *host) startProfiles() {
	cfg := h.cfg.Profile
	if !cfg.Enabled {
		return
	}
	why := ""
	if h.facts.tracker == track.None {
		why = "this kernel cannot track written pages"
	}
	keeper := h.openForecasts()
	conf := profiler.Config{
		Node: h.cfg.Node, Tasks: h.rt, PinDir: cfg.PinDir, BTF: cfg.BTF,
		StorePath: filepath.Join(h.cfg.StateDir, "profiles.db"), Retention: time.Duration(cfg.HistoryDays) * 24 * time.Hour,
		TrackerWhy: why, CameFrom: h.moves.CameFrom, Fetch: h.fetchHistory, Dirty: h.moves.DirtyRate, DirtyEvery: time.Duration(cfg.DirtyMinutes) * time.Minute, Log: h.log,
	}
	if keeper != nil {
		conf.Forecasts = keeper
	}
	p, err := profiler.New(conf)
	if err != nil {
		h.log.Warn("shards are not profiled", "err", err)
		return
	}
	h.profiles = p
	h.onClose(p.Close)
	h.metrics.MustRegister(p.NewCollector())
	if keeper != nil {
		h.forecasts = keeper
		h.metrics.MustRegister(keeper.NewCollector())
	}
}

// openForecasts opens the forecasters' store; nil if that fails: profiles are
// worth having without forecasts.
func (h *host) openForecasts() *forecasts.Keeper {
	k, err := forecasts.Open(filepath.Join(h.cfg.StateDir, "forecasts.db"), h.cfg.Node, h.log)
	if err != nil {
		h.log.Warn("shards are not forecast", "err", err)
		return nil
	}
	h.onClose(k.Close)
	return k
}

// fetchHistory asks another host of the pool what it knows of a shard.
func (h *host) fetchHistory(ctx context.Context, node, namespace, name string) (profiler.Travelling, error) {
	if h.peers == nil {
		return profiler.Travelling{}, errors.New("this host has no peers")
	}
	client, err := h.peers.Client(node)
	if err != nil {
		return profiler.Travelling{}, err
	}
	resp, err := client.History(ctx, connect.NewRequest(&v1.HistoryRequest{Namespace: namespace, Shard: name}))
	if err != nil {
		return profiler.Travelling{}, err
	}
	return profiler.Travelling{Blocks: resp.Msg.GetBlocks(), Forecasts: resp.Msg.GetForecasts()}, nil
}

// profileHandler answers for profiles on the local socket; nil without any.
func (h *host) profileHandler() *profiler.Handler {
	if h.profiles == nil {
		return nil
	}
	ph := &profiler.Handler{P: h.profiles}
	if h.peers != nil {
		ph.Peers = h.peers.Nodes
		ph.PeerLoad = func(ctx context.Context, node string, req *v1.LoadRequest) (*v1.LoadResponse, error) {
			client, err := h.peers.Client(node)
			if err != nil {
				return nil, err
			}
			resp, err := client.Load(ctx, connect.NewRequest(req))
			if err != nil {
				return nil, err
			}
			return resp.Msg, nil
		}
	}
	return ph
}

// mountProfiles serves profiles locally.
func (h *host) mountProfiles(mux *http.ServeMux) {
	if ph := h.profileHandler(); ph != nil {
		mux.Handle(transhipv1connect.NewProfilesHandler(ph, handlerOptions()...))
	}
}

// withProfiles lets peers ask for load and history.
func (h *host) withProfiles(to migrate.Host) migrate.Host {
	if h.profiles == nil {
		return to
	}
	local := &profiler.Handler{P: h.profiles}
	to.Load = func(_ context.Context, req *v1.LoadRequest) (*v1.LoadResponse, error) { return local.Local(req), nil }
	to.History = func(_ context.Context, req *v1.HistoryRequest) (*v1.HistoryResponse, error) {
		t, err := h.profiles.Travelling(req.GetNamespace(), req.GetShard())
		if err != nil {
			return nil, err
		}
		return &v1.HistoryResponse{Blocks: t.Blocks, Forecasts: t.Forecasts}, nil
	}
	return to
}

// cpuLoad is the share of this host's CPUs that was in use lately; nil when
// nothing measures it.
func (h *host) cpuLoad() *float64 {
	if h.profiles == nil {
		return nil
	}
	local := &profiler.Handler{P: h.profiles}
	for _, host := range local.Local(&v1.LoadRequest{}).GetHosts() {
		if used, ok := host.GetRates()[profile.CPU.String()]; ok && host.GetCpus() > 0 {
			return proto.Float64(min(max(used/float64(host.GetCpus()), 0), 1))
		}
	}
	return nil
}

// shardCPUs is what each shard used lately, in CPUs, by namespace and name.
func (h *host) shardCPUs() map[[2]string]float64 {
	out := map[[2]string]float64{}
	if h.profiles == nil {
		return out
	}
	local := &profiler.Handler{P: h.profiles}
	for _, s := range local.Local(&v1.LoadRequest{}).GetShards() {
		out[[2]string{s.GetNamespace(), s.GetName()}] = s.GetRates()[profile.CPU.String()]
	}
	return out
}
