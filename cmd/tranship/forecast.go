package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/predict"
	"github.com/tranship/tranship/predict/backtest"
)

// forecastDocument is what -o json prints. Values are in the signal's unit a
// second, as `tranship top` has them.
type forecastDocument struct {
	control.Document
	Shard     string            `json:"shard"`
	Namespace string            `json:"namespace"`
	Signal    string            `json:"signal"`
	StepS     float64           `json:"step_s"`
	Samples   int64             `json:"samples"`
	SeasonS   float64           `json:"season_s"` // 0: none was found
	At        time.Time         `json:"at"`
	Horizons  []forecastHorizon `json:"horizons"`
	History   []forecastPoint   `json:"history"`
	Path      []forecastPath    `json:"path"` // of the value, from now on
}

type forecastHorizon struct {
	HorizonS  float64            `json:"horizon_s"`
	Target    string             `json:"target"`
	Quantiles map[string]float64 `json:"quantiles"`
	Settled   int64              `json:"settled"`
	Error     float64            `json:"error"`    // recent mean absolute error
	Coverage  map[string]float64 `json:"coverage"` // recent share of outcomes below the bound
	AsNow     bool               `json:"as_now"`
	Members   []forecastMember   `json:"members"` // the heaviest first
}

type forecastMember struct {
	Name   string  `json:"name"`
	Weight float64 `json:"weight"`
}

type forecastPoint struct {
	At    time.Time `json:"at"`
	Value float64   `json:"value"`
}

type forecastPath struct {
	At  time.Time `json:"at"`
	P10 float64   `json:"p10"`
	P50 float64   `json:"p50"`
	P95 float64   `json:"p95"`
}

