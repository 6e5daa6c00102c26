package main

import (
	"fmt"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newPsCommand(g *globals) *cobra.Command {
	var local, allNamespaces bool
	cmd := &cobra.Command{
		Use:     "ps",
		Aliases: []string{"ls"},
		Short:   "List the pool's shards",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Shards.List(cmd.Context(), connect.NewRequest(&v1.ListShardsRequest{
				Namespace: g.namespace, AllNodes: !local, AllNamespaces: allNamespaces,
			}))
			if err != nil {
				return err
			}
			doc := control.ShardsDocument{
				Document: control.NewDocument(), Shards: []control.Shard{},
				UnreachableNodes: append([]string{}, resp.Msg.GetUnreachableNodes()...),
			}
			for _, s := range resp.Msg.GetShards() {
				doc.Shards = append(doc.Shards, control.ShardOf(s))
			}
			for _, node := range doc.UnreachableNodes {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s does not answer: its shards are missing here\n", node)
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			var rows [][]string
			for _, s := range doc.Shards {
				rows = append(rows, shardRow(s, allNamespaces, time.Now()))
			}
			header := []string{"NAME", "NODE", "STATUS", "ADDRESS", "MEMORY", "AGE", "IMAGE"}
			if allNamespaces {
				header = append([]string{"NAMESPACE"}, header...)
			}
			return printTable(cmd.OutOrStdout(), header, rows)
		},
	}
	cmd.Flags().BoolVar(&local, "local", false, "this host's only")
	cmd.Flags().BoolVarP(&allNamespaces, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

func shardRow(s control.Shard, withNamespace bool, now time.Time) []string {
	status := s.Status
	switch {
	case s.Note != "":
		status += " (" + s.Note + ")"
	case s.MigrationID != "":
		status += " (moving)"
	case s.Status == "stopped":
		status = fmt.Sprintf("stopped (%d)", s.ExitCode)
	}
	address := s.IP
	if address == "" {
		address = s.Network
	}
	memory := "-"
	if s.MemoryUsedBytes > 0 {
		memory = formatSize(s.MemoryUsedBytes)
	}
	if s.MemoryLimitBytes > 0 {
		memory += " / " + formatSize(s.MemoryLimitBytes)
	}
	row := []string{s.Name, s.Node, status, address, memory, formatAge(now.Sub(s.CreatedAt)), s.Image}
	if withNamespace {
		row = append([]string{s.Namespace}, row...)
	}
	return row
}

// formatAge keeps the largest unit: nobody asks for the seconds of a day.
func formatAge(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
