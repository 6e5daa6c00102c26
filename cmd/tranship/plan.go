package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newPlanCommand(g *globals) *cobra.Command {
	var (
		history bool
		since   time.Duration
	)
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what this host would move or resize now, and why; what it decided before",
		Long: `Show what the host's last planning round came to: the probability that the host is
overloaded, by how far ahead; what it moves, resizes or leaves, each with its
reason; and the room that it keeps for shards of other hosts. With --history,
every decision that was kept, taken or not, the newest first.

Whether a decision is carried out is for the autopilot to say: off, advise (the
default) or on, in the daemon's configuration or, for one shard, by the label
tranship.io/autopilot.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if since < 0 || since > 0 && !history {
				return usagef("--since is how far --history goes back, and not negative")
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			if history {
				req := &v1.DecisionsRequest{}
				if since > 0 {
					req.SinceUnixMs = time.Now().Add(-since).UnixMilli()
				}
				resp, err := client.Balance.Decisions(cmd.Context(), connect.NewRequest(req))
				if err != nil {
					return noPlans(err)
				}
				list := control.DecisionsOf(resp.Msg.GetDecisions())
				if g.output == outputJSON {
					return printJSON(cmd.OutOrStdout(), control.HistoryDocument{Document: control.NewDocument(), Decisions: list})
				}
				return printHistory(cmd.OutOrStdout(), list)
			}
			resp, err := client.Balance.Plan(cmd.Context(), connect.NewRequest(&v1.PlanRequest{}))
			if err != nil {
				return noPlans(err)
			}
			doc := control.PlanOf(resp.Msg)
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			printPlan(cmd.OutOrStdout(), &doc)
			return nil
		},
	}
	cmd.Flags().BoolVar(&history, "history", false, "show what was decided before")
	cmd.Flags().DurationVar(&since, "since", 0, "with --history: how far back (default: all that is kept)")
	return cmd
}

// noPlans explains a daemon that does not serve plans.
func noPlans(err error) error {
	if code := connect.CodeOf(err); code == connect.CodeUnimplemented || code == connect.CodeNotFound {
		return fmt.Errorf("this host plans nothing: profiles are off or failed to start; the log of transhipd says why")
	}
	return err
}

func printPlan(w io.Writer, doc *control.PlanDocument) {
	fmt.Fprintf(w, "%s: %d shards, autopilot %s, a round every %.0fs", doc.Node, doc.Shards, doc.Autopilot, doc.EveryS)
	if doc.At == nil {
		fmt.Fprintln(w, "; none has ended yet")
		return
	}
	fmt.Fprintf(w, ", the last at %s\n", doc.At.Local().Format("15:04:05"))
	if doc.Trouble != "" {
		fmt.Fprintf(w, "no plan: %s\n", doc.Trouble)
	}
	var spans []string
	for _, s := range doc.Overload {
		spans = append(spans, fmt.Sprintf("%.2f within %s", s.Probability, shortDuration(s.WithinS)))
	}
	fmt.Fprintf(w, "probability of overload: %s; expected loss %.0f s, weighted by priority\n", strings.Join(spans, ", "), doc.Loss)
	if len(doc.Decisions) == 0 {
		fmt.Fprintln(w, "nothing to do")
	}
	for i := range doc.Decisions {
		d := &doc.Decisions[i]
		fmt.Fprintf(w, "\n[%s] %s\n", d.Outcome, d.Words)
		if d.Detail != "" {
			fmt.Fprintf(w, "  %s\n", d.Detail)
		}
		fmt.Fprintf(w, "  since %s, %d rounds\n", d.At.Local().Format("15:04:05"), d.Rounds)
	}
	for _, h := range doc.Held {
		fmt.Fprintf(w, "\nroom is kept for %s from %s (%s) until %s\n", h.Shard, h.From, h.Reason, h.Expires.Local().Format("15:04:05"))
	}
	for _, f := range doc.Faults {
		fmt.Fprintf(w, "\n%s %s\n", f.Node, f.Why)
	}
}

// shortDuration is 10m or 1h.
func shortDuration(seconds float64) string {
	s := time.Duration(seconds * float64(time.Second)).String()
	if t, ok := strings.CutSuffix(s, "m0s"); ok {
		s = t + "m"
	}
	if t, ok := strings.CutSuffix(s, "h0m"); ok {
		s = t + "h"
	}
	return s
}

func printHistory(w io.Writer, list []control.Decision) error {
	var rows [][]string
	for _, d := range list {
		why := d.Words
		if d.Detail != "" {
			why += " — " + d.Detail
		}
		if d.Real != nil {
			why += fmt.Sprintf(" — really %s in %.1fs, blackout %.0fms", formatSize(int64(d.Real.Bytes)), d.Real.TookMs/1e3, d.Real.BlackoutMs)
		}
		rows = append(rows, []string{d.At.Local().Format("2006-01-02 15:04:05"), fmt.Sprint(d.Rounds), d.Outcome, d.Kind, orDash(d.Shard), orDash(d.To), why})
	}
	return printTable(w, []string{"WHEN", "ROUNDS", "OUTCOME", "WHAT", "SHARD", "TO", "WHY"}, rows)
}
