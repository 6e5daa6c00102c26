package migrate

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

// clockProbes is how many round trips the clock offset is measured over; the
// shortest one bounds the error best.
const clockProbes = 5

// preflight finds every reason why the shard could not move, here and at the
// destination. Without dryRun it leaves a reservation there. An error means
// that a host could not be asked.
func (o *outgoing) preflight(ctx context.Context, dryRun bool) ([]*v1.Finding, error) {
	m, req := o.m, o.req
	if runtime.ForeignNamespace(req.GetNamespace()) && !req.GetForceNamespace() {
		return []*v1.Finding{refuse("foreign-namespace", "--force-namespace, if its orchestrator does not watch the container",
			"namespace %s belongs to another orchestrator", req.GetNamespace())}, nil
	}
	if req.GetNode() == m.cfg.Node {
		return []*v1.Finding{refuse("same-host", "name another node; tranship nodes lists them", "shard %s is on %s already", req.GetShard(), m.cfg.Node)}, nil
	}
	rec, err := m.rt.Describe(ctx, req.GetNamespace(), req.GetShard())
	if errors.Is(err, runtime.ErrNotFound) {
		return []*v1.Finding{refuse("unknown-shard", "tranship ps lists the shards of this host; run migrate on the host that has it",
			"no shard %s in namespace %s on %s", req.GetShard(), req.GetNamespace(), m.cfg.Node)}, nil
	}
	if err != nil {
		return nil, err
	}
	o.rec = rec
	if o.peer, err = m.peers.Client(req.GetNode()); errors.Is(err, ErrUnknownNode) {
		return []*v1.Finding{refuse("unknown-node", "tranship nodes lists the pool", "no node %s in the pool", req.GetNode())}, nil
	}
	if err != nil {
		return nil, err
	}
	findings := m.checkHere(ctx, rec)
	there, err := o.checkThere(ctx, dryRun || refused(findings))
	if err != nil {
		return nil, err
	}
	return append(findings, there...), nil
}

// checkHere judges the shard by its record and by what its processes hold.
func (m *Manager) checkHere(ctx context.Context, rec *runtime.Record) []*v1.Finding {
	var out []*v1.Finding
	for _, f := range runtime.Movable(rec) {
		out = append(out, &v1.Finding{Code: f.Code, Message: f.Message, Advice: f.Advice, Warning: f.Warning})
	}
	out = append(out, checkCopiedMounts(rec)...)
	if other := m.MigrationOf(rec.Namespace, rec.Name); other != "" && m.outgoingOf(other) == nil && m.arriving(shardKey{rec.Namespace, rec.Name}) == nil {
		out = append(out, refuse("migrating", "wait until migration "+other+" has ended", "shard %s is part of migration %s%s",
			rec.Name, other, m.because(rec.Namespace, rec.Name)))
	}
	if m.trackerKind() == track.None {
		out = append(out, warn("tracker", "Linux 6.7 or newer, or a kernel with CONFIG_MEM_SOFT_DIRTY, pre-copies",
			"the kernel of %s cannot track written memory: all of it is copied while the shard stands still", m.cfg.Node))
	}
	if rec.Status != runtime.StatusRunning {
		return out
	}
	cg, err := m.rt.Cgroup(ctx, rec.Namespace, rec.Name)
	if err != nil {
		return append(out, refuse("cgroup", "see the log of containerd", "%v", err))
	}
	pids, err := cg.Processes()
	if err != nil {
		return append(out, refuse("cgroup", "see the log of containerd", "%v", err))
	}
	procs, err := track.ProcessesOf(pids, int(rec.PID))
	if err != nil {
		return append(out, refuse("processes", "every process of a shard must be in its pid namespace", "%v", err))
	}
	out = append(out, checkLinks(rec)...)
	return append(out, checkProcesses(rec.Name, procs, addressMoves(rec))...)
}

// checkLinks refuses a private network namespace that somebody, `ctr run --cni`
// for one, gave interfaces: only its loopback is made anew at the destination.
func checkLinks(rec *runtime.Record) []*v1.Finding {
	if rec.Network.Kind != runtime.NetworkPrivate {
		return nil
	}
	links, err := runtime.LinksOf(rec.PID)
	if err != nil {
		return []*v1.Finding{refuse("network", "try again when it is running", "%v", err)}
	}
	if len(links) == 0 {
		return nil
	}
	return []*v1.Finding{refuse("private-links", "run it with tranship run --net shard, whose address moves with it",
		"its network namespace has interfaces that tranship did not make and cannot move: %s", strings.Join(links, ", "))}
}

func (m *Manager) outgoingOf(id string) *outgoing {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.outgoing[id]
}

// addressMoves says whether established connections can survive: the address
// goes along, or they never leave the shard's own namespace.
func addressMoves(rec *runtime.Record) bool {
	switch rec.Network.Kind {
	case runtime.NetworkShard, runtime.NetworkNone, runtime.NetworkPrivate:
		return true
	}
	return false
}

