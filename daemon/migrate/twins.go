package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/track"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/transfer"
)

var _ transfer.Twins = (*incoming)(nil)

// pages is how many the shard has, at most.
func (o *outgoing) pages() checkpoint.Pages {
	memory, err := o.cgroup.MemoryCurrent()
	if err != nil {
		return 0 // it has other troubles then
	}
	return checkpoint.Pages(memory / checkpoint.PageSize)
}

// toldOfTwins hears what the destination has of this shard's memory because shards
// of the same image run there. One that cannot tell gets all of it.
func (o *outgoing) toldOfTwins(pages checkpoint.Pages, err error) {
	log := o.m.log.With("migration", o.entry.ID, "shard", o.entry.Shard)
	if err != nil {
		log.Warn("the destination does not tell what it has of shards like this one", "err", err)
		return
	}
	log.Debug("pages of shards like this one", "pages", pages)
}

// arrivalPatience is how long EachTwin waits for one that has just come: shards of
// a host that is drained come one after the other, and a second places a gigabyte.
const arrivalPatience = time.Second

// EachTwin goes through the memory of shards of the same image and tenant that
// run here, those of the same workload first. Only populated pages are read, which
// waits for nobody, and should one be gone when it is read again, none of a process
// that would have to bring it back itself.
func (in *incoming) EachTwin(ctx context.Context, limit checkpoint.Pages, found func(transfer.Twin, []byte) error) error {
	if err := in.enter(); err != nil {
		return err
	}
	defer in.sinks.Done()
	if in.rec == nil {
		return errors.New("a question came before prepare")
	}
	alike, err := in.m.rt.Alike(ctx, in.rec)
	if err != nil {
		return err
	}
	search := &twinSearch{left: limit, found: found, buf: make([]byte, readChunk)}
	for _, shard := range alike {
		if !in.m.stays(ctx, shardKey{in.rec.Namespace, shard.Name}) {
			continue
		}
		err := search.shard(ctx, shard)
		if errors.Is(err, errEnough) {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, errFound) {
			return err
		}
		if err != nil { // it may just have ended
			in.m.log.Debug("memory of a shard like the one that comes", "migration", in.entry.ID, "shard", shard.Name, "err", err)
		}
	}
	return nil
}

// ReadTwin reads a page of another shard as it is now.
func (in *incoming) ReadTwin(at transfer.Twin, dst []byte) error {
	var err error
	readErr := track.ReadMemory(at.Process, at.Addr, dst, func(uint64, checkpoint.Pages) {
		err = fmt.Errorf("process %d has nothing at %#x", at.Process, at.Addr)
	})
	return errors.Join(readErr, err)
}

// stays says whether a shard is no migration's, or one that has brought it here:
// then it waits a while for its memory. One that leaves may be gone before its pages
// are asked for, and one whose memory is on another host yet may lose it.
func (m *Manager) stays(ctx context.Context, key shardKey) bool {
	m.mu.Lock()
	id := m.busy[key]
	in := m.incoming[id]
	m.mu.Unlock()
	if id == "" {
		return true
	}
	if in == nil || in.entry.Mode == ModePostCopy && !in.pull.whole.Load() {
		return false
	}
	patience := time.NewTimer(arrivalPatience)
	defer patience.Stop()
	select {
	case <-in.ended:
	case <-patience.C:
	case <-ctx.Done():
	}
	return true
}

var (
	errEnough = errors.New("as many pages as were asked for")
	errFound  = errors.New("whoever is told of pages failed")
)

// twinSearch gives pages to found until there are enough.
type twinSearch struct {
	left  checkpoint.Pages
	found func(transfer.Twin, []byte) error
	buf   []byte
}

func (s *twinSearch) shard(ctx context.Context, shard runtime.Alike) error {
	procs, err := track.ProcessesOf(shard.Processes, shard.Init)
	if err != nil {
		return err
	}
	host := make(map[checkpoint.PID]int, len(procs))
	for _, p := range procs {
		host[p.PID] = p.HostPID
	}
	populated, err := track.New(track.None, nil)
	if err != nil {
		return err
	}
	defer populated.Close() // tracks nothing
	var extents []checkpoint.Extent
	var pages checkpoint.Pages
	_, err = populated.Collect(ctx, procs, track.Options{}, func(e checkpoint.Extent) error {
		if e.Hole {
			return nil
		}
		extents = append(extents, e)
		if pages += e.Pages; pages >= s.left {
			return errEnough
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return err
	}
	for _, e := range extents {
		if track.HandlesFaults(host[e.PID]) {
			continue
		}
		if err := s.extent(ctx, host[e.PID], e); err != nil {
			return err
		}
	}
	if s.left == 0 {
		return errEnough
	}
	return nil
}

func (s *twinSearch) extent(ctx context.Context, hostPID int, e checkpoint.Extent) error {
	for at := e.Addr; at < e.End(); {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		chunk := s.buf[:min(uint64(len(s.buf)), e.End()-at)]
		var gone []uint64
		err := track.ReadMemory(hostPID, at, chunk, func(addr uint64, n checkpoint.Pages) {
			for i := range n {
				gone = append(gone, addr+uint64(i.Bytes()))
			}
		})
		if err != nil {
			return err
		}
		for ; len(chunk) > 0; at, chunk = at+checkpoint.PageSize, chunk[checkpoint.PageSize:] {
			if _, missing := slices.BinarySearch(gone, at); missing {
				continue
			}
			if s.left == 0 {
				return errEnough
			}
			s.left--
			if err := s.found(transfer.Twin{Process: hostPID, Addr: at}, chunk[:checkpoint.PageSize]); err != nil {
				return fmt.Errorf("%w: %w", errFound, err)
			}
		}
	}
	return nil
}
