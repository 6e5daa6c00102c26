package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/image"
	"github.com/tranship/tranship/checkpoint/layer"
	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
)

// 4. stop and copy

func (o *outgoing) stopAndCopy(ctx context.Context) error {
	o.report.enter(PhaseStopAndCopy)
	dumper, err := o.startDumper()
	if err != nil {
		return err
	}
	defer dumper.Kill()
	o.entry.CRIUPID = dumper.PID()
	if o.entry.CRIUStart, err = startTime(dumper.PID()); err != nil {
		return err
	}
	if dumper.Unchanged() {
		if err := o.discardPages(filepath.Join(o.m.dir(o.entry.ID, Source), "images")); err != nil {
			return err
		}
	}
	if err := o.openHold(); err != nil {
		return err
	}
	freezer := o.cgroup.Freezer()
	state, err := freezer.State()
	if err != nil {
		return err
	}
	o.entry.InitPID, o.entry.FrozenBefore = int(o.rec.PID), state == runtime.Frozen
	o.entry.State, o.entry.MarkedStop = Stopping, true
	for _, i := range copiedMounts(o.rec) {
		o.entry.CopiedMounts = append(o.entry.CopiedMounts, o.rec.Mounts[i].Source)
	}
	if err := o.m.journal.Put(o.entry); err != nil {
		return err
	}
	o.undo.push("freeze", o.thaw)
	if err := o.m.rt.MarkStopped(ctx, o.rec.Namespace, o.rec.Name); err != nil {
		return err
	}
	if err := failpoint.Hit(ctx, "source.before-freeze"); err != nil {
		return err
	}
	if err := unthrottle(o.cgroup, o.entry.Throttle); err != nil {
		return err
	}
	o.frozenAt = time.Now()
	if err := freezer.Freeze(ctx); err != nil {
		return err
	}
	if err := o.isolate(ctx); err != nil {
		return err
	}
	o.report.set(func(m *v1.Migration) { m.FrozenAtMs = millis(o.frozenAt.Sub(o.report.started)) })
	o.step("freeze", o.frozenAt)
	if err := failpoint.Hit(ctx, "source.frozen"); err != nil {
		return err
	}
	if err := o.dumpAndSend(ctx, dumper, freezer); err != nil {
		return err
	}
	return o.seal(ctx)
}

// startDumper starts CRIU, the slower way if it was replaced since the daemon
// looked at it.
func (o *outgoing) startDumper() (*criu.Dumper, error) {
	dumper, err := criu.StartDumper(o.m.cfg.CRIU, o.m.cfg.Unchanged)
	if !errors.Is(err, criu.ErrNoUnchanged) {
		return dumper, err
	}
	o.m.log.Warn("the blackout grows with memory until the daemon is restarted", "migration", o.entry.ID, "shard", o.entry.Shard, "err", err)
	return criu.StartDumper(o.m.cfg.CRIU, nil)
}

// openHold prepares to keep the frames that the shard will miss.
func (o *outgoing) openHold() error {
	net, ok := o.shardNet()
	if !ok || !net.IP.IsValid() {
		return nil
	}
	hold, err := o.m.rt.Network().Hold(net)
	if err != nil {
		return err
	}
	o.hold = hold
	o.undo.push("held frames", func(context.Context) error { return hold.Close() })
	return nil
}

// isolate takes the shard's link down; what comes for it from now on is kept.
// Its loopback drops what comes.
func (o *outgoing) isolate(ctx context.Context) error {
	if o.hold != nil {
		if err := o.hold.Take(); err != nil {
			return err
		}
	}
	if net, ok := o.shardNet(); ok {
		if err := o.m.rt.Network().Isolate(ctx, net); err != nil {
			return err
		}
	}
	if o.rec.Network.Own() {
		return runtime.QuietLoopback(o.rec.PID)
	}
	return nil
}

