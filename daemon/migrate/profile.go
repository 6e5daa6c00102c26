package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

// What profiles need of migrations: where a shard came from, so that its history
// can follow, and the tracker for a moment, for its dirty rate.

// CameFrom names the last migration that brought a shard here, once it is over,
// and the node that it came from.
func (m *Manager) CameFrom(namespace, name string) (migration, node string, ok bool) {
	entries, err := m.journal.List()
	if err != nil {
		m.log.Warn("journal", "err", err)
		return "", "", false
	}
	entries = slices.DeleteFunc(entries, func(e *Entry) bool {
		return e.Role != Destination || e.State != Done || e.Namespace != namespace || e.Shard != name
	})
	if len(entries) == 0 {
		return "", "", false
	}
	last := slices.MaxFunc(entries, func(a, b *Entry) int { return a.Started.Compare(b.Started) })
	return last.ID, last.Peer, true
}

// Arrival is how a shard came to this host last.
type Arrival struct {
	At   time.Time // by this host's clock
	From string
}

// Arrivals are those that the journal knows, by namespace and name.
func (m *Manager) Arrivals() (map[[2]string]Arrival, error) {
	entries, err := m.journal.List()
	if err != nil {
		return nil, err
	}
	came := map[[2]string]Arrival{}
	for _, e := range entries {
		at := [2]string{e.Namespace, e.Shard}
		if e.Role == Destination && e.State == Done && e.Updated.After(came[at].At) {
			came[at] = Arrival{At: e.Updated, From: e.Peer}
		}
	}
	return came, nil
}

// Coming are the shards that migrations are bringing here, by namespace and name.
func (m *Manager) Coming() map[[2]string]bool {
	out := map[[2]string]bool{}
	for _, in := range m.allIncoming() {
		out[[2]string{in.entry.Namespace, in.entry.Shard}] = true
	}
	return out
}

// hold is a measurement that has a shard's memory tracked.
type hold struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
}

// errMoves is the cause with which a migration ends a measurement.
var errMoves = errors.New("a migration of the shard begins")

// borrow keeps migrations of a shard waiting until giveBack is called, which the
// end of the returned context asks for. A shard that is moving is not lent.
func (m *Manager) borrow(ctx context.Context, key shardKey) (held context.Context, giveBack func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if id, busy := m.busy[key]; busy {
		return nil, nil, &busyError{shard: key.name, migration: id}
	}
	if m.holds[key] != nil {
		return nil, nil, fmt.Errorf("the dirty rate of shard %s is being measured already", key.name)
	}
	held, cancel := context.WithCancelCause(ctx)
	h := &hold{cancel: cancel, done: make(chan struct{})}
	if m.holds == nil {
		m.holds = map[shardKey]*hold{}
	}
	m.holds[key] = h
	return held, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.holds, key)
		cancel(nil)
		close(h.done)
	}, nil
}

// endHold ends a measurement and waits until nothing of it is left. m.mu is
// held, but given up meanwhile.
func (m *Manager) endHold(key shardKey) {
	for m.holds[key] != nil {
		h := m.holds[key]
		m.mu.Unlock()
		h.cancel(errMoves)
		<-h.done
		m.mu.Lock()
	}
}

// DirtyRate measures how many different pages a shard writes in a second. The
// tracker is armed by a first look, whose result is thrown away; a second look,
// a window later, finds what was written since.
func (m *Manager) DirtyRate(ctx context.Context, namespace, name string, window time.Duration) (pages float64, err error) {
	if m.cfg.Tracker == track.None {
		return 0, errors.New("this host cannot track written pages")
	}
	shard, err := m.rt.Shard(ctx, namespace, name)
	if err != nil {
		return 0, err
	}
	if shard.Status != runtime.StatusRunning {
		return 0, fmt.Errorf("%w: %s is %s", runtime.ErrNotRunning, name, shard.Status)
	}
	cg, err := m.rt.Cgroup(ctx, namespace, name)
	if err != nil {
		return 0, err
	}
	held, giveBack, err := m.borrow(ctx, shardKey{namespace, name})
	if err != nil {
		return 0, err
	}
	defer giveBack()
	tracker, err := track.New(m.cfg.Tracker, m.log)
	if err != nil {
		return 0, err
	}
	// Nothing of the tracker is left in the shard when a migration goes on.
	defer func() { err = errors.Join(err, tracker.Close()) }()
	look := func() (track.Stats, time.Time, error) {
		pids, err := cg.Processes()
		if err != nil {
			return track.Stats{}, time.Time{}, err
		}
		procs, err := track.ProcessesOf(pids, int(shard.PID))
		if err != nil {
			return track.Stats{}, time.Time{}, err
		}
		st, err := tracker.Collect(held, procs, track.Options{}, func(checkpoint.Extent) error { return held.Err() })
		if held.Err() != nil {
			err = context.Cause(held)
		}
		return st, time.Now(), err
	}
	_, armed, err := look()
	if err != nil {
		return 0, err
	}
	timer := time.NewTimer(window)
	defer timer.Stop()
	select {
	case <-held.Done():
		return 0, context.Cause(held)
	case <-timer.C:
	}
	st, seen, err := look()
	if err != nil {
		return 0, err
	}
	return float64(st.Written) / seen.Sub(armed).Seconds(), nil
}

// Load is what this host and its shards use now.
func (h *PeerHandler) Load(ctx context.Context, r *connect.Request[v1.LoadRequest]) (*connect.Response[v1.LoadResponse], error) {
	if h.host.Load == nil {
		return nil, connect.NewError(connect.CodeUnimplemented, errors.New("profiles are off on this host"))
	}
	resp, err := h.host.Load(ctx, r.Msg)
	if err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(resp), nil
}

// History is what this host knows of a shard that was here.
func (h *PeerHandler) History(ctx context.Context, r *connect.Request[v1.HistoryRequest]) (*connect.Response[v1.HistoryResponse], error) {
	if h.host.History == nil {
		return nil, connect.NewError(connect.CodeUnimplemented, errors.New("profiles are off on this host"))
	}
	resp, err := h.host.History(ctx, r.Msg)
	if err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(resp), nil
}
