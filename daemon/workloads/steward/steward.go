// Package steward keeps the desired state of the pool's workloads and makes the
// pool look like it. Each workload has an owner, the host where it was first
// applied; only that host decides, one change at a time, so no shard is started
// twice (ADR 15). Every host keeps every record, and starts, resizes and
// removes shards when an owner asks, with the last word on its own room.
//
// Flow: Change → plan (daemon/workloads) → record, on disk and at the others →
// steps, each asked of the shard's host → record. It refuses to start a shard
// that a host which does not answer may have, and to watch: what dies is
// noticed by the next change.
package steward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/peers/pki"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads"
)

// Pool is the hosts. Safe for concurrent use.
type Pool interface {
	// Look asks all hosts, this one first, what they are and run.
	Look(ctx context.Context) []control.NodeStatus
	// Here is this host alone.
	Here(ctx context.Context) control.NodeStatus
	// Nodes lists the other hosts of the pool, whether they answer or not.
	Nodes() []string
	// Client speaks with one of them.
	Client(node string) (transhipv1connect.WorkloadHostsClient, error)
}

// Runtime is what the steward needs of daemon/runtime.
type Runtime interface {
	Run(ctx context.Context, s runtime.RunSpec) (*runtime.Shard, error)
	UndoRun(ctx context.Context, namespace, name string) (started bool, err error)
	Resize(ctx context.Context, namespace, name string, z runtime.Resize) (*runtime.Shard, error)
	Shard(ctx context.Context, namespace, name string) (*runtime.Shard, error)
	Stop(ctx context.Context, namespace, name string, grace time.Duration) error
	Remove(ctx context.Context, namespace, name string, force bool) error
	Images
}

var _ Runtime = (*runtime.Runtime)(nil)

// Config is what New needs.
type Config struct {
	Node    string
	Book    *Book
	Pool    Pool
	Runtime Runtime
	Tenants map[string]workloads.Tenant
	// MigrationOf names the migration that is moving a shard, or "".
	MigrationOf func(namespace, name string) string
	// Seals is nil where there are no other hosts.
	Seals Seals
	// Caller names the host that an API request came from; nil where there are none.
	Caller func(ctx context.Context) string
	Log    *slog.Logger
}

// Seals is what says from whom a record is. Safe for concurrent use.
type Seals interface {
	// Seal seals a statement as this host.
	Seal(statement []byte) (pki.Seal, error)
	// Open names the host of the cluster that sealed a statement.
	Open(seal pki.Seal, statement []byte) (host string, err error)
}

// Steward is this host's part. Safe for concurrent use.
type Steward struct {
	Config
	changing sync.Map   // names of workloads that are being changed here
	placing  sync.Mutex // one shard at a time is judged against this host's room and started
	fetching sync.Mutex // one image at a time
}

// New makes one. Recover before it serves.
func New(c Config) *Steward { return &Steward{Config: c} }

// sealed makes r one that others believe: only owners write records, and others
// pass them on.
func (s *Steward) sealed(r *Record) error {
	if s.Seals == nil {
		return nil
	}
	statement := r.bare()
	seal, err := s.Seals.Seal(statement)
	if err != nil {
		return fmt.Errorf("workload %s: %w", r.Name, err)
	}
	r.statement, r.seal = statement, seal
	return nil
}

// judge says why a record that another host brought is not its owner's, or nil.
func (s *Steward) judge(r *Record) error {
	if s.Seals == nil {
		return fmt.Errorf("%w: %s is in no cluster", errRecord, s.Node)
	}
	host, err := s.Seals.Open(r.seal, r.statement)
	if err != nil {
		return fmt.Errorf("%w %s of %s: %w", errRecord, r.Name, r.Owner, err)
	}
	if host != r.Owner {
		return fmt.Errorf("%w %s of %s: sealed by %s", errRecord, r.Name, r.Owner, host)
	}
	return nil
}

// heard keeps a record that another host brought, if nothing stands against it.
func (s *Steward) heard(peer string, raw []byte) (taken bool, have *Record, err error) {
	r, err := decodeRecord(raw)
	if err != nil {
		return false, nil, fmt.Errorf("%w: %w", errRecord, err)
	}
	if err := s.judge(r); err != nil {
		return false, nil, err
	}
	pool := s.pool()
	taken, have, err = s.Book.Offer(r, pool)
	if taken && have.live() && have.Confirmed && have.Owner != r.Owner && slices.Contains(pool, have.Owner) {
		s.Log.Warn("a workload has another owner, and the last one is still in the pool", "workload", r.Name, "owner", r.Owner, "last", have.Owner, "peer", peer)
	}
	return taken, have, err
}

// Recover removes what an earlier life of the daemon was starting when it died,
// and seals what this host wrote when it was in no cluster, or in another one.
func (s *Steward) Recover(ctx context.Context) error {
	if err := s.sealOwn(); err != nil {
		return err
	}
	begun, err := s.Book.begun()
	if err != nil {
		return err
	}
	for _, b := range begun {
		started, err := s.Runtime.UndoRun(ctx, b[0], b[1])
		if err != nil { // the next start tries again; what runs here needs the daemon
			s.Log.Error("a shard was being started when the daemon ended", "shard", b[1], "namespace", b[0], "err", err)
			continue
		}
		s.Log.Info("a shard was being started when the daemon ended", "shard", b[1], "namespace", b[0], "runs", started)
		if err := s.Book.end(b[0], b[1]); err != nil {
			return err
		}
	}
	return nil
}

