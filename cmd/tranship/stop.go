package main

import (
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newStopCommand(g *globals) *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:   "stop SHARD",
		Short: "Stop a shard: SIGTERM, then SIGKILL",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.acting()
			if err != nil {
				return err
			}
			defer client.Close()
			_, err = client.Shards.Stop(cmd.Context(), connect.NewRequest(&v1.StopRequest{
				Namespace: g.namespace, Name: args[0], TimeoutMs: grace.Milliseconds(), ForceNamespace: g.forceNamespace,
			}))
			return err
		},
	}
	cmd.Flags().DurationVar(&grace, "time", 10*time.Second, "wait this long before SIGKILL")
	return cmd
}