// redirect has the destination take the shard's address. The shard itself can
// send nothing any more that would make a switch learn otherwise.
func (o *outgoing) redirect(ctx context.Context) error {
	if o.hold == nil {
		return nil
	}
	if _, err := o.peer.Redirect(ctx, connect.NewRequest(&v1.RedirectRequest{Id: o.entry.ID})); err != nil {
		return fmt.Errorf("redirect to %s: %w", o.entry.Peer, peerError(err))
	}
	return nil
}

// sendHeld sends the frames that came here until the redirection.
func (o *outgoing) sendHeld(ctx context.Context) error {
	if o.hold == nil {
		return nil
	}
	_, err := o.stream(ctx, blobFrames, "", o.hold.Drain)
	return err
}

// thaw is the undo of everything that stopAndCopy did to the shard. It does not
// ask how far that came: every part may run on a shard that was not touched.
func (o *outgoing) thaw(ctx context.Context) error {
	err := o.giveBack(ctx)
	if o.hold == nil {
		return err
	}
	return errors.Join(err, o.hold.Deliver())
}

// dumpAndSend reads the last pages and files while CRIU dumps; all only look.
func (o *outgoing) dumpAndSend(ctx context.Context, dumper *criu.Dumper, freezer *runtime.Freezer) error {
	dir := o.m.dir(o.entry.ID, Source)
	images := filepath.Join(dir, "images")
	began := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return o.redirect(gctx) })
	remapped := false
	g.Go(func() error {
		err := o.sendFiles(gctx, true)
		// CRIU may give names to files that have none any more.
		remapped = errors.Is(err, layer.ErrChanging)
		if remapped {
			return nil
		}
		return err
	})
	g.Go(func() error {
		res, err := o.lastRound(gctx, o.nextRound())
		if err != nil {
			return fmt.Errorf("last round: %w", err)
		}
		o.report.round(res, 0, 0)
		return nil
	})
	g.Go(func() error {
		if err := o.dump(gctx, dumper, dir); err != nil {
			return err
		}
		o.step(stepDump, began)
		if err := failpoint.Hit(gctx, "source.held"); err != nil {
			return err
		}
		// CRIU has thawed the cgroup and holds the tasks by ptrace. It must be
		// FROZEN again while CRIU still lives; then CRIU is needed no more. If it
		// died before, the tasks have run, and are not what was dumped any more.
		if err := freezer.Freeze(gctx); err != nil {
			return err
		}
		return dumper.Lives()
	})
	if err := g.Wait(); err != nil {
		return err
	}
	o.step("last pages", began)
	if err := failpoint.Hit(ctx, "source.dumped"); err != nil {
		return err
	}

	g, gctx = errgroup.WithContext(ctx)
	g.Go(func() error {
		// It holds references to all of the shard's pages: 20 ms a GiB to let go.
		dumper.Kill()
		return nil
	})
	at := time.Now()
	g.Go(func() error { return o.sendUntold(gctx, images) })
	if remapped || exists(filepath.Join(images, "remap-fpath.img")) {
		g.Go(func() error { return o.sendFiles(gctx, true) })
	}
	g.Go(func() error { return o.sendHeld(gctx) })
	g.Go(func() error { return o.sendImages(gctx, images) })
	if err := g.Wait(); err != nil {
		return err
	}
	o.step("send images", at)
	return nil
}

func (o *outgoing) dump(ctx context.Context, dumper *criu.Dumper, dir string) error {
	spec, err := o.rec.OCISpec()
	if err != nil {
		return err
	}
	root := fmt.Sprintf("/proc/%d/root", o.rec.PID)
	mounts, external, err := criu.ExternalsOf(spec, root)
	if err != nil {
		return err
	}
	mounts = append(mounts, tmpfsExternals(o.rec)...)
	images := filepath.Join(dir, "images")
	if err := criu.WriteDescriptors(images, int(o.rec.PID)); err != nil {
		return err
	}
	cfg := criu.DumpConfig{
		InitPID: int(o.rec.PID), ImageDir: images, WorkDir: filepath.Join(dir, "work"),
		Root:         o.rootfs.Path,
		FreezeCgroup: o.cgroup.Dir, ExternalMounts: mounts, External: external,
		TCPEstablished: true, LazyPages: true, LogLevel: o.m.cfg.CRIULogLevel,
	}
	defer o.dumpParts(&cfg)()
	if !dumper.Unchanged() {
		return dumper.Dump(ctx, cfg)
	}
	procs, err := o.processes()
	if err != nil {
		return err
	}
	if cfg.Parent, err = writeParent(dir, procs); err != nil {
		return err
	}
	if err := dumper.Dump(ctx, cfg); err != nil {
		return err
	}
	at := time.Now()
	if err := settleImages(images, procs); err != nil {
		return err
	}
	o.step("pages into images", at)
	return nil
}

