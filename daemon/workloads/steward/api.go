package steward

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/opencontainers/go-digest"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/daemon/workloads"
)

// Local answers the command line.
type Local struct{ *Steward }

var _ transhipv1connect.WorkloadsHandler = Local{}

// Change is Steward.Change.
func (l Local) Change(ctx context.Context, r *connect.Request[v1.ChangeWorkloadRequest], stream *connect.ServerStream[v1.WorkloadEvent]) error {
	r.Msg.Forwarded = false
	return l.Steward.Change(ctx, r.Msg, stream.Send)
}

// ListWorkloads shows what is wanted and what is there: shards, and containers
// that joined by label.
func (l Local) ListWorkloads(ctx context.Context, r *connect.Request[v1.ListWorkloadsRequest]) (*connect.Response[v1.ListWorkloadsResponse], error) {
	records, err := l.Book.All()
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	resp := &v1.ListWorkloadsResponse{}
	type key struct{ namespace, name string }
	by := map[key]*v1.Workload{}
	add := func(w *v1.Workload) {
		by[key{w.GetNamespace(), w.GetName()}] = w
		resp.Workloads = append(resp.Workloads, w)
	}
	for _, rec := range records {
		spec := rec.spec()
		if spec == nil || !rec.Confirmed || r.Msg.GetName() != "" && rec.Name != r.Msg.GetName() {
			continue
		}
		add(&v1.Workload{
			Name: rec.Name, Namespace: spec.Namespace, Tenant: spec.Tenant, Owner: rec.Owner, Generation: rec.Generation,
			ChangedFrom: rec.From, ChangedAtUnixMs: rec.At.UnixMilli(),
			Priority: uint32(spec.Priority), Wanted: uint32(spec.Shards), Autopilot: spec.Autopilot, SpecJson: rec.Spec,
		})
	}
	for _, st := range l.Pool.Look(ctx) {
		if st.Node.GetState() != control.NodeAlive {
			resp.UnreachableNodes = append(resp.UnreachableNodes, st.Node.GetName())
			continue
		}
		for _, m := range st.Shards {
			name := m.GetLabels()[runtime.LabelWorkload]
			if name == "" || m.GetLabels()[runtime.LabelIncoming] != "" || r.Msg.GetName() != "" && name != r.Msg.GetName() {
				continue
			}
			k := key{m.GetNamespace(), name}
			if by[k] == nil {
				add(&v1.Workload{Name: name, Namespace: k.namespace, Tenant: m.GetLabels()[runtime.LabelTenant]})
			}
			by[k].Shards = append(by[k].Shards, m)
		}
	}
	slices.SortFunc(resp.Workloads, func(a, b *v1.Workload) int { return strings.Compare(a.GetName(), b.GetName()) })
	for _, w := range resp.Workloads {
		slices.SortFunc(w.Shards, func(a, b *v1.Shard) int { return shardOf(a).Index - shardOf(b).Index })
	}
	return connect.NewResponse(resp), nil
}

// Peers answers the other hosts.
type Peers struct{ *Steward }

var _ transhipv1connect.WorkloadHostsHandler = Peers{}

// Change is for a workload that this host owns.
func (p Peers) Change(ctx context.Context, r *connect.Request[v1.ChangeWorkloadRequest], stream *connect.ServerStream[v1.WorkloadEvent]) error {
	r.Msg.Forwarded = true
	return p.Steward.Change(ctx, r.Msg, stream.Send)
}

