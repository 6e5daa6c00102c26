package migrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
	"github.com/tranship/tranship/transfer"
)

// errInDoubt says that the source has yielded and the destination cannot be
// asked. The shard stays frozen here until it can, or an operator decides.
var errInDoubt = errors.New("the destination does not answer, so it is not known whether it runs the shard")

const (
	// doubtPatience is how long the client waits for an answer that may never
	// come; the question itself is repeated for as long as the daemon lives.
	doubtPatience = 20 * time.Second
	// commitRetry paces the question. Redialling a dead link costs a handshake.
	commitRetry = 250 * time.Millisecond
)

// 6. yield, 7. commit, 8. discard

func (o *outgoing) commit(ctx context.Context) error {
	o.report.enter(PhaseCommit)
	if err := failpoint.Hit(ctx, "source.before-yield"); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if time.Since(o.sealedAt) > freshAnswer {
		// Not the usual case: something held this host up. Better to give up now
		// than to yield to a host that cannot be reached any more.
		if err := o.probe(ctx); err != nil {
			return err
		}
	}
	var s *serving
	if o.req.GetMode() == ModePostCopy {
		var err error
		if s, err = o.m.openServing(ctx, o.entry, o.report); err != nil {
			return err
		}
		o.committed.Store(true)
	}
	at := time.Now()
	o.entry.State = Yielded
	if err := o.m.journal.Put(o.entry); err != nil {
		return o.failedToYield(ctx, err)
	}
	o.step("journal", at)
	if err := failpoint.Hit(context.WithoutCancel(ctx), "source.yielded"); err != nil {
		return errors.Join(err, errInDoubt)
	}
	at = time.Now()
	answer, err := o.m.askToRun(ctx, o.entry, o.peer, doubtPatience)
	if err != nil {
		return err
	}
	o.step("commit and restore", at)
	o.report.enter(PhaseActivate)
	o.settleBlackout(answer)
	if s != nil {
		return o.postCopy(s)
	}
	if err := o.m.discard(ctx, o.entry); err != nil {
		return &leftoverError{err}
	}
	return nil
}

// leftoverError says that the shard runs at the destination and that what is
// left of it here could not be removed yet. It is tried again until it can.
type leftoverError struct{ err error }

func (e *leftoverError) Error() string { return e.err.Error() }
func (e *leftoverError) Unwrap() error { return e.err }

// freshAnswer is for how long the answer to Seal counts as a sign that the
// destination can be reached.
const freshAnswer = 100 * time.Millisecond

// probe makes sure that the destination answers.
func (o *outgoing) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, tellTimeout)
	defer cancel()
	if _, err := o.peer.Clock(ctx, connect.NewRequest(&v1.ClockRequest{})); err != nil {
		return fmt.Errorf("%w: %s does not answer before the commit: %w", transfer.ErrLinkLost, o.entry.Peer, peerError(err))
	}
	return nil
}

// failedToYield handles a journal that could not be written: what is on the disk
// is unknown, and a restarted daemon might read "yielded". The shard may only go
// on here once the destination has promised never to start it.
func (o *outgoing) failedToYield(ctx context.Context, cause error) error {
	actx, cancel := undo(ctx)
	defer cancel()
	if _, err := o.peer.Abort(actx, connect.NewRequest(&v1.AbortRequest{Id: o.entry.ID, Reason: cause.Error()})); err != nil {
		return errors.Join(cause, peerError(err), errInDoubt)
	}
	o.entry.State = Stopping
	return cause
}

// settleBlackout computes the blackout from the two hosts' clocks.
func (o *outgoing) settleBlackout(answer *v1.CommitResponse) {
	running := time.Unix(0, answer.GetStartedUnixNs()).Add(-o.offset.offset)
	blackout := running.Sub(o.frozenAt)
	o.report.set(func(m *v1.Migration) {
		m.BlackoutMs = millis(blackout)
		for _, s := range answer.GetSteps() {
			m.Blackout = append(m.Blackout, o.theirs(s))
		}
		m.ClockErrorMs = millis(o.offset.roundTrip) / 2
	})
	o.m.learnFixed(blackout, o.report)
}

// askToRun asks the destination to run a shard that this host has yielded until
// it says yes or never. patience bounds the wait; errInDoubt then.
func (m *Manager) askToRun(ctx context.Context, e *Entry, peer transhipv1connect.PeerClient, patience time.Duration) (*v1.CommitResponse, error) {
	// Cancellation by a client means nothing any more, but the daemon's end does.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	stop := context.AfterFunc(m.life, cancel)
	defer stop()
	for {
		resp, err := askOnce(ctx, e, peer)
		if !errors.Is(err, errInDoubt) {
			return resp, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(commitRetry):
		}
	}
}

