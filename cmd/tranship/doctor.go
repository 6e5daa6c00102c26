package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/tranship/tranship/checkpoint/track"
	"github.com/tranship/tranship/daemon/profiler"
	"github.com/tranship/tranship/internal/doctor"
)

// newDoctorCommand examines this machine; it needs no daemon.
func newDoctorCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Say whether this machine can be a host, and what to do about what is missing",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			findings := doctor.Machine{Tracker: track.Probe, Signals: signalSources}.Examine(cmd.Context())
			if err := printFindings(cmd.OutOrStdout(), g.output, findings); err != nil {
				return err
			}
			if !doctor.Healthy(findings) {
				return errors.New("this machine cannot be a host yet: see the lines marked missing")
			}
			return nil
		},
	}
}

// signalSources loads the programs that profile, and removes them again.
func signalSources() []doctor.Signal {
	var tracker error
	if kind, err := track.Probe(); kind == track.None {
		tracker = err
	}
	var out []doctor.Signal
	for _, s := range profiler.Examine(tracker) {
		out = append(out, doctor.Signal{Name: s.Signal.String(), From: s.From, Why: s.Why})
	}
	return out
}

func printFindings(w io.Writer, format string, findings []doctor.Finding) error {
	if format == outputJSON {
		return printJSON(w, struct {
			SchemaVersion int              `json:"schema_version"`
			Healthy       bool             `json:"healthy"`
			Checks        []doctor.Finding `json:"checks"`
		}{1, doctor.Healthy(findings), findings})
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range findings {
		fmt.Fprintf(table, "%s\t%s\t%s\n", f.Level, f.Name, f.Found)
		if f.Do != "" {
			fmt.Fprintf(table, "\t\t→ %s\n", f.Do)
		}
	}
	return table.Flush()
}
