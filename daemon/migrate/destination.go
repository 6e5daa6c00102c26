package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/layer"
	"github.com/tranship/tranship/checkpoint/lazypages"
	"github.com/tranship/tranship/checkpoint/pagestore"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
	"github.com/tranship/tranship/transfer"
)

// The destination's road mirrors the source's:
//
//  1. reserve    pre-flight; the name and the memory are taken
//  2. prepare    image, snapshot, network (staged), container, page server, shim
//  3. receive    pages into the store, files into the writable layer, images
//  4. seal       journaled: everything is here; the source decides
//  5. start      journaled; runc restores, the page server answers faults
//  6. run        journaled; only now the link comes up: before, a failure is
//     undone and the source goes on, because nothing left the shard
//  7. fill       pages are placed behind the running shard; then adopt, clean up
//
// In post-copy some of them are not here at 4; from 5 on they are fetched (puller.go).

// Kinds of blobs that the source sends; the name's meaning depends on the kind.
const (
	blobContent = "content" // name: digest
	blobLayer   = "layer"
	blobLog     = "log" // name: offset in the log file
	blobFrames  = "frames"
	blobImages  = "images"
	blobOwed    = "owed" // post-copy: which pages come later
)

// incoming is one migration that arrives at this host.
type incoming struct {
	m      *Manager
	mu     sync.Mutex // one of reserve, prepare, seal, start, abort at a time
	entry  *Entry
	rec    *runtime.Record
	store  *pagestore.Store
	shared *pagestore.Store // of shared memory, which CRIU restores from
	pages  *pageServer
	task   *runtime.RestoreTask
	hold   *runtime.Hold // nil when no address moves
	rootfs *runtime.Rootfs
	upper  string
	image  string
	heard  time.Time // when the source last showed that it lives
	ended  chan struct{}
	steps  []*v1.Phase

	sinks    sync.WaitGroup // calls into the Sink that run now
	received atomic.Uint64  // digest of the CRIU images that arrived
	owed     atomic.Pointer[owedList]

	pullMu  sync.Mutex // guards pull.end and pull.done
	pull    pulling
	arrived atomic.Int64 // bytes that were pulled
}

var _ transfer.Sink = (*incoming)(nil)

func (in *incoming) dir(sub string) string {
	return filepath.Join(in.m.dir(in.entry.ID, Destination), sub)
}

// 2. prepare. May run twice; missing content is sent between the calls.
func (in *incoming) prepare(ctx context.Context, raw []byte) (missing []ocispec.Descriptor, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.entry.State != Receiving {
		return nil, fmt.Errorf("migration %s is %s", in.entry.ID, in.entry.State)
	}
	if err := failpoint.Hit(ctx, "destination.prepare"); err != nil {
		return nil, err
	}
	rec, err := runtime.DecodeRecord(raw)
	if err != nil {
		return nil, err
	}
	if rec.Name != in.entry.Shard || rec.Namespace != in.entry.Namespace {
		return nil, fmt.Errorf("%w: the record is of %s/%s, reserved was %s/%s", runtime.ErrInvalid, rec.Namespace, rec.Name, in.entry.Namespace, in.entry.Shard)
	}
	in.rec = rec
	in.entry.Record = json.RawMessage(raw)
	if err := in.m.journal.Put(in.entry); err != nil {
		return nil, err
	}
	missing, err = in.m.rt.EnsureContent(ctx, rec, in.entry.ID)
	if err != nil || len(missing) > 0 {
		return missing, err
	}
	if in.task != nil {
		return nil, nil
	}
	return nil, in.build(ctx)
}

// build makes everything that can be made before the freeze.
func (in *incoming) build(ctx context.Context) error {
	rt, rec := in.m.rt, in.rec
	for _, sub := range []string{"images", "work", "pages"} {
		if err := os.MkdirAll(in.dir(sub), 0o700); err != nil {
			return err
		}
	}
	var err error
	if in.image, err = rt.PrepareImage(ctx, rec, in.entry.ID); err != nil {
		return err
	}
	if err := errors.Join(in.makeMounts(), in.makeTmpfs()); err != nil {
		return err
	}
	if net, ok := shardNet(rec); ok {
		net.Staged = true
		if err := rt.Network().Create(ctx, net); err != nil {
			return err
		}
		if net.IP.IsValid() {
			if in.hold, err = rt.Network().Hold(net); err != nil {
				return err
			}
		}
	}
	if err := rt.CreateForRestore(ctx, rec, in.image, in.entry.ID); err != nil {
		return err
	}
	if in.upper, err = rt.UpperDir(ctx, rec.Namespace, rec.Name); err != nil {
		return err
	}
	if in.store, err = pagestore.Create(in.dir("pages")); err != nil {
		return err
	}
	if in.shared, err = pagestore.Create(in.dir("shared")); err != nil {
		return err
	}
	conf := criu.RestoreConfig{LazyPages: true, TCPEstablished: true, LogLevel: in.m.cfg.CRIULogLevel, Mounts: in.provided()}
	if err := conf.Write(runtime.CRIUConfigPath(rec.Namespace, rec.Name)); err != nil {
		return err
	}
	if in.pages, err = startPageServer(ctx, in.m.cfg.Daemon, in.dir("")); err != nil {
		return err
	}
	in.entry.PageServerPID, in.entry.PageServerStart = in.pages.pid, in.pages.start
	if err := in.m.journal.Put(in.entry); err != nil {
		return err
	}
	// runc reads the images only at Start; the shim and its mounts cost ~15 ms
	// that the blackout need not pay.
	if in.task, err = rt.NewRestoreTask(ctx, rec, in.dir("images"), in.dir("work")); err != nil {
		return err
	}
	// The writable layer is written to until the last moment, and an overlay's
	// upper directory must not change under a mount.
	if in.rootfs, err = rt.Rootfs(ctx, rec.Namespace, rec.Name); err != nil {
		return err
	}
	return in.rootfs.Unmount()
}