func (o *outgoing) lastRound(ctx context.Context, n int) (RoundResult, error) {
	if o.req.GetMode() == ModePostCopy {
		return o.leaveOwed(ctx, n)
	}
	return o.round(ctx, n, track.Options{Frozen: true})
}

// sendUntold sends the pages that CRIU left to tranship and that no round
// covered. There should be none; if the tracker's idea of what CRIU leaves out
// and CRIU's ever differ, this is what keeps the shard whole.
func (o *outgoing) sendUntold(ctx context.Context, images string) error {
	lazy, err := image.LazyExtents(images)
	if err != nil {
		return fmt.Errorf("pages left out of the images: %w", err)
	}
	if err := o.allStood(lazy); err != nil {
		return err
	}
	if o.req.GetMode() == ModePostCopy {
		return o.sendOwed(ctx, lazy)
	}
	var missing []checkpoint.Extent
	for _, extents := range lazy {
		for _, e := range extents {
			missing = append(missing, o.told.missing(e)...)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	procs, err := o.processes()
	if err != nil {
		return err
	}
	res, err := o.send(ctx, o.nextRound(), procs, missing, nil, time.Now())
	if err != nil {
		return err
	}
	o.m.log.Warn("pages that no round covered", "migration", o.entry.ID, "shard", o.entry.Shard, "bytes", res.BytesRaw)
	o.report.round(res, 0, 0)
	return nil
}

// allStood makes sure that the last round has looked at every process that left
// pages out of the images. One that was killed after CRIU had dumped it and before
// that round would be restored as an earlier round found it.
func (o *outgoing) allStood(lazy map[checkpoint.PID][]checkpoint.Extent) error {
	for pid, extents := range lazy {
		if len(extents) > 0 && !slices.ContainsFunc(o.stood, func(p checkpoint.Process) bool { return p.PID == pid }) {
			return fmt.Errorf("last pages of process %d: %w", pid, track.ErrDied)
		}
	}
	return nil
}

// nextRound numbers the rounds over the whole migration.
func (o *outgoing) nextRound() int {
	result, _ := o.report.snapshot()
	return len(result.GetRounds()) + 1
}

func (o *outgoing) sendImages(ctx context.Context, images string) error {
	if err := mendImages(images); err != nil {
		return err
	}
	if err := o.shared.settle(images); err != nil {
		return err
	}
	var sum imageDigest
	sent, err := o.stream(ctx, blobImages, "", func(w io.Writer) error {
		var err error
		sum, err = sendImages(images, w)
		return err
	})
	if err != nil {
		return err
	}
	o.report.count(sent)
	o.entry.ImageDigest = uint64(sum)
	return nil
}

// 5. seal

func (o *outgoing) seal(ctx context.Context) error {
	at := time.Now()
	if err := failpoint.Hit(ctx, "source.seal"); err != nil {
		return err
	}
	req := &v1.SealRequest{Id: o.entry.ID, ImageDigest: o.entry.ImageDigest, OwedDigest: o.owedDigest}
	if _, err := o.peer.Seal(ctx, connect.NewRequest(req)); err != nil {
		return fmt.Errorf("seal: %w", peerError(err))
	}
	o.sealedAt = time.Now()
	o.step("seal", at)
	return nil
}
