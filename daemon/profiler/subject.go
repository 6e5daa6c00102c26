package profiler

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/daemon/forecasts"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/probe"
	"github.com/tranship/tranship/ebpf/profile"
)

// subject is one running shard.
type subject struct {
	key             string
	namespace, name string
	tenant          string
	workload        string
	pid             int
	pidfd           int
	slot            int // of the probe; -1 without one
	since           time.Time
	files           *files
	links           *links // nil when it shares the host's network
	noNetwork       string // why links is nil
	profile         *profile.Profile
	usage           probe.Usage // as of the last sample
	// dirty is the rate as last measured; fresh until a sample has it.
	dirty                  float64
	dirtyKnown, dirtyFresh bool
	dirtyTried             time.Time
}

// sharedNetwork: the interfaces are the host's, and nothing on them says whose a
// packet is; a program for every packet of the host would cost more than it tells.
const sharedNetwork = "it shares the host's network, whose interfaces count all of it"

// network signals come from a shard's own interfaces and connections.
var network = []profile.Signal{
	profile.ReceiveBytes, profile.TransmitBytes, profile.ReceivePackets, profile.TransmitPackets,
	profile.Retransmits, profile.Connections, profile.RoundTrip,
}

// absent says which signals this shard lacks, unlike others of the host, and why.
func (s *subject) absent() map[string]string {
	if s.links != nil {
		return nil
	}
	out := map[string]string{}
	for _, sig := range network {
		out[sig.String()] = s.noNetwork
	}
	return out
}

func (s *subject) close() error {
	errs := []error{s.files.close()}
	if s.links != nil {
		errs = append(errs, s.links.close())
	}
	if s.pidfd >= 0 {
		errs = append(errs, unix.Close(s.pidfd))
		s.pidfd = -1
	}
	return errors.Join(errs...)
}

// begin starts to profile a shard; again for the same process it does nothing.
func (p *Profiler) begin(ctx context.Context, t runtime.Task) {
	key := t.Namespace + "/" + t.Name
	p.mu.Lock()
	have := p.subjects[key]
	p.mu.Unlock()
	if have != nil && have.pid == t.PID {
		p.wantHistory(key)
		return
	}
	s, err := p.newSubject(t)
	if err != nil {
		if cerr := p.claim(t); cerr != nil {
			p.log.Debug("profiles: a shard ended before it was seen", "shard", key, "err", errors.Join(err, cerr))
		}
		return
	}
	labels, err := p.cfg.Tasks.Labels(ctx, t.Namespace, t.Name)
	if err != nil && !errors.Is(err, runtime.ErrNotFound) && ctx.Err() == nil {
		p.log.Warn("profiles: labels", "shard", key, "err", err)
	}
	s.tenant, s.workload = labels[LabelTenant], labels[LabelWorkload]
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.insert(s); err != nil {
		p.log.Warn("profiles: shard", "shard", key, "err", errors.Join(err, s.close()))
		return
	}
	p.wantHistory(key)
}

func (p *Profiler) newSubject(t runtime.Task) (*subject, error) {
	// The pidfd first: while it says that the process lives, /proc/PID is its.
	pidfd, err := unix.PidfdOpen(t.PID, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", t.PID, err)
	}
	s := &subject{
		key: t.Namespace + "/" + t.Name, namespace: t.Namespace, name: t.Name, pid: t.PID, pidfd: pidfd, slot: -1,
		since: time.Now(), profile: profile.New(), files: newFiles(runtime.Place{}, 0),
	}
	place, err := runtime.PlaceOf(t.PID)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.files = newFiles(place, p.instead)
	s.noNetwork = sharedNetwork
	if place.Netns != 0 {
		s.noNetwork = ""
		if s.links, err = openLinks(s.pidfd, p.host.netns, p.instead.Has(profile.Retransmits)); err != nil {
			s.noNetwork = err.Error()
			// Without the network's counters, but not without the rest.
			p.log.Warn("profiles: network", "shard", s.key, "err", err)
		}
	}
	return s, nil
}

// insert gives a subject its slot and takes its first sample. p.mu is held.
func (p *Profiler) insert(s *subject) error {
	if old := p.subjects[s.key]; old != nil {
		if old.pid == s.pid {
			return s.close() // somebody else was faster
		}
		// Restarted: the slot goes on under the same name.
		minutes := map[string][]profile.Point{}
		p.retire(old, minutes)
		p.queue(minutes)
		delete(p.subjects, s.key)
	}
	if p.probe != nil {
		id := probe.Identity{Tasks: s.files.place.Dirs["cpu"].ID, Block: s.files.place.Dirs["blkio"].ID, Netns: s.files.place.Netns}
		slot, err := p.probe.Track(s.key, id)
		if errors.Is(err, probe.ErrFull) {
			// Its cgroup's files know some of what no program counts for it.
			s.files.instead = anything
			p.log.Warn("profiles: more shards than slots; of this one only what files know", "shard", s.key, "err", err)
		} else if err != nil {
			return err
		} else {
			s.slot = slot
			if err := p.began(s); err != nil {
				return err
			}
		}
	}
	p.subjects[s.key] = s
	if fc := p.cfg.Forecasts; fc != nil {
		labels := forecasts.Labels{Tenant: s.tenant, Workload: s.workload}
		s.profile.OnTen = func(ten *profile.Point) { fc.Offer(s.key, labels, ten) }
	}
	p.observe(s, &round{at: now()}, map[string][]profile.Point{}) // the first only begins
	return nil
}

