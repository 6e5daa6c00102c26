package main

import (
	"encoding/json"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newInspectCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect SHARD",
		Short: "Show everything about a shard, as JSON",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Shards.Inspect(cmd.Context(), connect.NewRequest(&v1.InspectRequest{Namespace: g.namespace, Name: args[0]}))
			if err != nil {
				return err
			}
			spec := json.RawMessage(resp.Msg.GetSpecJson())
			if len(spec) == 0 {
				spec = json.RawMessage("null")
			}
			return printJSON(cmd.OutOrStdout(), control.InspectDocument{
				Document: control.NewDocument(), Shard: control.ShardOf(resp.Msg.GetShard()), Spec: spec,
			})
		},
	}
}
