package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/checkpoint/layer"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/transfer"
)

// Modes of a migration.
const (
	ModePreCopy = "precopy"
	// ModePostCopy lets the shard run at the destination before its last pages
	// are there.
	ModePostCopy = "postcopy"
	ModeStop     = "stop"
)

// Defaults of the API.
const (
	defaultMaxBlackout = 300 * time.Millisecond
	defaultDeadline    = 5 * time.Minute
	// maxRounds ends pre-copy whatever the rounds say; QEMU and Xen use about 30.
	maxRounds = 30
	// progressEvery paces the stream: a person reads it.
	progressEvery = 200 * time.Millisecond
)

var _ transhipv1connect.MigrationsHandler = (*Manager)(nil)

// Causes of a migration's end; they travel as context causes.
var (
	errCancelled = errors.New("cancelled")
	errDeadline  = errors.New("deadline exceeded")
)

// Check runs pre-flight only.
func (m *Manager) Check(ctx context.Context, r *connect.Request[v1.CheckRequest]) (*connect.Response[v1.CheckResponse], error) {
	req := &v1.MigrateRequest{
		Namespace: r.Msg.GetNamespace(), Shard: r.Msg.GetShard(), Node: r.Msg.GetNode(),
		Mode: r.Msg.GetMode(), ForceNamespace: r.Msg.GetForceNamespace(),
	}
	if err := normalise(req); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	o := m.newOutgoing(req)
	findings, err := o.preflight(ctx, true)
	if err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(&v1.CheckResponse{Findings: findings}), nil
}

// Migrate runs a migration and streams its progress. The migration does not end
// with the client's connection: cancel does that.
func (m *Manager) Migrate(ctx context.Context, r *connect.Request[v1.MigrateRequest], stream *connect.ServerStream[v1.MigrateEvent]) error {
	req := r.Msg
	if err := normalise(req); err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	o := m.newOutgoing(req)
	if req.GetDryRun() {
		findings, err := o.preflight(ctx, true)
		if err != nil {
			return apiError(err)
		}
		result, _ := o.report.snapshot()
		result.Outcome, result.Reason = OutcomeAborted, "dry run: nothing was moved"
		event := &v1.MigrateEvent{Result: result}
		if refused(findings) {
			event.Refused = findings
			result.Code = CodeRefused
		}
		return stream.Send(event)
	}
	if err := m.launch(o); err != nil {
		return err
	}
	wake, stop := o.report.follow()
	defer stop()
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return ctx.Err() // the client left; the migration goes on
		case <-o.done:
			result, progress := o.report.snapshot()
			if result.GetOutcome() == OutcomeRunning {
				return connect.NewError(connect.CodeUnavailable, fmt.Errorf("%w; migration %s goes on when it is back", errShutdown, result.GetId()))
			}
			event := &v1.MigrateEvent{Progress: progress, Result: result}
			if result.GetCode() == CodeRefused {
				event.Refused = o.findings
			}
			return stream.Send(event)
		case <-wake:
			if time.Since(last) < progressEvery {
				continue
			}
			last = time.Now()
			_, progress := o.report.snapshot()
			if err := stream.Send(&v1.MigrateEvent{Progress: progress}); err != nil {
				return err
			}
		}
	}
}

// normalise fills defaults in and refuses impossible requests.
func normalise(req *v1.MigrateRequest) error {
	if req.Namespace == "" {
		req.Namespace = "default"
	}
	if req.Mode == "" {
		req.Mode = ModePreCopy
	}
	if req.DeadlineMs == 0 {
		req.DeadlineMs = defaultDeadline.Milliseconds()
	}
	errs := []error{runtime.CheckName("namespace", req.GetNamespace()), runtime.CheckName("shard", req.GetShard())}
	if req.GetMode() == ModePostCopy {
		req.NoThrottle = true // what is still written is fetched later
	}
	if req.GetNode() == "" {
		errs = append(errs, errors.New("name the node to move to; tranship nodes lists them"))
	}
	if !slices.Contains([]string{ModePreCopy, ModePostCopy, ModeStop}, req.GetMode()) {
		errs = append(errs, fmt.Errorf("mode %q: this version knows %s, %s and %s", req.GetMode(), ModePreCopy, ModePostCopy, ModeStop))
	}
	if req.GetMaxBlackoutMs() < 0 || req.GetDeadlineMs() < 0 || req.GetBandwidthBitsPerSecond() < 0 {
		errs = append(errs, errors.New("blackout, deadline and bandwidth cannot be negative"))
	}
	return errors.Join(errs...)
}

