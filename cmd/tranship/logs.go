package main

import (
	"errors"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newLogsCommand(g *globals) *cobra.Command {
	var follow bool
	var tail int64
	cmd := &cobra.Command{
		Use:   "logs SHARD",
		Short: "Show what a shard wrote to stdout and stderr",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			stream, err := client.Shards.Logs(cmd.Context(), connect.NewRequest(&v1.LogsRequest{
				Namespace: g.namespace, Name: args[0], Follow: follow, Tail: tail,
			}))
			if err != nil {
				return err
			}
			for stream.Receive() {
				if _, err := cmd.OutOrStdout().Write(stream.Msg().GetData()); err != nil {
					return errors.Join(err, stream.Close())
				}
			}
			// Ctrl-C is how following ends.
			if err := stream.Err(); err != nil && (!follow || connect.CodeOf(err) != connect.CodeCanceled) {
				return err
			}
			return nil
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what is written from now on")
	cmd.Flags().Int64Var(&tail, "tail", -1, "the last lines only (default: all)")
	return cmd
}
