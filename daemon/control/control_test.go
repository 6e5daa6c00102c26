package control

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

// fakeRuntime has the shards that it is given, and counts what changes them.
type fakeRuntime struct {
	shards  []runtime.Shard
	err     error
	changes int
}

var _ Runtime = (*fakeRuntime)(nil)

func (f *fakeRuntime) Run(_ context.Context, s runtime.RunSpec) (*runtime.Shard, error) {
	f.changes++
	return &runtime.Shard{Namespace: s.Namespace, Name: s.Name}, f.err
}

func (f *fakeRuntime) List(_ context.Context, namespace string) (out []runtime.Shard, err error) {
	for _, s := range f.shards {
		if s.Namespace == namespace {
			out = append(out, s)
		}
	}
	return out, f.err
}

func (f *fakeRuntime) Namespaces(context.Context) ([]string, error) {
	return []string{"default", "other"}, f.err
}

func (f *fakeRuntime) Shard(_ context.Context, namespace, name string) (*runtime.Shard, error) {
	for i, s := range f.shards {
		if s.Namespace == namespace && s.Name == name {
			return &f.shards[i], f.err
		}
	}
	return nil, fmt.Errorf("%w: %s", runtime.ErrNotFound, name)
}

func (f *fakeRuntime) Describe(context.Context, string, string) (*runtime.Record, error) {
	return &runtime.Record{}, f.err
}

func (f *fakeRuntime) Logs(ctx context.Context, namespace, name string, _ int64, follow bool, emit func([]byte) error) error {
	if _, err := f.Shard(ctx, namespace, name); err != nil {
		return err
	}
	if err := emit([]byte("one\n")); err != nil || !follow {
		return err
	}
	<-ctx.Done()
	return nil
}

func (f *fakeRuntime) Stop(context.Context, string, string, time.Duration) error {
	f.changes++
	return f.err
}

func (f *fakeRuntime) Remove(context.Context, string, string, bool) error {
	f.changes++
	return f.err
}

func serve(t *testing.T, s Services) *Client {
	t.Helper()
	mux := http.NewServeMux()
	Mount(mux, s)
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	var served sync.WaitGroup
	served.Go(func() { srv.Serve(l) })
	t.Cleanup(func() { srv.Close(); served.Wait() })
	c, err := NewClient("unix://" + socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestABadRequestChangesNothing(t *testing.T) {
	rt := &fakeRuntime{shards: []runtime.Shard{{Namespace: "default", Name: "web"}, {Namespace: "default", Name: "moving"}}}
	c := serve(t, Services{Node: "host-1", Runtime: rt, MigrationOf: func(_, name string) string {
		return map[string]string{"moving": "m1"}[name]
	}})
	ctx := t.Context()
	run := func(m *v1.RunRequest) error {
		_, err := c.Shards.Run(ctx, connect.NewRequest(m))
		return err
	}
	stop := func(m *v1.StopRequest) error {
		_, err := c.Shards.Stop(ctx, connect.NewRequest(m))
		return err
	}
	remove := func(m *v1.RemoveRequest) error {
		_, err := c.Shards.Remove(ctx, connect.NewRequest(m))
		return err
	}
	for _, tt := range []struct {
		name string
		err  error
		code connect.Code
		says string
	}{
		{"no image", run(&v1.RunRequest{}), connect.CodeInvalidArgument, "tranship run IMAGE"},
		{"another host", run(&v1.RunRequest{Image: "i", Node: "host-2"}), connect.CodeInvalidArgument, "host-2"},
		{"a negative limit", run(&v1.RunRequest{Image: "i", MemoryLimitBytes: -1}), connect.CodeInvalidArgument, "negative"},
		{"CPUs that are no number", run(&v1.RunRequest{Image: "i", Cpus: math.NaN()}), connect.CodeInvalidArgument, "cpus"},
		{"CPUs without end", run(&v1.RunRequest{Image: "i", Cpus: math.Inf(1)}), connect.CodeInvalidArgument, "cpus"},
		{"an address with its prefix length", run(&v1.RunRequest{Image: "i", Ip: "10.0.0.1/8"}), connect.CodeInvalidArgument, "without a prefix length"},
		{"too many mounts", run(&v1.RunRequest{Image: "i", Mounts: make([]*v1.Mount, maxMounts+1)}), connect.CodeInvalidArgument, "at most"},
		{"a namespace that is a path", run(&v1.RunRequest{Image: "i", Namespace: "../x"}), connect.CodeInvalidArgument, "namespace"},
		{"Docker's namespace", run(&v1.RunRequest{Image: "i", Namespace: "moby"}), connect.CodePermissionDenied, "--force-namespace"},
		{"stopping in Kubernetes' namespace", stop(&v1.StopRequest{Name: "web", Namespace: "k8s.io"}), connect.CodePermissionDenied, "--force-namespace"},
		{"removing in Kubernetes' namespace", remove(&v1.RemoveRequest{Name: "web", Namespace: "k8s.io"}), connect.CodePermissionDenied, "--force-namespace"},
		{"stopping nobody", stop(&v1.StopRequest{}), connect.CodeInvalidArgument, "shard"},
		{"a grace that is negative", stop(&v1.StopRequest{Name: "web", TimeoutMs: -1}), connect.CodeInvalidArgument, "grace"},
		{"a grace of a year", stop(&v1.StopRequest{Name: "web", TimeoutMs: 365 * 24 * 3600 * 1000}), connect.CodeInvalidArgument, "grace"},
		{"running under the name of what is being moved", run(&v1.RunRequest{Image: "i", Name: "moving"}), connect.CodeFailedPrecondition, "tranship cancel m1"},
		{"stopping what is being moved", stop(&v1.StopRequest{Name: "moving"}), connect.CodeFailedPrecondition, "tranship cancel m1"},
		{"removing what is being moved", remove(&v1.RemoveRequest{Name: "moving", Force: true}), connect.CodeFailedPrecondition, "tranship cancel m1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if connect.CodeOf(tt.err) != tt.code || !strings.Contains(tt.err.Error(), tt.says) {
				t.Errorf("%v, want %v with %q", tt.err, tt.code, tt.says)
			}
		})
	}
	if rt.changes != 0 {
		t.Errorf("%d requests got through", rt.changes)
	}
}

