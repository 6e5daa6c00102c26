package profiler

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/probe"
	"github.com/tranship/tranship/ebpf/profile"
)

// A shard may live for less time than the word of it takes. The probe counts
// every cgroup from the moment when it is made; here the counts find their shard,
// by the cgroup of its process, or if that has ended, by the cgroup's path.

const (
	// birthGrace is how long a cgroup may wait to be a shard's: above what a
	// container takes from its cgroup to the event of its creation on a busy host.
	birthGrace = 30 * time.Second
	// fromBirth: a younger shard's first interval begins with its cgroup. That of
	// an older one would be longer than an interval may be.
	fromBirth = 3 * time.Second
)

var errUnseen = errors.New("no cgroup was made that could have been its own")

// observeBirths adds what provisional slots have counted to the host, and takes
// back those that are nobody's. p.mu is held.
func (p *Profiler) observeBirths() error {
	if p.probe == nil {
		return nil
	}
	if p.tick%int(reconcileEvery/period) == 0 {
		clear(p.brief)
	}
	all, err := p.probe.Births()
	if err != nil {
		return fmt.Errorf("cgroups that were made: %w", err)
	}
	if len(all) == 0 {
		return nil // as in most rounds
	}
	for _, b := range all {
		if err := p.countBirth(b.Slot); err != nil {
			return err
		}
	}
	expired, err := p.probe.Expire(now().Monotonic - birthGrace)
	for _, slot := range expired {
		err = errors.Join(err, p.countBirth(slot))
		delete(p.births, slot)
	}
	return err
}

// countBirth adds what a slot that is no shard's has gained to the host.
func (p *Profiler) countBirth(slot int) error {
	u, _, err := p.probe.Read(slot)
	if err != nil {
		return err
	}
	before := p.births[slot]
	p.host.add(&before, &u)
	p.births[slot] = u
	return nil
}

// began notes from where the counts of a shard's new slot go on: from those that
// the host has had already, and in its profile from its birth. p.mu is held.
func (p *Profiler) began(s *subject) error {
	born, ok := p.probe.Born(s.slot)
	if !ok {
		var err error
		s.usage, _, err = p.probe.Read(s.slot)
		return err
	}
	s.usage = p.births[s.slot]
	delete(p.births, s.slot)
	if at := now(); at.Monotonic-born < fromBirth {
		first := profile.Sample{At: earlier(at, at.Monotonic-born)}
		p.take(&first, &probe.Usage{})
		s.profile.Observe(&first)
	}
	return nil
}

// earlier is the instant that lies d before another, on clocks that ran evenly.
func earlier(at profile.Instant, d time.Duration) profile.Instant {
	return profile.Instant{Wall: at.Wall.Add(-d), Monotonic: at.Monotonic - d, Boot: at.Boot - d}
}

// claim files what a shard has used that ended before it was heard of.
func (p *Profiler) claim(t runtime.Task) error {
	key := t.Namespace + "/" + t.Name
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.subjects[key]; p.brief[key] == t.PID || s != nil && s.pid == t.PID {
		return nil // the second event of the same task
	}
	p.brief[key] = t.PID
	if p.probe == nil {
		p.unwatch++
		return errUnseen
	}
	b, ok, err := p.probe.Claim(key, func(b *probe.Birth) bool { return pathOf(t, b.Path, true) })
	if !ok && err == nil {
		b, ok, err = p.probe.Claim(key, func(b *probe.Birth) bool { return pathOf(t, b.Path, false) })
	}
	if err != nil || !ok {
		p.unwatch++
		return errors.Join(errUnseen, err)
	}
	u, _, err := p.probe.Read(b.Slot)
	if err != nil {
		return err
	}
	before := p.births[b.Slot]
	p.host.add(&before, &u)
	delete(p.births, b.Slot)
	at := now()
	ended := at.Monotonic
	if b.Ended != 0 {
		ended = b.Ended
	}
	points := p.lived(&u, earlier(at, at.Monotonic-b.Born), ended-b.Born)
	p.queue(map[string][]profile.Point{key: points})
	return p.probe.Release(b.Slot)
}

// lived is the profile of a life of which only the sum is known: spread evenly,
// in intervals as short as intervals have to be.
func (p *Profiler) lived(u *probe.Usage, from profile.Instant, life time.Duration) []profile.Point {
	life = max(life, time.Millisecond)
	n := int(life/fromBirth) + 1
	var total profile.Sample
	p.take(&total, u)
	pr := profile.New()
	var points []profile.Point
	for i := range n + 1 {
		sm := profile.Sample{At: earlier(from, -life*time.Duration(i)/time.Duration(n)), Has: total.Has}
		for s := range profile.Signals {
			sm.Values[s] = total.Values[s] * float64(i) / float64(n)
		}
		done, _ := pr.Observe(&sm)
		points = append(points, done...)
	}
	if pt, ok := pr.Flush(); ok {
		points = append(points, pt)
	}
	return points
}

// pathOf says whether a cgroup's path is that of a container, as containerd's
// clients make them: NAMESPACE/NAME, or where the path does not say which
// namespace it is, some directory and NAME, or with systemd PREFIX-NAME.scope.
func pathOf(t runtime.Task, cgroup string, namespaced bool) bool {
	dir, base := path.Split(cgroup)
	if namespaced {
		return base == t.Name && path.Base(dir) == t.Namespace
	}
	return base == t.Name || strings.HasSuffix(base, "-"+t.Name+".scope")
}
