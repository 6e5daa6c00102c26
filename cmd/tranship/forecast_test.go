package main

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/forecasts"
	"github.com/tranship/tranship/predict"
)

// recorder is a daemon that has profiles and nothing else.
type recorder struct {
	transhipv1connect.UnimplementedProfilesHandler
	points map[string][]*v1.LoadPoint // by shard
}

func (r *recorder) Points(_ context.Context, req *connect.Request[v1.PointsRequest]) (*connect.Response[v1.PointsResponse], error) {
	if req.Msg.GetStepSeconds() != 60 || req.Msg.GetNamespace() != "default" {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("asked for something else"))
	}
	return connect.NewResponse(&v1.PointsResponse{Points: r.points[req.Msg.GetShard()]}), nil
}

// Forecast learns from the recorded minutes, as the daemon does from its shards'
// ten seconds.
func (r *recorder) Forecast(_ context.Context, req *connect.Request[v1.ForecastRequest]) (*connect.Response[v1.ForecastResponse], error) {
	points := r.points[req.Msg.GetShard()]
	if points == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("forecast of %s: %w", req.Msg.GetShard(), forecasts.ErrUnknown))
	}
	if _, ok := points[0].GetMean()[req.Msg.GetSignal()]; !ok {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%w: cpu, receive_bytes are", forecasts.ErrSignal))
	}
	ahead := time.Duration(req.Msg.GetAheadMs()) * time.Millisecond
	if ahead > 24*time.Hour {
		return nil, connect.NewError(connect.CodeFailedPrecondition, forecasts.ErrReach)
	}
	f, err := predict.New(predict.Config{Step: time.Minute})
	if err != nil {
		return nil, err
	}
	var end time.Time
	for _, p := range points {
		at := time.UnixMilli(p.GetStartUnixMs())
		f.Observe(at.Add(30*time.Second), p.GetMean()[req.Msg.GetSignal()])
		end = at.Add(time.Minute)
		f.Advance(end)
	}
	resp, err := forecasts.AnswerOf(f, ahead, int(req.Msg.GetPoints()), end)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(resp), nil
}

// startRecorder serves a shard web with a day's rhythm over three days, in
// minutes, an hour of which is missing.
func startRecorder(t *testing.T) *daemon {
	t.Helper()
	r := &recorder{points: map[string][]*v1.LoadPoint{}}
	begin := time.Date(2026, 3, 2, 0, 0, 0, 0, time.UTC)
	for i := range 3 * 1440 {
		if i >= 2000 && i < 2060 {
			continue
		}
		cpu := 2 + math.Sin(2*math.Pi*float64(i)/1440) + 0.1*float64(i*7919%13)/13
		r.points["web"] = append(r.points["web"], &v1.LoadPoint{
			StartUnixMs: begin.Add(time.Duration(i) * time.Minute).UnixMilli(), Covered: 1,
			Mean: map[string]float64{"cpu": cpu, "receive_bytes": 1e6 * cpu},
		})
	}
	return r.serve(t)
}

func (r *recorder) serve(t *testing.T) *daemon {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle(transhipv1connect.NewProfilesHandler(r))
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	var served sync.WaitGroup
	served.Go(func() { srv.Serve(l) })
	t.Cleanup(func() { srv.Close(); served.Wait() })
	return &daemon{address: "unix://" + socket}
}