// 3. receive: the Sink of the page session.

// enter refuses data that comes too early or too late. Once sealed nothing may
// change any more, whatever a peer sends.
func (in *incoming) enter() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.entry.State != Receiving {
		return fmt.Errorf("migration %s takes no data, it is %s", in.entry.ID, in.entry.State)
	}
	in.heard = time.Now()
	in.sinks.Add(1)
	return nil
}

// PutPages keeps pages of one process.
func (in *incoming) PutPages(pid checkpoint.PID, addr uint64, data []byte) error {
	return in.withStore(pid, func(s *pagestore.Store) error { return s.PutPages(pid, addr, data) })
}

// ReadPages reads what is kept of one process, for what changed in it.
func (in *incoming) ReadPages(pid checkpoint.PID, addr uint64, dst []byte) error {
	return in.withStore(pid, func(s *pagestore.Store) error { return s.ReadPages(pid, addr, dst) })
}

// ZeroPages forgets what was kept for a range: it reads as zero.
func (in *incoming) ZeroPages(pid checkpoint.PID, addr uint64, n checkpoint.Pages) error {
	return in.withStore(pid, func(s *pagestore.Store) error { return s.ZeroPages(pid, addr, n) })
}

// withStore gives use the store that a pid's pages are in.
func (in *incoming) withStore(pid checkpoint.PID, use func(*pagestore.Store) error) error {
	if err := in.enter(); err != nil {
		return err
	}
	defer in.sinks.Done()
	store := in.store
	if pid.Shared() {
		store = in.shared
	}
	if store == nil {
		return errors.New("pages came before prepare")
	}
	return use(store)
}

// Blob takes one of the byte streams that accompany the pages.
func (in *incoming) Blob(ctx context.Context, kind, name string, size int64, r io.Reader) error {
	if err := in.enter(); err != nil {
		return err
	}
	defer in.sinks.Done()
	if in.rec == nil {
		return errors.New("data came before prepare")
	}
	switch kind {
	case blobContent:
		return in.takeContent(ctx, name, size, r)
	case blobLayer:
		if in.upper == "" {
			return errors.New("the shard's root is read-only here")
		}
		_, err := layer.Apply(ctx, in.upper, r)
		return err
	case blobMount:
		return in.takeMount(ctx, name, r)
	case blobTmpfs:
		return in.takeTmpfs(ctx, name, r)
	case blobLog:
		return in.takeLog(name, r)
	case blobFrames:
		if in.hold == nil {
			return errors.New("frames for a shard without an address")
		}
		return in.hold.Add(r)
	case blobImages:
		sum, err := receiveImages(in.dir("images"), r)
		if err != nil {
			return err
		}
		in.received.Store(uint64(sum))
		return nil
	case blobOwed:
		return in.takeOwed(r)
	}
	return fmt.Errorf("unknown kind of data %q", kind)
}

// takeContent accepts only blobs that the record names, at their size.
func (in *incoming) takeContent(ctx context.Context, name string, size int64, r io.Reader) error {
	img := in.rec.Image
	for _, d := range append([]ocispec.Descriptor{img.Target, img.Manifest, img.Config}, img.Layers...) {
		if d.Digest == digest.Digest(name) && d.Size == size {
			return in.m.rt.WriteBlob(ctx, in.rec.Namespace, in.entry.ID, d, r)
		}
	}
	return fmt.Errorf("content %s of %d bytes is not part of image %s", name, size, img.Name)
}