// end stops profiling a shard whose init was pid.
func (p *Profiler) end(key string, pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.subjects[key]; s == nil || s.pid != pid {
		return
	}
	minutes := map[string][]profile.Point{}
	p.remove(key, minutes)
	p.queue(minutes)
}

// remove takes the last sample and gives everything back. p.mu is held.
func (p *Profiler) remove(key string, minutes map[string][]profile.Point) {
	s := p.subjects[key]
	p.retire(s, minutes)
	delete(p.subjects, key)
	if p.cfg.Forecasts != nil {
		p.cfg.Forecasts.End(key)
	}
	if s.slot > 0 {
		if err := p.probe.Release(s.slot); err != nil {
			p.log.Warn("profiles: release", "shard", key, "err", err)
		}
	}
}

func (p *Profiler) retire(s *subject, minutes map[string][]profile.Point) {
	p.observe(s, &round{at: now()}, minutes)
	if pt, ok := s.profile.Flush(); ok {
		minutes[s.key] = append(minutes[s.key], pt)
	}
	if err := s.close(); err != nil {
		p.log.Warn("profiles: close", "shard", s.key, "err", err)
	}
}

// news asks the kernel, by one call, which inits are gone, the word that cannot
// be lost, and where interfaces have changed. p.mu is held.
func (p *Profiler) news() (ended []string) {
	p.polled, p.polledOf = p.polled[:0], p.polledOf[:0]
	for _, s := range p.subjects {
		changes := -1 // left out
		if s.links != nil {
			changes = s.links.changes
		}
		p.polled = append(p.polled, unix.PollFd{Fd: int32(s.pidfd), Events: unix.POLLIN}, unix.PollFd{Fd: int32(changes), Events: unix.POLLIN})
		p.polledOf = append(p.polledOf, s)
	}
	if n, err := unix.Poll(p.polled, 0); err != nil || n == 0 {
		return nil // interrupted: a second later is soon enough
	}
	for i, s := range p.polledOf {
		switch {
		case p.polled[2*i].Revents != 0:
			ended = append(ended, s.key)
		case p.polled[2*i+1].Revents != 0:
			s.links.changed(s.pidfd, p.host.netns, p.buf)
		}
	}
	return ended
}

// observe samples one shard. p.mu is held.
func (p *Profiler) observe(s *subject, r *round, minutes map[string][]profile.Point) {
	sm := profile.Sample{At: r.at}
	if s.files.instead.Has(profile.CPU) {
		sm.At = now() // no program has counted up to the round's moment
	}
	s.files.read(&sm, p.tick+s.slot, p.buf) // not all in the same tick
	if s.slot >= 0 {
		u, conns, err := p.probe.Read(s.slot)
		if err != nil {
			p.log.Warn("profiles: counts", "shard", s.key, "err", err)
		} else {
			p.take(&sm, &u)
			if s.links != nil {
				p.takeConnections(&sm, conns)
			} else {
				sm.Clear(profile.Retransmits)
			}
			p.host.add(&s.usage, &u)
			s.usage = u
		}
	}
	if s.links != nil {
		if err := s.links.read(&sm, r.interfaces, p.buf); err != nil {
			p.log.Warn("profiles: network", "shard", s.key, "err", err)
		}
	}
	if s.dirtyFresh {
		sm.Set(profile.DirtyPages, s.dirty)
		s.dirtyFresh = false
	}
	done, gap := s.profile.Observe(&sm)
	if gap != profile.NoGap {
		p.gaps[gap]++
	}
	if len(done) > 0 {
		minutes[s.key] = append(minutes[s.key], done...)
	}
}

// take fills in what programs have counted.
func (p *Profiler) take(s *profile.Sample, u *probe.Usage) {
	set := func(sig profile.Signal, v float64) {
		if !p.instead.Has(sig) {
			s.Set(sig, v)
		}
	}
	const ns = 1e-9
	set(profile.CPU, float64(u.CpuNs)*ns)
	set(profile.Wait, float64(u.WaitNs)*ns)
	set(profile.Voluntary, float64(u.Voluntary))
	set(profile.Forced, float64(u.Forced))
	set(profile.MinorFaults, float64(u.MinorFaults))
	set(profile.MajorFaults, float64(u.MajorFaults))
	set(profile.ReadBytes, float64(u.ReadBytes))
	set(profile.WriteBytes, float64(u.WriteBytes))
	set(profile.ReadOps, float64(u.ReadOps))
	set(profile.WriteOps, float64(u.WriteOps))
	s.RunQueue = profile.Latency{Buckets: u.Wait, Seconds: float64(u.WaitNs) * ns}
	s.Reads = profile.Latency{Buckets: u.Read, Seconds: float64(u.ReadNs) * ns}
	s.Writes = profile.Latency{Buckets: u.Write, Seconds: float64(u.WriteNs) * ns}
	if !p.instead.Has(profile.Retransmits) {
		s.Set(profile.Retransmits, float64(u.Retransmits))
	}
}

func (p *Profiler) takeConnections(s *profile.Sample, c probe.Connections) {
	if p.instead.Has(profile.RoundTrip) {
		return
	}
	s.Set(profile.Connections, float64(c.Open))
	if c.Measured > 0 {
		s.Set(profile.RoundTrip, float64(c.RTTSum)/float64(c.Measured)/1e6)
	}
}
