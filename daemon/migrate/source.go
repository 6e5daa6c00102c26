package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/opencontainers/go-digest"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/layer"
	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
	"github.com/tranship/tranship/transfer"
)

// The source's road:
//
//  0. wait         for the shard's memory, or while others leave this host
//  1. reserve      pre-flight here and there; the destination holds room
//  2. prepare      image content, then everything that the destination can build
//  3. pre-copy     writable layer and log in bulk, then rounds of written pages
//  4. stop         one shard of this host after the other: freeze, take the link
//                   down; last pages and CRIU's images
//  5. seal         the destination says that it has everything
//  6. yield        journaled: from here only the destination may run the shard
//  7. commit       the destination starts it, and answers when it runs
//  8. discard      kill the frozen source and remove what it had
//
// In post-copy the last pages stay here at 4, and between 7 and 8 the destination
// fetches them (serving.go).
//
// Until 6 every error runs the undo list and the shard goes on here.

// outgoing is one migration that leaves this host.
type outgoing struct {
	m      *Manager
	req    *v1.MigrateRequest
	entry  *Entry
	report *report
	cancel context.CancelCauseFunc
	// arriving is an earlier migration of the shard, to this host, that must end
	// first; nil if the shard was claimed at once.
	arriving *incoming
	done     chan struct{} // closed when run has returned
	// findings are why pre-flight refused, valid after done.
	findings []*v1.Finding

	rec     *runtime.Record
	peer    transhipv1connect.PeerClient
	session *transfer.Session
	tracker track.Tracker
	cgroup  runtime.Cgroup
	rootfs  *runtime.Rootfs
	upper   string
	index   *layer.Index
	// mountIndex is index for each copied mount, by its place in rec.Mounts.
	mountIndex map[int]*layer.Index
	logSent    int64
	tmpfs      []tmpfsSource // as Record.Tmpfs
	told       extentSet
	stood      []checkpoint.Process // whose memory the last round looked at
	shared     sharedMemory
	owed       extentSet // post-copy: what the last round left here
	owedDigest uint64
	committed  atomic.Bool // post-copy: it cannot be cancelled any more
	offset     clockOffset
	undo       undoList
	slowing    slowing
	left       func()        // another migration of this host may begin; may run twice
	hold       *runtime.Hold // nil when no address moves

	frozenAt time.Time
	sealedAt time.Time
}

// undoList is what gives the shard back, newest first. It is emptied by yield.
type undoList struct {
	mu    sync.Mutex
	steps []undoStep
}

type undoStep struct {
	name string
	run  func(ctx context.Context) error
}

func (u *undoList) push(name string, run func(ctx context.Context) error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.steps = append(u.steps, undoStep{name, run})
}

// run executes and forgets every step; all run, whatever fails.
func (u *undoList) run(ctx context.Context) error {
	u.mu.Lock()
	steps := u.steps
	u.steps = nil
	u.mu.Unlock()
	var errs []error
	for i := len(steps) - 1; i >= 0; i-- {
		if err := steps[i].run(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", steps[i].name, err))
		}
	}
	return errors.Join(errs...)
}

// clockOffset is destination's clock minus ours, known within half a round trip.
type clockOffset struct{ offset, roundTrip time.Duration }

// errRefused carries pre-flight findings.
type errRefused struct{ findings []*v1.Finding }

func (e *errRefused) Error() string {
	for _, f := range e.findings {
		if !f.GetWarning() {
			return f.GetMessage()
		}
	}
	return "refused"
}

// run is the whole migration. It returns nil when the shard runs at the
// destination, errInDoubt when that is not known.
func (o *outgoing) run(ctx context.Context) error {
	if err := o.awaitArrival(ctx); err != nil {
		return err
	}
	if err := o.awaitStart(ctx); err != nil {
		return err
	}
	defer o.left()
	if err := o.reserve(ctx); err != nil {
		return err
	}
	if err := o.prepare(ctx); err != nil {
		return fmt.Errorf("prepare %s on %s: %w", o.entry.Shard, o.entry.Peer, err)
	}
	if err := o.preCopy(ctx); err != nil {
		return fmt.Errorf("pre-copy %s: %w", o.entry.Shard, err)
	}
	defer o.m.turns.leave(o)
	if err := o.takeTurn(ctx); err != nil {
		return fmt.Errorf("pre-copy %s: %w", o.entry.Shard, err)
	}
	if err := o.stopAndCopy(ctx); err != nil {
		return fmt.Errorf("stop-and-copy %s: %w", o.entry.Shard, err)
	}
	return o.commit(ctx)
}