func (in *incoming) takeLog(name string, r io.Reader) error {
	offset, err := strconv.ParseInt(name, 10, 64)
	if err != nil || offset < 0 {
		return fmt.Errorf("log offset %q", name)
	}
	path := in.m.rt.LogPath(in.rec.Namespace, in.rec.Name)
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o640)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.NewOffsetWriter(f, offset), r)
	return errors.Join(err, f.Close())
}

// redirect makes the shard's address point here while the source stands still.
func (in *incoming) redirect() error {
	if err := in.enter(); err != nil {
		return err
	}
	defer in.sinks.Done()
	if in.hold == nil {
		return errors.New("a shard without an address cannot be redirected")
	}
	return in.hold.Redirect()
}

// 4. seal

func (in *incoming) seal(ctx context.Context, sum, owedSum uint64) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.entry.State == Sealed {
		return nil
	}
	if in.entry.State != Receiving || in.task == nil {
		return fmt.Errorf("migration %s cannot be sealed, it is %s", in.entry.ID, in.entry.State)
	}
	if got := in.received.Load(); got != sum || sum == 0 {
		return fmt.Errorf("CRIU images differ: %x was sent, %x arrived", sum, got)
	}
	in.entry.ImageDigest = sum
	if err := failpoint.Hit(ctx, "destination.seal"); err != nil {
		return err
	}
	in.sinks.Wait() // an honest source has nothing under way any more
	if err := in.owe(owedSum); err != nil {
		return err
	}
	if err := in.linkShared(); err != nil {
		return err
	}
	if in.store != nil {
		if err := in.store.Seal(); err != nil {
			return err
		}
	}
	if err := in.rootfs.Mount(); err != nil {
		return err
	}
	in.entry.State = Sealed
	if err := in.m.journal.Put(in.entry); err != nil {
		in.entry.State = Receiving
		return err
	}
	return nil
}

// 5. start, 6. run

// start is the source's Commit. It may run twice: a shard that runs is answered
// for, not started again. An *abortedError is the durable word that it never runs.
func (in *incoming) start(ctx context.Context) (*v1.CommitResponse, error) {
	// The caller's connection may break; the decision must not depend on it.
	ctx = context.WithoutCancel(ctx)
	in.mu.Lock()
	defer in.mu.Unlock()
	switch in.entry.State {
	case Running, Done:
		return in.runs(), nil
	case Aborted:
		return nil, &abortedError{in.entry.Reason}
	case Sealed:
	default:
		return nil, fmt.Errorf("migration %s is %s", in.entry.ID, in.entry.State)
	}
	if err := failpoint.Hit(ctx, "destination.commit"); err != nil {
		return nil, err
	}
	if in.task == nil { // the daemon was restarted since seal
		var err error
		if in.task, err = in.m.rt.PreparedTask(ctx, in.entry.Namespace, in.entry.Shard); err != nil {
			return nil, in.neverRuns(ctx, CodeRestarted, err)
		}
	}
	in.entry.State = Starting
	if err := in.m.journal.Put(in.entry); err != nil {
		in.entry.State = Sealed
		return nil, err
	}
	in.startPull()
	if err := in.restore(ctx); err != nil {
		return nil, in.neverRuns(ctx, CodeRestore, err)
	}
	at := time.Now()
	in.entry.State = Running
	if err := in.m.journal.Put(in.entry); err != nil {
		in.entry.State = Starting
		return nil, in.neverRuns(ctx, CodeFailed, err)
	}
	in.step("journal", at)
	in.activate(ctx)
	return in.runs(), nil
}

func (in *incoming) restore(ctx context.Context) error {
	at := time.Now()
	var pid int
	started := make(chan error, 1)
	go func() {
		var err error
		pid, err = in.task.Start(ctx)
		started <- err
	}()
	restored, err := in.pages.awaitFinished(ctx, started)
	if err != nil {
		return in.criuError(err)
	}
	released := make(chan time.Time, 1)
	runs, stop := context.WithCancel(ctx)
	defer stop()
	go func() { released <- awaitReleased(runs, restored.InitHostPID) }()
	in.passHeld()
	err = <-started
	stop() // it runs by now, if ever
	running := <-released
	if err != nil {
		return in.criuError(err)
	}
	in.part(stepRestore, at, running) // which is where the blackout ends
	in.entry.StartedUnixNS = running.UnixNano()
	in.step("runc", running)
	in.entry.InitPID = pid
	if err := failpoint.Hit(ctx, "destination.restored"); err != nil {
		return err
	}
	// A shim that died meanwhile takes the shard with it. Now the source can
	// still go on; once the link is up it cannot.
	return in.m.rt.MustRun(ctx, in.entry.Namespace, in.entry.Shard)
}

// passHeld hands over the frames that came until now. The shard works on them
// while runc ends; nothing of it leaves the host before activate.
func (in *incoming) passHeld() {
	if in.hold == nil {
		return
	}
	if err := in.hold.Pass(); err != nil {
		in.m.log.Warn("frames that came during the blackout", "migration", in.entry.ID, "shard", in.entry.Shard, "err", err)
	}
}