func (m *Manager) newOutgoing(req *v1.MigrateRequest) *outgoing {
	now := time.Now()
	id := newID(now)
	return &outgoing{
		m: m, req: req, done: make(chan struct{}), told: extentSet{}, owed: extentSet{}, mountIndex: map[int]*layer.Index{},
		entry: &Entry{
			ID: id, Role: Source, State: Preparing, Namespace: req.GetNamespace(), Shard: req.GetShard(),
			Peer: req.GetNode(), Mode: req.GetMode(), Started: now,
			Bandwidth: req.GetBandwidthBitsPerSecond(),
		},
		report: newReport(&v1.Migration{
			Id: id, Shard: req.GetShard(), Namespace: req.GetNamespace(), From: m.cfg.Node, To: req.GetNode(),
			Mode: req.GetMode(), Role: string(Source),
		}, time.Now),
	}
}

// launch journals and starts a migration on a context of its own.
func (m *Manager) launch(o *outgoing) error {
	key := shardKey{o.entry.Namespace, o.entry.Shard}
	if o.arriving = m.arriving(key); o.arriving == nil {
		if err := m.claim(key, o.entry.ID); err != nil {
			o.findings = m.refuseBusy(key, err)
			o.report.finish(OutcomeAborted, CodeRefused, err.Error())
			close(o.done)
			return nil
		}
	}
	if err := m.journal.Put(o.entry); err != nil {
		m.release(key, o.entry.ID)
		return connect.NewError(connect.CodeInternal, err)
	}
	ctx, cancel := context.WithCancelCause(m.life)
	o.cancel = cancel
	m.mu.Lock()
	m.outgoing[o.entry.ID] = o
	m.mu.Unlock()
	m.work.Go(func() {
		defer cancel(nil)
		// A destination that was restarted knows nothing of what it had promised.
		dctx, stop := context.WithTimeoutCause(transfer.Once(ctx), time.Duration(o.req.GetDeadlineMs())*time.Millisecond, errDeadline)
		defer stop()
		m.conclude(dctx, o, o.run(dctx))
	})
	return nil
}

func (m *Manager) refuseBusy(key shardKey, err error) []*v1.Finding {
	return []*v1.Finding{refuse("migrating", "wait, or tranship cancel "+m.MigrationOf(key.namespace, key.name),
		"%v%s", err, m.because(key.namespace, key.name))}
}

// conclude undoes what a failed migration did and writes the last word.
func (m *Manager) conclude(ctx context.Context, o *outgoing, err error) {
	log := m.log.With("migration", o.entry.ID, "shard", o.entry.Shard, "peer", o.entry.Peer)
	outcome, code := outcomeOf(ctx, o.entry.State, err)
	reason := ""
	if err != nil {
		reason = reasonOf(ctx, err)
	}
	o.entry.Code, o.entry.Reason = code, reason
	// A yielded shard must not run here again unless the destination refused it.
	unsettled := outcome == OutcomeInDoubt || (o.entry.State == Yielded && outcome == OutcomeDone)
	switch {
	case unsettled:
		log.Error("migration is not settled yet", "err", err)
	case outcome == OutcomeAborted:
		m.endServing(o.entry.ID)
		uctx, cancel := undo(ctx)
		if uerr := o.undo.run(uctx); uerr != nil {
			log.Error("undo", "err", uerr)
		}
		cancel()
		if o.entry.State != Returning {
			o.entry.State = Aborted
		}
	}
	if o.entry.State == Returning && !o.entry.Runs {
		outcome, code = OutcomeInDoubt, CodeReturning
		reason, _ = m.noteOf(o.entry)
	}
	o.report.finish(outcome, code, reason)
	if outcome == OutcomeDone {
		o.letGo(log)
	}
	var jerr error
	if o.entry.Report, jerr = o.report.encode(); jerr == nil {
		jerr = m.journal.Put(o.entry)
	}
	if jerr != nil {
		log.Error("journal", "err", jerr)
		if o.entry.State == Aborted {
			// A later daemon would undo it once more, under whoever has the shard then.
			o.entry.State = Returning
		}
	}
	unsettled = unsettled || o.entry.State == Returning
	result, _ := o.report.snapshot()
	m.metrics.ended(result)
	traceMigration(m.cfg.Traces, result)
	log.Info("migration ended", "outcome", outcome, "code", code, "reason", reason,
		"blackout_ms", result.GetBlackoutMs(), "total_ms", result.GetTotalMs(), "pages", result.GetPages(), "bytes_sent", result.GetBytesSent())
	m.mu.Lock()
	delete(m.outgoing, o.entry.ID)
	m.mu.Unlock()
	if unsettled {
		m.work.Go(func() {
			m.settle(m.life, o.entry)
			// Whoever keeps the shard, nothing here tracks it any more.
			o.letGo(log)
		})
	} else {
		m.release(shardKey{o.entry.Namespace, o.entry.Shard}, o.entry.ID)
	}
	close(o.done)
	m.giveMemoryBack()
}

