package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
)

// A cgroup that is made gets a provisional slot from the kernel's side
// (bpf/births.bpf.c), so that a shard counts before user space has heard of it,
// and is known even if it has ended by then.

// Birth is a cgroup that may be a shard's.
type Birth struct {
	Slot int
	ID   Identity
	// Path ends like the cgroup's; what is longer than 160 bytes lacks the start.
	Path string
	// Born and Ended are CLOCK_MONOTONIC; Ended is 0 while the cgroup is there.
	Born, Ended time.Duration
}

// spareSlots wait in the kernel. A host that makes more cgroups than these
// between two calls of Births counts some of them late.
const spareSlots = 128

const birthSize = int64(unsafe.Sizeof(birthsBirth{}))

// Births lists the provisional slots, and gives the kernel as many spare ones as
// it has used up.
func (p *Probe) Births() ([]Birth, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	if p.failed[PartBirths] != nil {
		return nil, nil
	}
	out, err := p.born()
	if err != nil {
		return out, err
	}
	return out, p.refill(len(p.spare) - len(out))
}

// born reads the provisional ones out of what was given to the kernel.
func (p *Probe) born() ([]Birth, error) {
	var out []Birth
	for at := range p.spare {
		b, ok, err := p.birth(at)
		if err != nil {
			return out, err
		}
		if ok {
			out = append(out, b)
		}
	}
	slices.SortFunc(out, func(a, b Birth) int { return int(a.Born - b.Born) })
	return out, nil
}

// birth reads the provisional slot at. Its first word says whether it is one,
// which of all spare ones is asked every second.
func (p *Probe) birth(at int) (Birth, bool, error) {
	b := &p.readBirth
	raw := unsafe.Slice((*byte)(unsafe.Pointer(b)), birthSize)
	if _, err := p.births.ReadAt(raw[:unsafe.Sizeof(b.BornNs)], int64(at)*birthSize); err != nil {
		return Birth{}, false, fmt.Errorf("birth in slot %d: %w", at, err)
	}
	if b.BornNs == 0 {
		return Birth{}, false, nil
	}
	if _, err := p.births.ReadAt(raw, int64(at)*birthSize); err != nil {
		return Birth{}, false, fmt.Errorf("birth in slot %d: %w", at, err)
	}
	path := make([]byte, min(int(b.Length), len(b.Path)))
	for i := range path {
		path[i] = byte(b.Path[i])
	}
	return Birth{
		Slot: at, ID: Identity{Tasks: b.Tasks, Block: b.Block}, Path: string(path),
		Born: time.Duration(b.BornNs), Ended: time.Duration(b.EndedNs),
	}, true, nil
}

// refill gives the kernel slots until it has spareSlots, of which so many wait
// there. Half of what is free stays for shards that come another way.
func (p *Probe) refill(waiting int) error {
	for ; waiting < spareSlots && len(p.free) > spareSlots; waiting++ {
		at := p.free[0]
		if err := p.clear(int(at)); err != nil {
			return err
		}
		if err := p.maps[birthsMapSpares].Put(nil, at); err != nil {
			return fmt.Errorf("spare slots: %w", err)
		}
		p.free = p.free[1:]
		p.spare[int(at)] = true
	}
	return nil
}

// unspare takes a spare slot back from the kernel.
func (p *Probe) unspare() (int, bool) {
	var at uint32
	if p.failed[PartBirths] != nil || p.maps[birthsMapSpares].LookupAndDelete(nil, &at) != nil {
		return 0, false
	}
	delete(p.spare, int(at))
	return int(at), true
}

// bornAs finds the birth of a shard's cgroup.
func (p *Probe) bornAs(id Identity) (Birth, bool, error) {
	if id.Tasks == 0 || p.failed[PartBirths] != nil {
		return Birth{}, false, nil
	}
	all, err := p.born()
	for _, b := range all {
		if b.ID.Tasks == id.Tasks {
			return b, true, err
		}
	}
	return Birth{}, false, err
}

