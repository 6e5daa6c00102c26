package migrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/semaphore"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/internal/failpoint"
)

// action is what a daemon that comes back does about a journaled state.
type action string

const (
	nothing action = "nothing"
	// undoAll: the shard never left, or never came; make it as if nothing had
	// happened, then tell the other end.
	undoAll action = "undo"
	// ask: this host has yielded; ask the destination to run the shard until it
	// says yes or never.
	ask action = "ask"
	// serve: the shard runs at the destination, and reads its last pages here.
	serve action = "serve"
	// again: the shard is to go on here, and could not yet.
	again action = "again"
	// wait: the source decides; ask it until it has.
	wait action = "wait"
	// look: a restore was under way; see whether the shard runs.
	look action = "look"
	// finish: the shard runs here; do what remains.
	finish action = "finish"
)

// recoveryOf is the right-hand column of ARCHITECTURE.md's table.
func recoveryOf(role Role, state State) action {
	switch {
	case state.Final():
		return nothing
	case role == Source && state == Yielded:
		return ask
	case role == Source && state == Serving:
		return serve
	case role == Source && state == Returning:
		return again
	case role == Source:
		return undoAll
	case state == Sealed:
		return wait
	case state == Starting:
		return look
	case state == Running:
		return finish
	default:
		return undoAll
	}
}

// Decisions that a source answers with.
const (
	decisionCommitted = "committed"
	decisionAborted   = "aborted"
	decisionPending   = "pending"
)

// decisionOf is what a source in a state tells a destination that asks.
func decisionOf(s State) string {
	switch s {
	case Yielded, Serving, Done:
		return decisionCommitted
	case Returning, Aborted:
		return decisionAborted
	default:
		return decisionPending
	}
}

// Recover settles what an earlier daemon left behind. What can be settled alone
// is when it returns; what needs the other end goes on in the background.
func (m *Manager) Recover(ctx context.Context) error {
	entries, err := m.journal.List()
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, e := range entries {
		act := recoveryOf(e.Role, e.State)
		if act == nothing {
			continue
		}
		known[filepath.Base(m.dir(e.ID, e.Role))] = true
		log := m.log.With("migration", e.ID, "shard", e.Shard, "peer", e.Peer, "role", e.Role, "state", e.State)
		log.Info("recovering a migration", "action", act)
		if err := m.claim(shardKey{e.Namespace, e.Shard}, e.ID); err != nil {
			log.Error("recover", "err", err)
			continue
		}
		if err := m.recover(ctx, act, e); err != nil {
			log.Error("recover", "err", err)
		}
	}
	m.sweep(known)
	if err := m.journal.Prune(); err != nil {
		return err
	}
	m.work.Go(func() { m.watchIncoming(m.life) })
	return nil
}

func (m *Manager) recover(ctx context.Context, act action, e *Entry) error {
	switch act {
	case ask, serve, again:
		m.work.Go(func() { m.settle(m.life, e) })
		return nil
	case undoAll:
		if e.Role == Source {
			return m.recoverSource(ctx, e)
		}
	}
	in, err := m.reviveIncoming(e)
	if err != nil {
		return err
	}
	switch act {
	case undoAll:
		in.mu.Lock()
		defer in.mu.Unlock()
		err := in.neverRuns(ctx, CodeRestarted, errors.New("transhipd of the destination was restarted"))
		var aborted *abortedError
		if errors.As(err, &aborted) {
			return nil
		}
		return err
	case look:
		return in.lookWhetherItRuns(ctx)
	case finish:
		in.mu.Lock()
		defer in.mu.Unlock()
		in.activate(ctx)
	case wait: // watchIncoming asks the source
	}
	return nil
}

// recoverSource gives a shard back that an earlier daemon may have frozen.
func (m *Manager) recoverSource(ctx context.Context, e *Entry) error {
	e.State, e.Code, e.Reason = Returning, CodeRestarted, "transhipd of the source was restarted"
	if peer, err := m.peers.Client(e.Peer); err == nil {
		m.keepTellingAbort(e, peer)
	}
	if err := m.goOn(ctx, e); err != nil {
		m.work.Go(func() { m.settle(m.life, e) })
		return err
	}
	m.release(shardKey{e.Namespace, e.Shard}, e.ID)
	return nil
}