func newForecastCommand(g *globals) *cobra.Command {
	var (
		signal, svg string
		past, ahead time.Duration
	)
	cmd := &cobra.Command{
		Use:   "forecast SHARD",
		Short: "Forecast what a shard will need, from what it used",
		Long: `Forecast what a shard will need, from its recorded profile: quantiles of its load
at t+h ("value") and of its peak over (t, t+h], and what they rest on. HELD is
the share of recent outcomes that stayed below the 95 % bound.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if past <= 0 || ahead <= 0 || ahead > 24*time.Hour {
				return usagef("--past must be positive, and --ahead within 24h")
			}
			s, err := g.recorded(cmd.Context(), args[0], signal)
			if err != nil {
				return err
			}
			doc, err := forecastOf(s, past, ahead)
			if err != nil {
				return fmt.Errorf("forecast %s of %s: %w", signal, args[0], err)
			}
			doc.Shard, doc.Namespace, doc.Signal = args[0], g.namespace, signal
			if svg != "" {
				if err := os.WriteFile(svg, []byte(forecastSVG(doc)), 0o644); err != nil {
					return err
				}
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			return printForecast(cmd, doc)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&signal, "signal", "cpu", "what to forecast: cpu, working_set, receive_bytes, transmit_bytes, read_bytes, write_bytes, …")
	flags.StringVar(&svg, "svg", "", "write the plot to this file too")
	flags.DurationVar(&past, "past", 3*time.Hour, "how much history the plot shows")
	flags.DurationVar(&ahead, "ahead", time.Hour, "how far ahead the plot looks")
	return cmd
}

// recorded reads one signal of a shard's profile, a minute a sample.
func (g *globals) recorded(ctx context.Context, shard, signal string) (backtest.Series, error) {
	s := backtest.Series{File: shard, Column: signal}
	client, err := g.client()
	if err != nil {
		return s, err
	}
	defer client.Close()
	resp, err := client.Profiles.Points(ctx, connect.NewRequest(&v1.PointsRequest{Namespace: g.namespace, Shard: shard, StepSeconds: 60}))
	if err != nil {
		return s, profilesOff(err)
	}
	points := resp.Msg.GetPoints()
	if len(points) == 0 {
		return s, fmt.Errorf("nothing is recorded of %s yet: the first minute must end, and this must be its host (tranship ps)", shard)
	}
	measured := map[string]bool{}
	for _, p := range points {
		for name := range p.GetMean() {
			measured[name] = true
		}
		if v, ok := p.GetMean()[signal]; ok && !math.IsNaN(v) {
			// The sample stands for its minute, and lies in its middle.
			s.Times = append(s.Times, time.UnixMilli(p.GetStartUnixMs()).UTC().Add(30*time.Second))
			s.Values = append(s.Values, v)
		}
	}
	if len(s.Values) == 0 {
		var names []string
		for name := range measured {
			names = append(names, name)
		}
		slices.Sort(names)
		return s, usagef("--signal %q is not recorded of %s; there are %s", signal, shard, strings.Join(names, ", "))
	}
	return s, nil
}

// forecastOf runs the forecaster over the whole history.
func forecastOf(s backtest.Series, past, ahead time.Duration) (*forecastDocument, error) {
	f, err := predict.New(predict.Config{Step: time.Minute})
	if err != nil {
		return nil, err
	}
	for i, at := range s.Times {
		f.Observe(at, s.Values[i])
	}
	last := s.Times[len(s.Times)-1]
	f.Advance(last.Add(30*time.Second + 1))
	x := f.Explain()
	doc := &forecastDocument{
		Document: control.NewDocument(), StepS: x.Step.Seconds(), Samples: x.Samples, SeasonS: x.Season.Seconds(), At: last,
		Horizons: []forecastHorizon{}, History: []forecastPoint{}, Path: []forecastPath{},
	}
	for _, h := range x.Horizons {
		q, err := f.Forecast(h.Horizon, h.Target)
		if err != nil {
			return nil, err
		}
		row := forecastHorizon{
			HorizonS: h.Horizon.Seconds(), Target: h.Target.String(), Settled: h.Settled, Error: h.Error, AsNow: h.AsNow,
			Quantiles: map[string]float64{"0.1": q.P10, "0.5": q.P50, "0.9": q.P90, "0.95": q.P95, "0.99": q.P99},
			Coverage:  map[string]float64{"0.9": h.Cover90, "0.95": h.Cover95}, Members: []forecastMember{},
		}
		for _, m := range h.Members {
			row.Members = append(row.Members, forecastMember{m.Name, m.Weight})
		}
		doc.Horizons = append(doc.Horizons, row)
	}
	for i, at := range s.Times {
		if at.After(last.Add(-past)) {
			doc.History = append(doc.History, forecastPoint{at, s.Values[i]})
		}
	}
	// As many points as a plot can show.
	for i := range pathPoints {
		h := max(time.Minute, ahead*time.Duration(i+1)/pathPoints)
		q, err := f.Forecast(h, predict.Value)
		if err != nil {
			return nil, err
		}
		doc.Path = append(doc.Path, forecastPath{last.Add(h), q.P10, q.P50, q.P95})
	}
	return doc, nil
}

const pathPoints = 60

func printForecast(cmd *cobra.Command, doc *forecastDocument) error {
	out := cmd.OutOrStdout()
	season := "no daily rhythm found"
	if doc.SeasonS > 0 {
		season = "a daily rhythm"
	}
	fmt.Fprintf(out, "%s of %s, from %d minutes until %s: %s\n\n", doc.Signal, doc.Shard, doc.Samples, doc.At.Format(time.RFC3339), season)
	fmt.Fprintln(out, forecastPlot(doc, 96, 14))
	rows := make([][]string, 0, len(doc.Horizons))
	for _, h := range doc.Horizons {
		row := []string{(time.Duration(h.HorizonS) * time.Second).String(), h.Target}
		for _, q := range []string{"0.1", "0.5", "0.9", "0.95", "0.99"} {
			row = append(row, formatSignal(doc.Signal, h.Quantiles[q]))
		}
		held, rests := "-", "nothing settled yet"
		if h.Settled > 0 {
			held = strconv.FormatFloat(h.Coverage["0.95"], 'f', 3, 64)
			var names []string
			for _, m := range h.Members[:min(3, len(h.Members))] {
				names = append(names, fmt.Sprintf("%s %.0f%%", m.Name, 100*m.Weight))
			}
			rests = strings.Join(names, ", ")
			if h.AsNow {
				rests = "as now: nothing did better"
			}
		}
		rows = append(rows, append(row, held, strconv.FormatInt(h.Settled, 10), rests))
	}
	return printTable(out, []string{"AHEAD", "TARGET", "P10", "P50", "P90", "P95", "P99", "HELD", "SETTLED", "RESTS ON"}, rows)
}

// formatSignal writes a value in the signal's unit.
func formatSignal(signal string, v float64) string {
	switch {
	case signal == "memory_bytes" || signal == "working_set":
		return formatSize(int64(v))
	case strings.HasSuffix(signal, "_bytes"):
		return formatRate(v)
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}
