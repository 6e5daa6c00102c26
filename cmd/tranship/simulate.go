package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/allocate/sim"
	"github.com/tranship/tranship/daemon/control"
)

// simulateDocument is what -o json prints.
type simulateDocument struct {
	control.Document
	Reports    []sim.Report    `json:"reports"`
	Comparison *sim.Comparison `json:"comparison,omitempty"`
}

func newSimulateCommand(g *globals) *cobra.Command {
	var (
		policy, traces string
		seed           uint64
		timing         bool
	)
	cmd := &cobra.Command{
		Use:   "simulate SCENARIO",
		Short: "Run the allocator on a simulated pool, beside other policies",
		Long: fmt.Sprintf(`Run the allocator on a simulated pool, beside other policies.

SCENARIO is a TOML file or one of: %s.
Loads come from traces (CSV files as for backtest) below --traces, or from
patterns in the scenario. Equal scenarios and seeds give equal reports, byte by
byte; --timing adds what planning took, which is measured and is not.

Policies: none; reactive (a threshold on the last sample, best-fit); drs
(periodic balancing by cost and benefit); tranship; oracle (tranship's planner,
told the future instead of a forecast); all. Several: --policy reactive,tranship.`, strings.Join(sim.Builtins(), ", ")),
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sc, err := loadScenario(args[0])
			if err != nil {
				return err
			}
			if traces != "" {
				sc.Traces.Dir = traces
			}
			names, err := policyNames(policy)
			if err != nil {
				return err
			}
			begin := time.Now()
			options := sim.Options{Seed: seed, Clock: func() time.Duration { return time.Since(begin) }, CPU: threadTime}
			doc := simulateDocument{Document: control.NewDocument()}
			for _, name := range names {
				from := time.Now()
				report, err := sim.Run(cmd.Context(), sc, name, options)
				if err != nil {
					if cmd.Context().Err() != nil {
						return fmt.Errorf("simulate: %w", err)
					}
					return usagef("%w", err)
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: simulated in %v%s\n", name, time.Since(from).Round(time.Millisecond), planningLine(report.Planning))
				if !timing {
					report.Planning = nil
				}
				doc.Reports = append(doc.Reports, *report)
			}
			if c, ok := sim.Compare(doc.Reports); ok {
				doc.Comparison = &c
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			return printSimulation(cmd, &doc)
		},
	}
	cmd.Flags().StringVar(&policy, "policy", "all", "none, reactive, drs, tranship, oracle, several with commas, or all")
	cmd.Flags().Uint64Var(&seed, "seed", 0, "instead of the scenario's")
	cmd.Flags().StringVar(&traces, "traces", os.Getenv("TRANSHIP_TRACES"), "the traces' folder, instead of the scenario's (TRANSHIP_TRACES)")
	cmd.Flags().BoolVar(&timing, "timing", false, "put the measured time of planning into the reports")
	return cmd
}

// maxScenario bounds a scenario file.
const maxScenario = 1 << 20

func loadScenario(name string) (*sim.Scenario, error) {
	text, ok := sim.Builtin(name)
	if !ok {
		info, err := os.Stat(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, usagef("scenario %s is neither a file nor one of %s", name, strings.Join(sim.Builtins(), ", "))
		case err != nil:
			return nil, usagef("scenario: %w", err)
		case !info.Mode().IsRegular() || info.Size() > maxScenario:
			return nil, usagef("scenario %s is not a file of at most %d KiB", name, maxScenario>>10)
		}
		if text, err = os.ReadFile(name); err != nil {
			return nil, usagef("scenario: %w", err)
		}
	}
	sc, err := sim.Parse(text)
	if err != nil {
		return nil, usagef("scenario %s: %w", name, err)
	}
	if sc.Name == "" {
		sc.Name = name
	}
	return sc, nil
}

func policyNames(list string) ([]string, error) {
	if list == "all" {
		return sim.Policies(), nil
	}
	names := strings.Split(list, ",")
	for i, name := range names {
		if !slices.Contains(sim.Policies(), name) || slices.Contains(names[:i], name) {
			return nil, usagef("--policy %q: use all, or some of %s, each once", list, strings.Join(sim.Policies(), ", "))
		}
	}
	return names, nil
}

func planningLine(p *sim.Planning) string {
	if p == nil {
		return ""
	}
	line := fmt.Sprintf("; planning a host's round took %.3f ms on average, %.3f at the 99th percentile, %.3f at most", p.MeanMS, p.P99MS, p.MaxMS)
	if p.CPU != nil {
		line += fmt.Sprintf(" (of a processor %.3f, %.3f, %.3f)", p.CPU.MeanMS, p.CPU.P99MS, p.CPU.MaxMS)
	}
	return line
}

// threadTime is how much of a processor the calling thread has had.
func threadTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		return 0 // Linux has had it since 2.6.12
	}
	return time.Duration(t.Nano())
}

func printSimulation(cmd *cobra.Command, doc *simulateDocument) error {
	header := []string{"POLICY", "OVERLOAD", "UNDER-SERVED", "MOVES", "THRASH", "MOVED", "BLACKOUT", "HOSTS", "HOST-HOURS", "COST", "VETOED", "BEYOND", "SLATAH", "PDM", "SLAV", "ENERGY"}
	var rows [][]string
	number := func(v float64, digits int) string { return strconv.FormatFloat(v, 'f', digits, 64) }
	for i := range doc.Reports {
		r := &doc.Reports[i]
		under := 0.0
		for _, p := range []string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"} { // in order: a sum must not depend on a map's
			under += r.UnderServed[p]
		}
		rows = append(rows, []string{
			r.Policy, number(r.OverloadHostMinutes, 0) + " min", number(under, 0) + " min", strconv.Itoa(r.Moves),
			number(100*r.ThrashShare, 1) + "%", formatSize(int64(r.BytesMoved)), number(r.BlackoutS, 0) + " s", number(r.HostsUsedMean, 0), number(r.HostHours, 0),
			number(r.Cost, 0), strconv.Itoa(r.Vetoed), strconv.Itoa(r.BeyondRoom), number(100*r.SLATAH, 2) + "%", number(100*r.PDM, 3) + "%", fmt.Sprintf("%.2g", r.SLAV), number(r.EnergyKWh, 1) + " kWh",
		})
	}
	if err := printTable(cmd.OutOrStdout(), header, rows); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "\n%s", sim.Plot(doc.Reports, 72))
	if c := doc.Comparison; c != nil {
		fmt.Fprintf(cmd.OutOrStdout(), "\ntranship avoids %.0f %% of the overload that oracle avoids against reactive, with %.2f of its moves and %.2f of its host-hours\n",
			100*c.AvoidedShare, c.MovesRatio, c.HoursRatio)
	}
	return nil
}