// Claim gives the oldest birth that a shard's it is to that shard, whose process
// has ended already. The slot is as if Track had returned it.
func (p *Probe) Claim(name string, its func(*Birth) bool) (Birth, bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.failed[PartBirths] != nil {
		return Birth{}, false, nil
	}
	all, err := p.born()
	if err != nil {
		return Birth{}, false, err
	}
	for _, b := range all {
		if its(&b) {
			return b, true, p.claim(name, b, b.ID)
		}
	}
	return Birth{}, false, nil
}

// claim makes a provisional slot a shard's.
func (p *Probe) claim(name string, b Birth, id Identity) error {
	if err := p.assign(b.Slot, slot{taken: true, name: name, id: id, born: b.Born}); err != nil {
		return fmt.Errorf("claim %s: %w", name, err)
	}
	return p.unborn(b.Slot)
}

// Born says when the cgroup of a slot was made, if the slot has counted from
// then on, on CLOCK_MONOTONIC.
func (p *Probe) Born(at int) (time.Duration, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.slots[at].born, p.slots[at].born != 0
}

// Expire takes back what nobody has claimed: births before a time on
// CLOCK_MONOTONIC. What they go on to use counts to the host. It returns their
// slots; their counts can be read until they are taken again.
func (p *Probe) Expire(before time.Duration) ([]int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.failed[PartBirths] != nil {
		return nil, nil
	}
	all, err := p.born()
	var out []int
	for _, b := range all {
		if b.Born >= before {
			break
		}
		err = errors.Join(err, p.leave(b.Slot, b.ID, Identity{}), p.unborn(b.Slot))
		p.free = append(p.free, uint32(b.Slot))
		out = append(out, b.Slot)
	}
	if len(out) > 0 {
		err = errors.Join(err, p.changed())
	}
	return out, err
}

// unborn ends that a slot is provisional.
func (p *Probe) unborn(at int) error {
	delete(p.spare, at)
	raw := make([]byte, birthSize)
	if _, err := p.births.ReadAt(raw, int64(at)*birthSize); err != nil {
		return fmt.Errorf("birth in slot %d: %w", at, err)
	}
	hash := (*birthsBirth)(unsafe.Pointer(&raw[0])).Hash
	if _, err := p.births.WriteAt(make([]byte, 8), int64(at)*birthSize); err != nil {
		return fmt.Errorf("birth in slot %d: %w", at, err)
	}
	// Unless the path belongs to a younger birth.
	var owner uint32
	paths := p.maps[birthsMapPaths]
	if err := paths.Lookup(hash, &owner); err != nil || owner != uint32(at) {
		return nil
	}
	if err := paths.Delete(hash); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("path of slot %d: %w", at, err)
	}
	return nil
}

// adoptBirths takes over what the kernel did while no daemon ran: p.free are all
// slots without an owner, of which some are provisional. The queue is emptied
// first, so that no slot is in use that looks free; a cgroup that is made
// meanwhile counts as it would without any of this.
func (p *Probe) adoptBirths() error {
	if p.failed[PartBirths] != nil {
		return nil
	}
	var at uint32
	for {
		err := p.maps[birthsMapSpares].LookupAndDelete(nil, &at)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		}
		if err != nil {
			return fmt.Errorf("spare slots: %w", err)
		}
	}
	var free []uint32
	for _, at := range p.free {
		if _, ok, err := p.birth(int(at)); err != nil {
			return err
		} else if ok {
			p.spare[int(at)] = true
		} else {
			free = append(free, at)
		}
	}
	p.free = free
	return sweep(p.maps[birthsMapPaths], make([]byte, 8), func(key []byte, at uint32) bool {
		b, ok, err := p.birth(int(min(at, MaxSlots-1)))
		return err == nil && ok && p.spare[b.Slot] && binary.NativeEndian.Uint64(key) != 0
	})
}

// isBirths says whether a key of the map cgroups is a provisional slot's.
func (p *Probe) isBirths(key uint64, at uint32) bool {
	if !p.spare[int(at)] {
		return false
	}
	b, ok, err := p.birth(int(at))
	return err == nil && ok && slices.Contains(cgroupKeys(b.ID), key)
}
