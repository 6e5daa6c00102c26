package main

import (
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

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
			return printNodes(cmd.OutOrStdout(), doc.Nodes)
		},
	}
}

func printNodes(w io.Writer, nodes []control.Node) error {
	var rows [][]string
	for _, n := range nodes {
		name := n.Name
		if n.Self {
			name += " *"
		}
		state := n.State
		if n.Cordoned {
			state += ", cordoned"
		}
		if n.State != control.NodeAlive {
			if n.Membership == control.MemberSuspected {
				state += ", suspected"
			}
			rows = append(rows, []string{name, state, n.Address, orDash(n.Zone), "", "", "", "", "", n.Error})
			continue
		}
		load := "-"
		if n.CPULoad != nil {
			load = strconv.Itoa(int(100**n.CPULoad+0.5)) + "%"
		}
		rows = append(rows, []string{
			name, state, n.Address, orDash(n.Zone), strconv.Itoa(int(n.Shards)), strconv.Itoa(int(n.CPUs)), load,
			formatSize(n.MemoryAvailableBytes) + " of " + formatSize(n.MemoryTotalBytes), n.Tracker, n.Versions.Tranship,
		})
	}
	columns := []string{"NAME", "STATE", "ADDRESS", "ZONE", "SHARDS", "CPUS", "LOAD", "MEMORY FREE", "TRACKER", "VERSION"}
	// What nobody has said of any host needs no column.
	if slices.ContainsFunc(nodes, func(n control.Node) bool { return n.CostPerHour > 0 }) {
		columns = append(columns, "COST/H")
		for i, n := range nodes {
			rows[i] = append(rows[i], strconv.FormatFloat(n.CostPerHour, 'g', 6, 64))
		}
	}
	if slices.ContainsFunc(nodes, func(n control.Node) bool { return len(n.Labels) > 0 }) {
		columns = append(columns, "LABELS")
		for i, n := range nodes {
			var labels []string
			for _, k := range slices.Sorted(maps.Keys(n.Labels)) {
				labels = append(labels, k+"="+n.Labels[k])
			}
			rows[i] = append(rows[i], orDash(strings.Join(labels, ",")))
		}
	}
	return printTable(w, columns, rows)
}
