// Package control is the local API of a host, which the CLI speaks: handlers
// for shards and nodes, a client, and the JSON documents that the CLI prints.
// Migrations are served by daemon/migrate on the same socket.
//
// It refuses to act: a handler checks a request, asks daemon/runtime or the
// peers, and turns what they say into messages and connect codes. Who may call
// is decided by the socket's permissions.
package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
)

// DefaultNamespace is containerd's namespace when a request names none.
const DefaultNamespace = "default"

// Runtime is what the handlers need of daemon/runtime. *runtime.Runtime is one.
type Runtime interface {
	Run(ctx context.Context, s runtime.RunSpec) (*runtime.Shard, error)
	List(ctx context.Context, namespace string) ([]runtime.Shard, error)
	Namespaces(ctx context.Context) ([]string, error)
	Shard(ctx context.Context, namespace, name string) (*runtime.Shard, error)
	Describe(ctx context.Context, namespace, name string) (*runtime.Record, error)
	Logs(ctx context.Context, namespace, name string, tail int64, follow bool, emit func([]byte) error) error
	Stop(ctx context.Context, namespace, name string, grace time.Duration) error
	Remove(ctx context.Context, namespace, name string, force bool) error
}

var _ Runtime = (*runtime.Runtime)(nil)

// NodeStatus is one host of the pool as it was last heard of.
type NodeStatus struct {
	Node   *v1.Node
	Shards []*v1.Shard
}

// Services are the parts of a host that the API shows.
type Services struct {
	// Node is this host's name.
	Node    string
	Runtime Runtime
	// Self describes this host.
	Self func(ctx context.Context) *v1.Node
	// Peers asks the other hosts of the pool, those that are down included; nil
	// when there are none.
	Peers func(ctx context.Context) []NodeStatus
	// RunOn has another node of the pool run a shard; nil when there are none.
	RunOn func(ctx context.Context, req *v1.RunRequest) (*v1.RunResponse, error)
	// Cordon, Drain and StopDrain act on a node of the pool, "" or this one's name
	// being this; nil where there is nothing to act on.
	Cordon    func(ctx context.Context, req *v1.CordonRequest) (*v1.CordonResponse, error)
	Drain     func(ctx context.Context, req *v1.DrainRequest, send func(*v1.DrainEvent) error) error
	StopDrain func(ctx context.Context, req *v1.StopDrainRequest) error
	// Note says what an operator should know of a shard, and whether it stands
	// still here; nil without migrations.
	Note func(namespace, name string) (note string, frozen bool)
	// Pulling says that a shard runs here and lacks pages that are on another host:
	// it may be stopped or removed, without waiting for them.
	Pulling func(namespace, name string) bool
	// MigrationOf names the migration that is moving a shard, or "".
	MigrationOf func(namespace, name string) string
	// AwaitArrival waits while a shard that already runs here gets the rest of
	// its memory; nil when nothing arrives.
	AwaitArrival func(ctx context.Context, namespace, name string) error
}

// Mount serves Shards and Nodes on mux.
func Mount(mux *http.ServeMux, s Services, opts ...connect.HandlerOption) {
	mux.Handle(transhipv1connect.NewShardsHandler(&shards{s}, opts...))
	mux.Handle(transhipv1connect.NewNodesHandler(&nodes{s}, opts...))
}

// RunHere answers a request to run a shard that came from another host.
func RunHere(ctx context.Context, s Services, req *v1.RunRequest) (*v1.RunResponse, error) {
	resp, err := (&shards{s}).Run(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg, nil
}

// ShardMessage is the API's form of a shard on node.
func ShardMessage(node string, s *runtime.Shard, migration string) *v1.Shard {
	if migration == "" {
		migration = s.Incoming
	}
	m := &v1.Shard{
		Name: s.Name, Namespace: s.Namespace, Image: s.Image, Status: s.Status, Pid: s.PID,
		Network: string(s.Network.Kind), Mac: s.Network.MAC, NetnsPath: s.Network.Path, Node: node,
		MemoryLimitBytes: s.MemoryLimit, MemoryUsedBytes: s.MemoryUsed, MemoryHeldBytes: s.MemoryHeld, Cpus: s.CPUs,
		Labels: s.Labels, CreatedAtUnixMs: s.CreatedAt.UnixMilli(), MigrationId: migration,
		ExitCode: s.ExitCode, Command: s.Command,
	}
	if s.Network.IP.IsValid() {
		m.Ip = s.Network.IP.String()
	}
	return m
}

// apiError gives an error of the runtime its connect code.
func apiError(err error) error {
	var already *connect.Error
	if errors.As(err, &already) {
		return err
	}
	code := connect.CodeInternal
	for _, known := range []struct {
		err  error
		code connect.Code
	}{
		{context.Canceled, connect.CodeCanceled},
		{context.DeadlineExceeded, connect.CodeDeadlineExceeded},
		{runtime.ErrInvalid, connect.CodeInvalidArgument},
		{runtime.ErrNotFound, connect.CodeNotFound},
		{runtime.ErrExists, connect.CodeAlreadyExists},
		{runtime.ErrRunning, connect.CodeFailedPrecondition},
		{runtime.ErrNotRunning, connect.CodeFailedPrecondition},
		{runtime.ErrIncoming, connect.CodeFailedPrecondition},
	} {
		if errors.Is(err, known.err) {
			code = known.code
			break
		}
	}
	return connect.NewError(code, err)
}

func invalid(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

// checkNamespace fills the default in and guards namespaces in which another
// orchestrator would undo what tranship does. PermissionDenied is used for
// nothing else.
func checkNamespace(namespace *string, force bool) error {
	if *namespace == "" {
		*namespace = DefaultNamespace
	}
	if err := runtime.CheckName("namespace", *namespace); err != nil {
		return apiError(err)
	}
	if runtime.ForeignNamespace(*namespace) && !force {
		return connect.NewError(connect.CodePermissionDenied,
			fmt.Errorf("namespace %s belongs to another orchestrator, which would undo this; --force-namespace does it anyway", *namespace))
	}
	return nil
}
