package main

import (
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newRmCommand(g *globals) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm SHARD…",
		Short: "Remove stopped shards with their files, address and log",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.acting()
			if err != nil {
				return err
			}
			defer client.Close()
			// One that cannot be removed does not keep the others.
			var failed error
			for _, name := range args {
				_, err := client.Shards.Remove(cmd.Context(), connect.NewRequest(&v1.RemoveRequest{
					Namespace: g.namespace, Name: name, Force: force, ForceNamespace: g.forceNamespace,
				}))
				if err != nil && failed != nil {
					fmt.Fprintln(cmd.ErrOrStderr(), "tranship:", explain(failed, g.host))
				}
				if err != nil {
					failed = err
				}
			}
			return failed
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "running ones too")
	return cmd
}
