package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newMigrationsCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "migrations [ID]",
		Short: "List migrations under way and ended, or show one",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			req := &v1.ListMigrationsRequest{}
			if len(args) == 1 {
				req.Id = args[0]
			}
			resp, err := client.Migrations.ListMigrations(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			list := []control.Migration{}
			for _, m := range resp.Msg.GetMigrations() {
				list = append(list, control.MigrationOf(m))
			}
			if req.Id != "" {
				if len(list) == 0 {
					return fmt.Errorf("this host knows no migration %s", req.Id)
				}
				return printMigration(cmd.OutOrStdout(), g.output, control.MigrationDocument{Document: control.NewDocument(), Migration: list[0]})
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), control.MigrationsDocument{Document: control.NewDocument(), Migrations: list})
			}
			var rows [][]string
			for _, m := range list {
				rows = append(rows, []string{
					m.ID, m.Shard, m.From, m.To, m.Mode, m.Outcome, m.Phase,
					m.StartedAt.Local().Format("2006-01-02 15:04:05"), fmt.Sprintf("%.0fms", m.BlackoutMs),
				})
			}
			return printTable(cmd.OutOrStdout(), []string{"ID", "SHARD", "FROM", "TO", "MODE", "OUTCOME", "PHASE", "STARTED", "BLACKOUT"}, rows)
		},
	}
	cmd.AddCommand(newResolveCommand(g))
	return cmd
}

// newResolveCommand is hidden: only a migration in doubt names it.
func newResolveCommand(g *globals) *cobra.Command {
	var keep string
	cmd := &cobra.Command{
		Use:    "resolve ID --keep here|there",
		Short:  "Settle a migration in doubt; the other copy must not run any more",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if keep != "here" && keep != "there" {
				return usagef("--keep: say whether the copy here or there stays")
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Migrations.Resolve(cmd.Context(), connect.NewRequest(&v1.ResolveRequest{Id: args[0], Keep: keep}))
			if err != nil {
				return err
			}
			return printMigration(cmd.OutOrStdout(), g.output, control.MigrationDocument{
				Document: control.NewDocument(), Migration: control.MigrationOf(resp.Msg.GetMigration()),
			})
		},
	}
	cmd.Flags().StringVar(&keep, "keep", "", "here or there")
	return cmd
}

// printMigration writes one migration for a person or a program.
func printMigration(w io.Writer, output string, doc control.MigrationDocument) error {
	if output == outputJSON {
		return printJSON(w, doc)
	}
	m := doc.Migration
	fmt.Fprintf(w, "%s: %s %s → %s, %s", m.ID, m.Shard, m.From, m.To, m.Outcome)
	if m.Reason != "" {
		fmt.Fprintf(w, ": %s", m.Reason)
	}
	fmt.Fprintln(w)
	fmt.Fprintf(w, "blackout %.1fms, total %.0fms, %d pages, %s read, %s sent, tracker %s\n",
		m.BlackoutMs, m.TotalMs, m.Pages, formatSize(m.BytesRaw), formatSize(m.BytesSent), orDash(m.Tracker))
	for _, p := range m.Phases {
		fmt.Fprintf(w, "  %-14s %8.1fms\n", p.Name, p.Ms)
	}
	if err := printBlackout(w, m); err != nil {
		return err
	}
	if len(m.Rounds) == 0 {
		return nil
	}
	var rows [][]string
	for _, r := range m.Rounds {
		slowed := "-"
		if r.ThrottledCPUs > 0 {
			slowed = fmt.Sprintf("to %.2g CPU", r.ThrottledCPUs)
		}
		rows = append(rows, []string{fmt.Sprint(r.N), fmt.Sprint(r.Pages), formatSize(r.BytesRaw), formatSize(r.BytesSent), fmt.Sprintf("%.1fms", r.Ms), slowed})
	}
	return printTable(w, []string{"ROUND", "PAGES", "READ", "SENT", "TIME", "SLOWED"}, rows)
}

// printBlackout shows where the blackout went: the steps, which may overlap, in
// the order in which they began, each with its parts.
func printBlackout(w io.Writer, m control.Migration) error {
	if len(m.Blackout) == 0 {
		return nil
	}
	steps := slices.Clone(m.Blackout)
	slices.SortStableFunc(steps, func(a, b control.Step) int { return cmp.Compare(a.AtMs, b.AtMs) })
	var rows [][]string
	add := func(s control.Step, indent string) {
		at := "-"
		if s.AtMs >= 0 {
			at = fmt.Sprintf("%.1fms", s.AtMs)
		}
		rows = append(rows, []string{indent + s.Name, orDash(s.Node), at, fmt.Sprintf("%.1fms", s.Ms)})
	}
	for _, s := range steps {
		if s.Of != "" {
			continue
		}
		add(s, "")
		for _, part := range steps {
			if part.Of == s.Name && part.Node == s.Node {
				add(part, "  ")
			}
		}
	}
	fmt.Fprintln(w)
	if err := printTable(w, []string{"BLACKOUT", "NODE", "AT", "TIME"}, rows); err != nil {
		return err
	}
	if m.ClockErrorMs > 0 {
		fmt.Fprintf(w, "the two clocks agree within %.1fms\n", m.ClockErrorMs)
	}
	fmt.Fprintln(w)
	return nil
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
