package probe

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

const (
	usageSize = int(unsafe.Sizeof(Usage{}))
	tcpSize   = int64(unsafe.Sizeof(tcpTcpNow{}))
	stateSize = int64(unsafe.Sizeof(schedCpuState{}))
	// Where in a CPU's state these are.
	generationAt = int64(unsafe.Offsetof(schedCpuState{}.Generation))
	lostAt       = int64(unsafe.Offsetof(schedCpuState{}.ConnectionsLost))
	// runOnCPU is BPF_F_TEST_RUN_ON_CPU: the program is run there, in the
	// interrupt of another CPU's call.
	runOnCPU = 1
	// statsRunTime is BPF_STATS_RUN_TIME.
	statsRunTime = 0
)

func usageOf(words *[usageSize / 8]uint64) Usage { return *(*Usage)(unsafe.Pointer(words)) }

// connectionsOf reads a slot of the map `tcp`.
func connectionsOf(raw []byte) Connections {
	now := (*tcpTcpNow)(unsafe.Pointer(&raw[0]))
	return Connections{Open: now.Open, Measured: now.Measured, RTTSum: now.RttSumUs, RTTMax: now.RttMaxUs}
}

// offline: a CPU that is possible need not be there.
func offline(err error) bool { return errors.Is(err, unix.ENXIO) }

// object is one file in bpf/.
type object struct {
	part Part
	load func() (*ebpf.CollectionSpec, error)
	// attached programs, which are pinned, and those that Refresh runs.
	attached, called []string
}

var objects = []object{
	{PartSched, loadSched, []string{schedProgSchedSwitch, schedProgAttachTask, schedProgExitTask}, []string{schedProgFlush}},
	{PartBlock, loadBlock, []string{blockProgBlockRqIssue, blockProgBlockRqRequeue, blockProgBlockRqComplete}, nil},
	{PartTCP, loadTcp, []string{tcpProgSetState, tcpProgRetransmit}, []string{tcpProgSurvey}},
	{PartBirths, loadBirths, []string{birthsProgCgroupMkdir, birthsProgCgroupRmdir}, nil},
}

// fingerprint changes when what an earlier daemon pinned is of no use: other
// programs, other layouts, another machine.
func (p *Probe) fingerprint() string {
	h := sha256.New()
	for _, raw := range [][]byte{_SchedBytes, _BlockBytes, _TcpBytes, _BirthsBytes} {
		h.Write(raw)
	}
	fmt.Fprint(h, p.cpus, p.cfg.Unified, p.cfg.Host, runtime.GOARCH)
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// load makes or finds the maps, then each part's programs.
func (p *Probe) load() error {
	var types *btf.Spec
	if p.cfg.BTF != "" {
		var err error
		if types, err = btf.LoadSpec(p.cfg.BTF); err != nil {
			for _, o := range objects {
				p.failed[o.part] = fmt.Errorf("types of the kernel: %w", err)
			}
		}
	}
	for _, o := range objects {
		spec, err := o.load()
		if err != nil {
			return err
		}
		for name, ms := range spec.Maps {
			if err := p.makeMap(name, ms); err != nil {
				return err
			}
		}
		if p.failed[o.part] == nil {
			if err := p.loadPart(o, spec, types); err != nil {
				p.failed[o.part] = err
			}
		}
	}
	return p.makeMap(mapOwners, &ebpf.MapSpec{
		Name: mapOwners, Type: ebpf.Array, KeySize: 4, ValueSize: uint32(unsafe.Sizeof(owner{})), MaxEntries: MaxSlots,
	})
}

func (p *Probe) makeMap(name string, spec *ebpf.MapSpec) error {
	if p.maps[name] != nil || name[0] == '.' { // .rodata belongs to its program
		return nil
	}
	spec = spec.Copy()
	switch name {
	case schedMapUsage, schedMapPercpu:
		spec.MaxEntries *= uint32(p.cpus)
	}
	var opts ebpf.MapOptions
	if p.pins.dir != "" {
		spec.Pinning, opts.PinPath = ebpf.PinByName, p.pins.dir
	}
	m, err := ebpf.NewMapWithOptions(spec, opts)
	if err != nil {
		return fmt.Errorf("map %s: %w", name, err)
	}
	p.maps[name] = m
	return nil
}

// loadPart loads a part's programs; either all of them count or none does.
func (p *Probe) loadPart(o object, spec *ebpf.CollectionSpec, types *btf.Spec) error {
	if err := spec.Variables[schedVarCpus].Set(uint32(p.cpus)); err != nil {
		return fmt.Errorf("number of CPUs: %w", err)
	}
	if v := spec.Variables[schedVarUnified]; v != nil && p.cfg.Unified {
		if err := v.Set(uint32(1)); err != nil {
			return fmt.Errorf("cgroup version: %w", err)
		}
	}
	replace := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if m := p.maps[name]; m != nil {
			replace[name] = m
			spec.Maps[name].MaxEntries = m.MaxEntries()
			spec.Maps[name].Pinning = ebpf.PinNone
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		MapReplacements: replace,
		Programs:        ebpf.ProgramOptions{KernelTypes: types},
	})
	if err != nil {
		return err
	}
	defer coll.Close()
	var links []string
	for _, name := range o.attached {
		if err := p.attach(name, coll.Programs[name]); err != nil {
			for _, done := range links {
				err = errors.Join(err, p.links[done].Unpin(), p.links[done].Close())
				delete(p.links, done)
				delete(p.progs, done)
			}
			return fmt.Errorf("attach %s: %w", name, err)
		}
		links = append(links, name)
	}
	for _, name := range o.called {
		p.progs[name] = coll.DetachProgram(name)
	}
	return nil
}

