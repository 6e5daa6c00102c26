package steward

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads"
	"github.com/tranship/tranship/internal/failpoint"
)

// Kinds of a change.
const (
	kindApply  = "apply"
	kindScale  = "scale"
	kindRemove = "remove"
)

// Outcomes of a change.
const (
	outcomeDone      = "done"
	outcomeNothing   = "nothing"
	outcomePlanned   = "planned" // a dry run
	outcomeRefused   = "refused"
	outcomeFailed    = "failed"
	outcomeCancelled = "cancelled"
)

// parallel bounds the steps that run at once.
const parallel = 6

// Change plans and carries out a change of a workload:
//
//  1. find its owner; another host is asked to do the rest
//  2. one change of a workload at a time; look at the pool; plan; send the plan
//  3. write down what is wanted, here and at the others
//  4. do the steps: what goes, what changes in place, what is replaced, what is new
//  5. write down what is there no more
//
// Killed or cancelled anywhere, what is written down is what is wanted, and
// the same change goes on from what is there.
func (s *Steward) Change(ctx context.Context, req *v1.ChangeWorkloadRequest, send func(*v1.WorkloadEvent) error) error {
	name := req.GetName()
	var asked *workloads.Spec
	if req.GetKind() == kindApply {
		var err error
		if asked, err = workloads.Decode(req.GetSpecJson()); err != nil {
			return connect.NewError(connect.CodeInvalidArgument, err)
		}
		name = asked.Name
	}
	have, err := s.find(ctx, name)
	if err != nil {
		return err
	}
	if !have.live() && req.GetKind() != kindApply {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("no workload %s; tranship workload ls lists them", name))
	}
	if have.live() && have.Owner != s.Node && s.inPool(have.Owner) {
		return s.forward(ctx, have.Owner, name, req, send)
	}
	if _, busy := s.changing.LoadOrStore(name, true); busy {
		return s.refuse(&v1.WorkloadPlan{Workload: name, Owner: s.Node}, fmt.Sprintf("workload %s is being changed by somebody else: wait for that, and do this again", name), send)
	}
	defer s.changing.Delete(name)
	// Again, now that nobody else can change it.
	if have, err = s.Book.Get(name); err != nil {
		return err
	}
	want, err := wanted(req, have, asked)
	if err != nil {
		return err
	}
	c := &change{s: s, req: req, from: s.Node, name: name, have: have, want: want, send: send}
	if req.GetForwarded() {
		c.from = s.Caller(ctx)
	}
	return c.run(ctx)
}

// find gets a record; what this host has not heard of, the others are asked for.
func (s *Steward) find(ctx context.Context, name string) (*Record, error) {
	have, err := s.Book.Get(name)
	if err == nil && !have.live() {
		s.learnFromAll(ctx)
		have, err = s.Book.Get(name)
	}
	return have, err
}

// wanted is the spec after the change; nil: none.
func wanted(req *v1.ChangeWorkloadRequest, have *Record, asked *workloads.Spec) (*workloads.Spec, error) {
	switch req.GetKind() {
	case kindApply:
		if old := have.spec(); old != nil && old.Namespace != asked.Namespace {
			return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("workload %s is in namespace %s: tranship -n %s, or choose another name", asked.Name, old.Namespace, old.Namespace))
		}
		return asked, nil
	case kindRemove:
		return nil, nil
	case kindScale:
		want := have.spec()
		if want == nil {
			return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no workload %s; tranship workload ls lists them", req.GetName()))
		}
		if req.Shards != nil {
			want.Shards = int(req.GetShards())
		}
		if req.Cpus != nil {
			want.Size.CPULimit = req.GetCpus()
			if want.Size.CPULimit > 0 {
				want.Size.CPURequest = min(want.Size.CPURequest, want.Size.CPULimit)
			}
		}
		if req.MemoryBytes != nil {
			want.Size.MemoryLimit = req.GetMemoryBytes()
			if want.Size.MemoryLimit > 0 {
				want.Size.MemoryRequest = min(want.Size.MemoryRequest, want.Size.MemoryLimit)
			}
		}
		if err := want.Validate(); err != nil {
			return nil, connect.NewError(connect.CodeInvalidArgument, err)
		}
		return want, nil
	}
	return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("kind %q is none of apply, scale, remove", req.GetKind()))
}

// forward has the owner do it.
func (s *Steward) forward(ctx context.Context, owner, name string, req *v1.ChangeWorkloadRequest, send func(*v1.WorkloadEvent) error) error {
	plan := &v1.WorkloadPlan{Workload: name, Owner: owner}
	if req.GetForwarded() {
		return s.refuse(plan, fmt.Sprintf("%s takes %s for the owner of workload %s, and was asked as if it were itself: do this again", s.Node, owner, name), send)
	}
	gone := func(err error) error {
		return s.refuse(plan, fmt.Sprintf("workload %s belongs to %s, which does not answer (%v): bring it back; if it is gone for good, tranship cluster revoke %s, and apply again", name, owner, err, owner), send)
	}
	client, err := s.Pool.Client(owner)
	if err != nil {
		return gone(err)
	}
	req.Forwarded = true
	stream, err := client.Change(ctx, connect.NewRequest(req))
	if err != nil {
		return gone(err)
	}
	defer stream.Close()
	heard := false
	for stream.Receive() {
		heard = true
		if err := send(stream.Msg()); err != nil {
			return err
		}
	}
	err = stream.Err()
	if err != nil && !heard && connect.CodeOf(err) == connect.CodeUnavailable {
		return gone(err)
	}
	return err
}

