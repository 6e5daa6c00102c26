// Package migrate moves shards: source.go and destination.go are mirror images,
// stoprule.go and recovery.go are pure, journal.go is what survives a crash.
//
// Road of a page: track finds what the shard wrote → ReadMemory reads it →
// transfer.Round encodes and sends it → at the destination the Sink puts it
// into the page store → the shard is frozen, CRIU dumps it without its pages →
// the destination seals, the source yields, runc restores, and the page server
// places the pages under the running shard.
//
// It refuses to know how containers, CRIU, QUIC or the network do their part.
package migrate

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/semaphore"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/pagestore"
	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/transfer"
)

// Peers reaches the other hosts of the pool.
type Peers interface {
	// Client speaks the peer API with a node; ErrUnknownNode for one that is not in the pool.
	Client(node string) (transhipv1connect.PeerClient, error)
	// Dial opens a page session for a migration that the node has reserved.
	Dial(ctx context.Context, node, migration string, opt transfer.Options) (*transfer.Session, error)
}

// ErrUnknownNode says that no host of the pool has that name.
var ErrUnknownNode = errors.New("no such node")

// Config is what a Manager needs to know of its host.
type Config struct {
	Node string
	// StoreDir is on a tmpfs; a directory a migration holds pages and images.
	StoreDir string
	// TmpfsDir holds the mounts of arriving shards.
	TmpfsDir string
	// Daemon is the transhipd binary, started again as page server.
	Daemon string
	// CRIU is the binary that dumps, CRIULogLevel its verbosity.
	CRIU         string
	CRIULogLevel int
	// Unchanged is what keeps CRIU from touching every page of a dump; nil where
	// it cannot be kept from it.
	Unchanged *criu.Unchanged
	Versions  *v1.Versions
	// Subnet holds the addresses of all shards of the pool.
	Subnet netip.Prefix
	// Tracker is what this host's kernel can do.
	Tracker track.Kind
	// Traces, if any, gets a trace of every migration that ends here as source.
	Traces trace.Tracer
}

// Manager runs this host's end of every migration. Safe for concurrent use.
type Manager struct {
	cfg     Config
	journal *Journal
	rt      *runtime.Runtime
	peers   Peers
	metrics *Metrics
	log     *slog.Logger

	// life ends when the daemon stops; every migration's context hangs on it.
	life context.Context
	stop context.CancelCauseFunc
	work sync.WaitGroup

	mu       sync.Mutex
	outgoing map[string]*outgoing // by migration id
	incoming map[string]*incoming
	serving  map[string]*serving // whose pages the destination reads
	busy     map[shardKey]string // which migration has a shard
	holds    map[shardKey]*hold  // measurements, which give way to migrations
	fixed    time.Duration       // the last blackout's fixed part, for the stop rule
	// words are of migrations that were in doubt since the daemon started.
	words map[string]*semaphore.Weighted

	turns *turns
}

type shardKey struct{ namespace, name string }

// errShutdown is the cause that migrations see when the daemon stops.
var errShutdown = errors.New("transhipd is stopping")

// initialFixed is the fixed part of a blackout assumed before the first was
// measured: dump and restore of a small container on a slow machine.
const initialFixed = 200 * time.Millisecond

// undoTimeout bounds an undo. It runs on a context of its own: a cancelled
// migration must still be able to clean up.
const undoTimeout = 30 * time.Second

// New makes a manager; Recover must run before the first request.
func New(cfg Config, journal *Journal, rt *runtime.Runtime, peers Peers, metrics *Metrics, log *slog.Logger) (*Manager, error) {
	for _, dir := range []string{cfg.StoreDir, cfg.TmpfsDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	life, stop := context.WithCancelCause(context.Background())
	return &Manager{
		cfg: cfg, journal: journal, rt: rt, peers: peers, metrics: metrics, log: log,
		life: life, stop: stop,
		outgoing: map[string]*outgoing{}, incoming: map[string]*incoming{}, serving: map[string]*serving{}, busy: map[shardKey]string{}, turns: newTurns(),
		fixed: initialFixed,
	}, nil
}

// Close aborts what can be aborted, leaves the rest to the journal, and waits.
func (m *Manager) Close() {
	m.stop(errShutdown)
	m.work.Wait()
}

// claim reserves a shard for one migration on this host.
func (m *Manager) claim(key shardKey, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.endHold(key)
	if other, taken := m.busy[key]; taken && other != id {
		return &busyError{shard: key.name, migration: other}
	}
	m.busy[key] = id
	return nil
}

func (m *Manager) release(key shardKey, id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.busy[key] == id {
		delete(m.busy, key)
	}
}

// MigrationOf tells which migration has a shard now, "" if none.
func (m *Manager) MigrationOf(namespace, name string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.busy[shardKey{namespace, name}]
}

type busyError struct{ shard, migration string }

func (e *busyError) Error() string {
	return fmt.Sprintf("shard %s is already migrating (%s)", e.shard, e.migration)
}

// dir is where a migration keeps its files on this host.
func (m *Manager) dir(id string, role Role) string {
	return filepath.Join(m.cfg.StoreDir, id+"-"+string(role))
}

// newID names a migration: sortable by time, unique across hosts.
func newID(now time.Time) string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // crypto/rand.Read never fails (Go 1.24)
	return now.UTC().Format("20060102-150405-") + hex.EncodeToString(b[:])
}

