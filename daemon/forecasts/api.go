package forecasts

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/predict"
)

// maxPoints bounds the path of an answer.
const maxPoints = 1000

// Answer answers the question for a shard's forecast, with a connect error where
// it cannot.
func (k *Keeper) Answer(req *v1.ForecastRequest) (*v1.ForecastResponse, error) {
	signal, ok := profile.SignalNamed(req.GetSignal())
	if !ok || !slices.Contains(Signals[:], signal) {
		var names []string
		for _, s := range Signals {
			names = append(names, s.String())
		}
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("signal %q is not forecast: %s are", req.GetSignal(), strings.Join(names, ", ")))
	}
	ahead := time.Duration(req.GetAheadMs()) * time.Millisecond
	if ahead < 0 || ahead > week || req.GetPoints() > maxPoints {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%v ahead in %d points: at most %v and %d", ahead, req.GetPoints(), week, maxPoints))
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	f, sh, err := k.find(req.GetNamespace()+"/"+req.GetShard(), signal)
	switch {
	case errors.Is(err, ErrSignal):
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("%s of %s is not measured here: tranship top -o json says why", signal, req.GetShard()))
	case err != nil:
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("forecast of %s: %w: the first ten seconds must pass, and this must be its host (tranship ps)", req.GetShard(), err))
	case ahead > reach(f):
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("forecast of %s for %v: %w: %v is possible", req.GetShard(), ahead, ErrReach, reach(f)))
	}
	resp, err := AnswerOf(f, ahead, int(req.GetPoints()), sh.until)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	resp.Node, resp.Borrowed = k.node, sh.borrowed
	return resp, nil
}

// AnswerOf is what one forecaster says that has seen all up to at, with a path of
// so many points.
func AnswerOf(f *predict.Forecaster, ahead time.Duration, points int, at time.Time) (*v1.ForecastResponse, error) {
	x := f.Explain()
	resp := &v1.ForecastResponse{
		AtUnixMs: at.UnixMilli(), StepMs: x.Step.Milliseconds(), Samples: x.Samples, SeasonMs: x.Season.Milliseconds(),
	}
	for _, h := range x.Horizons {
		if h.Horizon > reach(f) {
			continue
		}
		q, err := f.Forecast(h.Horizon, h.Target)
		if err != nil {
			return nil, err
		}
		row := &v1.ForecastHorizon{
			HorizonMs: h.Horizon.Milliseconds(), Target: h.Target.String(), Quantiles: quantiles(q),
			Settled: h.Settled, Error: h.Error, Held90: h.Cover90, Held95: h.Cover95, AsNow: h.AsNow,
		}
		for _, m := range h.Members {
			row.Members = append(row.Members, &v1.ForecastWeight{Name: m.Name, Weight: m.Weight})
		}
		resp.Horizons = append(resp.Horizons, row)
	}
	for i := range points {
		h := max(step, ahead*time.Duration(i+1)/time.Duration(points))
		q, err := f.Forecast(h, predict.Value)
		if err != nil {
			return nil, err
		}
		resp.Path = append(resp.Path, &v1.ForecastPath{AtUnixMs: at.Add(h).UnixMilli(), Quantiles: quantiles(q)})
	}
	return resp, nil
}

func quantiles(q predict.Quantiles) *v1.ForecastQuantiles {
	return &v1.ForecastQuantiles{P10: q.P10, P50: q.P50, P90: q.P90, P95: q.P95, P99: q.P99}
}