func (s *Steward) refuse(plan *v1.WorkloadPlan, why string, send func(*v1.WorkloadEvent) error) error {
	plan.Refused = append(plan.Refused, why)
	if err := send(&v1.WorkloadEvent{Plan: plan}); err != nil {
		return err
	}
	return send(&v1.WorkloadEvent{Result: &v1.WorkloadResult{Outcome: outcomeRefused, Reason: why}})
}

// change is one under way at its owner.
type change struct {
	s    *Steward
	req  *v1.ChangeWorkloadRequest
	from string // the host at which it was said
	name string
	have *Record
	want *workloads.Spec
	plan workloads.Plan

	mu        sync.Mutex // of what follows: steps run in parallel
	send      func(*v1.WorkloadEvent) error
	done, all uint32
}

func (c *change) run(ctx context.Context) error {
	if err := c.look(ctx); err != nil {
		return err
	}
	message := c.message()
	if err := c.send(&v1.WorkloadEvent{Plan: message}); err != nil {
		return err
	}
	same := c.have.live() && c.want != nil && c.have.Owner == c.s.Node && bytes.Equal(c.have.Spec, c.want.Encode())
	switch {
	case len(c.plan.Refused) > 0:
		return c.result(outcomeRefused, c.plan.Refused[0])
	case len(c.plan.Steps) == 0 && same:
		return c.result(outcomeNothing, "")
	case c.req.GetDryRun():
		return c.result(outcomePlanned, "")
	case c.req.GetExpect() != "" && c.req.GetExpect() != message.GetFingerprint():
		return c.result(outcomeRefused, "the pool changed since the plan was shown: do this again")
	}
	err := c.carryOut(ctx)
	var refused *refusal
	switch {
	case err == nil:
		return c.result(outcomeDone, "")
	case errors.As(err, &refused):
		return c.result(outcomeRefused, refused.text)
	case ctx.Err() != nil:
		return c.result(outcomeCancelled, "the same command goes on from here")
	}
	return c.result(outcomeFailed, err.Error())
}

func (c *change) result(outcome, reason string) error {
	c.s.Log.Info("workload", "workload", c.name, "kind", c.req.GetKind(), "peer", c.from, "outcome", outcome, "reason", reason)
	return c.send(&v1.WorkloadEvent{Done: c.done, All: c.all, Result: &v1.WorkloadResult{Outcome: outcome, Reason: reason}})
}

// look plans. A shard that was started and is nowhere is looked for twice: one
// that is moving while the hosts are asked, one after another, may be missed.
func (c *change) look(ctx context.Context) error {
	for range 2 {
		if err := c.lookOnce(ctx); err != nil {
			return err
		}
		again := slices.ContainsFunc(c.plan.Steps, func(s workloads.Step) bool {
			return s.Op == workloads.Add && c.have != nil && slices.Contains(c.have.Begun, s.Index)
		})
		if !again {
			break
		}
	}
	return ctx.Err()
}

func (c *change) lookOnce(ctx context.Context) error {
	in := workloads.Input{Name: c.name, Want: c.want, Tenants: c.s.Tenants, Prefer: c.req.GetPrefer()}
	if c.want != nil {
		in.Namespace, in.Policy = c.want.Namespace, policyOf(c.want)
	} else if spec := c.have.spec(); spec != nil {
		in.Namespace = spec.Namespace
	}
	if c.have.live() {
		in.Begun = c.have.Begun
	}
	all, err := c.s.Book.All()
	if err != nil {
		return err
	}
	for _, r := range all {
		if spec := r.spec(); spec != nil && r.Name != c.name {
			in.Others = append(in.Others, spec)
		}
	}
	for _, st := range c.s.Pool.Look(ctx) {
		in.Hosts = append(in.Hosts, HostOf(st))
	}
	if c.req.GetDryRun() {
		if err := pretend(in.Hosts, c.req.GetPlanned()); err != nil {
			return connect.NewError(connect.CodeInvalidArgument, err)
		}
	}
	c.plan = workloads.Make(in)
	return nil
}

