package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
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
	Borrowed  string            `json:"borrowed"` // whose shards lent to it when it was cold; "" nobody's
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
		Long: `Forecast what a shard will need: quantiles of its load at t+h ("value") and of its
peak over (t, t+h], and what they rest on. The daemon of its host learns from
every ten seconds; a shard that is new borrows from those of its workload, tenant
or host. HELD is the share of recent outcomes that stayed below the 95 % bound. A
week ahead is forecast once there is history of more than a week.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if past <= 0 || ahead <= 0 || ahead > 7*24*time.Hour {
				return usagef("--past must be positive, and --ahead within 168h")
			}
			doc, err := g.forecast(cmd.Context(), args[0], signal, past, ahead)
			if err != nil {
				return err
			}
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
	flags.StringVar(&signal, "signal", "cpu", "what to forecast: cpu, working_set, receive_bytes, transmit_bytes, read_bytes or write_bytes")
	flags.StringVar(&svg, "svg", "", "write the plot to this file too")
	flags.DurationVar(&past, "past", 3*time.Hour, "how much history the plot shows")
	flags.DurationVar(&ahead, "ahead", time.Hour, "how far ahead the plot looks")
	return cmd
}

// forecast asks the daemon for a forecast, and for the history to show with it.
func (g *globals) forecast(ctx context.Context, shard, signal string, past, ahead time.Duration) (*forecastDocument, error) {
	client, err := g.client()
	if err != nil {
		return nil, err
	}
	defer client.Close()
	resp, err := client.Profiles.Forecast(ctx, connect.NewRequest(&v1.ForecastRequest{
		Namespace: g.namespace, Shard: shard, Signal: signal, AheadMs: ahead.Milliseconds(), Points: pathPoints,
	}))
	switch {
	case connect.CodeOf(err) == connect.CodeInvalidArgument:
		return nil, usagef("--signal: %v", err)
	case connect.CodeOf(err) == connect.CodeUnimplemented:
		return nil, profilesOff(err)
	case err != nil:
		return nil, err
	}
	doc := forecastOf(resp.Msg)
	doc.Shard, doc.Namespace, doc.Signal = shard, g.namespace, signal
	// Minutes, or of a shard that has none yet, tens of seconds.
	for _, step := range []int64{60, 10} {
		if len(doc.History) > 0 {
			break
		}
		points, err := client.Profiles.Points(ctx, connect.NewRequest(&v1.PointsRequest{
			Namespace: g.namespace, Shard: shard, StepSeconds: step, FromUnixMs: doc.At.Add(-past).UnixMilli(),
		}))
		if err != nil {
			return nil, profilesOff(err)
		}
		s := seriesIn(points.Msg.GetPoints(), signal, time.Duration(step)*time.Second)
		for i, at := range s.Times {
			if at.After(doc.At.Add(-past)) {
				doc.History = append(doc.History, forecastPoint{at, s.Values[i]})
			}
		}
	}
	return doc, nil
}

// forecastOf converts a message.
func forecastOf(m *v1.ForecastResponse) *forecastDocument {
	doc := &forecastDocument{
		Document: control.NewDocument(), StepS: float64(m.GetStepMs()) / 1000, Samples: m.GetSamples(), SeasonS: float64(m.GetSeasonMs()) / 1000,
		Borrowed: m.GetBorrowed(), At: time.UnixMilli(m.GetAtUnixMs()).UTC(),
		Horizons: []forecastHorizon{}, History: []forecastPoint{}, Path: []forecastPath{},
	}
	for _, h := range m.GetHorizons() {
		q := h.GetQuantiles()
		row := forecastHorizon{
			HorizonS: float64(h.GetHorizonMs()) / 1000, Target: h.GetTarget(), Settled: h.GetSettled(), Error: h.GetError(), AsNow: h.GetAsNow(),
			Quantiles: map[string]float64{"0.1": q.GetP10(), "0.5": q.GetP50(), "0.9": q.GetP90(), "0.95": q.GetP95(), "0.99": q.GetP99()},
			Coverage:  map[string]float64{"0.9": h.GetHeld90(), "0.95": h.GetHeld95()}, Members: []forecastMember{},
		}
		for _, w := range h.GetMembers() {
			row.Members = append(row.Members, forecastMember{w.GetName(), w.GetWeight()})
		}
		doc.Horizons = append(doc.Horizons, row)
	}
	for _, p := range m.GetPath() {
		q := p.GetQuantiles()
		doc.Path = append(doc.Path, forecastPath{time.UnixMilli(p.GetAtUnixMs()).UTC(), q.GetP10(), q.GetP50(), q.GetP95()})
	}
	return doc
}

// pathPoints are as many as a plot can show.
const pathPoints = 60

func printForecast(cmd *cobra.Command, doc *forecastDocument) error {
	out := cmd.OutOrStdout()
	season := "no daily rhythm found"
	if doc.SeasonS > 0 {
		season = "a daily rhythm"
	}
	if doc.Borrowed != "" {
		season += ", begun with what its " + doc.Borrowed + "'s shards knew"
	}
	seen := time.Duration(float64(doc.Samples) * doc.StepS * float64(time.Second))
	fmt.Fprintf(out, "%s of %s, from %v until %s: %s\n\n", doc.Signal, doc.Shard, seen, doc.At.Format(time.RFC3339), season)
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
