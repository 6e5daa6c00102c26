package steward

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/opencontainers/go-digest"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/peers/pki"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads"
)

// pool is hosts in one process that speak the real API with each other.
type pool struct {
	ca    *pki.CA
	hosts map[string]*fakeHost
}

// seals are a host's real ones.
type seals struct {
	ca   *x509.Certificate
	pair *tls.Certificate
}

func (s *seals) Seal(statement []byte) (pki.Seal, error) {
	return pki.MakeSeal(s.pair, "workload", statement)
}

func (s *seals) Open(seal pki.Seal, statement []byte) (string, error) {
	host, err := seal.Open(s.ca, "workload", statement)
	return host.Name, err
}

func (p *pool) seals(t *testing.T, name string) *seals {
	t.Helper()
	cert, key, err := p.ca.Issue(name, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return &seals{p.ca.Cert(), &pair}
}

type callerKey struct{}

// fakeHost is a steward over containers that are entries of a map.
type fakeHost struct {
	*Steward
	p    *pool
	name string
	srv  *httptest.Server

	mu     sync.Mutex
	shards map[string]*runtime.Shard // by name; one namespace
	down   bool
	moving map[string]string
	fail   func(op, shard string) error // nil: nothing fails
	undone []string
}

var (
	_ Runtime = (*fakeHost)(nil)
	_ Pool    = (*fakeHost)(nil)
)

func newPool(t *testing.T, names ...string) *pool {
	t.Helper()
	ca, err := pki.Init(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	p := &pool{ca: ca, hosts: map[string]*fakeHost{}}
	for _, name := range names {
		h := &fakeHost{p: p, name: name, shards: map[string]*runtime.Shard{}, moving: map[string]string{}}
		book, err := OpenBook(filepath.Join(t.TempDir(), "b"))
		if err != nil {
			t.Fatal(err)
		}
		h.Steward = New(Config{
			Node: name, Book: book, Pool: h, Runtime: h, Log: slog.New(slog.DiscardHandler), Tenants: map[string]workloads.Tenant{"shop": {Shards: 4}},
			MigrationOf: func(_, shard string) string { h.mu.Lock(); defer h.mu.Unlock(); return h.moving[shard] },
			Seals:       p.seals(t, name),
			Caller:      func(ctx context.Context) string { name, _ := ctx.Value(callerKey{}).(string); return name },
		})
		mux := http.NewServeMux()
		mux.Handle(transhipv1connect.NewWorkloadHostsHandler(Peers{h.Steward}))
		// The real server takes the caller from its certificate.
		h.srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			caller, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
			r.URL.Path = "/" + path
			mux.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, caller)))
		}))
		t.Cleanup(func() { h.srv.Close(); book.Close() })
		p.hosts[name] = h
	}
	return p
}

func (h *fakeHost) set(f func()) { h.mu.Lock(); defer h.mu.Unlock(); f() }

func (h *fakeHost) failing(op, shard string) error {
	if h.fail == nil {
		return nil
	}
	return h.fail(op, shard)
}

func (h *fakeHost) Here(context.Context) control.NodeStatus {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := control.NodeStatus{Node: &v1.Node{Name: h.name, State: control.NodeAlive, Cpus: 4, MemoryTotalBytes: 8 << 30, MemoryAvailableBytes: 6 << 30}}
	for _, name := range slices.Sorted(maps.Keys(h.shards)) {
		st.Shards = append(st.Shards, control.ShardMessage(h.name, h.shards[name], h.moving[name]))
	}
	return st
}

func (h *fakeHost) Look(ctx context.Context) []control.NodeStatus {
	out := []control.NodeStatus{h.Here(ctx)}
	for _, name := range h.Nodes() {
		other := h.p.hosts[name]
		other.mu.Lock()
		down := other.down
		other.mu.Unlock()
		if down {
			out = append(out, control.NodeStatus{Node: &v1.Node{Name: name, State: control.NodeUnreachable}})
			continue
		}
		out = append(out, other.Here(ctx))
	}
	return out
}

