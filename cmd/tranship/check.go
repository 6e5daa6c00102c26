package main

import (
	"fmt"
	"io"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newCheckCommand(g *globals) *cobra.Command {
	var mode string
	cmd := &cobra.Command{
		Use:   "check SHARD NODE",
		Short: "Say whether a shard could move, every reason why not, and what to do",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.acting()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Migrations.Check(cmd.Context(), connect.NewRequest(&v1.CheckRequest{
				Namespace: g.namespace, Shard: args[0], Node: args[1], ForceNamespace: g.forceNamespace, Mode: mode,
			}))
			if err != nil {
				return err
			}
			doc := control.CheckDocument{
				Document: control.NewDocument(), Namespace: g.namespace, Shard: args[0], Node: args[1],
				Findings: control.FindingsOf(resp.Msg.GetFindings()),
			}
			doc.Movable = !control.Refused(doc.Findings)
			if g.output == outputJSON {
				err = printJSON(cmd.OutOrStdout(), doc)
			} else {
				err = printFindingList(cmd.OutOrStdout(), doc.Findings)
				if err == nil && doc.Movable {
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s can move to %s\n", doc.Shard, doc.Node)
				}
			}
			if err == nil && !doc.Movable {
				err = &exitError{code: exitRefused, err: fmt.Errorf("%s cannot move to %s", doc.Shard, doc.Node)}
			}
			return err
		},
	}
	cmd.Flags().StringVar(&mode, "mode", "precopy", "precopy, postcopy or stop")
	return cmd
}

// printFindingList writes one finding after the other with its advice.
func printFindingList(w io.Writer, findings []control.Finding) error {
	for _, f := range findings {
		level := "refused"
		if f.Warning {
			level = "warning"
		}
		if _, err := fmt.Fprintf(w, "%s  %s: %s\n", level, f.Code, f.Message); err != nil {
			return err
		}
		if f.Advice != "" {
			if _, err := fmt.Fprintf(w, "         → %s\n", f.Advice); err != nil {
				return err
			}
		}
	}
	return nil
}