// settle asks the destination of a yielded shard until it has answered, and tries
// what follows from that until it is done, for as long as the daemon lives. Until
// then the shard is claimed: whatever freeze is found is this migration's own.
func (m *Manager) settle(ctx context.Context, e *Entry) {
	log := m.log.With("migration", e.ID, "shard", e.Shard, "peer", e.Peer)
	var warned time.Time
	wait := commitRetry
	for ctx.Err() == nil {
		if err := failpoint.Hit(ctx, "source.settle"); err != nil {
			return
		}
		s, answered, err := m.settleOnce(ctx, e)
		switch {
		case errors.Is(err, errSettled):
			m.release(shardKey{e.Namespace, e.Shard}, e.ID)
			return
		case ctx.Err() != nil && !answered:
			return
		case answered: // and err says whether that was carried out
		case err == nil:
			_, err = m.serve(ctx, s)
			var lost *pagesLostError
			if errors.As(err, &lost) {
				log.Error("the destination has lost a shard; an operator is to say whether it goes on here", "err", err)
				continue
			}
			if ctx.Err() != nil {
				return
			}
			if e.State == Returning {
				continue
			}
		case e.Mode == ModePostCopy && s == nil:
			log.Error("pages that the destination lacks cannot be served", "err", err)
			pause(ctx, doubtPatience)
			continue
		default:
			if time.Since(warned) > doubtPatience {
				warned = time.Now()
				log.Warn("migration is in doubt", "err", err)
			}
			pause(ctx, commitRetry)
			continue
		}
		if err != nil {
			log.Error("settle", "err", err)
			pause(ctx, wait)
			wait = min(2*wait, doubtPatience)
			continue
		}
		m.release(shardKey{e.Namespace, e.Shard}, e.ID)
		log.Info("migration settled", "state", e.State)
		return
	}
}

// errSettled says that there is nothing to settle any more.
var errSettled = errors.New("an operator has settled it")

// settleOnce asks the destination once. answered: it said whether it runs the shard,
// and err says whether that was carried out. If not, s is to be served, or err says
// why there is no answer. An operator's word comes before the question or after what
// follows from its answer: in between the shard would run here and there.
func (m *Manager) settleOnce(ctx context.Context, e *Entry) (s *serving, answered bool, err error) {
	word := m.lastWord(e.ID)
	if err := word.Acquire(ctx, 1); err != nil {
		return nil, false, err
	}
	defer word.Release(1)
	if now, err := m.journal.Get(Source, e.ID); err == nil {
		switch {
		case now.State.Final():
			return nil, false, errSettled
		case now.State == Returning && e.State != Returning: // on an operator's word
			e.State, e.Code, e.Reason, e.Runs, e.Left = now.State, now.Code, now.Reason, now.Runs, now.Left
		}
	}
	if e.State == Returning {
		return nil, true, m.goOn(ctx, e)
	}
	s, err = m.serveAgain(ctx, e)
	if err == nil && e.State == Yielded {
		err = m.askAgain(ctx, e)
	}
	var refused *refusedToRunError
	switch {
	case err == nil && s == nil:
		return nil, true, m.discard(ctx, e)
	case errors.As(err, &refused):
		return nil, true, m.takeBack(ctx, e, refused.Error())
	}
	return s, false, err
}

// lastWord is held by whoever settles a yielded migration.
func (m *Manager) lastWord(id string) *semaphore.Weighted {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.words == nil {
		m.words = map[string]*semaphore.Weighted{}
	}
	if m.words[id] == nil {
		m.words[id] = semaphore.NewWeighted(1)
	}
	return m.words[id]
}