func (h *fakeHost) Nodes() (out []string) {
	for name := range h.p.hosts {
		if name != h.name {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func (h *fakeHost) Client(node string) (transhipv1connect.WorkloadHostsClient, error) {
	other, ok := h.p.hosts[node]
	if !ok {
		return nil, errors.New("no such host")
	}
	other.mu.Lock()
	defer other.mu.Unlock()
	if other.down {
		return nil, errors.New("no answer")
	}
	return transhipv1connect.NewWorkloadHostsClient(other.srv.Client(), other.srv.URL+"/"+h.name), nil
}

func (h *fakeHost) Run(ctx context.Context, s runtime.RunSpec) (*runtime.Shard, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := errors.Join(ctx.Err(), h.failing("run", s.Name)); err != nil {
		return nil, err
	}
	if h.shards[s.Name] != nil {
		return nil, runtime.ErrExists
	}
	labels := maps.Clone(s.Labels)
	labels[runtime.LabelIndex], labels[runtime.LabelSpec] = fmt.Sprint(*s.Index), s.Spec
	h.shards[s.Name] = &runtime.Shard{Namespace: s.Namespace, Name: s.Name, Image: s.Image, Status: runtime.StatusRunning, CPUs: s.CPUs, MemoryLimit: s.Memory, Labels: labels}
	return h.shards[s.Name], nil
}

func (h *fakeHost) UndoRun(_ context.Context, _, name string) (bool, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.undone = append(h.undone, name)
	return false, nil
}

func (h *fakeHost) Resize(_ context.Context, _, name string, z runtime.Resize) (*runtime.Shard, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.failing("resize", name); err != nil {
		return nil, err
	}
	s := h.shards[name]
	if z.CPUs != nil {
		s.CPUs = *z.CPUs
	}
	if z.Memory != nil {
		s.MemoryLimit = *z.Memory
	}
	maps.Copy(s.Labels, z.Labels)
	maps.DeleteFunc(s.Labels, func(_, v string) bool { return v == "" })
	return s, nil
}

func (h *fakeHost) Shard(_ context.Context, _, name string) (*runtime.Shard, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.shards[name]; s != nil {
		clone := *s
		return &clone, nil
	}
	return nil, runtime.ErrNotFound
}

func (h *fakeHost) Stop(context.Context, string, string, time.Duration) error { return nil }

func (h *fakeHost) Remove(_ context.Context, _, name string, _ bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.failing("remove", name); err != nil {
		return err
	}
	delete(h.shards, name)
	return nil
}

func (h *fakeHost) DescribeImage(context.Context, string, string) (*runtime.Record, error) {
	return &runtime.Record{}, nil
}

func (h *fakeHost) EnsureImage(_ context.Context, _, ref string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.failing("image", ref)
}

func (h *fakeHost) FetchImage(context.Context, *runtime.Record, string, func(context.Context, digest.Digest) (io.ReadCloser, error)) error {
	return errors.New("not needed")
}

func (h *fakeHost) OpenBlob(context.Context, string, digest.Digest) (runtime.Blob, error) {
	return runtime.Blob{}, errors.New("not needed")
}

// change asks one host and returns the outcome, the steps of the plan and why.
func (p *pool) change(t *testing.T, at string, req *v1.ChangeWorkloadRequest) (outcome, steps, reason string) {
	t.Helper()
	var plan []string
	err := p.hosts[at].Change(t.Context(), req, func(e *v1.WorkloadEvent) error {
		for _, s := range e.GetPlan().GetSteps() {
			plan = append(plan, workloads.Step{Op: s.GetOp(), Shard: s.GetShard(), Node: s.GetNode(), Detail: s.GetDetail()}.String())
		}
		if r := e.GetResult(); r != nil {
			outcome, reason = r.GetOutcome(), r.GetReason()
		}
		return nil
	})
	if err != nil {
		return "error", "", err.Error()
	}
	return outcome, strings.Join(plan, "; "), reason
}

func apply(s *workloads.Spec) *v1.ChangeWorkloadRequest {
	return &v1.ChangeWorkloadRequest{Kind: kindApply, SpecJson: s.Encode()}
}

func scale(name string, shards uint32) *v1.ChangeWorkloadRequest {
	return &v1.ChangeWorkloadRequest{Kind: kindScale, Name: name, Shards: &shards}
}

// copies counts every shard of the pool, by name.
func (p *pool) copies() map[string]int {
	out := map[string]int{}
	for _, h := range p.hosts {
		h.mu.Lock()
		for name := range h.shards {
			out[name]++
		}
		h.mu.Unlock()
	}
	return out
}

func (p *pool) mustBe(t *testing.T, names ...string) {
	t.Helper()
	want := map[string]int{}
	for _, n := range names {
		want[n] = 1
	}
	if got := p.copies(); !maps.Equal(got, want) {
		t.Fatalf("there is %v, wanted %v", got, names)
	}
}

func TestAWorkloadIsAppliedScaledAndRemovedFromAnyHost(t *testing.T) {
	p := newPool(t, "a", "b", "c")
	web := spec("web")
	must := func(at string, req *v1.ChangeWorkloadRequest, outcome, steps string) {
		t.Helper()
		if got, did, why := p.change(t, at, req); got != outcome || did != steps {
			t.Fatalf("%s: %s (%s)\nwant %s: %s", got, did, why, outcome, steps)
		}
	}
	dry := apply(web)
	dry.DryRun = true
	must("a", dry, outcomePlanned, "+ shard web-0 on a; + shard web-1 on b; + shard web-2 on c")
	p.mustBe(t)
	must("a", apply(web), outcomeDone, "+ shard web-0 on a; + shard web-1 on b; + shard web-2 on c")
	must("a", apply(web), outcomeNothing, "")
	must("b", apply(web), outcomeNothing, "")
	must("c", scale("web", 2), outcomeDone, "- web-2 on c")
	must("c", scale("web", 3), outcomeDone, "+ shard web-2 on c")
	p.mustBe(t, "web-0", "web-1", "web-2")

	web.Size.MemoryLimit = 128 << 20
	must("b", apply(web), outcomeDone, "~ web-0 memory 64M → 128M in place; ~ web-1 memory 64M → 128M in place; ~ web-2 memory 64M → 128M in place")
	must("c", apply(web), outcomeNothing, "")
	web.Tenant, web.Shards = "shop", 5
	if got, _, why := p.change(t, "b", apply(web)); got != outcomeRefused || !strings.Contains(why, "may have 4 shards and would have 5") {
		t.Errorf("%s %s", got, why)
	}
	for name, h := range p.hosts {
		if r, err := h.Book.Get("web"); err != nil || r.Owner != "a" || !r.Confirmed {
			t.Errorf("%s has %+v %v", name, r, err)
		}
	}
	must("c", &v1.ChangeWorkloadRequest{Kind: kindRemove, Name: "web"}, outcomeDone, "- web-0 on a; - web-1 on b; - web-2 on c")
	p.mustBe(t)
	if got, _, why := p.change(t, "b", &v1.ChangeWorkloadRequest{Kind: kindRemove, Name: "web"}); got != "error" || !strings.Contains(why, "no workload web") {
		t.Errorf("%s %s", got, why)
	}
	// Another host may own it next.
	web.Tenant, web.Shards = "", 1
	must("b", apply(web), outcomeDone, "+ shard web-0 on a")
	if r, err := p.hosts["c"].Book.Get("web"); err != nil || r.Owner != "b" {
		t.Errorf("%+v %v", r, err)
	}
}

// Two that apply the same name at once, at two hosts and more than once each,
// never make two of one shard, whoever wins.
func TestTwoApplyTheSameNameAtOnce(t *testing.T) {
	for range 10 {
		p := newPool(t, "a", "b", "c", "d")
		var work sync.WaitGroup
		for _, at := range []string{"a", "b", "c", "d", "a"} {
			work.Go(func() { p.change(t, at, apply(spec("web"))) })
		}
		work.Wait()
		for name, n := range p.copies() {
			if n != 1 {
				t.Fatalf("%d of %s", n, name)
			}
		}
		// All may have lost; then one more makes it.
		if got, _, why := p.change(t, "a", apply(spec("web"))); got != outcomeDone && got != outcomeNothing {
			t.Fatalf("%s %s", got, why)
		}
		p.mustBe(t, "web-0", "web-1", "web-2")
	}
}

func TestWhatFailsOrDiesInTheMiddleIsGoneOnWith(t *testing.T) {
	p := newPool(t, "a", "b")
	broken := errors.New("no room on the disk")
	b := p.hosts["b"]
	b.set(func() { b.fail = func(op, _ string) error { return broken } })
	got, _, why := p.change(t, "a", apply(spec("web")))
	if got != outcomeFailed || !strings.Contains(why, "no room on the disk") || !strings.Contains(why, "goes on from here") {
		t.Fatalf("%s %s", got, why)
	}
	b.set(func() { b.fail = nil })
	if got, _, why := p.change(t, "a", apply(spec("web"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	p.mustBe(t, "web-0", "web-1", "web-2")

	// A removal that fails leaves what it could not remove, and is gone on with.
	b.set(func() { b.fail = func(op, _ string) error { return broken } })
	if got, _, _ := p.change(t, "a", &v1.ChangeWorkloadRequest{Kind: kindRemove, Name: "web"}); got != outcomeFailed {
		t.Fatal(got)
	}
	b.set(func() { b.fail = nil })
	if got, _, why := p.change(t, "b", &v1.ChangeWorkloadRequest{Kind: kindRemove, Name: "web"}); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	p.mustBe(t)

	// What a daemon was starting when it died is undone when it comes back.
	if err := b.Book.begin("default", "web-7"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := b.Recover(t.Context()); err != nil || fmt.Sprint(b.undone) != "[web-7]" {
			t.Fatal(b.undone, err)
		}
	}
}

func TestHostsThatDoNotAnswer(t *testing.T) {
	p := newPool(t, "a", "b", "c")
	if got, _, why := p.change(t, "a", apply(spec("web"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	c := p.hosts["c"]
	c.set(func() { c.down = true })
	// web-2 is on c: it is not missed, and started nowhere else.
	if got, steps, why := p.change(t, "a", apply(spec("web"))); got != outcomeRefused || !strings.Contains(why, "web-2 may be on c") {
		t.Fatalf("%s %s %s", got, steps, why)
	}
	p.mustBe(t, "web-0", "web-1", "web-2")
	if got, _, why := p.change(t, "a", &v1.ChangeWorkloadRequest{Kind: kindRemove, Name: "web"}); got != outcomeRefused || !strings.Contains(why, "tranship cluster revoke") {
		t.Fatalf("%s %s", got, why)
	}
	// Two of three are enough for a new name; one of three is not.
	if got, _, why := p.change(t, "b", apply(spec("cache"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	b := p.hosts["b"]
	b.set(func() { b.down = true })
	if got, _, why := p.change(t, "a", apply(spec("late"))); got != outcomeRefused || !strings.Contains(why, "only 1 of 3 hosts") {
		t.Fatalf("%s %s", got, why)
	}
	if r, err := p.hosts["a"].Book.Get("late"); r != nil || err != nil {
		t.Errorf("a refused offer is left: %+v %v", r, err)
	}
	if got, _, why := p.change(t, "a", scale("cache", 1)); got != outcomeRefused || !strings.Contains(why, "belongs to b, which does not answer") {
		t.Fatalf("%s %s", got, why)
	}
	// c comes back, and learns what it missed.
	b.set(func() { b.down = false })
	c.set(func() { c.down = false })
	c.learnFromAll(t.Context())
	if r, err := c.Book.Get("cache"); err != nil || r == nil || r.Owner != "b" {
		t.Errorf("%+v %v", r, err)
	}
	// b leaves the pool for good: whoever applies next owns it.
	delete(p.hosts, "b")
	if got, _, why := p.change(t, "c", apply(spec("cache"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	if r, err := p.hosts["a"].Book.Get("cache"); err != nil || r.Owner != "c" {
		t.Errorf("%+v %v", r, err)
	}
}

func TestOwnersAreToldWhatAHostWillNotDo(t *testing.T) {
	p := newPool(t, "a", "b")
	if got, _, why := p.change(t, "a", apply(spec("web"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	a, b := p.hosts["a"], p.hosts["b"]
	client, err := a.Client("b")
	if err != nil {
		t.Fatal(err)
	}
	web := spec("web")
	evict := func(name, workload string) string {
		t.Helper()
		resp, err := client.Evict(t.Context(), connect.NewRequest(&v1.EvictShardRequest{Namespace: "default", Name: name, Workload: workload}))
		if err != nil {
			t.Fatal(err)
		}
		return resp.Msg.GetRefused()
	}
	b.set(func() {
		b.shards["mine"] = &runtime.Shard{Namespace: "default", Name: "mine", Status: runtime.StatusRunning, Labels: map[string]string{runtime.LabelWorkload: "web"}}
	})
	if why := evict("mine", "web"); !strings.Contains(why, "left alone") {
		t.Errorf("a container that joined is removed: %q", why)
	}
	if why := evict("web-1", "other"); !strings.Contains(why, "left alone") {
		t.Errorf("another workload's shard is removed: %q", why)
	}
	b.set(func() { b.moving["web-1"] = "m1" })
	if why := evict("web-1", "web"); !strings.Contains(why, "migration m1") {
		t.Errorf("a shard on its way is removed: %q", why)
	}
	b.set(func() { delete(b.moving, "web-1") })
	if why := evict("nobody", "web"); why != "" {
		t.Errorf("what is gone is refused: %q", why)
	}
	place := func(s *workloads.Spec, index uint32) (string, error) {
		resp, err := client.Place(t.Context(), connect.NewRequest(&v1.PlaceShardRequest{SpecJson: s.Encode(), Index: index}))
		if err != nil {
			return "", err
		}
		return resp.Msg.GetRefused(), nil
	}
	if why, err := place(web, 1); why != "" || err != nil {
		t.Errorf("what runs already: %q %v", why, err)
	}
	big := spec("big")
	big.Size.CPURequest, big.Size.CPULimit = 64, 64
	if why, err := place(big, 0); err != nil || !strings.Contains(why, "and 64.00 are needed") {
		t.Errorf("beyond its room: %q %v", why, err)
	}
	foreign := spec("web")
	foreign.Namespace = "k8s.io"
	if _, err := place(foreign, 0); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("a foreign namespace: %v", err)
	}
	bad := spec("web")
	bad.Shards = -1
	if _, err := place(bad, 0); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("an impossible spec: %v", err)
	}
	if _, err := client.Put(t.Context(), connect.NewRequest(&v1.PutWorkloadRequest{Record: []byte("{}")})); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("an impossible record: %v", err)
	}
	// The plan that was shown is the one that is done.
	req := apply(spec("later"))
	req.Expect = "something else"
	if got, _, why := p.change(t, "a", req); got != outcomeRefused || !strings.Contains(why, "changed since") {
		t.Errorf("%s %s", got, why)
	}
}
