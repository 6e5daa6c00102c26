package criu

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/tranship/tranship/internal/osthread"
)

// cacheFile is where CRIU keeps what it found out about the kernel.
const cacheFile = "/run/criu.kdat"

// dirtyTracking is the offset of has_dirty_track in it (struct kerndat_s in
// criu/include/kerndat.h): two magics, shmem_dev, last_cap, zero_page_pfn
// before it. Trusted only after CRIU itself said what it makes of it.
const dirtyTracking = 32

// Unchanged lets CRIU dump on top of another dump where the kernel has no
// soft-dirty bits: it is told that it has them, and finds every page unchanged.
// So it only notes which pages there are, and touches none of them. What it
// notes is worth nothing by itself: image.Settle makes a dump of it.
type Unchanged struct {
	path string // of CRIU
	made os.FileInfo
	kdat string
}

// ErrNoUnchanged says why CRIU has to reference every page instead.
var ErrNoUnchanged = errors.New("criu cannot be kept from referencing every page")

// PrepareUnchanged makes a copy of CRIU's cache (Warm before) at file, for the
// CRIU at path, and has CRIU read it. ErrNoUnchanged where that does not work.
func PrepareUnchanged(ctx context.Context, path, file string) (*Unchanged, error) {
	made, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoUnchanged, err)
	}
	raw, err := os.ReadFile(cacheFile)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoUnchanged, err)
	}
	if len(raw) <= dirtyTracking || raw[dirtyTracking] != 0 {
		// With soft-dirty bits every page that was ever written is dirty.
		return nil, fmt.Errorf("%w: the kernel has soft-dirty bits, or the cache another layout", ErrNoUnchanged)
	}
	raw[dirtyTracking] = 1
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoUnchanged, err)
	}
	u := &Unchanged{path: path, made: made, kdat: file}
	without, err := tracksMemory(ctx, path, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoUnchanged, err)
	}
	with, err := tracksMemory(ctx, path, u)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoUnchanged, err)
	}
	if without || !with {
		return nil, fmt.Errorf("%w: its cache has another layout", ErrNoUnchanged)
	}
	return u, nil
}

// tracksMemory asks CRIU whether it believes in soft-dirty bits.
func tracksMemory(ctx context.Context, path string, u *Unchanged) (bool, error) {
	w, err := startWorker(path, u)
	if err != nil {
		return false, err
	}
	defer w.kill()
	kind := rpc.CriuReqType_FEATURE_CHECK
	ask := &rpc.CriuFeatures{MemTrack: proto.Bool(true)}
	if err := w.send(&rpc.CriuReq{Type: &kind, Features: ask}); err != nil {
		return false, err
	}
	resp, err := w.receive(ctx)
	if err != nil {
		return false, err
	}
	return resp.GetFeatures().GetMemTrack(), nil
}

// enter makes the calling thread see u's cache in the place of CRIU's own, in a
// mount namespace of its own that a process started from it inherits. The thread
// is of no other use afterwards: the caller never unlocks it.
func (u *Unchanged) enter() error {
	now, err := os.Stat(u.path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoUnchanged, err)
	}
	if !os.SameFile(now, u.made) || !now.ModTime().Equal(u.made.ModTime()) {
		return fmt.Errorf("%w: %s was replaced since this daemon started", ErrNoUnchanged, u.path)
	}
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("%w: mount namespace: %w", ErrNoUnchanged, err)
	}
	// What the host unmounts must go here as well, or it would stay busy.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("%w: mount namespace: %w", ErrNoUnchanged, err)
	}
	if err := unix.Mount(u.kdat, cacheFile, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("%w: mount %s: %w", ErrNoUnchanged, u.kdat, err)
	}
	return nil
}

// start runs f on a thread that has entered u, or on any if u is nil.
func (u *Unchanged) start(f func() error) error {
	if u == nil {
		return f()
	}
	return osthread.Do(func() error {
		if err := u.enter(); err != nil {
			return err
		}
		return f()
	})
}