// checkThere asks the destination, and measures the clocks' offset on the way.
func (o *outgoing) checkThere(ctx context.Context, dryRun bool) ([]*v1.Finding, error) {
	here, err := o.m.facts()
	if err != nil {
		return nil, err
	}
	if o.offset, err = o.measureClocks(ctx); err != nil {
		return []*v1.Finding{refuse("unreachable", "is transhipd running there? tranship nodes shows what this host sees",
			"node %s does not answer: %v", o.req.GetNode(), peerError(err))}, nil
	}
	memory := int64(0)
	if cg, err := o.m.rt.Cgroup(ctx, o.rec.Namespace, o.rec.Name); err == nil {
		if memory, err = cg.MemoryCurrent(); err != nil {
			return nil, err
		}
	}
	req := &v1.ReserveRequest{
		Id: o.entry.ID, From: o.m.cfg.Node, Mode: o.req.GetMode(), DryRun: dryRun,
		Versions: o.m.cfg.Versions, CpuFeatures: here.CPUFeatures, UnixNs: time.Now().UnixNano(), MemoryBytes: memory,
		Snapshotter: o.rec.Snapshot.Snapshotter, Runtime: o.rec.Runtime.Name,
		Shard: &v1.Shard{
			Name: o.rec.Name, Namespace: o.rec.Namespace, Image: o.rec.Image.Name,
			Network: string(o.rec.Network.Kind), NetnsPath: o.rec.Network.Path, Mac: o.rec.Network.MAC,
		},
	}
	if o.rec.Network.IP.IsValid() {
		req.Shard.Ip = o.rec.Network.IP.String()
	}
	for _, mnt := range o.rec.Mounts {
		req.Mounts = append(req.Mounts, &v1.Mount{Source: mnt.Source, Destination: mnt.Destination, ReadOnly: mnt.ReadOnly, Policy: string(mnt.Policy)})
	}
	resp, err := o.peer.Reserve(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, fmt.Errorf("reserve on %s: %w", o.req.GetNode(), peerError(err))
	}
	return resp.Msg.GetFindings(), nil
}

func (o *outgoing) measureClocks(ctx context.Context) (clockOffset, error) {
	best := clockOffset{roundTrip: time.Hour}
	for range clockProbes {
		sent := time.Now()
		status, err := o.peer.Clock(ctx, connect.NewRequest(&v1.ClockRequest{}))
		if err != nil {
			return clockOffset{}, err
		}
		back := time.Now()
		if rtt := back.Sub(sent); rtt < best.roundTrip {
			middle := sent.Add(rtt / 2)
			best = clockOffset{offset: time.Unix(0, status.Msg.GetUnixNs()).Sub(middle), roundTrip: rtt}
		}
	}
	return best, nil
}

// checkArrival is what the destination knows of its own system about a shard
// that wants to come.
func (m *Manager) checkArrival(ctx context.Context, req *v1.ReserveRequest) []*v1.Finding {
	var out []*v1.Finding
	s := req.GetShard()
	if _, err := m.rt.Describe(ctx, s.GetNamespace(), s.GetName()); err == nil {
		out = append(out, refuse("name-taken", "remove or rename it there", "%s has a container %s in namespace %s already", m.cfg.Node, s.GetName(), s.GetNamespace()))
	} else if !errors.Is(err, runtime.ErrNotFound) {
		out = append(out, refuse("containerd", "see the log of transhipd on "+m.cfg.Node, "%s: %v", m.cfg.Node, err))
	}
	if s.GetNetwork() == string(runtime.NetworkNetns) {
		if _, err := os.Stat(s.GetNetnsPath()); err != nil {
			out = append(out, refuse("netns", "make it: ip netns add "+filepath.Base(s.GetNetnsPath()), "%s has no network namespace %s", m.cfg.Node, s.GetNetnsPath()))
		}
	}
	if s.GetIp() != "" {
		if ip, err := netip.ParsePrefix(s.GetIp()); err != nil || !m.cfg.Subnet.Contains(ip.Addr()) {
			out = append(out, refuse("subnet", "give both hosts the same network.subnet", "address %s is outside %s, the shards' network of %s", s.GetIp(), m.cfg.Subnet, m.cfg.Node))
		}
	}
	for _, mnt := range req.GetMounts() {
		if mnt.GetPolicy() == string(runtime.MountCopy) {
			if f := checkMountTarget(m.cfg.Node, mnt.GetSource()); f != nil {
				out = append(out, f)
			}
		}
		if mnt.GetPolicy() != string(runtime.MountShared) {
			continue
		}
		if _, err := os.Stat(mnt.GetSource()); err != nil {
			out = append(out, refuse("mount-missing", "make it there, or use policy=copy", "%s, declared shared, does not exist on %s", mnt.GetSource(), m.cfg.Node))
		}
	}
	return out
}
