// Package daemon wires a host together and starts and stops it in order:
//
//	containerd, journal, page store → migrations left by an earlier life →
//	peers → local API → metrics
//
// and back again in reverse. It owns the configuration; what the parts do is
// theirs.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/track"
	"github.com/tranship/tranship/daemon/balance"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/forecasts"
	"github.com/tranship/tranship/daemon/migrate"
	"github.com/tranship/tranship/daemon/peers"
	"github.com/tranship/tranship/daemon/profiler"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads/steward"
	"github.com/tranship/tranship/transfer"
)

// PageServerCommand is the word with which transhipd starts itself as a page server.
const PageServerCommand = migrate.PageServerCommand

// Run is the daemon: it returns when ctx ends and everything is stopped, or when
// something that the host cannot do without has failed.
func Run(ctx context.Context, cfg Config, version string) error {
	log, err := newLogger(cfg.Log)
	if err != nil {
		return err
	}
	h := &host{cfg: cfg, version: version, log: log.With("node", cfg.Node)}
	defer h.close()
	if err := h.start(ctx); err != nil {
		return err
	}
	return h.serve(ctx)
}

// host is one running daemon. Its parts are started in the order of its fields.
type host struct {
	cfg     Config
	version string
	log     *slog.Logger

	rt      *runtime.Runtime
	journal *migrate.Journal
	cluster *belonging // nil: this host has no peers
	peers   *peers.Directory
	cordon  *cordon
	drains  drains
	metrics *prometheus.Registry
	moves   *migrate.Manager
	steward *steward.Steward
	pages   *transfer.Server
	api     net.Listener
	scrape  net.Listener
	facts   hostFacts
	// profiles is nil when they are off, or this machine has none.
	profiles *profiler.Profiler
	// forecasts and balance are nil without profiles.
	forecasts *forecasts.Keeper
	balance   *balance.Balancer

	closers []func() error
}

// onClose runs when the daemon stops, newest first.
func (h *host) onClose(f func() error) { h.closers = append(h.closers, f) }

func (h *host) close() {
	for i := len(h.closers) - 1; i >= 0; i-- {
		if err := h.closers[i](); err != nil {
			h.log.Warn("stop", "err", err)
		}
	}
}

func (h *host) start(ctx context.Context) error {
	cfg := h.cfg
	store := filepath.Join(cfg.RunDir, "store")
	if err := mountStore(store, cfg.Store.SizeBytes); err != nil {
		return err
	}
	h.onClose(func() error { return unmountStore(store) })

	var err error
	if h.journal, err = migrate.OpenJournal(filepath.Join(cfg.StateDir, "journal.db")); err != nil {
		return err
	}
	h.onClose(h.journal.Close)

	if h.cordon, err = openCordon(cfg.StateDir); err != nil {
		return err
	}
	serverTLS, err := h.startPeers()
	if err != nil {
		return err
	}
	rtc := runtime.Config{
		Node: cfg.Node, Address: cfg.Containerd.Address, Snapshotter: cfg.Containerd.Snapshotter,
		StateDir: cfg.StateDir, RunDir: cfg.RunDir, Log: h.log,
		Network: runtime.NetworkConfig{
			Bridge: cfg.Network.Bridge, Subnet: cfg.Network.Subnet, Pool: cfg.Network.Pool,
			Gateway: cfg.Network.Gateway, MTU: cfg.Network.MTU, CNIBin: cfg.Network.CNIBin,
		},
	}
	if h.peers != nil {
		rtc.PeerAddresses = h.peers.Addresses
	}
	if h.rt, err = runtime.New(ctx, rtc); err != nil {
		return err
	}
	h.onClose(h.rt.Close)

	h.metrics = prometheus.NewRegistry()
	h.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if err := h.startMigrations(ctx, store); err != nil {
		return err
	}
	if err := h.startWorkloads(ctx); err != nil {
		return err
	}
	h.startProfiles()
	h.startBalance()
	if h.peers != nil {
		if err := h.listenForPeers(serverTLS); err != nil {
			return err
		}
	}
	return h.listenLocally()
}

func (h *host) startPeers() (*serverTLS, error) {
	if h.cfg.Peer.Listen == "" {
		return nil, nil
	}
	b, server, client, err := h.startBelonging()
	if err != nil || b == nil {
		return nil, err
	}
	h.cluster = b
	if h.peers, err = peers.New(b, client); err != nil {
		return nil, err
	}
	h.onClose(h.peers.Close)
	return server, nil
}

