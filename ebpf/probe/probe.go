// Package probe is tranship's only door to BPF (cilium/ebpf). It owns the
// programs in bpf/, loads them one by one, so that a kernel that refuses one
// still runs the others, and reads what they count.
//
//	Open (load, or find what an earlier daemon left) → Track a shard → each
//	second Refresh, then Read every slot → Release
//
// Maps and links are pinned: while the daemon is down the kernel counts on.
// It refuses to know what a shard is: it maps cgroup ids to slots. No program
// touches a task's memory, and there are no uprobes, which CRIU refuses.
package probe

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
)

// HostSlot counts what belongs to the host and to no shard.
const HostSlot = 0

// MaxSlots is how many shards a host can have, plus the host.
const MaxSlots = 1024

// Sentinels for what callers branch on.
var (
	// ErrFull: every slot is taken.
	ErrFull = errors.New("all slots are taken")
	// ErrClosed: the probe was closed.
	ErrClosed = errors.New("probe is closed")
)

// Identity is how the kernel knows a shard.
type Identity struct {
	// Tasks is the id of its cgroup in the hierarchy that schedules tasks (cpu
	// under v1), Block in the one that accounts I/O (blkio). Under v2 they are
	// equal. The id is the inode number of the cgroup's directory. 0 is none.
	Tasks, Block uint64
	// Netns is the inode number of its network namespace; 0 for a shard that
	// shares the host's.
	Netns uint32
}

// Config of a Probe.
type Config struct {
	// PinDir is a directory for this daemon alone, whose parent is a bpf file
	// system. If that is none, or PinDir is "", nothing is counted while the
	// daemon is down.
	PinDir string
	// Unified says that cgroup v2 is all there is.
	Unified bool
	// Host is the host's own root: what is below it and in no shard counts to
	// the host.
	Host Identity
	// BTF is a file with the kernel's types; "" is the kernel's own.
	BTF string
}

// Part is a program, or a pair of them, that loads or does not.
type Part string

// The parts.
const (
	PartSched Part = "sched" // CPU time, wait, switches, faults
	PartBlock Part = "block" // block bytes, operations, latency
	PartTCP   Part = "tcp"   // retransmits, connections, round-trip time
	// PartBirths counts a shard from the moment when its cgroup is made.
	PartBirths Part = "births"
)

// Parts lists them all.
var Parts = []Part{PartSched, PartBlock, PartTCP, PartBirths}

// Usage is what a slot has counted since it was taken. Durations in
// nanoseconds; histograms as in ebpf/profile.
type Usage = schedShardUsage

// Connections of a slot now.
type Connections struct {
	Open uint64
	// Measured of them have a round-trip time, whose sum and maximum follow.
	Measured       uint64
	RTTSum, RTTMax uint64 // microseconds
}

// Probe counts. It is safe for concurrent use.
type Probe struct {
	cfg  Config
	cpus int
	pins *pinDir

	mu     sync.Mutex
	closed bool
	maps   map[string]*ebpf.Map
	links  map[string]link.Link
	progs  map[string]*ebpf.Program
	failed map[Part]error
	usage  *ebpf.Memory
	tcp    *ebpf.Memory
	state  *ebpf.Memory
	births *ebpf.Memory
	// What is copied to and from maps.
	nothing, counts, conns []byte
	readBirth              birthsBirth
	// generation of the programs' memory of which cgroup is whose.
	generation uint32
	slots      [MaxSlots]slot
	free       []uint32     // oldest first, so that a slot rests before it is reused
	spare      map[int]bool // slots that the kernel has, for births
}

type slot struct {
	taken bool
	name  string
	id    Identity
	born  time.Duration // of a slot that was claimed; see Born
}

// Open loads what this kernel takes. An error means that nothing at all can be
// counted; Failed says what is missing otherwise.
func Open(cfg Config) (*Probe, error) {
	// Before Linux 5.11 maps counted against the limit of locked memory; later
	// this does nothing.
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("limit of locked memory: %w", err)
	}
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("number of CPUs: %w", err)
	}
	p := &Probe{
		cfg: cfg, cpus: cpus,
		maps: map[string]*ebpf.Map{}, links: map[string]link.Link{}, progs: map[string]*ebpf.Program{}, failed: map[Part]error{},
		spare: map[int]bool{},
	}
	if err := p.open(); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func (p *Probe) open() error {
	var err error
	if p.pins, err = openPins(p.cfg.PinDir, p.fingerprint()); err != nil {
		return err
	}
	if err := p.load(); err != nil {
		return err
	}
	for _, m := range []struct {
		name string
		at   **ebpf.Memory
	}{{schedMapUsage, &p.usage}, {tcpMapTcp, &p.tcp}, {schedMapPercpu, &p.state}, {birthsMapBirths, &p.births}} {
		if *m.at, err = p.maps[m.name].Memory(); err != nil {
			return fmt.Errorf("memory of map %s: %w", m.name, err)
		}
	}
	p.nothing, p.counts, p.conns = make([]byte, p.tcp.Size()), make([]byte, usageSize*p.cpus), make([]byte, tcpSize)
	return p.adopt()
}