// outcomeOf classifies the end of a migration by the state that the source has
// journaled and by the error.
func outcomeOf(ctx context.Context, state State, err error) (outcome, code string) {
	var refusal *errRefused
	var noRestore *refusedToRunError
	var leftover *leftoverError
	var overLimit *overLimitError
	var lost *pagesLostError
	switch {
	case err == nil, errors.As(err, &leftover):
		return OutcomeDone, ""
	case errors.As(err, &noRestore), errors.Is(err, errTakenBack):
		return OutcomeAborted, CodeRestore
	case errors.As(err, &lost):
		return OutcomeInDoubt, CodePagesLost
	case state == Serving:
		return OutcomeRunning, CodeRestarted // only the end of the daemon interrupts it
	case state == Yielded, errors.Is(err, errInDoubt):
		return OutcomeInDoubt, CodeInDoubt
	case errors.As(err, &refusal):
		return OutcomeAborted, CodeRefused
	case errors.As(err, &overLimit):
		return OutcomeAborted, CodeOverLimit
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errCancelled):
		return OutcomeAborted, CodeCancelled
	case errors.Is(cause, errDeadline):
		return OutcomeAborted, CodeDeadline
	case errors.Is(cause, errShutdown):
		return OutcomeAborted, CodeRestarted
	}
	if isLinkError(err) {
		return OutcomeAborted, CodeLink
	}
	return OutcomeAborted, CodeFailed
}

func reasonOf(ctx context.Context, err error) string {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, errInDoubt) {
		for _, c := range []error{errCancelled, errDeadline, errShutdown} {
			if errors.Is(cause, c) {
				return c.Error()
			}
		}
	}
	return err.Error()
}

// Cancel ends a migration that has not been committed and waits for its undo.
func (m *Manager) Cancel(ctx context.Context, r *connect.Request[v1.CancelRequest]) (*connect.Response[v1.CancelResponse], error) {
	m.mu.Lock()
	o := m.outgoing[r.Msg.GetId()]
	m.mu.Unlock()
	if o == nil {
		e, err := m.find(r.Msg.GetId())
		if err != nil {
			return nil, err
		}
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("migration %s is %s and can no longer be cancelled", e.ID, e.State))
	}
	if o.committed.Load() {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf(
			"migration %s can no longer be cancelled: %s runs on %s, which fetches the rest of its memory from here", o.entry.ID, o.entry.Shard, o.entry.Peer))
	}
	o.cancel(errCancelled)
	select {
	case <-o.done:
	case <-ctx.Done():
		return nil, connect.NewError(connect.CodeCanceled, ctx.Err())
	}
	result, _ := o.report.snapshot()
	return connect.NewResponse(&v1.CancelResponse{Migration: result}), nil
}

// ListMigrations lists what this host knows, running ones first.
func (m *Manager) ListMigrations(_ context.Context, r *connect.Request[v1.ListMigrationsRequest]) (*connect.Response[v1.ListMigrationsResponse], error) {
	entries, err := m.journal.List()
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	resp := &v1.ListMigrationsResponse{}
	for _, e := range entries {
		if id := r.Msg.GetId(); id != "" && e.ID != id {
			continue
		}
		m.mu.Lock()
		o := m.outgoing[e.ID]
		m.mu.Unlock()
		if o != nil && e.Role == Source {
			live, _ := o.report.snapshot()
			resp.Migrations = append(resp.Migrations, m.described(live, e))
			continue
		}
		resp.Migrations = append(resp.Migrations, m.described(migrationOf(e, m.cfg.Node), e))
	}
	if id := r.Msg.GetId(); id != "" && len(resp.GetMigrations()) == 0 {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("%s: %w; tranship migrations lists those that %s knows", id, ErrUnknownMigration, m.cfg.Node))
	}
	return connect.NewResponse(resp), nil
}

func (m *Manager) find(id string) (*Entry, error) {
	for _, role := range []Role{Source, Destination} {
		e, err := m.journal.Get(role, id)
		if err == nil {
			return e, nil
		}
		if !errors.Is(err, ErrUnknownMigration) {
			return nil, connect.NewError(connect.CodeInternal, err)
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("%s: %w", id, ErrUnknownMigration))
}