// askAgain asks the destination once to run a shard, and journals that it does if
// it lacks pages that are here.
func (m *Manager) askAgain(ctx context.Context, e *Entry) error {
	peer, err := m.peers.Client(e.Peer)
	if err != nil {
		return err
	}
	asked, cancel := context.WithTimeout(ctx, doubtPatience)
	defer cancel()
	if _, err := askOnce(asked, e, peer); err != nil || e.Mode != ModePostCopy {
		return err
	}
	e.State = Serving
	if err := m.journal.Put(e); err != nil {
		e.State = Yielded
		return err
	}
	return nil
}

// serveAgain lets the destination read pages of a shard that an earlier daemon
// has yielded; nil if there are none. It comes before the destination is asked to
// run the shard: the restore may need them.
func (m *Manager) serveAgain(ctx context.Context, e *Entry) (*serving, error) {
	if e.Mode != ModePostCopy {
		return nil, nil
	}
	return m.openServing(ctx, e, nil)
}

// takeBack lets a yielded shard go on here, after the destination's word that
// it never will there, or an operator's. With an error and the state Returning
// that is decided, and settle tries it again.
func (m *Manager) takeBack(ctx context.Context, e *Entry, reason string) error {
	m.endServing(e.ID)
	// Journaled first: between here and the thaw a restart must not ask again.
	before := e.State
	e.State, e.Code, e.Reason = Returning, CodeRestore, reason
	if err := m.journal.Put(e); err != nil {
		e.State = before
		return err
	}
	return m.goOn(ctx, e)
}

// Resolve settles a migration on an operator's word.
func (m *Manager) Resolve(ctx context.Context, r *connect.Request[v1.ResolveRequest]) (*connect.Response[v1.ResolveResponse], error) {
	id, keep := r.Msg.GetId(), r.Msg.GetKeep()
	if keep != keepHere && keep != keepThere {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("keep %q: say here or there", keep))
	}
	e, err := m.journal.Get(Source, id)
	if errors.Is(err, ErrUnknownMigration) {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("%w on %s as source", err, m.cfg.Node))
	}
	if err == nil {
		m.mu.Lock()
		s := m.serving[id]
		m.mu.Unlock()
		if e.State == Serving && s != nil {
			err = s.decide(ctx, keep, m.keptBy())
		} else {
			err = m.resolve(ctx, id, keep)
		}
	}
	if err == nil {
		e, err = m.journal.Get(Source, id)
	}
	if err != nil {
		var ce *connect.Error
		if errors.As(err, &ce) {
			return nil, ce
		}
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return connect.NewResponse(&v1.ResolveResponse{Migration: m.described(migrationOf(e, m.cfg.Node), e)}), nil
}

func (m *Manager) keptBy() string { return "an operator kept it on " + m.cfg.Node }

// resolve settles a migration that nobody is asked about just now, and whose pages
// nobody reads.
func (m *Manager) resolve(ctx context.Context, id, keep string) error {
	word := m.lastWord(id)
	if err := word.Acquire(ctx, 1); err != nil {
		return connect.NewError(connect.CodeCanceled, err)
	}
	defer word.Release(1)
	// The destination may have answered meanwhile.
	e, err := m.journal.Get(Source, id)
	if err != nil {
		return err
	}
	m.mu.Lock()
	_, running := m.outgoing[id]
	m.mu.Unlock()
	no := func(format string, args ...any) error {
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf(format, args...))
	}
	switch {
	case e.State == Returning:
		note, _ := m.noteOf(e)
		return no("migration %s: %s %s", id, e.Shard, note)
	case e.State != Yielded && e.State != Serving:
		return no("migration %s is %s: there is no doubt to resolve", id, e.State)
	case running:
		return no("migration %s is still under way", id)
	case keep == keepThere:
		err = m.discard(ctx, e)
	case e.RunsThere:
		return no("%s runs on %s; what is left of it here is removed as soon as that can be done", e.Shard, e.Peer)
	default:
		err = m.takeBack(ctx, e, m.keptBy())
	}
	if err == nil {
		m.release(shardKey{e.Namespace, e.Shard}, id)
	}
	return err
}