func (in *incoming) criuError(err error) error {
	return &criu.LogError{Op: "restore", Err: err, Tail: criu.ErrorTail(in.dir("work/restore.log"))}
}

// activate brings the link up and lets the pages be filled in behind the shard.
// A failure here cannot be undone: the shard runs. It is logged and retried by
// the next start of the daemon.
func (in *incoming) activate(ctx context.Context) {
	at := time.Now()
	if net, ok := shardNet(in.rec); ok {
		if err := in.m.rt.Network().Activate(ctx, net); err != nil {
			in.m.log.Error("link of a moved shard", "migration", in.entry.ID, "shard", in.entry.Shard, "err", err)
		}
	}
	if in.hold != nil {
		if err := in.hold.Deliver(); err != nil {
			in.m.log.Warn("frames that came during the blackout", "migration", in.entry.ID, "shard", in.entry.Shard, "err", err)
		}
	}
	in.step("link up", at)
	in.restoreParts() // no client waits for it now; fill removes the file
	in.startPull()
	in.m.work.Go(func() { in.fill(in.m.life) })
}

func (in *incoming) runs() *v1.CommitResponse {
	lost := ""
	if in.entry.Code == CodePagesLost {
		lost = in.entry.Reason
	}
	return &v1.CommitResponse{
		Lost: lost, Running: true, StartedUnixNs: in.entry.StartedUnixNS, Steps: in.steps, UnixNs: time.Now().UnixNano(),
		Whole: in.pull.whole.Load() || in.entry.State == Done && in.entry.Code != CodePagesLost,
	}
}

// neverRuns undoes everything and journals that the shard will not run here, in
// this order: the promise is only given once it is true.
func (in *incoming) neverRuns(ctx context.Context, code string, cause error) error {
	uctx, cancel := undo(ctx)
	defer cancel()
	if err := in.destroy(uctx); err != nil {
		in.m.log.Error("undo of an incoming shard", "migration", in.entry.ID, "shard", in.entry.Shard, "err", err)
		// Unless the task is surely dead, the promise cannot be given.
		if in.m.rt.Runs(uctx, in.entry.Namespace, in.entry.Shard) {
			return errors.Join(cause, err)
		}
	}
	in.entry.State, in.entry.Code, in.entry.Reason = Aborted, code, cause.Error()
	if err := in.m.journal.Put(in.entry); err != nil {
		return errors.Join(cause, err)
	}
	in.m.forgetIncoming(in)
	return &abortedError{in.entry.Reason}
}

// abortedError is the durable word that this host will never run the shard.
type abortedError struct{ reason string }

func (e *abortedError) Error() string { return e.reason }

// abort ends a migration that the source gave up. Refused once the shard may run.
func (in *incoming) abort(ctx context.Context, code, reason string) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	switch in.entry.State {
	case Aborted:
		return nil
	case Receiving, Sealed:
	default:
		return fmt.Errorf("migration %s cannot be aborted, it is %s", in.entry.ID, in.entry.State)
	}
	err := in.neverRuns(ctx, code, errors.New(reason))
	var aborted *abortedError
	if errors.As(err, &aborted) {
		return nil
	}
	return err
}

// dropHold lets go of frames that nobody waits for any more.
func (in *incoming) dropHold() {
	if in.hold == nil {
		return
	}
	if err := in.hold.Close(); err != nil {
		in.m.log.Warn("packet socket", "migration", in.entry.ID, "shard", in.entry.Shard, "err", err)
	}
}

// destroy removes everything that the migration built here. May run twice.
func (in *incoming) destroy(ctx context.Context) error {
	// Data that is being written now would come back after its directory went.
	in.entry.State = Aborted
	in.sinks.Wait()
	in.endPull()
	in.dropHold()
	var errs []error
	// The task first: while it may run, its pages must be served.
	if err := in.m.rt.DestroyIncoming(ctx, in.entry.Namespace, in.entry.Shard, in.entry.ID); err != nil {
		return err
	}
	for _, store := range []*pagestore.Store{in.store, in.shared} {
		if store != nil {
			errs = append(errs, store.Close())
		}
	}
	if in.pages != nil {
		errs = append(errs, in.pages.kill(ctx))
	} else {
		errs = append(errs, lazypages.LetGo(ctx, in.dir(pagesDir)))
	}
	if in.rec != nil {
		if net, ok := shardNet(in.rec); ok {
			errs = append(errs, in.m.rt.Network().Delete(ctx, net))
		}
	}
	errs = append(errs, in.dropMounts(), in.m.dropTmpfs(in.entry.ID), in.m.removeCRIUConfig(in.entry), os.RemoveAll(in.dir("")))
	return errors.Join(errs...)
}