// askOnce is askToRun with one question.
func askOnce(ctx context.Context, e *Entry, peer transhipv1connect.PeerClient) (*v1.CommitResponse, error) {
	resp, err := peer.Commit(ctx, connect.NewRequest(&v1.CommitRequest{Id: e.ID}))
	switch {
	case err == nil && resp.Msg.GetRunning():
		return resp.Msg, nil
	case err == nil:
		err = errors.New("it neither runs the shard nor refuses it")
	case connect.CodeOf(err) == connect.CodeAborted:
		return nil, &refusedToRunError{peerError(err)}
	}
	return nil, errors.Join(errInDoubt, fmt.Errorf("commit on %s: %w", e.Peer, peerError(err)))
}

// refusedToRunError is the destination's durable word that it did not run the
// shard and never will.
type refusedToRunError struct{ err error }

func (e *refusedToRunError) Error() string {
	return "the destination could not start it: " + e.err.Error()
}
func (e *refusedToRunError) Unwrap() error { return e.err }

// discard removes the frozen source after the destination said that it runs the
// shard. May run twice. The tasks get SIGKILL before they are thawed and their
// link is down, so that no instruction of theirs runs and no packet leaves.
func (m *Manager) discard(ctx context.Context, e *Entry) error {
	ctx, cancel := undo(ctx)
	defer cancel()
	m.endServing(e.ID)
	if err := failpoint.Hit(ctx, "source.discard"); err != nil {
		return err
	}
	var errs []error
	if err := leaveMounts(e); err != nil {
		errs = append(errs, err)
	}
	if err := m.rt.RemoveMoved(ctx, e.Namespace, e.Shard); err != nil && !errors.Is(err, runtime.ErrNotFound) {
		errs = append(errs, err)
	}
	if err := os.RemoveAll(m.dir(e.ID, Source)); err != nil {
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		// It is in doubt no more: nobody may say that it stays here.
		e.RunsThere = true
		errs = append(errs, m.journal.Put(e))
		return fmt.Errorf("remove what is left of %s: %w", e.Shard, errors.Join(errs...))
	}
	e.State, e.Code, e.Reason, e.RunsThere = Done, "", "", false
	return m.journal.Put(e)
}

const (
	// tellTimeout bounds one attempt to tell the destination of an abort: the
	// shard that is being given back waits for it.
	tellTimeout = 2 * time.Second
	// tellFor is how long the attempts go on; a destination that is away longer
	// asks by itself when it is back.
	tellFor = 10 * time.Minute
)

func (m *Manager) tellAbort(ctx context.Context, e *Entry, peer transhipv1connect.PeerClient) error {
	ctx, cancel := context.WithTimeout(ctx, tellTimeout)
	defer cancel()
	_, err := peer.Abort(ctx, connect.NewRequest(&v1.AbortRequest{Id: e.ID, Reason: e.Reason}))
	if err != nil && isLinkError(err) || ctx.Err() != nil {
		return fmt.Errorf("abort on %s: %w", e.Peer, peerError(err))
	}
	return nil // told, or it has its own reasons, which its journal knows
}

// keepTellingAbort repeats the abort until the destination has heard it, so that
// what it holds for the shard is free as soon as the link is back.
func (m *Manager) keepTellingAbort(e *Entry, peer transhipv1connect.PeerClient) {
	told := &Entry{ID: e.ID, Peer: e.Peer, Reason: e.Reason}
	m.work.Go(func() {
		ctx, cancel := context.WithTimeout(m.life, tellFor)
		defer cancel()
		for m.tellAbort(ctx, told, peer) != nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(commitRetry):
			}
		}
	})
}

// killByStart ends a process of an earlier daemon, if its id is still its.
func killByStart(pid int, start uint64) error {
	if pid <= 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd of %d: %w", pid, err)
	}
	defer unix.Close(fd)
	now, err := startTime(pid)
	if err != nil || now != start {
		return nil // gone, and the id may be somebody else's
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %d: %w", pid, err)
	}
	// Its death is what lets go of the tasks that it traced.
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(poll, int(undoTimeout.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && n == 0 {
			err = errors.New("does not end")
		}
		if err != nil {
			return fmt.Errorf("await end of %d: %w", pid, err)
		}
		return nil
	}
}
