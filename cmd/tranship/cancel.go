package main

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newCancelCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "cancel ID",
		Short: "Cancel a migration, and wait until the source runs as if nothing had happened",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Migrations.Cancel(cmd.Context(), connect.NewRequest(&v1.CancelRequest{Id: args[0]}))
			if err != nil {
				return err
			}
			m := control.MigrationOf(resp.Msg.GetMigration())
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), control.MigrationDocument{Document: control.NewDocument(), Migration: m})
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: %s\n", m.ID, m.Outcome)
			return err
		},
	}
}