// Failed says why a part does not count; nil when it does.
func (p *Probe) Failed(part Part) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed[part]
}

// Pinned is nil when counting goes on while no daemon runs, else it says why not.
func (p *Probe) Pinned() error {
	if p.pins.dir == "" && p.pins.why == nil {
		return errors.New("not asked for")
	}
	return p.pins.why
}

// Close releases this daemon's hold. What is pinned counts on.
func (p *Probe) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	var errs []error
	for name, l := range p.links {
		if err := l.Close(); err != nil {
			errs = append(errs, fmt.Errorf("link %s: %w", name, err))
		}
	}
	for name, prog := range p.progs {
		if err := prog.Close(); err != nil {
			errs = append(errs, fmt.Errorf("program %s: %w", name, err))
		}
	}
	for name, m := range p.maps {
		if err := m.Close(); err != nil {
			errs = append(errs, fmt.Errorf("map %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// Track gives a shard a slot, under a name that a later daemon finds again
// (Tracked). Tracking a name that is tracked moves its slot to the new identity
// and keeps the counts.
func (p *Probe) Track(name string, id Identity) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0, ErrClosed
	}
	if len(name) == 0 || len(name) > maxName {
		return 0, fmt.Errorf("track %q: the name has no place in an owner", name)
	}
	at := -1
	for i := range p.slots {
		if p.slots[i].taken && p.slots[i].name == name {
			at = i
		}
	}
	if at < 0 {
		if b, ok, err := p.bornAs(id); err != nil {
			return 0, fmt.Errorf("track %s: %w", name, err)
		} else if ok {
			return b.Slot, p.claim(name, b, id)
		}
		if len(p.free) > 0 {
			at = int(p.free[0])
			p.free = p.free[1:]
		} else if spare, ok := p.unspare(); ok {
			at = spare
		} else {
			return 0, fmt.Errorf("track %s: %w", name, ErrFull)
		}
		if err := p.clear(at); err != nil {
			return 0, fmt.Errorf("track %s: %w", name, err)
		}
	}
	if err := p.assign(at, slot{taken: true, name: name, id: id}); err != nil {
		return 0, fmt.Errorf("track %s: %w", name, err)
	}
	return at, nil
}

// Release gives a slot back. Its counts can be read until it is taken again.
func (p *Probe) Release(at int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return ErrClosed
	}
	if at <= HostSlot || at >= MaxSlots || !p.slots[at].taken {
		return nil
	}
	err := p.assign(at, slot{})
	p.free = append(p.free, uint32(at))
	if err != nil {
		return fmt.Errorf("release slot %d: %w", at, err)
	}
	return nil
}

// Tracked lists the slots by name.
func (p *Probe) Tracked() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string]int{}
	for i, s := range p.slots {
		if s.taken && i != HostSlot {
			out[s.name] = i
		}
	}
	return out
}

// IdentityOf returns what a slot counts.
func (p *Probe) IdentityOf(at int) Identity {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.slots[at].id
}

