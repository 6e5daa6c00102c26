package profiler

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/checkpoint"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/predict"
)

// Handler answers the Profiles service.
type Handler struct {
	P *Profiler
	// Peers names the other hosts, PeerLoad asks one of them; nil without any.
	Peers    func() []string
	PeerLoad func(ctx context.Context, node string, req *v1.LoadRequest) (*v1.LoadResponse, error)
}

// Forecaster answers for the forecasts of this host's shards.
type Forecaster interface {
	Forecast(namespace, name string, signal profile.Signal, h time.Duration, target predict.Target) (predict.Quantiles, error)
	Answer(*v1.ForecastRequest) (*v1.ForecastResponse, error)
}

var _ transhipv1connect.ProfilesHandler = (*Handler)(nil)

// peerTimeout bounds the question after one peer's load.
const peerTimeout = 2 * time.Second

// Load is what this host and its shards use now and, if asked for, the others.
func (h *Handler) Load(ctx context.Context, r *connect.Request[v1.LoadRequest]) (*connect.Response[v1.LoadResponse], error) {
	resp := h.Local(r.Msg)
	if r.Msg.GetAllNodes() && h.Peers != nil {
		var wg sync.WaitGroup
		var mu sync.Mutex
		for _, node := range h.Peers() {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(ctx, peerTimeout)
				defer cancel()
				theirs, err := h.PeerLoad(ctx, node, &v1.LoadRequest{Recent: r.Msg.GetRecent()})
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					resp.UnreachableNodes = append(resp.UnreachableNodes, node)
					return
				}
				resp.Hosts = append(resp.Hosts, theirs.GetHosts()...)
				resp.Shards = append(resp.Shards, theirs.GetShards()...)
			})
		}
		wg.Wait()
	}
	slices.Sort(resp.UnreachableNodes)
	slices.SortFunc(resp.Hosts, func(a, b *v1.HostLoad) int { return cmp.Compare(a.GetNode(), b.GetNode()) })
	slices.SortFunc(resp.Shards, func(a, b *v1.ShardLoad) int {
		return cmp.Or(cmp.Compare(a.GetNamespace(), b.GetNamespace()), cmp.Compare(a.GetName(), b.GetName()), cmp.Compare(a.GetNode(), b.GetNode()))
	})
	return connect.NewResponse(resp), nil
}

// maxRecent bounds how many seconds of CPU are shown: as many as are kept.
const maxRecent = 120

// Local is the load of this host alone.
func (h *Handler) Local(req *v1.LoadRequest) *v1.LoadResponse {
	resp := h.P.Load(int(min(req.GetRecent(), maxRecent)))
	if fc := h.P.cfg.Forecasts; fc != nil {
		for _, m := range resp.GetShards() {
			// What is not known yet is not shown.
			if q, err := fc.Forecast(m.GetNamespace(), m.GetName(), profile.CPU, roomHorizon, predict.Peak); err == nil {
				m.CpuForecast = &q.P95
			}
		}
	}
	return resp
}

// Load is what this host and its shards use now, without forecasts; recent is of
// how many seconds the CPU is listed.
func (p *Profiler) Load(recent int) *v1.LoadResponse {
	at := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	host := &v1.HostLoad{
		Node: p.cfg.Node, Cpus: uint32(cpus()), MemoryTotalBytes: int64(p.host.memory), LinkBytesPerSecond: p.host.linkBytes,
		Rates: ratesOf(p.host.profile, at), CpuRecent: cpuOf(p.host.profile, at, recent),
	}
	for _, s := range p.sources {
		host.Sources = append(host.Sources, &v1.SignalSource{Signal: s.Signal.String(), From: s.From, Why: s.Why})
	}
	resp := &v1.LoadResponse{Hosts: []*v1.HostLoad{host}}
	for _, s := range p.subjects {
		m := &v1.ShardLoad{
			Node: p.cfg.Node, Namespace: s.namespace, Name: s.name, Tenant: s.tenant, Workload: s.workload,
			Rates: ratesOf(s.profile, at), CpuRecent: cpuOf(s.profile, at, recent), Absent: s.absent(),
		}
		if s.dirtyKnown {
			m.DirtyPagesPerSecond = &s.dirty
		}
		resp.Shards = append(resp.Shards, m)
	}
	return resp
}

// roomHorizon is how far ahead top's forecast looks: a plan for room is about the
// peak of the next hour.
const roomHorizon = time.Hour

// nowWindow is what "now" is the mean of.
const nowWindow = 10 * time.Second