// Put takes a record that its owner sealed, unless one stands against it.
func (p Peers) Put(ctx context.Context, r *connect.Request[v1.PutWorkloadRequest]) (*connect.Response[v1.PutWorkloadResponse], error) {
	taken, have, err := p.heard(p.Caller(ctx), r.Msg.GetRecord())
	if errors.Is(err, errRecord) {
		p.Log.Warn("a record is not believed", "peer", p.Caller(ctx), "err", err)
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	resp := &v1.PutWorkloadResponse{Taken: taken}
	if !taken && have == nil {
		resp.Taken = true // an offer taken back that never came
	} else if !taken {
		resp.Have = have.encode()
	}
	return connect.NewResponse(resp), nil
}

// maxAnswer leaves room below what a peer reads of one message.
const maxAnswer = 6 << 20

// Records are the confirmed ones that the caller lacks, as many as fit; the rest
// comes when it asks again.
func (p Peers) Records(_ context.Context, r *connect.Request[v1.WorkloadRecordsRequest]) (*connect.Response[v1.WorkloadRecordsResponse], error) {
	all, err := p.Book.All()
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	resp, size := &v1.WorkloadRecordsResponse{}, 0
	for _, rec := range all {
		if !rec.Confirmed || rec.Generation <= r.Msg.GetKnown()[rec.Name] {
			continue
		}
		raw := rec.encode()
		if size += len(raw); size > maxAnswer {
			break
		}
		resp.Records = append(resp.Records, raw)
	}
	return connect.NewResponse(resp), nil
}

// asked writes down which host had a shard started, changed or removed here.
func (p Peers) asked(ctx context.Context, op, shard, refused string, err error) {
	p.Log.Info("asked by another host", "op", op, "shard", shard, "peer", p.Caller(ctx), "refused", refused, "err", err)
}

// nameOf is the shard that a request is about, "" where that is not to be read.
func nameOf(r interface {
	GetSpecJson() []byte
	GetIndex() uint32
},
) string {
	spec, err := workloads.Decode(r.GetSpecJson())
	if err != nil {
		return ""
	}
	return spec.Shard(int(r.GetIndex()))
}

// Place starts a shard here.
func (p Peers) Place(ctx context.Context, r *connect.Request[v1.PlaceShardRequest]) (*connect.Response[v1.PlaceShardResponse], error) {
	refused, err := here(p).place(ctx, r.Msg)
	p.asked(ctx, "place", nameOf(r.Msg), refused, err)
	if err != nil {
		return nil, p.apiError(err)
	}
	return connect.NewResponse(&v1.PlaceShardResponse{Refused: refused}), nil
}

// Resize changes limits and labels of a shard here.
func (p Peers) Resize(ctx context.Context, r *connect.Request[v1.ResizeShardRequest]) (*connect.Response[v1.ResizeShardResponse], error) {
	refused, err := here(p).resize(ctx, r.Msg)
	p.asked(ctx, "resize", nameOf(r.Msg), refused, err)
	if err != nil {
		return nil, p.apiError(err)
	}
	return connect.NewResponse(&v1.ResizeShardResponse{Refused: refused}), nil
}

// Evict removes a shard from here.
func (p Peers) Evict(ctx context.Context, r *connect.Request[v1.EvictShardRequest]) (*connect.Response[v1.EvictShardResponse], error) {
	refused, err := here(p).evict(ctx, r.Msg)
	p.asked(ctx, "evict", r.Msg.GetName(), refused, err)
	if err != nil {
		return nil, p.apiError(err)
	}
	return connect.NewResponse(&v1.EvictShardResponse{Refused: refused}), nil
}

// Image describes an image of this host.
func (p Peers) Image(ctx context.Context, r *connect.Request[v1.ImageRequest]) (*connect.Response[v1.ImageResponse], error) {
	if err := scope(r.Msg.GetNamespace()); err != nil {
		return nil, err
	}
	rec, err := p.Runtime.DescribeImage(ctx, r.Msg.GetNamespace(), r.Msg.GetImage())
	if err != nil {
		return nil, p.apiError(err)
	}
	raw, err := json.Marshal(rec)
	if err != nil {
		return nil, p.apiError(err)
	}
	return connect.NewResponse(&v1.ImageResponse{Record: raw}), nil
}

// decodeImage reads what Image sent; FetchImage judges it.
func decodeImage(raw []byte) (*runtime.Record, error) {
	rec := new(runtime.Record)
	if len(raw) > maxAnswer {
		return nil, fmt.Errorf("an image's record of %d bytes", len(raw))
	}
	if err := json.Unmarshal(raw, rec); err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	return rec, nil
}

// chunk of a blob in one message.
const chunk = 256 << 10

// Blob sends content of this host.
func (p Peers) Blob(ctx context.Context, r *connect.Request[v1.BlobRequest], stream *connect.ServerStream[v1.BlobChunk]) error {
	if err := scope(r.Msg.GetNamespace()); err != nil {
		return err
	}
	blob, err := p.Runtime.OpenBlob(ctx, r.Msg.GetNamespace(), digest.Digest(r.Msg.GetDigest()))
	if err != nil {
		return p.apiError(err)
	}
	defer blob.Close()
	buf := make([]byte, chunk)
	for from := blob.Reader(); ; {
		n, err := io.ReadFull(from, buf)
		if n > 0 {
			if err := stream.Send(&v1.BlobChunk{Data: buf[:n]}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return p.apiError(err)
		}
	}
}

func (p Peers) apiError(err error) error {
	var already *connect.Error
	if errors.As(err, &already) {
		return err
	}
	code := connect.CodeInternal
	switch {
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	case errors.Is(err, runtime.ErrNotFound):
		code = connect.CodeNotFound
	case errors.Is(err, runtime.ErrInvalid):
		code = connect.CodeInvalidArgument
	}
	return connect.NewError(code, fmt.Errorf("%s: %w", p.Node, err))
}