func TestForecastFollowsTheRecordedDay(t *testing.T) {
	d := startRecorder(t)
	code, out, errs := d.tranship(t, t.Context(), "forecast", "web", "-o", "json", "--past", "2h")
	if code != exitDone {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	var doc forecastDocument
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.SchemaVersion == 0 || doc.Shard != "web" || doc.Namespace != "default" || doc.Signal != "cpu" || doc.StepS != 60 || doc.Samples != 3*1440-60 {
		t.Fatalf("%+v", doc)
	}
	if len(doc.Horizons) != 8 || len(doc.History) != 120 || len(doc.Path) != pathPoints {
		t.Fatalf("%d horizons, %d points of history, %d of the path", len(doc.Horizons), len(doc.History), len(doc.Path))
	}
	for _, h := range doc.Horizons {
		if h.Target != "value" || h.HorizonS != 3600 {
			continue
		}
		// An hour after midnight: 2 + sin(2π/24), and 0.05 of noise.
		if want := 2.05 + math.Sin(2*math.Pi/24); math.Abs(h.Quantiles["0.5"]-want) > 0.1 {
			t.Errorf("median %.3f in an hour, want %.2f", h.Quantiles["0.5"], want)
		}
		if h.Settled == 0 || len(h.Members) == 0 || h.Quantiles["0.1"] > h.Quantiles["0.5"] || h.Quantiles["0.5"] > h.Quantiles["0.95"] {
			t.Errorf("%+v", h)
		}
	}
}

func TestForecastIsShownAndDrawn(t *testing.T) {
	d := startRecorder(t)
	svg := filepath.Join(t.TempDir(), "web.svg")
	code, out, errs := d.tranship(t, t.Context(), "forecast", "web", "--signal", "receive_bytes", "--svg", svg)
	if code != exitDone {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	for _, want := range []string{"receive_bytes of web, from 71h0m0s", "AHEAD", "24h0m0s", "peak", "MB/s", "•", "░", "─", "now"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	for _, line := range strings.Split(out, "\n")[:18] {
		if n := len([]rune(line)); n > 120 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	drawing, err := os.ReadFile(svg)
	if err != nil {
		t.Fatal(err)
	}
	elements := map[string]int{}
	for dec := xml.NewDecoder(strings.NewReader(string(drawing))); ; {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("the drawing is not well-formed: %v", err)
		}
		if e, ok := tok.(xml.StartElement); ok {
			elements[e.Name.Local]++
		}
	}
	if elements["polyline"] != 2 || elements["polygon"] != 1 || strings.Contains(string(drawing), "NaN") {
		t.Errorf("%v", elements)
	}
}

func TestForecastSaysWhatIsMissing(t *testing.T) {
	d := startRecorder(t)
	for name, c := range map[string]struct {
		args []string
		code int
		says string
	}{
		"a shard without a record":  {[]string{"forecast", "db"}, exitFailed, "nothing is known of it"},
		"a signal of no name":       {[]string{"forecast", "web", "--signal", "joy"}, exitUsage, "cpu, receive_bytes are"},
		"too far ahead":             {[]string{"forecast", "web", "--ahead", "200h"}, exitUsage, "168h"},
		"farther than the history":  {[]string{"forecast", "web", "--ahead", "48h"}, exitFailed, "too short"},
		"no shard":                  {[]string{"forecast"}, exitUsage, "arg"},
		"a store without the shard": {[]string{"backtest", "--store", "cpu", "db"}, exitFailed, "nothing is recorded"},
	} {
		t.Run(name, func(t *testing.T) {
			code, _, errs := d.tranship(t, t.Context(), c.args...)
			if code != c.code || !strings.Contains(errs, c.says) {
				t.Errorf("exit code %d, %q", code, errs)
			}
		})
	}
}

func TestForecastOfADaemonWithoutProfiles(t *testing.T) {
	d := startDaemon(t)
	code, _, errs := d.tranship(t, t.Context(), "forecast", "web")
	if code != exitFailed || !strings.Contains(errs, "no profiles") {
		t.Errorf("exit code %d, %q", code, errs)
	}
}

func TestForecastOfAMinute(t *testing.T) {
	d := (&recorder{points: map[string][]*v1.LoadPoint{"new": {{StartUnixMs: 60000, Mean: map[string]float64{"cpu": 0}}}}}).serve(t)
	code, out, errs := d.tranship(t, t.Context(), "forecast", "new")
	if code != exitDone || !strings.Contains(out, "nothing settled yet") || strings.Contains(out, "NaN") {
		t.Errorf("exit code %d, %s%s", code, errs, out)
	}
}

func TestBacktestOfARecord(t *testing.T) {
	d := startRecorder(t)
	code, out, errs := d.tranship(t, t.Context(), "backtest", "--store", "cpu", "web", "--models", "tranship,naive", "--horizons", "5m,1h", "--stride", "11", "-o", "json")
	if code != exitDone {
		t.Fatalf("exit code %d: %s", code, errs)
	}
	var doc backtestDocument
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Series) != 1 || doc.Series[0].StepS != 60 || doc.Series[0].N != 3*1440 || len(doc.Series[0].Results) != 8 {
		t.Errorf("%+v", doc.Series)
	}
}