// lookWhetherItRuns settles a restore that was under way when an earlier daemon
// died. The shard's link is still down, so a shard that does not run for sure
// can be refused and the source goes on.
func (in *incoming) lookWhetherItRuns(ctx context.Context) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	finished := false
	if in.pages != nil {
		if st, err := in.pages.state(ctx); err == nil && st.Finished {
			finished = true
			in.entry.StartedUnixNS = st.FinishedAt.UnixNano()
		}
	}
	if finished && in.m.rt.Runs(ctx, in.entry.Namespace, in.entry.Shard) {
		in.entry.State = Running
		if err := in.m.journal.Put(in.entry); err != nil {
			return err
		}
		in.activate(ctx)
		return nil
	}
	err := in.neverRuns(ctx, CodeRestarted, errors.New("transhipd of the destination was restarted during the restore"))
	var aborted *abortedError
	if errors.As(err, &aborted) {
		return nil
	}
	return err
}

const (
	// watchEvery paces the look at incoming migrations whose source is silent.
	watchEvery = 2 * time.Second
	// silence is how long a source may be silent before it is asked.
	silence = 10 * time.Second
	// abandonAfter is how long a source may be unreachable before a migration
	// that was not sealed is given up: nothing can be lost by that.
	abandonAfter = 30 * time.Second
)

// watchIncoming asks the sources of migrations that have become silent what they
// decided, so that a reservation never outlives its source's interest.
func (m *Manager) watchIncoming(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, in := range m.allIncoming() {
			in.watch(ctx)
		}
	}
}

func (in *incoming) watch(ctx context.Context) {
	in.mu.Lock()
	state, quiet := in.entry.State, time.Since(in.heard)
	in.mu.Unlock()
	if (state != Receiving && state != Sealed) || quiet < silence {
		return
	}
	log := in.m.log.With("migration", in.entry.ID, "shard", in.entry.Shard, "peer", in.entry.Peer)
	decision, err := in.askDecision(ctx)
	switch {
	case err == nil && decision == decisionPending:
		in.mu.Lock()
		in.heard = time.Now()
		in.mu.Unlock()
	case err == nil && decision == decisionCommitted && state == Sealed:
		if _, err := in.start(ctx); err != nil {
			log.Error("start after the source's decision", "err", err)
		}
	case connect.CodeOf(err) == connect.CodeNotFound, err == nil && decision == decisionAborted:
		if err := in.abort(ctx, CodeFailed, "the source gave it up"); err != nil {
			log.Error("abort", "err", err)
		}
	case err != nil && state == Receiving && quiet > abandonAfter:
		if err := in.abort(ctx, CodeLink, "the source is silent"); err != nil {
			log.Error("abort", "err", err)
		}
	case err != nil:
		log.Warn("the source does not answer", "err", err)
	}
}

func (in *incoming) askDecision(ctx context.Context) (string, error) {
	peer, err := in.m.peers.Client(in.entry.Peer)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, watchEvery)
	defer cancel()
	resp, err := peer.Decision(ctx, connect.NewRequest(&v1.DecisionRequest{Id: in.entry.ID}))
	if err != nil {
		return "", err
	}
	return resp.Msg.GetDecision(), nil
}

// sweep removes directories of migrations that the journal does not know.
func (m *Manager) sweep(known map[string]bool) {
	for _, id := range m.madeTmpfs() {
		if known[filepath.Base(m.dir(id, Destination))] {
			continue
		}
		if err := m.dropTmpfs(id); err != nil {
			m.log.Error("sweep", "err", err)
		}
	}
	entries, err := os.ReadDir(m.cfg.StoreDir)
	if err != nil {
		m.log.Error("sweep", "err", err)
		return
	}
	for _, e := range entries {
		if known[e.Name()] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(m.cfg.StoreDir, e.Name())); err != nil {
			m.log.Error("sweep", "err", err)
		}
	}
}