// attach keeps a link that an earlier daemon left: the same program, by the
// directory's fingerprint, and two would count twice.
func (p *Probe) attach(name string, prog *ebpf.Program) error {
	pin := p.pins.link(name)
	if pin != "" {
		if old, err := link.LoadPinnedLink(pin, nil); err == nil {
			p.links[name] = old
			info, err := old.Info()
			if err != nil {
				return err
			}
			p.progs[name], err = ebpf.NewProgramFromID(info.Program)
			return err
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	l, err := link.AttachTracing(link.TracingOptions{Program: prog})
	if err != nil {
		return err
	}
	if pin != "" {
		if err := l.Pin(pin); err != nil {
			return errors.Join(fmt.Errorf("pin: %w", err), l.Close())
		}
	}
	p.links[name] = l
	p.progs[name], err = prog.Clone()
	return err
}

// linkPrefix sets links apart from maps.
const linkPrefix = "link_"

// pinDir is where maps and links of one fingerprint are pinned; dir is "" when
// nothing is, and why says the reason unless none was wanted.
type pinDir struct {
	dir string
	why error
}

func (d *pinDir) link(name string) string {
	if d.dir == "" {
		return ""
	}
	return filepath.Join(d.dir, linkPrefix+name)
}

// openPins makes the directory, and removes what daemons of other versions
// pinned, which ends their counting.
func openPins(parent, fingerprint string) (*pinDir, error) {
	if parent == "" {
		return &pinDir{}, nil
	}
	dir := filepath.Join(parent, fingerprint)
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(parent), &fs); err != nil {
		return &pinDir{why: fmt.Errorf("%s: %w", filepath.Dir(parent), err)}, nil
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		return &pinDir{why: fmt.Errorf("%s is not a bpf file system", filepath.Dir(parent))}, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("pinned programs: %w", err)
	}
	entries, err := os.ReadDir(parent)
	if err != nil {
		return nil, fmt.Errorf("pinned programs: %w", err)
	}
	for _, e := range entries {
		if e.Name() == fingerprint {
			continue
		}
		if err := os.RemoveAll(filepath.Join(parent, e.Name())); err != nil {
			return nil, fmt.Errorf("pinned programs of another version: %w", err)
		}
	}
	return &pinDir{dir: dir}, nil
}

// mapOwners says whose the slots are, for the next daemon. No program reads it.
const mapOwners = "owners"

// maxName fits NAMESPACE/NAME of containerd.
const maxName = 160

type owner struct {
	Tasks, Block uint64
	Netns        uint32
	Length       uint32 // of the name; 0 is a free slot
	Name         [maxName]byte
}

// adopt takes over what the owners map says. Counts are kept; entries that no
// owner accounts for, left by a daemon that was killed in between, go.
func (p *Probe) adopt() error {
	for at := range MaxSlots {
		var o owner
		if err := p.maps[mapOwners].Lookup(uint32(at), &o); err != nil {
			return fmt.Errorf("owner of slot %d: %w", at, err)
		}
		if at == HostSlot {
			continue
		}
		if o.Length > 0 && o.Length <= maxName {
			p.slots[at] = slot{taken: true, name: string(o.Name[:o.Length]), id: Identity{o.Tasks, o.Block, o.Netns}}
		} else {
			p.free = append(p.free, uint32(at))
		}
	}
	p.slots[HostSlot] = slot{taken: true, id: p.cfg.Host}
	if err := p.adoptBirths(); err != nil {
		return err
	}
	raw := make([]byte, 4)
	if _, err := p.state.ReadAt(raw, generationAt); err != nil {
		return err
	}
	p.generation = binary.NativeEndian.Uint32(raw)
	if err := sweep(p.maps[schedMapCgroups], make([]byte, 8), func(key []byte, at uint32) bool {
		k := binary.NativeEndian.Uint64(key)
		return at < MaxSlots && p.slots[at].taken && slices.Contains(cgroupKeys(p.slots[at].id), k) || p.isBirths(k, at)
	}); err != nil {
		return fmt.Errorf("map %s: %w", schedMapCgroups, err)
	}
	if err := sweep(p.maps[schedMapNetns], make([]byte, 4), func(key []byte, at uint32) bool {
		return at < MaxSlots && p.slots[at].taken && p.slots[at].id.Netns == binary.NativeEndian.Uint32(key)
	}); err != nil {
		return fmt.Errorf("map %s: %w", schedMapNetns, err)
	}
	for at := range p.slots {
		if p.slots[at].taken {
			if err := p.enter(at, p.slots[at].id); err != nil {
				return err
			}
		}
	}
	if p.failed[PartBirths] == nil {
		all, err := p.born()
		if err != nil {
			return err
		}
		if err := p.refill(len(p.spare) - len(all)); err != nil {
			return err
		}
	}
	return p.changed()
}

// sweep deletes entries that keep does not want.
func sweep(m *ebpf.Map, key []byte, keep func(key []byte, slot uint32) bool) error {
	var at uint32
	var gone [][]byte
	it := m.Iterate()
	for it.Next(&key, &at) {
		if !keep(key, at) {
			gone = append(gone, slices.Clone(key))
		}
	}
	if err := it.Err(); err != nil {
		return err
	}
	for _, k := range gone {
		if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// cgroupKeys are the keys of bpf/shards.h: kind<<60 | id.
func cgroupKeys(id Identity) []uint64 {
	var keys []uint64
	if id.Tasks != 0 {
		keys = append(keys, 1<<60|id.Tasks)
	}
	if id.Block != 0 {
		keys = append(keys, 2<<60|id.Block)
	}
	return keys
}

// assign gives a slot to s, or to nobody. The owner is written first when it
// comes and last when it goes: a daemon that is killed in between leaves an
// owner that adopt completes, never entries that nobody owns.
func (p *Probe) assign(at int, s slot) error {
	old := p.slots[at]
	if s.taken {
		if err := p.own(at, s); err != nil {
			return err
		}
	}
	p.slots[at] = s
	errs := []error{p.leave(at, old.id, s.id), p.enter(at, s.id), p.changed()}
	if !s.taken {
		errs = append(errs, p.own(at, s))
	}
	return errors.Join(errs...)
}

func (p *Probe) own(at int, s slot) error {
	o := owner{Tasks: s.id.Tasks, Block: s.id.Block, Netns: s.id.Netns, Length: uint32(len(s.name))}
	copy(o.Name[:], s.name)
	if err := p.maps[mapOwners].Put(uint32(at), &o); err != nil {
		return fmt.Errorf("owner of slot %d: %w", at, err)
	}
	return nil
}

// enter makes id count to the slot.
func (p *Probe) enter(at int, id Identity) error {
	for _, key := range cgroupKeys(id) {
		if err := p.maps[schedMapCgroups].Put(key, uint32(at)); err != nil {
			return fmt.Errorf("cgroup %d: %w", key&^(15<<60), err)
		}
	}
	if id.Netns != 0 {
		if err := p.maps[schedMapNetns].Put(id.Netns, uint32(at)); err != nil {
			return fmt.Errorf("network namespace %d: %w", id.Netns, err)
		}
	}
	return nil
}

// leave removes what old had and id has not, as far as it is the slot's still:
// an inode number may have gone to another shard meanwhile.
func (p *Probe) leave(at int, old, id Identity) error {
	var errs []error
	drop := func(m *ebpf.Map, key any) {
		var owner uint32
		if err := m.Lookup(key, &owner); err != nil || owner != uint32(at) {
			return
		}
		if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, err)
		}
	}
	for _, key := range cgroupKeys(old) {
		if !slices.Contains(cgroupKeys(id), key) {
			drop(p.maps[schedMapCgroups], key)
		}
	}
	if old.Netns != 0 && old.Netns != id.Netns {
		drop(p.maps[schedMapNetns], old.Netns)
	}
	return errors.Join(errs...)
}

// changed makes the programs forget what cgroups resolved to.
func (p *Probe) changed() error {
	p.generation++
	raw := binary.NativeEndian.AppendUint32(nil, p.generation)
	for cpu := range p.cpus {
		if _, err := p.state.WriteAt(raw, int64(cpu)*stateSize+generationAt); err != nil {
			return fmt.Errorf("generation of CPU %d: %w", cpu, err)
		}
	}
	return nil
}

// clear zeroes the counts of a slot that nobody has.
func (p *Probe) clear(at int) error {
	_, err := p.usage.WriteAt(make([]byte, usageSize*p.cpus), int64(at)*int64(usageSize*p.cpus))
	return err
}
