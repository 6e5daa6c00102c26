package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/daemon/runtime"
)

// home is where a shard is on this host.
type home struct {
	rec         *runtime.Record // nil: it was removed
	cgroup      runtime.Cgroup  // without Dir: it has ended
	root, upper string          // "": containerd is to be asked
	start       uint64          // of its first process, against pid reuse
}

func (h home) runs() bool { return h.cgroup.Dir != "" }

// homeOf finds the shard that a migration may have frozen. What the daemon that did
// so knows needs no containerd, which may be away.
func (m *Manager) homeOf(ctx context.Context, e *Entry) (home, error) {
	if h := e.home; h != nil && exists(h.cgroup.Dir) {
		if start, err := startTime(int(h.rec.PID)); err == nil && start == h.start {
			return *h, nil
		}
	}
	rec, err := m.rt.Describe(ctx, e.Namespace, e.Shard)
	if errors.Is(err, runtime.ErrNotFound) {
		return home{}, nil
	}
	if err != nil {
		return home{}, err
	}
	if rec.PID == 0 || rec.Status == runtime.StatusStopped {
		return home{rec: rec}, nil
	}
	if e.InitPID > 0 && int(rec.PID) != e.InitPID {
		return home{}, nil // another one of that name
	}
	cg, err := m.rt.Cgroup(ctx, e.Namespace, e.Shard)
	if errors.Is(err, runtime.ErrNotRunning) || errors.Is(err, runtime.ErrNotFound) {
		err = nil
	}
	return home{rec: rec, cgroup: cg}, err
}

// giveBack lets a shard go on here as if nothing had happened. Every step may run
// on a shard that was never touched, and twice; but one that runs again may have
// been frozen by somebody since, and then only traces are removed. An error says
// that something is left, and so does the entry.
func (m *Manager) giveBack(ctx context.Context, e *Entry) error {
	if e.Runs && e.Left == "" {
		return nil
	}
	var errs []error
	step := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	step("criu", killByStart(e.CRIUPID, e.CRIUStart))
	var h home
	var err error
	if e.InitPID > 0 || e.Throttle != nil {
		h, err = m.homeOf(ctx, e)
		step("find it", err)
	}
	// What runs would see them.
	remaps := m.removeLinkRemaps(ctx, e, h)
	if !e.Runs {
		m.resume(ctx, e, h, step)
		e.Runs = len(errs) == 0
	}
	step("link remaps", remaps)
	if e.MarkedStop {
		if err = m.rt.UnmarkStopped(ctx, e.Namespace, e.Shard); !errors.Is(err, runtime.ErrNotFound) {
			step("restart label", err)
		}
	}
	e.Left = ""
	if err = errors.Join(errs...); err != nil {
		e.Left = err.Error()
	}
	return err
}

// resume undoes what keeps a shard from running as before. One that has ended may
// be started again in the same network namespace.
func (m *Manager) resume(ctx context.Context, e *Entry, h home, step func(what string, err error)) {
	if h.runs() {
		step("throttling", unthrottle(h.cgroup, e.Throttle))
	}
	if e.InitPID == 0 || h.rec == nil {
		return // it was not frozen, or is not there any more
	}
	if h.runs() {
		pids, err := h.cgroup.Processes()
		step("processes", err)
		_, err = criu.ReleaseSockets(pids)
		step("sockets", err)
	}
	if net, ok := shardNet(h.rec); ok && (h.runs() || exists(m.rt.Network().Path(net.Namespace, net.Name))) {
		step("network", m.rt.Network().Restore(ctx, net))
	}
	if h.runs() && h.rec.Network.Own() {
		step("loopback", runtime.FreeLoopback(h.rec.PID))
	}
	if h.runs() && !e.FrozenBefore {
		step("thaw", h.cgroup.Freezer().Thaw(ctx))
	}
}

// linkRemapPrefix begins the names that CRIU gives to files that a process has
// open and that have no name any more (criu/files-reg.c, create_link_remap).
const linkRemapPrefix = "link_remap."

// removeLinkRemaps removes the names that a dump made in the writable layer and
// that CRIU, being killed, did not take away again.
func (m *Manager) removeLinkRemaps(ctx context.Context, e *Entry, h home) error {
	if !exists(filepath.Join(m.dir(e.ID, Source), imagesDir, "remap-fpath.img")) {
		return nil // the dump made none
	}
	if e.InitPID > 0 && h.rec == nil {
		return nil // gone with the shard, unless that could not be found out
	}
	if h.upper == "" {
		upper, err := m.rt.UpperDir(ctx, e.Namespace, e.Shard)
		if errors.Is(err, runtime.ErrNotFound) {
			return nil
		}
		if err != nil || upper == "" {
			return err
		}
		h.upper, h.root = upper, upper
		// Through the mounted root, not behind the overlay's back.
		if rootfs, err := m.rt.Rootfs(ctx, e.Namespace, e.Shard); err == nil {
			h.root = rootfs.Path
		} else if h.runs() {
			return err
		}
	}
	root, err := os.OpenRoot(h.root)
	if err != nil {
		return err
	}
	defer root.Close()
	return filepath.WalkDir(h.upper, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.HasPrefix(d.Name(), linkRemapPrefix) {
			return err
		}
		rel, err := filepath.Rel(h.upper, path)
		if err != nil {
			return err
		}
		return root.Remove(rel)
	})
}

// giveBack is the undo of what was done to a shard that did not leave. What fails of
// it is tried again once the migration has been concluded.
func (o *outgoing) giveBack(ctx context.Context) error {
	err := o.m.giveBack(ctx, o.entry)
	if err != nil {
		o.entry.State = Returning
	}
	return err
}

// goOn tries once to give back a shard whose migration is Returning, and ends it.
func (m *Manager) goOn(ctx context.Context, e *Entry) error {
	ctx, cancel := undo(ctx)
	defer cancel()
	before := e.Left
	err := m.giveBack(ctx, e)
	if err == nil {
		err = os.RemoveAll(m.dir(e.ID, Source))
	}
	switch {
	case err == nil:
		e.State = Aborted
		if err = m.journal.Put(e); err != nil {
			e.State = Returning
		}
	case e.Left != before:
		err = errors.Join(err, m.journal.Put(e))
	}
	if err != nil {
		return fmt.Errorf("give %s back: %w", e.Shard, err)
	}
	return nil
}
