package migrate

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/tranship/tranship/checkpoint/pagestore"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
)

// 7. fill

// fill waits until every page is placed, then removes what only the migration
// needed.
func (in *incoming) fill(ctx context.Context) {
	in.dropHold()
	log := in.m.log.With("migration", in.entry.ID, "shard", in.entry.Shard)
	if in.rec != nil {
		if err := in.m.rt.LeaseHere(in.entry.Namespace, in.entry.Shard, in.rec.Network); err != nil {
			log.Error("address lease", "err", err)
		}
	}
	// Whatever becomes of this, the memory has to be watched.
	adoptErr := in.m.rt.Adopt(ctx, in.entry.Namespace, in.entry.Shard, in.entry.ID)
	if err := failpoint.Hit(ctx, "destination.fill"); err != nil {
		log.Error("fill", "err", err)
		return
	}
	if in.pages != nil && !in.endFilling(ctx) {
		return // the next daemon goes on
	}
	if adoptErr != nil {
		adoptErr = in.m.rt.Adopt(ctx, in.entry.Namespace, in.entry.Shard, in.entry.ID)
	}
	if adoptErr != nil {
		log.Error("adopt; the next start of the daemon tries again", "err", adoptErr)
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, store := range []**pagestore.Store{&in.store, &in.shared} {
		if *store == nil {
			continue
		}
		if err := (*store).Close(); err != nil {
			log.Warn("page store", "err", err)
		}
		*store = nil
	}
	if err := errors.Join(in.m.dropTmpfs(in.entry.ID), in.m.removeCRIUConfig(in.entry), os.RemoveAll(in.dir(""))); err != nil {
		log.Error("remove migration files", "err", err)
		return
	}
	in.entry.State = Done
	if err := in.m.journal.Put(in.entry); err != nil {
		log.Error("journal", "err", err)
		return
	}
	in.m.forgetIncoming(in)
	log.Info("shard arrived", "peer", in.entry.Peer)
}

// endFilling returns when every page is placed, or the shard that lacks one was
// stopped, and nobody serves pages any more. False says that it could not.
func (in *incoming) endFilling(ctx context.Context) bool {
	log := in.m.log.With("migration", in.entry.ID, "shard", in.entry.Shard)
	var lost error
	if !in.entry.Placed {
		lost = in.pages.awaitDone(ctx, log)
		if ctx.Err() != nil {
			return false
		}
		if lost != nil {
			// Its missing pages may read as zeros from now on: a shard that runs on
			// wrong memory is worse than none.
			log.Error("pages of a shard are lost; it is stopped", "err", lost)
			if !in.stopForGood(ctx, lost) {
				return false
			}
		} else if err := in.notePlaced(); err != nil {
			log.Error("journal", "err", err)
			return false
		}
	}
	if err := in.pages.kill(ctx); err != nil {
		log.Error("end the page server", "err", err)
	}
	if err := failpoint.Hit(ctx, "destination.placed"); err != nil {
		log.Error("fill", "err", err)
		return false
	}
	if in.entry.Mode == ModePostCopy {
		in.endPull()
		if lost == nil {
			in.isWhole() // or needs no page any more
		}
	}
	return true
}

// notePlaced journals that all memory is in place. A daemon that found neither the
// page server nor its last word would take the pages for lost otherwise: a server
// that has placed everything is ended, and may not have come to that word.
func (in *incoming) notePlaced() error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.entry.Placed = true
	err := in.m.journal.Put(in.entry)
	if err != nil {
		in.entry.Placed = false
	}
	return err
}

const (
	stopPause    = 20 * time.Millisecond
	maxStopPause = 5 * time.Second
)

// stopForGood kills a shard whose pages can no longer be served, and notes why. As
// long as it cannot, it tries again: a shard that dies by itself just then is
// neither there nor gone. False says that ctx ended before.
func (in *incoming) stopForGood(ctx context.Context, cause error) bool {
	for wait := stopPause; ; wait = min(2*wait, maxStopPause) {
		cg, err := in.m.rt.Cgroup(ctx, in.entry.Namespace, in.entry.Shard)
		if err == nil {
			err = cg.Kill(ctx)
		}
		if err == nil || errors.Is(err, runtime.ErrNotRunning) || errors.Is(err, runtime.ErrNotFound) {
			break
		}
		in.m.log.Error("stop a shard", "migration", in.entry.ID, "shard", in.entry.Shard, "err", err)
		if !pause(ctx, wait) {
			return false
		}
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	in.entry.Code, in.entry.Reason = CodePagesLost, "stopped after the move: "+cause.Error()
	return true
}
