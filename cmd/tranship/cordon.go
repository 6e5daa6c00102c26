package main

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newCordonCommand(g *globals) *cobra.Command {
	return cordonVerb(g, "cordon NODE", "Keep shards from moving to a host", false)
}

func newUncordonCommand(g *globals) *cobra.Command {
	return cordonVerb(g, "uncordon NODE", "Let shards move to a host again", true)
}

func cordonVerb(g *globals, use, short string, off bool) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Nodes.Cordon(cmd.Context(), connect.NewRequest(&v1.CordonRequest{Node: args[0], Off: off}))
			if err != nil {
				return err
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), control.CordonDocument{Document: control.NewDocument(), Node: args[0], Cordoned: resp.Msg.GetCordoned()})
			}
			state := "cordoned"
			if !resp.Msg.GetCordoned() {
				state = "not cordoned"
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is %s\n", args[0], state)
			return err
		},
	}
}