// Refresh brings all counts up to now: what running tasks have used since they
// last came to a CPU, and the state of TCP connections.
func (p *Probe) Refresh() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return ErrClosed
	}
	var errs []error
	if flush := p.progs[schedProgFlush]; flush != nil {
		for cpu := range p.cpus {
			_, err := flush.Run(&ebpf.RunOptions{CPU: uint32(cpu), Flags: runOnCPU})
			if err != nil && !offline(err) {
				errs = append(errs, fmt.Errorf("flush CPU %d: %w", cpu, err))
			}
		}
	}
	if survey := p.progs[tcpProgSurvey]; survey != nil {
		if _, err := p.tcp.WriteAt(p.nothing, 0); err != nil {
			errs = append(errs, fmt.Errorf("survey of TCP: %w", err))
		} else if _, err := survey.Run(nil); err != nil {
			errs = append(errs, fmt.Errorf("survey of TCP: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Read adds up what a slot has counted on all CPUs, as of the last Refresh or
// later.
func (p *Probe) Read(at int) (Usage, Connections, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return Usage{}, Connections{}, ErrClosed
	}
	if at < 0 || at >= MaxSlots {
		return Usage{}, Connections{}, fmt.Errorf("slot %d: there are %d", at, MaxSlots)
	}
	raw := p.counts
	if _, err := p.usage.ReadAt(raw, int64(at)*int64(len(raw))); err != nil {
		return Usage{}, Connections{}, fmt.Errorf("slot %d: %w", at, err)
	}
	// A Usage is an array of words; they are added up as such.
	var sum [usageSize / 8]uint64
	for cpu := range p.cpus {
		of := raw[cpu*usageSize:][:usageSize]
		for i := range sum {
			sum[i] += binary.NativeEndian.Uint64(of[8*i:])
		}
	}
	u := usageOf(&sum)
	raw = p.conns
	if _, err := p.tcp.ReadAt(raw, int64(at)*tcpSize); err != nil {
		return Usage{}, Connections{}, fmt.Errorf("slot %d: %w", at, err)
	}
	return u, connectionsOf(raw), nil
}

// Stats are about the probe itself.
type Stats struct {
	// Missed events: a program was interrupted by itself.
	Missed uint64
	// ConnectionsLost is how many connections found no place in the map.
	ConnectionsLost uint64
	// Runs and RunTime of the programs, 0 unless somebody has turned on
	// kernel.bpf_stats_enabled.
	Runs    uint64
	RunTime float64 // seconds
}

// Stats reads the kernel's statistics of the programs.
func (p *Probe) Stats() (Stats, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var st Stats
	if p.closed {
		return st, ErrClosed
	}
	for name, prog := range p.progs {
		s, err := prog.Stats()
		if err != nil {
			return st, fmt.Errorf("statistics of %s: %w", name, err)
		}
		st.Missed += s.RecursionMisses
		st.Runs += s.RunCount
		st.RunTime += s.Runtime.Seconds()
	}
	raw := make([]byte, 4)
	for cpu := range p.cpus {
		if _, err := p.state.ReadAt(raw, int64(cpu)*stateSize+lostAt); err != nil {
			return st, fmt.Errorf("state of CPU %d: %w", cpu, err)
		}
		st.ConnectionsLost += uint64(binary.NativeEndian.Uint32(raw))
	}
	return st, nil
}

// Entries counts the entries of the maps that could leak, by name, without those
// of births, which come and go with anybody's cgroups. It is a system call an
// entry.
func (p *Probe) Entries() (map[string]int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	out := map[string]int{}
	for _, name := range []string{schedMapCgroups, schedMapNetns, tcpMapConnections} {
		n, err := count(p.maps[name])
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
		out[name] = n
	}
	all, err := p.born()
	for _, b := range all {
		out[schedMapCgroups] -= len(cgroupKeys(b.ID))
	}
	return out, err
}

// count walks a hash map. A walk that deletions keep sending back to the start
// ends after as many steps as there could be entries.
func count(m *ebpf.Map) (int, error) {
	key := make([]byte, m.KeySize())
	var at any
	for n := 0; n < int(m.MaxEntries()); n++ {
		err := m.NextKey(at, key)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		at = bytes.Clone(key)
	}
	return int(m.MaxEntries()), nil
}

// CountRunTime has the kernel measure all BPF programs of the machine, which
// costs some ten nanoseconds a run, until close is called.
func CountRunTime() (close func() error, err error) {
	c, err := ebpf.EnableStats(statsRunTime)
	if err != nil {
		return nil, fmt.Errorf("statistics of BPF programs: %w", err)
	}
	return c.Close, nil
}

// AttachEmpty has a program that does nothing run at every switch of the
// scheduler, until close is called: what counting cannot cost less than.
func AttachEmpty() (close func() error, err error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "empty", Type: ebpf.Tracing, AttachType: ebpf.AttachTraceRawTp, AttachTo: "sched_switch", License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return nil, fmt.Errorf("empty program: %w", err)
	}
	defer p.Close() // the link keeps it
	l, err := link.AttachTracing(link.TracingOptions{Program: p})
	if err != nil {
		return nil, fmt.Errorf("empty program: %w", err)
	}
	return l.Close, nil
}

// Remove ends all counting of the daemon with this directory, and forgets it.
func Remove(pinDir string) error {
	if err := os.RemoveAll(pinDir); err != nil {
		return fmt.Errorf("pinned programs: %w", err)
	}
	return nil
}

// PinnedStats reads the run times of the programs that are pinned in a
// directory of one version, from outside the daemon that pinned them.
func PinnedStats(dir string) (Stats, error) {
	var st Stats
	pins, err := filepath.Glob(filepath.Join(dir, linkPrefix+"*"))
	if err != nil || len(pins) == 0 {
		return st, errors.Join(fmt.Errorf("no programs are pinned in %s", dir), err)
	}
	for _, pin := range pins {
		s, err := pinnedStats(pin)
		if err != nil {
			return st, fmt.Errorf("%s: %w", pin, err)
		}
		st.Missed += s.RecursionMisses
		st.Runs += s.RunCount
		st.RunTime += s.Runtime.Seconds()
	}
	return st, nil
}

func pinnedStats(pin string) (*ebpf.ProgramStats, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return nil, err
	}
	prog, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	return prog.Stats()
}