func (s *Steward) sealOwn() error {
	all, err := s.Book.All()
	if err != nil {
		return err
	}
	for _, r := range all {
		if r.Owner != s.Node || s.Seals == nil || s.judge(r) == nil {
			continue
		}
		if err := s.sealed(r); err != nil {
			return err
		}
		if _, _, err := s.Book.Offer(r, s.pool()); err != nil {
			return err
		}
	}
	return nil
}

const (
	// learnEvery is how often a host asks another for records that it missed.
	learnEvery = 15 * time.Second
	// askTimeout bounds one question to one host.
	askTimeout = 3 * time.Second
)

// Run learns records from the others until ctx ends.
func (s *Steward) Run(ctx context.Context) error {
	tick := time.NewTicker(learnEvery)
	defer tick.Stop()
	s.learnFromAll(ctx)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if nodes := s.Pool.Nodes(); len(nodes) > 0 {
			node := nodes[rand.IntN(len(nodes))]
			if err := s.learn(ctx, node); err != nil {
				s.Log.Debug("learn workloads", "peer", node, "err", err)
			}
		}
	}
}

func (s *Steward) learnFromAll(ctx context.Context) {
	var wg sync.WaitGroup
	for _, node := range s.Pool.Nodes() {
		wg.Go(func() {
			if err := s.learn(ctx, node); err != nil {
				s.Log.Debug("learn workloads", "peer", node, "err", err)
			}
		})
	}
	wg.Wait()
}

func (s *Steward) learn(ctx context.Context, node string) error {
	client, err := s.Pool.Client(node)
	if err != nil {
		return err
	}
	all, err := s.Book.All()
	if err != nil {
		return err
	}
	known := map[string]uint64{}
	for _, r := range all {
		if r.Confirmed {
			known[r.Name] = r.Generation
		}
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	resp, err := client.Records(ctx, connect.NewRequest(&v1.WorkloadRecordsRequest{Known: known}))
	if err != nil {
		return err
	}
	for _, raw := range resp.Msg.GetRecords() {
		// One that is not to be believed is no reason to miss the others.
		if _, _, err := s.heard(node, raw); errors.Is(err, errRecord) {
			s.Log.Warn("a record is not believed", "peer", node, "err", err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

// pool lists the hosts that belong to it, this one included.
func (s *Steward) pool() []string { return append(s.Pool.Nodes(), s.Node) }

func (s *Steward) inPool(node string) bool { return slices.Contains(s.pool(), node) }

// put offers a record to the others, and counts who took it, this host included.
// against is a record that stands against it, somewhere.
func (s *Steward) put(ctx context.Context, r *Record) (taken, asked int, against *Record, err error) {
	if err := s.sealed(r); err != nil {
		return 0, 0, nil, err
	}
	here, have, err := s.Book.Offer(r, s.pool())
	if err != nil {
		return 0, 0, nil, err
	}
	nodes := s.Pool.Nodes()
	asked = 1 + len(nodes)
	if !here {
		return 0, asked, have, nil
	}
	taken = 1
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, node := range nodes {
		wg.Go(func() {
			have, err := s.putAt(ctx, node, r)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil: // it learns of it later
				s.Log.Debug("tell of a workload", "peer", node, "workload", r.Name, "err", err)
			case have == nil:
				taken++
			case against == nil || have.Confirmed:
				against = have
			}
		})
	}
	wg.Wait()
	return taken, asked, against, nil
}

// putAt returns the record that stands against r at a host.
func (s *Steward) putAt(ctx context.Context, node string, r *Record) (*Record, error) {
	client, err := s.Pool.Client(node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	resp, err := client.Put(ctx, connect.NewRequest(&v1.PutWorkloadRequest{Record: r.encode()}))
	if err != nil {
		return nil, err
	}
	if resp.Msg.GetTaken() {
		return nil, nil
	}
	have, err := decodeRecord(resp.Msg.GetHave())
	if err != nil {
		return nil, err
	}
	return have, s.judge(have)
}

// write makes a record hold. The first of a name, and one that takes a workload
// over from a host that left the pool, needs more than half of the hosts; the
// owner's later ones only have to reach them some time.
func (s *Steward) write(ctx context.Context, have, r *Record) error {
	if have.live() && have.Confirmed && have.Owner == s.Node {
		r.Confirmed = true
		_, _, against, err := s.put(ctx, r)
		if err != nil {
			return err
		}
		if against != nil && against.Confirmed && against.Generation >= r.Generation && against.Owner != s.Node {
			_, _, err := s.Book.Offer(against, s.pool())
			return errors.Join(refusalf("workload %s belongs to %s by now: do this again", r.Name, against.Owner), err)
		}
		return nil
	}
	taken, asked, against, err := s.put(ctx, r)
	if err != nil {
		return err
	}
	if 2*taken <= asked {
		back := *r
		back.Deleted, back.Confirmed = true, false
		ctx := context.WithoutCancel(ctx)
		if _, _, _, err := s.put(ctx, &back); err != nil {
			return err
		}
		if against != nil {
			return refusalf("%s is creating workload %s, or has: apply it there", against.Owner, r.Name)
		}
		return refusalf("only %d of %d hosts of the pool answer: a new workload needs more than half, so that no other half makes one of the same name; bring hosts back, or tranship cluster revoke those that are gone", taken, asked)
	}
	r.Confirmed = true
	_, _, _, err = s.put(ctx, r)
	return err
}

// refusal is why something is not done, with the next step.
type refusal struct{ text string }

func (r *refusal) Error() string { return r.text }

func refusalf(format string, args ...any) error { return &refusal{fmt.Sprintf(format, args...)} }
