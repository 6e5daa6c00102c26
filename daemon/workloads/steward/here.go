package steward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/opencontainers/go-digest"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads"
	"github.com/tranship/tranship/internal/failpoint"
)

// What owners ask of a host. A refusal is in words, with the next step; an
// error is that something failed.

// host is where a step is done. Each method may run twice.
type host interface {
	place(ctx context.Context, r *v1.PlaceShardRequest) (refused string, err error)
	resize(ctx context.Context, r *v1.ResizeShardRequest) (refused string, err error)
	evict(ctx context.Context, r *v1.EvictShardRequest) (refused string, err error)
}

func (s *Steward) host(node string) (host, error) {
	if node == s.Node {
		return here{s}, nil
	}
	client, err := s.Pool.Client(node)
	if err != nil {
		return nil, err
	}
	return there{client}, nil
}

// there is another host.
type there struct {
	client transhipv1connect.WorkloadHostsClient
}

var _ host = there{}

func (t there) place(ctx context.Context, r *v1.PlaceShardRequest) (string, error) {
	resp, err := t.client.Place(ctx, connect.NewRequest(r))
	if err != nil {
		return "", err
	}
	return resp.Msg.GetRefused(), nil
}

func (t there) resize(ctx context.Context, r *v1.ResizeShardRequest) (string, error) {
	resp, err := t.client.Resize(ctx, connect.NewRequest(r))
	if err != nil {
		return "", err
	}
	return resp.Msg.GetRefused(), nil
}

func (t there) evict(ctx context.Context, r *v1.EvictShardRequest) (string, error) {
	resp, err := t.client.Evict(ctx, connect.NewRequest(r))
	if err != nil {
		return "", err
	}
	return resp.Msg.GetRefused(), nil
}

// here is this host.
type here struct{ *Steward }

var _ host = here{}

