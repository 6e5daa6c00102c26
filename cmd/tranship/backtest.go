package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/predict"
	"github.com/tranship/tranship/predict/backtest"
)

// backtestDocument is what -o json prints.
type backtestDocument struct {
	control.Document
	Series  []backtest.SeriesReport `json:"series"`
	Summary []backtest.Summary      `json:"summary"`
}

func newBacktestCommand(g *globals) *cobra.Command {
	var (
		options  backtest.Options
		horizons []string
		group    string
		sample   string
		store    string
		jobs     int
	)
	cmd := &cobra.Command{
		Use:   "backtest FILE… | --store SIGNAL SHARD…",
		Short: "Measure forecasts on recorded loads, beside the standard methods",
		Long: `Measure forecasts on recorded loads, beside the standard methods.

A FILE is CSV: the first column is the time (unix seconds, RFC 3339 or
YYYY-MM-DD HH:MM:SS), every other column one series, an empty cell a gap.
The first half of a series trains, the second tests. Errors are divided by the
training half's mean absolute error of "as a day ago" (of "as a step ago" below
five days), so that 1 is as good as that; tables show medians over series.

With --store, the arguments are shards of this host, and the series are what was
recorded of one signal of each: how good the forecasts would have been.

A model that was changed until it did well on some series is judged on others:
--sample development and --sample holdout are two halves of all series, split
by a hash of their names.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("backtest: which files?")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, files []string) error {
			for _, text := range horizons {
				h, err := time.ParseDuration(text)
				if err != nil || h <= 0 {
					return usagef("--horizons: %q is not a duration like 5m or 24h", text)
				}
				options.Horizons = append(options.Horizons, h)
			}
			if err := checkBacktest(&options, group, sample, jobs); err != nil {
				return err
			}
			var series []backtest.Series
			for _, name := range files {
				s, err := g.seriesOf(cmd.Context(), name, store)
				if err != nil {
					return err
				}
				for i := range s {
					if backtest.Sample(sample).Includes(&s[i]) {
						series = append(series, s[i])
					}
				}
			}
			reports, err := backtestAll(cmd.Context(), series, options, jobs, newBacktestProgress(cmd, len(series)))
			if err != nil {
				return err
			}
			summary := backtest.Summarise(reports, func(r *backtest.SeriesReport) string { return backtestGroup(r, group) })
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), backtestDocument{control.NewDocument(), reports, summary})
			}
			for i := range reports {
				if reports[i].Skipped != "" {
					fmt.Fprintf(cmd.ErrOrStderr(), "%s: column %s: skipped: %s\n", reports[i].File, reports[i].Column, reports[i].Skipped)
				}
			}
			return printTable(cmd.OutOrStdout(),
				[]string{"GROUP", "TARGET", "HORIZON", "MODEL", "SERIES", "MASE", "PINBALL .9", "PINBALL .95", "BELOW .9", "BELOW .95"},
				summaryRows(summary))
		},
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&horizons, "horizons", nil, "how far ahead (default 5m,15m,1h,24h)")
	flags.IntVar(&options.Stride, "stride", 1, "forecast from every so many-th cell")
	flags.StringSliceVar(&options.Models, "models", nil, "which models (default all: "+strings.Join(backtest.Models(), ", ")+")")
	flags.StringVar(&group, "group", "folder", "medians over the series of each folder, file or column")
	flags.StringVar(&sample, "sample", string(backtest.Everything), "which series: all, development or holdout")
	flags.StringVar(&store, "store", "", "measure this signal (cpu, working_set, …) of recorded shards instead of files")
	flags.IntVar(&jobs, "jobs", runtime.GOMAXPROCS(0), "series at a time")
	return cmd
}

func checkBacktest(o *backtest.Options, group, sample string, jobs int) error {
	for i := 1; i < len(o.Horizons); i++ {
		if o.Horizons[i] <= o.Horizons[i-1] {
			return usagef("--horizons must ascend")
		}
	}
	known := map[string]bool{}
	for _, m := range backtest.Models() {
		known[m] = true
	}
	for _, m := range o.Models {
		if !known[m] {
			return usagef("--models: there is no %q, only %s", m, strings.Join(backtest.Models(), ", "))
		}
	}
	switch {
	case len(o.Horizons) > predict.MaxHorizons:
		return usagef("--horizons: at most %d", predict.MaxHorizons)
	case o.Stride < 1:
		return usagef("--stride %d: want 1 or more", o.Stride)
	case jobs < 1:
		return usagef("--jobs %d: want 1 or more", jobs)
	case group != "folder" && group != "file" && group != "column":
		return usagef("--group %q: use folder, file or column", group)
	}
	switch backtest.Sample(sample) {
	case backtest.Everything, backtest.Development, backtest.Holdout:
	default:
		return usagef("--sample %q: use all, development or holdout", sample)
	}
	return nil
}

// seriesOf reads a file, or with a signal what is recorded of a shard.
func (g *globals) seriesOf(ctx context.Context, name, signal string) ([]backtest.Series, error) {
	if signal == "" {
		return readSeries(name)
	}
	s, err := g.recorded(ctx, name, signal)
	return []backtest.Series{s}, err
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
	found := seriesIn(points, signal, time.Minute)
	s.Times, s.Values = found.Times, found.Values
	if len(s.Values) == 0 {
		measured := map[string]bool{}
		for _, p := range points {
			for name := range p.GetMean() {
				measured[name] = true
			}
		}
		var names []string
		for name := range measured {
			names = append(names, name)
		}
		slices.Sort(names)
		return s, usagef("--signal %q is not recorded of %s; there are %s", signal, shard, strings.Join(names, ", "))
	}
	return s, nil
}

// seriesIn picks one signal out of points of a step.
func seriesIn(points []*v1.LoadPoint, signal string, step time.Duration) (s backtest.Series) {
	for _, p := range points {
		if v, ok := p.GetMean()[signal]; ok && !math.IsNaN(v) {
			// The sample stands for its step, and lies in its middle.
			s.Times = append(s.Times, time.UnixMilli(p.GetStartUnixMs()).UTC().Add(step/2))
			s.Values = append(s.Values, v)
		}
	}
	return s
}

func readSeries(file string) ([]backtest.Series, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close() // read only: nothing to lose
	return backtest.Read(f, file)
}

// backtestAll keeps the order of series.
func backtestAll(ctx context.Context, series []backtest.Series, o backtest.Options, jobs int, done func()) ([]backtest.SeriesReport, error) {
	reports := make([]backtest.SeriesReport, len(series))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(jobs)
	for i := range series {
		group.Go(func() error {
			r, err := backtest.Run(ctx, series[i], o)
			reports[i] = r
			done()
			return err
		})
	}
	err := group.Wait()
	if cause := context.Cause(ctx); err == nil && errors.Is(cause, context.DeadlineExceeded) {
		err = cause
	}
	return reports, err
}

// newBacktestProgress tells a tenth at a time on stderr.
func newBacktestProgress(cmd *cobra.Command, total int) func() {
	var mu sync.Mutex
	n := 0
	return func() {
		mu.Lock()
		defer mu.Unlock()
		n++
		if total >= 20 && n*10/total > (n-1)*10/total {
			fmt.Fprintf(cmd.ErrOrStderr(), "%d of %d series\n", n, total)
		}
	}
}

func backtestGroup(r *backtest.SeriesReport, by string) string {
	folder := filepath.Base(filepath.Dir(r.File))
	switch by {
	case "file":
		return filepath.Join(folder, filepath.Base(r.File))
	case "column":
		return folder + ":" + r.Column
	}
	return folder
}

func summaryRows(summary []backtest.Summary) [][]string {
	number := func(v float64) string { return strconv.FormatFloat(v, 'f', 3, 64) }
	rows := make([][]string, 0, len(summary))
	for _, s := range summary {
		rows = append(rows, []string{
			s.Group, s.Target, (time.Duration(s.HorizonS) * time.Second).String(), s.Model, strconv.Itoa(s.Series),
			number(s.MASE), number(s.Pinball["0.9"]), number(s.Pinball["0.95"]), number(s.Coverage["0.9"]), number(s.Coverage["0.95"]),
		})
	}
	return rows
}
