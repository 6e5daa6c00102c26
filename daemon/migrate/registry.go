package migrate

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/checkpoint/pagestore"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/transfer"
)

func (m *Manager) newIncoming(e *Entry) *incoming {
	return &incoming{m: m, entry: e, heard: time.Now(), ended: make(chan struct{})}
}

func (m *Manager) addIncoming(in *incoming) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.incoming[in.entry.ID] = in
}

// forgetIncoming drops a migration that has ended; the journal still knows it.
func (m *Manager) forgetIncoming(in *incoming) {
	m.mu.Lock()
	known := m.incoming[in.entry.ID] == in
	delete(m.incoming, in.entry.ID)
	m.mu.Unlock()
	m.release(shardKey{in.entry.Namespace, in.entry.Shard}, in.entry.ID)
	if known {
		close(in.ended)
		m.giveMemoryBack()
	}
}

// giveMemoryBack returns what the last migration needed to the system, once there
// is none under way: buffers for a fast link and hashes of a large shard, which a
// daemon that watches and waits would keep for hours.
func (m *Manager) giveMemoryBack() {
	m.mu.Lock()
	idle := len(m.incoming)+len(m.outgoing) == 0
	m.mu.Unlock()
	if idle {
		debug.FreeOSMemory()
	}
}

// arriving is the migration that brought a shard here and still places its
// memory, if there is one. To whoever moves the shard on it has arrived.
func (m *Manager) arriving(key shardKey) *incoming {
	m.mu.Lock()
	in := m.incoming[m.busy[key]]
	m.mu.Unlock()
	if in == nil {
		return nil
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.entry.State != Running {
		return nil
	}
	return in
}

// AwaitArrival waits while a shard that runs here still gets its memory.
func (m *Manager) AwaitArrival(ctx context.Context, namespace, name string) error {
	in := m.arriving(shardKey{namespace, name})
	if in == nil {
		return nil
	}
	select {
	case <-in.ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (m *Manager) allIncoming() []*incoming {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*incoming, 0, len(m.incoming))
	for _, in := range m.incoming {
		out = append(out, in)
	}
	return out
}

// receivingFrom counts what a host has reserved and not sealed.
func (m *Manager) receivingFrom(peer string) (n int) {
	for _, in := range m.allIncoming() {
		in.mu.Lock()
		if in.entry.Peer == peer && in.entry.State == Receiving {
			n++
		}
		in.mu.Unlock()
	}
	return n
}

// incomingOf finds a migration for a call of its source. Ended ones are
// answered from the journal.
func (m *Manager) incomingOf(ctx context.Context, id string) (*incoming, error) {
	m.mu.Lock()
	in := m.incoming[id]
	m.mu.Unlock()
	if in == nil {
		e, err := m.journal.Get(Destination, id)
		if errors.Is(err, ErrUnknownMigration) {
			return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("%w on %s", err, m.cfg.Node))
		}
		if err != nil {
			return nil, connect.NewError(connect.CodeInternal, err)
		}
		in = m.newIncoming(e)
	}
	if peer := transfer.PeerFrom(ctx); peer != in.entry.Peer {
		return nil, connect.NewError(connect.CodePermissionDenied, fmt.Errorf("migration %s was reserved by another host than %s", id, peer))
	}
	in.mu.Lock()
	in.heard = time.Now()
	in.mu.Unlock()
	return in, nil
}

// AcceptPages is asked for every page session that a peer opens.
func (m *Manager) AcceptPages(_ context.Context, peer, migration string) (transfer.Sink, error) {
	m.mu.Lock()
	in := m.incoming[migration]
	m.mu.Unlock()
	if in == nil || in.entry.Peer != peer {
		return nil, fmt.Errorf("%s: %w", migration, ErrUnknownMigration)
	}
	return in, nil
}

// reviveIncoming rebuilds what an earlier daemon knew of a migration from the
// journal and the files that it left.
func (m *Manager) reviveIncoming(e *Entry) (*incoming, error) {
	in := m.newIncoming(e)
	if len(e.Record) > 0 {
		rec, err := runtime.DecodeRecord(e.Record)
		if err != nil {
			return nil, fmt.Errorf("journaled record of %s: %w", e.ID, err)
		}
		in.rec = rec
	}
	if exists(in.dir(pagesDir)) {
		var err error
		if in.store, err = pagestore.Open(in.dir(pagesDir)); err != nil {
			return nil, err
		}
	}
	in.pages = adoptPageServer(m.cfg.Daemon, in.dir(""), e.PageServerPID, e.PageServerStart)
	in.received.Store(e.ImageDigest)
	m.addIncoming(in)
	return in, nil
}