func (h *host) startMigrations(ctx context.Context, store string) error {
	binary, err := criu.Find(h.cfg.CRIU.Path)
	if err != nil {
		// The host still runs shards; it cannot move them, and pre-flight says so.
		h.log.Warn("shards cannot be moved from here", "err", err)
	}
	if binary != "" {
		if err := criu.Warm(ctx, binary); err != nil {
			h.log.Warn("criu", "err", err)
		}
	}
	unchanged, err := criu.PrepareUnchanged(ctx, binary, filepath.Join(h.cfg.RunDir, "criu.kdat"))
	if err != nil && binary != "" {
		h.log.Info("blackouts grow with memory", "err", err)
	}
	kind, why := track.Probe()
	if kind == track.None {
		h.log.Warn("written memory cannot be tracked: moves copy everything while the shard stands still", "err", why)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("own binary: %w", err)
	}
	h.facts = h.gatherFacts(ctx, binary, kind)
	var pool migrate.Peers = noPeers{}
	if h.peers != nil {
		pool = h.peers
	}
	traces, stopTraces, err := openTraces(ctx, h.cfg.Traces, h.cfg.Node, h.version, h.log)
	if err != nil {
		return err
	}
	h.onClose(stopTraces)
	h.moves, err = migrate.New(migrate.Config{
		Node: h.cfg.Node, StoreDir: store, TmpfsDir: filepath.Join(h.cfg.RunDir, "tmpfs"), Daemon: self, CRIU: binary, CRIULogLevel: h.cfg.CRIU.LogLevel, Unchanged: unchanged,
		Versions: h.facts.versions, Subnet: h.cfg.Network.Subnet, Tracker: kind, Traces: traces,
	}, h.journal, h.rt, pool, migrate.NewMetrics(h.metrics), h.log)
	if err != nil {
		return err
	}
	h.onClose(func() error { h.moves.Close(); return nil })
	return h.moves.Recover(ctx)
}

func (h *host) listenForPeers(conf *serverTLS) error {
	mux := http.NewServeMux()
	moves := migrate.NewPeerHandler(h.moves, h.withProfiles(migrate.Host{Node: h.node, Shards: h.localShards, Run: h.runForPeer}))
	mux.Handle(transhipv1connect.NewPeerHandler(&guarded{PeerHandler: moves, h: h}, append(handlerOptions(), rawPages())...))
	mux.Handle(transhipv1connect.NewWorkloadHostsHandler(steward.Peers{Steward: h.steward}, handlerOptions()...))
	mux.Handle(transhipv1connect.NewPoolHandler(&poolHandler{h: h}, handlerOptions()...))
	mux.Handle(transhipv1connect.NewRoomsHandler(&roomsHandler{h: h}, handlerOptions()...))
	var err error
	if h.pages, err = transfer.Listen(h.cfg.Peer.Listen, conf, mux, h.moves.AcceptPages, h.log); err != nil {
		return err
	}
	h.onClose(h.pages.Close)
	return h.cluster.listen()
}

// listenLocally opens the unix socket and the metrics port.
func (h *host) listenLocally() error {
	socket := h.cfg.API.Socket
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		return fmt.Errorf("local API: %w", err)
	}
	// The journal's lock says that no other daemon lives, so a socket is stale.
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("local API: %w", err)
	}
	var err error
	if h.api, err = net.Listen("unix", socket); err != nil {
		return fmt.Errorf("local API: %w", err)
	}
	h.onClose(func() error { return ignoreClosed(h.api.Close()) })
	if err := restrict(socket, h.cfg.API.Group); err != nil {
		return fmt.Errorf("local API: %w", err)
	}
	if h.cfg.Metrics.Listen == "" {
		return nil
	}
	if h.scrape, err = net.Listen("tcp", h.cfg.Metrics.Listen); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	h.onClose(func() error { return ignoreClosed(h.scrape.Close()) })
	return nil
}

// restrict makes a socket 0660, of the group if there is one.
func restrict(socket, group string) error {
	if g, err := user.LookupGroup(group); err == nil {
		gid, err := strconv.Atoi(g.Gid)
		if err != nil {
			return err
		}
		if err := os.Chown(socket, 0, gid); err != nil {
			return err
		}
	}
	return os.Chmod(socket, 0o660)
}

// serve answers until ctx ends or a server fails.
func (h *host) serve(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	api := &http.Server{Handler: h.localAPI(), ReadHeaderTimeout: readHeaderTimeout}
	serveHTTP(ctx, g, "local API", api, h.api)
	if h.scrape != nil {
		mux := http.NewServeMux()
		mux.Handle("/metrics", promhttp.HandlerFor(h.metrics, promhttp.HandlerOpts{EnableOpenMetrics: true, Registry: h.metrics}))
		serveHTTP(ctx, g, "metrics", &http.Server{Handler: mux, ReadHeaderTimeout: readHeaderTimeout}, h.scrape)
	}
	if h.profiles != nil {
		g.Go(func() error { return h.profiles.Run(ctx) })
	}
	if h.balance != nil {
		g.Go(func() error { return h.balance.Run(ctx) })
	}
	g.Go(func() error { return h.steward.Run(ctx) })
	if h.cluster != nil {
		g.Go(func() error { return h.cluster.run(ctx) })
	}
	if h.pages != nil {
		g.Go(func() error {
			if err := h.pages.Serve(ctx); err != nil && ctx.Err() == nil {
				return fmt.Errorf("peers: %w", err)
			}
			return nil
		})
	}
	h.log.Info("transhipd is up", "version", h.version, "socket", h.cfg.API.Socket, "peers", h.cfg.Peer.Listen, "tracker", h.facts.tracker)
	return g.Wait()
}

// readHeaderTimeout ends connections of clients that say nothing.
const readHeaderTimeout = 10 * time.Second

func serveHTTP(ctx context.Context, g *errgroup.Group, what string, srv *http.Server, l net.Listener) {
	g.Go(func() error {
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownGrace)
		defer cancel()
		if err := srv.Shutdown(sctx); err != nil {
			return errors.Join(fmt.Errorf("%s: %w", what, err), srv.Close())
		}
		return nil
	})
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func newLogger(cfg LogConfig) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
		return nil, fmt.Errorf("log.level: %w", err)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch cfg.Format {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return nil, fmt.Errorf("log.format: %q is neither text nor json", cfg.Format)
}