// ratesOf are the means of the last seconds, weighted by what they cover.
func ratesOf(pr *profile.Profile, at time.Time) map[string]float64 {
	var sum, of [profile.Signals]float64
	for pt := range pr.SecondsFrom(at.Add(-nowWindow - time.Second)) {
		w := pt.Covered.Seconds()
		for s := range profile.Signals {
			if pt.Has.Has(s) {
				sum[s] += float64(pt.Mean[s]) * w
				of[s] += w
			}
		}
	}
	out := map[string]float64{}
	for s := range profile.Signals {
		if of[s] > 0 {
			out[s.String()] = sum[s] / of[s]
		}
	}
	return out
}

// cpuOf lists the CPU of the last n seconds, oldest first. Seconds that were not
// measured are NaN, and none are listed before the shard was there.
func cpuOf(pr *profile.Profile, at time.Time, n int) []float64 {
	if n == 0 {
		return nil
	}
	points := pr.Seconds()
	if len(points) == 0 {
		return nil
	}
	// The second under way has no point yet, and the one before it may not.
	end := points[len(points)-1].Start
	if at.Sub(end) > 3*time.Second {
		end = at.Truncate(time.Second).Add(-time.Second)
	}
	begin := end.Add(-time.Duration(n-1) * time.Second)
	if points[0].Start.After(begin) {
		begin = points[0].Start
	}
	out := make([]float64, int(end.Sub(begin)/time.Second)+1)
	for i := range out {
		out[i] = math.NaN()
	}
	for _, pt := range points {
		if i := int(pt.Start.Sub(begin) / time.Second); i >= 0 && i < len(out) && pt.Has.Has(profile.CPU) {
			out[i] = float64(pt.Mean[profile.CPU])
		}
	}
	return out
}

// Points is what one shard, or the host, used over time.
func (h *Handler) Points(_ context.Context, r *connect.Request[v1.PointsRequest]) (*connect.Response[v1.PointsResponse], error) {
	req := r.Msg
	step := time.Duration(req.GetStepSeconds()) * time.Second
	if step != profile.Second && step != profile.DecaSecond && step != profile.Minute {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("step of %v: 1, 10 and 60 seconds are kept", step))
	}
	points, err := h.P.Points(req.GetNamespace(), req.GetShard(), step, time.UnixMilli(req.GetFromUnixMs()))
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	resp := &v1.PointsResponse{}
	for _, pt := range points {
		m := &v1.LoadPoint{
			StartUnixMs: pt.Start.UnixMilli(), Covered: pt.Covered.Seconds() / pt.Step.Seconds(),
			Mean: map[string]float64{}, Peak: map[string]float64{},
		}
		for s := range profile.Signals {
			if !pt.Has.Has(s) {
				continue
			}
			m.Mean[s.String()] = float64(pt.Mean[s])
			if s.Peaked() {
				m.Peak[s.String()] = float64(pt.Peak[s])
			}
		}
		resp.Points = append(resp.Points, m)
	}
	return connect.NewResponse(resp), nil
}

// Forecast is what a shard is expected to need.
func (h *Handler) Forecast(_ context.Context, r *connect.Request[v1.ForecastRequest]) (*connect.Response[v1.ForecastResponse], error) {
	if h.P.cfg.Forecasts == nil {
		return nil, connect.NewError(connect.CodeUnimplemented, errors.New("this host does not forecast"))
	}
	resp, err := h.P.cfg.Forecasts.Answer(r.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}

// DirtyRate measures a shard's.
func (h *Handler) DirtyRate(ctx context.Context, r *connect.Request[v1.DirtyRateRequest]) (*connect.Response[v1.DirtyRateResponse], error) {
	req := r.Msg
	if err := errors.Join(runtime.CheckName("namespace", req.GetNamespace()), runtime.CheckName("shard", req.GetShard())); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	if runtime.ForeignNamespace(req.GetNamespace()) && !req.GetForceNamespace() {
		return nil, connect.NewError(connect.CodePermissionDenied,
			fmt.Errorf("namespace %s belongs to another orchestrator; --force-namespace stops its tasks for a moment all the same", req.GetNamespace()))
	}
	rate, err := h.P.DirtyRate(ctx, req.GetNamespace(), req.GetShard(), time.Duration(req.GetWindowMs())*time.Millisecond)
	switch {
	case errors.Is(err, runtime.ErrNotFound):
		return nil, connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, ErrNoTracker), errors.Is(err, runtime.ErrNotRunning):
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	case err != nil && ctx.Err() != nil:
		return nil, connect.NewError(connect.CodeCanceled, err)
	case err != nil:
		return nil, connect.NewError(connect.CodeAborted, err)
	}
	return connect.NewResponse(&v1.DirtyRateResponse{PagesPerSecond: rate, BytesPerSecond: rate * checkpoint.PageSize}), nil
}