// undo gives a context for cleaning up after ctx may have ended.
func undo(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

func (m *Manager) trackerKind() track.Kind { return m.cfg.Tracker }

// fixedPart is the part of a blackout that does not depend on memory, as the
// last migration from this host had it.
func (m *Manager) fixedPart() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fixed
}

// learnFixed takes the fixed part from a finished migration: its blackout
// without the time for the last pages.
func (m *Manager) learnFixed(blackout time.Duration, r *report) {
	result, _ := r.snapshot()
	if n := len(result.GetRounds()); n > 0 {
		blackout -= time.Duration(result.GetRounds()[n-1].GetMs() * float64(time.Millisecond))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fixed = max(blackout, 0)
}

// shardNet is the network that a migration moves; false if it moves none.
func shardNet(rec *runtime.Record) (runtime.ShardNet, bool) {
	switch rec.Network.Kind {
	case runtime.NetworkShard:
		return runtime.ShardNet{Namespace: rec.Namespace, Name: rec.Name, IP: rec.Network.IP, MAC: rec.Network.MAC}, true
	case runtime.NetworkNone, runtime.NetworkPrivate:
		return runtime.ShardNet{Namespace: rec.Namespace, Name: rec.Name}, true
	}
	return runtime.ShardNet{}, false
}

func (o *outgoing) shardNet() (runtime.ShardNet, bool) { return shardNet(o.rec) }

// maxRounds: in post-copy a third round would carry what is written once more.
func (o *outgoing) maxRounds() int {
	if o.req.GetMode() == ModePostCopy {
		return 2
	}
	return maxRounds
}

// maxBlackout is what was asked for, else the shard's own limit, else the default,
// which nobody said.
func (o *outgoing) maxBlackout() (limit time.Duration, said bool) {
	if ms := o.req.GetMaxBlackoutMs(); ms > 0 {
		return time.Duration(ms) * time.Millisecond, true
	}
	if own, err := time.ParseDuration(o.rec.Labels[runtime.LabelMaxBlackout]); err == nil && own > 0 {
		return own, true
	}
	return defaultMaxBlackout, false
}

// letGo closes what only an undo would have closed. May run twice.
func (o *outgoing) letGo(log *slog.Logger) {
	if o.tracker != nil {
		if err := o.tracker.Close(); err != nil {
			log.Warn("dirty tracking", "err", err)
		}
	}
	if err := o.closeTmpfs(); err != nil {
		log.Warn("tmpfs", "err", err)
	}
	if o.hold != nil {
		if err := o.hold.Close(); err != nil {
			log.Warn("packet socket", "err", err)
		}
	}
	if o.session != nil {
		if err := ignoreClosed(o.session.Close()); err != nil {
			log.Warn("page session", "err", err)
		}
	}
}

func ignoreClosed(err error) error {
	if isLinkError(err) {
		return nil
	}
	return err
}

// isLinkError says that the other host was lost, rather than that it refused.
func isLinkError(err error) bool {
	if errors.Is(err, transfer.ErrLinkLost) {
		return true
	}
	return err != nil && connect.CodeOf(err) == connect.CodeUnavailable
}

// reservedMemory is what migrations under way will still need here.
func (m *Manager) reservedMemory(_ context.Context, except string) int64 {
	var sum int64
	for _, in := range m.allIncoming() {
		if in.entry.ID != except {
			sum += in.memoryToCome()
		}
	}
	return sum
}

// memoryToCome is what the reservation holds less what has arrived.
func (in *incoming) memoryToCome() int64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.entry.State != Receiving {
		return in.stillOwed()
	}
	have := checkpoint.Bytes(0)
	for _, store := range []*pagestore.Store{in.store, in.shared} {
		if store != nil {
			n, _ := store.Bytes()
			have += n
		}
	}
	return max(0, in.entry.MemoryBytes-int64(have))
}

// removeCRIUConfig removes the CRIU configuration of a shard that has arrived or
// never will: a later restore by somebody else must not find it.
func (m *Manager) removeCRIUConfig(e *Entry) error {
	err := os.Remove(runtime.CRIUConfigPath(e.Namespace, e.Shard))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
