package track

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// softDirtyMethod tracks by the soft-dirty bit of the page tables
// (Documentation/admin-guide/mm/soft-dirty.rst).
//
// The kernel reads and clears the bits in two calls, and what is written in
// between would be lost, so a process is stopped, all its threads, for both.
// It is not stopped the first time: the bits are cleared first and everything is
// reported. New mappings carry the bit as a whole until it is cleared, and so does
// one that the kernel joins with a new one beside it: a heap that grows is sent
// once more.
type softDirtyMethod struct{ log *slog.Logger }

// The bit alone does not suffice. It stays clear when whole page tables move to
// another address (mremap since Linux 5.11), and it is cleared in mappings that
// are not reported at the time, as locked ones are. So the frame, or the place in
// swap, of each page is remembered as well, and a page counts as written unless
// it is the same as the last time.
type identities map[uint64]*[chunkPages]uint64

// softState is what softDirtyMethod knows of a process.
type softState struct {
	// cleared says that the bits were cleared, and everything reported, before.
	cleared bool
	// pages are those seen by the last reading: 4 KiB for 2 MiB.
	pages identities
	// dirty is what the last reading found to be written.
	dirty pageSet
}

func newSoftDirtyMethod(log *slog.Logger) (*softDirtyMethod, error) {
	// Frames are shown to the privileged only.
	if _, err := zeroPageFrame(); err != nil {
		return nil, fmt.Errorf("soft-dirty tracking: %w", err)
	}
	return &softDirtyMethod{log: log}, nil
}

func (*softDirtyMethod) kind() Kind { return SoftDirty }

func (m *softDirtyMethod) prepare(c *collection) ([]region, error) {
	if err := c.open(); err != nil {
		return nil, err
	}
	state := &c.p.soft
	if c.frozen {
		if !state.cleared {
			return c.untracked()
		}
		return m.snapshot(c)
	}
	partners, err := m.partners(c)
	if err != nil {
		return nil, err
	}
	if len(partners) > 0 {
		// Clearing the bits of one would clear those of the other.
		if !state.cleared {
			c.stats.Deferred++
			return nil, nil
		}
		return m.snapshot(c)
	}
	if !state.cleared || c.p.unfinished {
		if err := clearSoftDirty(c.p.HostPID); err != nil {
			return nil, err
		}
		state.cleared = true
		regions, err := m.snapshot(c)
		for i := range regions {
			regions[i].full = true
		}
		c.stats.Registered += len(regions)
		return regions, err
	}
	var regions []region
	began := time.Now()
	err = whileStopped(c.p.HostPID, func() error {
		var err error
		if regions, err = m.snapshot(c); err != nil {
			return err
		}
		// Bits that were read are gone now: until this Collect is through, they
		// are nowhere else.
		c.p.unfinished = true
		return clearSoftDirty(c.p.HostPID)
	})
	c.stats.Pause = max(c.stats.Pause, time.Since(began))
	if errors.Is(err, errBusy) {
		// Not cleared: what is dirty now is reported now and again the next time.
		m.log.Debug("the process could not be stopped, its bits stay", "pid", c.p.HostPID, "err", err)
		return m.snapshot(c)
	}
	if err != nil {
		return nil, err
	}
	c.p.unfinished = false // run sets it again as soon as it goes on
	return regions, nil
}

// snapshot reads the bits of all pages, and what the pages are. It forgets the
// snapshot before, except for a frozen process, which may be looked at again.
func (m *softDirtyMethod) snapshot(c *collection) ([]region, error) {
	regions, err := c.untracked()
	if err != nil {
		return nil, err
	}
	before, now, dirty := c.p.soft.pages, identities{}, pageSet{}
	note := func(addr, entry uint64) {
		if entry&(entryPresent|entrySwap) == 0 {
			return
		}
		base := chunkFloor(addr)
		seen := now[base]
		if seen == nil {
			seen = new([chunkPages]uint64)
			now[base] = seen
		}
		i := pageIndex(base, addr)
		seen[i] = entry & (entryPresent | entrySwap | entryPFN)
		same := before[base] != nil && before[base][i] == seen[i]
		// A file's page in anonymous memory is the huge zero page, which takes the
		// place of zapped memory without the bit.
		zero := entry&(entryPresent|entryFile) == entryPresent|entryFile
		if entry&entrySoftDirty != 0 || !same || zero {
			dirty.add(addr, addr+checkpoint.PageSize)
		}
	}
	for i := range regions {
		regions[i].full = false
		err := c.pages.chunks(regions[i].start, regions[i].end, func(start, end uint64) error {
			return c.pages.entries(start, end, note)
		})
		if err != nil {
			return nil, err
		}
	}
	c.p.soft.dirty = dirty
	if !c.frozen {
		c.p.soft.pages = now
	}
	return regions, nil
}

// judge always has the window looked at: the bits do not show what went away.
func (m *softDirtyMethod) judge(c *collection, r region) (verdict, error) {
	if r.full {
		return unknown, nil
	}
	c.window.markSet(c.window.written, c.p.soft.dirty)
	return touched, nil
}

func (m *softDirtyMethod) release(p *process) error {
	p.soft = softState{}
	return nil
}

// disarm leaves the bits as they are: nothing hangs on them.
func (m *softDirtyMethod) disarm(p *process) error { return m.release(p) }

// partners lists the other processes with the same memory.
func (m *softDirtyMethod) partners(c *collection) ([]int, error) {
	var pids []int
	for _, p := range c.t.shards {
		if p == c.p || p.HostPID == 0 {
			continue
		}
		same, err := sameMemory(p.HostPID, c.p.HostPID)
		if err != nil && !errors.Is(err, errGone) {
			return nil, err
		}
		if same {
			pids = append(pids, p.HostPID)
		}
	}
	return pids, nil
}

// clearSoftDirty clears the bits of all pages and mappings of a process.
func clearSoftDirty(hostPID int) error {
	err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", hostPID), []byte("4"), 0)
	if err != nil {
		return fmt.Errorf("clear the soft-dirty bits: %w", procError(err))
	}
	return nil
}

// whileStopped runs f while no thread of a process runs. f is not run, and the
// error is errBusy, if one of them does not stop soon enough.
func whileStopped(hostPID int, f func() error) error {
	return onTracer(func() (err error) {
		var stopped []*tracee
		defer func() {
			for _, t := range stopped {
				if detachErr := t.detach(); !errors.Is(detachErr, errGone) {
					err = errors.Join(err, detachErr)
				}
			}
		}()
		// Until no new thread turns up: a running one may still start others.
		for {
			tids, err := threads(hostPID)
			if err != nil {
				return err
			}
			found := false
			for _, tid := range tids {
				if slices.ContainsFunc(stopped, func(t *tracee) bool { return t.tid == tid }) {
					continue
				}
				found = true
				t, err := seize(tid)
				if errors.Is(err, errGone) {
					continue
				}
				if err != nil {
					return err
				}
				stopped = append(stopped, t)
			}
			if !found {
				return f()
			}
		}
	})
}

// softDirtyWorks tries the bit on a page of its own.
func softDirtyWorks() error {
	mem, err := unix.Mmap(-1, 0, checkpoint.PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Munmap(mem) }() // it cannot fail for a mapping that is there
	mem[0] = 1
	dirty, err := softDirty(mem)
	if err != nil {
		return err
	}
	if !dirty {
		return errors.New("kernel without CONFIG_MEM_SOFT_DIRTY")
	}
	return nil
}