// 1. reserve

func (o *outgoing) reserve(ctx context.Context) error {
	o.report.enter(PhaseReserve)
	if err := failpoint.Hit(ctx, "source.reserve"); err != nil {
		return err
	}
	findings, err := o.preflight(ctx, false)
	if err != nil {
		return err
	}
	o.findings = findings
	if refused(findings) {
		return &errRefused{findings}
	}
	o.undo.push("reservation on "+o.entry.Peer, o.abortPeer)
	return nil
}

// awaitArrival claims the shard once all of its memory is here.
func (o *outgoing) awaitArrival(ctx context.Context) error {
	if o.arriving == nil {
		return nil
	}
	o.report.enter(PhaseWait)
	select {
	case <-o.arriving.ended:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	key := shardKey{o.entry.Namespace, o.entry.Shard}
	if err := o.m.claim(key, o.entry.ID); err != nil {
		o.findings = o.m.refuseBusy(key, err)
		return &errRefused{o.findings}
	}
	return nil
}

func (o *outgoing) abortPeer(ctx context.Context) error {
	if err := o.m.tellAbort(ctx, o.entry, o.peer); err != nil {
		o.m.log.Info("destination cannot be told of the abort yet", "migration", o.entry.ID, "peer", o.entry.Peer, "err", err)
		o.m.keepTellingAbort(o.entry, o.peer)
	}
	return nil
}

// 2. prepare

func (o *outgoing) prepare(ctx context.Context) error {
	o.report.enter(PhasePrepare)
	if err := failpoint.Hit(ctx, "source.prepare"); err != nil {
		return err
	}
	dir := o.m.dir(o.entry.ID, Source)
	for _, sub := range []string{"images", "work", parentDir} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return err
		}
	}
	o.undo.push("files", func(context.Context) error {
		if o.entry.State == Returning {
			return nil // they say what is to be undone
		}
		return os.RemoveAll(dir)
	})

	session, err := o.m.peers.Dial(ctx, o.entry.Peer, o.entry.ID, transfer.Options{Bandwidth: o.req.GetBandwidthBitsPerSecond()})
	if err != nil {
		return err
	}
	o.session = session
	o.undo.push("page session", func(context.Context) error { return ignoreClosed(session.Close()) })

	raw, err := json.Marshal(o.rec)
	if err != nil {
		return fmt.Errorf("encode container record: %w", err)
	}
	req := &v1.PrepareRequest{Id: o.entry.ID, Container: raw}
	for {
		if err := o.m.turns.wayFor(ctx, o); err != nil {
			return err
		}
		resp, err := o.peer.Prepare(ctx, connect.NewRequest(req))
		if err != nil {
			return peerError(err)
		}
		if resp.Msg.GetReady() {
			return nil
		}
		if len(resp.Msg.GetMissingBlobs()) == 0 {
			return errors.New("the destination is neither ready nor lacks content")
		}
		for _, d := range resp.Msg.GetMissingBlobs() {
			if err := o.sendContent(ctx, digest.Digest(d)); err != nil {
				return err
			}
		}
	}
}

func (o *outgoing) sendContent(ctx context.Context, d digest.Digest) error {
	blob, err := o.m.rt.OpenBlob(ctx, o.rec.Namespace, d)
	if err != nil {
		return err
	}
	defer blob.Close()
	sent, err := o.session.Blob(ctx, blobContent, d.String(), blob.Size(), blob.Reader())
	if err != nil {
		return fmt.Errorf("send content %s: %w", d, err)
	}
	o.report.count(sent)
	return nil
}