func TestErrorsOfTheRuntimeGetTheirCode(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want connect.Code
	}{
		{runtime.ErrInvalid, connect.CodeInvalidArgument},
		{runtime.ErrNotFound, connect.CodeNotFound},
		{runtime.ErrExists, connect.CodeAlreadyExists},
		{runtime.ErrRunning, connect.CodeFailedPrecondition},
		{runtime.ErrNotRunning, connect.CodeFailedPrecondition},
		{runtime.ErrIncoming, connect.CodeFailedPrecondition},
		{context.Canceled, connect.CodeCanceled},
		{context.DeadlineExceeded, connect.CodeDeadlineExceeded},
		{errors.New("disk on fire"), connect.CodeInternal},
	} {
		if got := connect.CodeOf(apiError(fmt.Errorf("stop web: %w", tt.err))); got != tt.want {
			t.Errorf("%v has code %v, want %v", tt.err, got, tt.want)
		}
	}
}

func TestThePoolIsSeenFromOneHost(t *testing.T) {
	rt := &fakeRuntime{shards: []runtime.Shard{{Namespace: "default", Name: "web"}, {Namespace: "other", Name: "hidden"}}}
	c := serve(t, Services{
		Node: "host-2", Runtime: rt,
		Self: func(context.Context) *v1.Node { return &v1.Node{Name: "host-2", Self: true, State: NodeAlive} },
		Peers: func(context.Context) []NodeStatus {
			return []NodeStatus{
				{Node: &v1.Node{Name: "host-3", State: NodeUnreachable}},
				{Node: &v1.Node{Name: "host-1", State: NodeAlive}, Shards: []*v1.Shard{
					{Name: "db", Namespace: "default", Node: "host-1"}, {Name: "deep", Namespace: "other", Node: "host-1"},
				}},
			}
		},
	})
	ctx := t.Context()
	list := func(m *v1.ListShardsRequest) string {
		resp, err := c.Shards.List(ctx, connect.NewRequest(m))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range resp.Msg.GetShards() {
			names = append(names, s.GetNode()+"/"+s.GetName())
		}
		return strings.Join(names, " ") + " | " + strings.Join(resp.Msg.GetUnreachableNodes(), " ")
	}
	for _, tt := range []struct {
		name string
		req  *v1.ListShardsRequest
		want string
	}{
		{"this host's", &v1.ListShardsRequest{}, "host-2/web | "},
		{"all hosts'", &v1.ListShardsRequest{AllNodes: true}, "host-1/db host-2/web | host-3"},
		{"all namespaces'", &v1.ListShardsRequest{AllNodes: true, AllNamespaces: true}, "host-1/db host-2/web host-1/deep host-2/hidden | host-3"},
	} {
		if got := list(tt.req); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
	nodes, err := c.Nodes.ListNodes(ctx, connect.NewRequest(&v1.ListNodesRequest{}))
	if err != nil || len(nodes.Msg.GetNodes()) != 3 || nodes.Msg.GetNodes()[1].GetName() != "host-2" {
		t.Errorf("nodes %v %v", nodes, err)
	}
	_, err = c.Shards.Inspect(ctx, connect.NewRequest(&v1.InspectRequest{Name: "db"}))
	if connect.CodeOf(err) != connect.CodeNotFound || !strings.Contains(err.Error(), "it is on host-1") {
		t.Errorf("a shard of another host's: %v", err)
	}
}

func TestFollowedLogsEndWithTheirReader(t *testing.T) {
	c := serve(t, Services{Node: "host-1", Runtime: &fakeRuntime{shards: []runtime.Shard{{Namespace: "default", Name: "web"}}}})
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.Shards.Logs(ctx, connect.NewRequest(&v1.LogsRequest{Name: "web", Follow: true}))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || string(stream.Msg().GetData()) != "one\n" {
		t.Fatalf("%v %v", stream.Msg(), stream.Err())
	}
	cancel()
	if stream.Receive() {
		t.Errorf("more: %q", stream.Msg().GetData())
	}
	if connect.CodeOf(stream.Err()) != connect.CodeCanceled {
		t.Errorf("%v", stream.Err())
	}
	stream, err = c.Shards.Logs(t.Context(), connect.NewRequest(&v1.LogsRequest{Name: "none"}))
	if err == nil {
		for stream.Receive() {
		}
		err = stream.Err()
	}
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("logs of nobody: %v", err)
	}
}

func TestOnlyAUnixSocketIsAnAddress(t *testing.T) {
	for _, address := range []string{"", "/run/s", "tcp://host:1", "unix://run/s", "unix:run/s", "unix:///%zz"} {
		if _, err := NewClient(address); err == nil {
			t.Errorf("%q passed", address)
		}
	}
	c, err := NewClient("unix:///nowhere/s")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Nodes.Version(t.Context(), connect.NewRequest(&v1.VersionRequest{})); !errors.Is(err, ErrUnreachable) {
		t.Errorf("%v", err)
	}
}