// pretend puts shards on hosts that a dry run would have started before.
func pretend(hosts []workloads.Host, planned []*v1.PlannedShards) error {
	for _, p := range planned {
		spec, err := workloads.Decode(p.GetSpecJson())
		if err != nil {
			return err
		}
		for i := range hosts {
			h := &hosts[i]
			for _, name := range slices.Sorted(maps.Keys(p.GetNode())) {
				if p.GetNode()[name] != h.Name {
					continue
				}
				h.Shards = append(h.Shards, workloads.Shard{
					Namespace: spec.Namespace, Name: name, Workload: spec.Name, Tenant: spec.Tenant, Running: true, Avoid: spec.Avoid,
					RequestCPUs: spec.Size.CPURequest, RequestMemory: spec.Size.MemoryRequest, CPUs: spec.Size.CPULimit, Memory: spec.Size.MemoryLimit,
				})
			}
		}
	}
	return nil
}

func (c *change) message() *v1.WorkloadPlan {
	m := &v1.WorkloadPlan{Workload: c.name, Owner: c.s.Node, Refused: c.plan.Refused, Fingerprint: c.plan.Fingerprint()}
	for _, s := range c.plan.Steps {
		m.Steps = append(m.Steps, &v1.WorkloadStep{Op: s.Op, Shard: s.Shard, Node: s.Node, Detail: s.Detail})
	}
	return m
}

func (c *change) carryOut(ctx context.Context) error {
	r := &Record{Name: c.name, Owner: c.s.Node, Generation: 1, At: time.Now().UTC(), From: c.from}
	if c.have != nil {
		r.Generation, r.Begun = c.have.Generation+1, c.have.Begun
	}
	if !c.have.live() {
		r.Begun = nil
	}
	spec := c.want
	if spec == nil { // what is left of it while it goes: nothing is wanted
		spec = c.have.spec()
		spec.Shards = 0
	}
	r.Spec = spec.Encode()
	for _, s := range c.plan.Steps {
		r.Begun = with(r.Begun, s.Index)
	}
	if err := c.s.write(ctx, c.have, r); err != nil {
		return err
	}
	if err := failpoint.Hit(ctx, "workload.written"); err != nil {
		return err
	}
	c.all = uint32(len(c.plan.Steps))
	var gone []int
	for _, op := range []string{workloads.Remove, workloads.Change, workloads.Replace, workloads.Add} {
		limit := parallel
		if op == workloads.Replace {
			limit = 1 // the others serve meanwhile
		}
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(limit)
		for _, step := range c.plan.Steps {
			if step.Op != op {
				continue
			}
			g.Go(func() error {
				if err := gctx.Err(); err != nil {
					return context.Cause(gctx)
				}
				return c.step(gctx, spec, step)
			})
			if op == workloads.Remove {
				gone = append(gone, step.Index)
			}
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	if len(gone) == 0 && c.want != nil {
		return nil
	}
	last := *r
	last.Generation++
	last.Begun = slices.DeleteFunc(slices.Clone(r.Begun), func(i int) bool { return slices.Contains(gone, i) })
	if c.want == nil {
		last.Deleted, last.Spec, last.Begun = true, nil, nil
	}
	return c.s.write(ctx, r, &last)
}

// step does one thing at the shard's host.
func (c *change) step(ctx context.Context, spec *workloads.Spec, step workloads.Step) error {
	refused, err := c.ask(ctx, spec, step)
	if err != nil {
		return fmt.Errorf("%s %s on %s: %w; what is done is done, and the same command goes on from here", step.Op, step.Shard, step.Node, err)
	}
	if refused != "" {
		return refusalf("%s of %s on %s: %s; what is done is done, and the same command goes on from here", step.Op, step.Shard, step.Node, refused)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done++
	// Whoever follows may have gone; the change goes on until its ctx ends.
	_ = c.send(&v1.WorkloadEvent{Note: step.String(), Done: c.done, All: c.all})
	return nil
}

func (c *change) ask(ctx context.Context, spec *workloads.Spec, step workloads.Step) (refused string, err error) {
	host, err := c.s.host(step.Node)
	if err != nil {
		return "", err
	}
	raw, index := spec.Encode(), uint32(step.Index)
	from := slices.DeleteFunc(c.s.pool(), func(n string) bool { return n == step.Node })
	if step.Op == workloads.Replace { // what cannot be started is no reason to stop what runs
		refused, err = host.place(ctx, &v1.PlaceShardRequest{SpecJson: raw, Index: index, ImageFrom: from, Prepare: true})
		if err != nil || refused != "" {
			return refused, err
		}
	}
	if step.Op == workloads.Remove || step.Op == workloads.Replace {
		refused, err = host.evict(ctx, &v1.EvictShardRequest{Namespace: spec.Namespace, Name: step.Shard, Workload: spec.Name})
		if err != nil || refused != "" || step.Op == workloads.Remove {
			return refused, err
		}
	}
	if step.Op == workloads.Change {
		return host.resize(ctx, &v1.ResizeShardRequest{SpecJson: raw, Index: index})
	}
	return host.place(ctx, &v1.PlaceShardRequest{SpecJson: raw, Index: index, ImageFrom: from})
}

// scope keeps a request out of namespaces of other orchestrators.
func scope(namespace string) error {
	if runtime.ForeignNamespace(namespace) {
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("namespace %s belongs to another orchestrator, which would undo this", namespace))
	}
	return nil
}
