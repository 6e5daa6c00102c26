package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path/filepath"
	"slices"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/image"
	"github.com/tranship/tranship/checkpoint/track"
	"github.com/tranship/tranship/transfer"
)

// Shared memory is sent in every round, as far as it differs from what the
// destination has, packed in the order in which CRIU will read it there. The last
// round, of the frozen shard, makes the destination's copy exact; CRIU's own is
// then left out of the images.

// givePages gives pages to a round; it returns how many the peer did not have.
type givePages func(ctx context.Context, r *transfer.Round, procs []checkpoint.Process) (checkpoint.Pages, error)

// sharedMemory is the shared memory of a shard that leaves, by inode.
type sharedMemory struct {
	segments map[uint64]*sharedSegment
	named    int // how many ids were given away
}

type sharedSegment struct {
	pid    checkpoint.PID
	packed image.Packed
	// last says that the last pass found it.
	last bool
}

// segment returns what is known of a segment. One that has become shorter than
// what was sent starts over: CRIU reads no further than to its end.
func (m *sharedMemory) segment(s *track.Segment) *sharedSegment {
	known := m.segments[s.ID]
	if known == nil || known.packed.End() > uint64(s.Pages) {
		known = &sharedSegment{pid: checkpoint.SharedPID(m.named)}
		m.named++
		if m.segments == nil {
			m.segments = map[uint64]*sharedSegment{}
		}
		m.segments[s.ID] = known
	}
	known.last = true
	return known
}

func (o *outgoing) sendShared(ctx context.Context, r *transfer.Round, procs []checkpoint.Process) (checkpoint.Pages, error) {
	segments, err := track.SharedSegments(procs)
	if err != nil {
		return 0, err
	}
	defer func() {
		for _, s := range segments {
			_ = s.Close() // read only
		}
	}()
	for _, known := range o.shared.segments {
		known.last = false
	}
	var given checkpoint.Pages
	before := r.Unchanged()
	buf := make([]byte, sharedChunk)
	for _, s := range segments {
		n, err := o.sendSegment(ctx, r, s, buf)
		if err != nil {
			return 0, err
		}
		given += n
	}
	return given - (r.Unchanged() - before), nil
}

// sharedChunk is read and hashed at once, and fits the second-level cache.
const sharedChunk = 256 << 10

func (o *outgoing) sendSegment(ctx context.Context, r *transfer.Round, s *track.Segment, buf []byte) (checkpoint.Pages, error) {
	var data []image.PageRun
	if err := s.Data(func(first uint64, n checkpoint.Pages) { data = append(data, image.PageRun{First: first, Pages: n}) }); err != nil {
		return 0, err
	}
	known := o.shared.segment(s)
	full, empty := known.packed.Update(data)
	var given checkpoint.Pages
	for _, pl := range empty {
		if err := r.Zero(known.pid, pl.Slot*checkpoint.PageSize, pl.Pages); err != nil {
			return 0, err
		}
	}
	for _, pl := range full {
		for done := checkpoint.Pages(0); done < pl.Pages; {
			if ctx.Err() != nil {
				return 0, context.Cause(ctx)
			}
			if err := o.m.turns.wayFor(ctx, o); err != nil {
				return 0, err
			}
			chunk := buf[:min(len(buf), int((pl.Pages-done).Bytes()))]
			if err := s.Read(pl.First+uint64(done), chunk); err != nil {
				return 0, err
			}
			if err := r.Pages(known.pid, (pl.Slot+uint64(done))*checkpoint.PageSize, chunk); err != nil {
				return 0, err
			}
			done += checkpoint.Pages(len(chunk) / checkpoint.PageSize)
		}
		given += pl.Pages
	}
	return given, nil
}

// settle points the images of a dump to the pages that were sent.
func (m *sharedMemory) settle(images string) error {
	for id, s := range m.segments {
		if !s.last {
			continue
		}
		// Nothing was made of a memfd without a size.
		if err := image.SettleShared(images, id, &s.packed, uint32(s.pid)); err != nil && !errors.Is(err, image.ErrNoSegment) {
			return fmt.Errorf("shared memory: %w", err)
		}
	}
	lost, err := image.LostSegment(images)
	if err != nil {
		return fmt.Errorf("shared memory: %w", err)
	}
	if lost != 0 {
		return errors.New("shared memory came into being at the last moment; migrate again")
	}
	return nil
}

// discardPages has the dump write no pages, if tranship has them all: what CRIU
// writes of private memory is none on top of parent images, and shared memory is
// sent.
func (o *outgoing) discardPages(images string) error {
	procs, err := o.processes()
	if err != nil {
		return err
	}
	other, err := track.OtherShared(procs)
	if err != nil || other {
		return err
	}
	return image.Discard(images, len(procs)+spareImages)
}

// spareImages are for segments of shared memory, beside an image a process: more
// segments than that are written and then removed.
const spareImages = 64

// linkShared puts the pages of shared memory among the images, where CRIU's
// restore looks for them.
func (in *incoming) linkShared() error {
	wanted, err := image.SharedPages(in.dir("images"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("shared memory: %w", err)
	}
	ids := make([]uint32, 0, len(wanted))
	for id := range wanted {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for _, id := range ids {
		if id > math.MaxInt32 || !checkpoint.PID(id).Shared() {
			continue // in the images
		}
		path := filepath.Join(in.dir("images"), fmt.Sprintf("pages-%d.img", id))
		if err := in.shared.Export(checkpoint.PID(id), wanted[id], path); err != nil {
			return fmt.Errorf("shared memory: %w", err)
		}
	}
	return nil
}