// place starts a shard if this host, as it is now, has the room.
func (s here) place(ctx context.Context, r *v1.PlaceShardRequest) (string, error) {
	spec, err := workloads.Decode(r.GetSpecJson())
	if err != nil {
		return "", connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := scope(spec.Namespace); err != nil {
		return "", err
	}
	index := int(r.GetIndex())
	name := spec.Shard(index)
	if err := s.needImage(ctx, spec.Namespace, spec.Image, r.GetImageFrom()); err != nil {
		return "", err
	}
	if r.GetPrepare() {
		return lacking(spec, index), s.Runtime.EnsureImage(ctx, spec.Namespace, spec.Image)
	}
	s.placing.Lock()
	defer s.placing.Unlock()
	if id := s.MigrationOf(spec.Namespace, name); id != "" {
		return fmt.Sprintf("migration %s moves a shard of that name: wait for it", id), nil
	}
	have, err := s.Runtime.Shard(ctx, spec.Namespace, name)
	switch {
	case err == nil:
		h := shardOf(control.ShardMessage(s.Node, have, ""))
		if h.Workload == spec.Name && h.Index == index && h.Running && !h.Incoming && h.Digest == spec.Digest() {
			return "", nil // asked before, and the answer was lost
		}
		return fmt.Sprintf("there is a container %s already: tranship rm it there, if nobody needs it", name), nil
	case !errors.Is(err, runtime.ErrNotFound):
		return "", err
	}
	own := HostOf(s.Pool.Here(ctx))
	if why := workloads.Unfit(spec, name, &own, nil); why != "" {
		return "it " + why, nil
	}
	if why := lacking(spec, index); why != "" {
		return why, nil
	}
	if err := s.Book.begin(spec.Namespace, name); err != nil {
		return "", err
	}
	if err := failpoint.Hit(ctx, "workload.place"); err != nil {
		return "", err
	}
	err = s.start(ctx, spec, index)
	err = errors.Join(err, s.Book.end(spec.Namespace, name))
	if errors.Is(err, runtime.ErrInvalid) || errors.Is(err, runtime.ErrExists) {
		return err.Error(), nil
	}
	return "", err
}

// lacking says which volume of a shard this host has not, and what to do; "" when
// all are here. One that moves with its shard begins as an empty directory.
func lacking(spec *workloads.Spec, index int) string {
	for _, v := range spec.Volumes {
		source := spec.SourceOf(v, index)
		_, err := os.Stat(source)
		if err == nil || errors.Is(err, fs.ErrNotExist) && v.Kind == string(runtime.MountCopy) {
			continue
		}
		return fmt.Sprintf("volume %s: %v: a shared volume has to be on every host that may run a shard", v.Destination, err)
	}
	return ""
}

// start runs a shard. What it made for one that does not start, it removes.
func (s here) start(ctx context.Context, spec *workloads.Spec, index int) (err error) {
	var made []string
	defer func() {
		for _, dir := range made {
			if err != nil {
				_ = os.Remove(dir) // fails only where something is in it by now
			}
		}
	}()
	for _, v := range spec.Volumes {
		source := spec.SourceOf(v, index)
		if _, err := os.Stat(source); v.Kind != string(runtime.MountCopy) || !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.MkdirAll(source, 0o755); err != nil {
			return fmt.Errorf("volume %s: %w", v.Destination, err)
		}
		made = append(made, source)
	}
	_, err = s.Runtime.Run(ctx, runSpec(spec, index))
	return err
}

func runSpec(spec *workloads.Spec, index int) runtime.RunSpec {
	out := runtime.RunSpec{
		Namespace: spec.Namespace, Name: spec.Shard(index), Image: spec.Image, Command: spec.Command,
		Network: runtime.NetworkKind(spec.Network), Memory: spec.Size.MemoryLimit, CPUs: spec.Size.CPULimit,
		Env: spec.EnvOf(index), Labels: policyOf(spec), Index: &index, Spec: spec.Digest(),
	}
	for _, v := range spec.Volumes {
		out.Mounts = append(out.Mounts, runtime.Mount{
			Source: spec.SourceOf(v, index), Destination: v.Destination, ReadOnly: v.ReadOnly, Policy: runtime.MountPolicy(v.Kind),
		})
	}
	return out
}

// own finds a shard of a workload here that nothing is moving.
func (s here) own(ctx context.Context, namespace, name, workload string) (*runtime.Shard, string, error) {
	have, err := s.Runtime.Shard(ctx, namespace, name)
	if err != nil {
		return nil, "", err
	}
	id := s.MigrationOf(namespace, name)
	if id == "" {
		id = have.Incoming
	}
	switch _, managed := have.Labels[runtime.LabelIndex]; {
	case id != "":
		return have, fmt.Sprintf("%s is being moved: wait for migration %s", name, id), nil
	case !managed || have.Labels[runtime.LabelWorkload] != workload:
		return have, fmt.Sprintf("container %s is not one of workload %s: it is left alone", name, workload), nil
	}
	return have, "", nil
}

// resize gives a running shard the limits and labels of its spec.
func (s here) resize(ctx context.Context, r *v1.ResizeShardRequest) (string, error) {
	spec, err := workloads.Decode(r.GetSpecJson())
	if err != nil {
		return "", connect.NewError(connect.CodeInvalidArgument, err)
	}
	name := spec.Shard(int(r.GetIndex()))
	s.placing.Lock()
	defer s.placing.Unlock()
	have, refused, err := s.own(ctx, spec.Namespace, name, spec.Name)
	if err != nil || refused != "" {
		return refused, err
	}
	z := runtime.Resize{Labels: policyOf(spec)}
	for k := range have.Labels {
		if _, wanted := z.Labels[k]; !wanted && runtime.IsPolicy(k) {
			z.Labels[k] = ""
		}
	}
	if have.MemoryLimit != spec.Size.MemoryLimit {
		z.Memory = &spec.Size.MemoryLimit
	}
	limit := strconv.FormatFloat(spec.Size.CPULimit, 'g', -1, 64)
	if have.CPUs != spec.Size.CPULimit && (have.Labels[runtime.LabelAutopilot] != "on" || have.Labels[runtime.LabelLimitCPUs] != limit) {
		z.CPUs = &spec.Size.CPULimit
	}
	if refused := workloads.Grows(HostOf(s.Pool.Here(ctx)), name, spec); refused != "" {
		return refused, nil
	}
	if err := failpoint.Hit(ctx, "workload.resize"); err != nil {
		return "", err
	}
	_, err = s.Runtime.Resize(ctx, spec.Namespace, name, z)
	if errors.Is(err, runtime.ErrInUse) {
		return fmt.Sprintf("%v; choose a limit above that", err), nil
	}
	return "", err
}

// stopGrace is what a shard gets to end by itself.
const stopGrace = 10 * time.Second

// evict stops and removes a shard.
func (s here) evict(ctx context.Context, r *v1.EvictShardRequest) (string, error) {
	namespace, name := r.GetNamespace(), r.GetName()
	if err := scope(namespace); err != nil {
		return "", err
	}
	have, refused, err := s.own(ctx, namespace, name, r.GetWorkload())
	if errors.Is(err, runtime.ErrNotFound) {
		return "", nil
	}
	if err != nil || refused != "" {
		return refused, err
	}
	if have.Status == runtime.StatusRunning {
		if err := s.Runtime.Stop(ctx, namespace, name, stopGrace); err != nil && !errors.Is(err, runtime.ErrNotRunning) {
			return "", err
		}
	}
	if err := s.Runtime.Remove(ctx, namespace, name, true); err != nil && !errors.Is(err, runtime.ErrNotFound) {
		return "", err
	}
	return "", nil
}

// Images is what sending an image needs of daemon/runtime.
type Images interface {
	DescribeImage(ctx context.Context, namespace, ref string) (*runtime.Record, error)
	EnsureImage(ctx context.Context, namespace, ref string) error
	FetchImage(ctx context.Context, rec *runtime.Record, id string, open func(context.Context, digest.Digest) (io.ReadCloser, error)) error
	OpenBlob(ctx context.Context, namespace string, d digest.Digest) (runtime.Blob, error)
}

// needImage brings an image from a host that has it. One that nobody has is
// left for Run to pull, or to say what to do.
func (s here) needImage(ctx context.Context, namespace, ref string, from []string) error {
	_, err := s.Runtime.DescribeImage(ctx, namespace, ref)
	if err == nil || !errors.Is(err, runtime.ErrNotFound) {
		return err
	}
	s.fetching.Lock() // the second shard finds what the first one brought
	defer s.fetching.Unlock()
	if _, err := s.Runtime.DescribeImage(ctx, namespace, ref); err == nil {
		return nil
	}
	for _, node := range from {
		if !s.inPool(node) || node == s.Node {
			continue
		}
		if err := s.fetch(ctx, namespace, ref, node); err == nil {
			s.Log.Info("an image was brought", "image", ref, "peer", node)
			return nil
		} else if ctx.Err() != nil {
			return context.Cause(ctx)
		} else {
			s.Log.Info("an image could not be brought", "image", ref, "peer", node, "err", err)
		}
	}
	return nil
}

func (s here) fetch(ctx context.Context, namespace, ref, node string) error {
	client, err := s.Pool.Client(node)
	if err != nil {
		return err
	}
	qctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	resp, err := client.Image(qctx, connect.NewRequest(&v1.ImageRequest{Namespace: namespace, Image: ref}))
	if err != nil {
		return err
	}
	rec, err := decodeImage(resp.Msg.GetRecord())
	if err != nil {
		return err
	}
	rec.Namespace = namespace
	id := "image-" + strconv.FormatInt(time.Now().UnixNano(), 36)
	return s.Runtime.FetchImage(ctx, rec, id, func(ctx context.Context, d digest.Digest) (io.ReadCloser, error) {
		stream, err := client.Blob(ctx, connect.NewRequest(&v1.BlobRequest{Namespace: namespace, Digest: d.String()}))
		if err != nil {
			return nil, err
		}
		return &blobReader{stream: stream}, nil
	})
}

// blobReader reads a stream of chunks.
type blobReader struct {
	stream *connect.ServerStreamForClient[v1.BlobChunk]
	rest   []byte
}

func (b *blobReader) Read(p []byte) (int, error) {
	for len(b.rest) == 0 {
		if !b.stream.Receive() {
			if err := b.stream.Err(); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}
		b.rest = b.stream.Msg().GetData()
	}
	n := copy(p, b.rest)
	b.rest = b.rest[n:]
	return n, nil
}

func (b *blobReader) Close() error { return b.stream.Close() }
