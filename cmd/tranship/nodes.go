package main

import (
	"strconv"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newNodesCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "nodes",
		Short: "List the hosts of the pool",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Nodes.ListNodes(cmd.Context(), connect.NewRequest(&v1.ListNodesRequest{}))
			if err != nil {
				return err
			}
			doc := control.NodesDocument{Document: control.NewDocument(), Nodes: []control.Node{}}
			for _, n := range resp.Msg.GetNodes() {
				doc.Nodes = append(doc.Nodes, control.NodeOf(n))
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			var rows [][]string
			for _, n := range doc.Nodes {
				name := n.Name
				if n.Self {
					name += " *"
				}
				if n.State != control.NodeAlive {
					rows = append(rows, []string{name, n.State, n.Address, "", "", "", "", n.Error})
					continue
				}
				rows = append(rows, []string{
					name, n.State, n.Address, strconv.Itoa(int(n.Shards)), strconv.Itoa(int(n.CPUs)),
					formatSize(n.MemoryAvailableBytes) + " of " + formatSize(n.MemoryTotalBytes), n.Tracker, n.Versions.Tranship,
				})
			}
			return printTable(cmd.OutOrStdout(), []string{"NAME", "STATE", "ADDRESS", "SHARDS", "CPUS", "MEMORY FREE", "TRACKER", "VERSION"}, rows)
		},
	}
}
