package main

import (
	"fmt"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newRunCommand(g *globals) *cobra.Command {
	var memory string
	var mounts, labels []string
	req := &v1.RunRequest{}
	cmd := &cobra.Command{
		Use:   "run [flags] IMAGE [COMMAND…]",
		Short: "Start a shard with an address that moves with it",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.acting()
			if err != nil {
				return err
			}
			defer client.Close()
			req.Namespace, req.ForceNamespace = g.namespace, g.forceNamespace
			req.Image, req.Command = args[0], args[1:]
			if memory != "" {
				if req.MemoryLimitBytes, err = parseSize(memory); err != nil {
					return usagef("--memory: %w", err)
				}
			}
			for _, s := range mounts {
				m, err := parseMount(s)
				if err != nil {
					return usagef("--mount %s: %w", s, err)
				}
				req.Mounts = append(req.Mounts, m)
			}
			if req.Labels, err = parseLabels(labels); err != nil {
				return usagef("--label: %w", err)
			}
			resp, err := client.Shards.Run(cmd.Context(), connect.NewRequest(req))
			if err != nil {
				return err
			}
			shard := control.ShardOf(resp.Msg.GetShard())
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), control.ShardDocument{Document: control.NewDocument(), Shard: shard})
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), shard.Name)
			return err
		},
	}
	flags := cmd.Flags()
	flags.SetInterspersed(false) // flags behind IMAGE are the command's
	flags.StringVar(&req.Name, "name", "", "the shard's name and hostname (default: chosen)")
	flags.StringVar(&req.Node, "node", "", "this host's name; other hosts are reached with --host")
	flags.StringVar(&req.Ip, "ip", "", "its address, from the pool's subnet (default: the next free one)")
	flags.StringVar(&memory, "memory", "", "memory limit, like 512m (default: none)")
	flags.Float64Var(&req.Cpus, "cpus", 0, "CPU limit, like 1.5 (default: none)")
	flags.StringArrayVar(&req.Env, "env", nil, "environment, KEY=VALUE; may be repeated")
	flags.StringArrayVar(&mounts, "mount", nil, "bind mount, src=PATH,dst=PATH[,ro][,policy=shared|copy]; may be repeated")
	flags.StringVar(&req.Network, "net", "shard", "shard, host or none")
	flags.StringArrayVar(&labels, "label", nil, "label, KEY=VALUE; may be repeated")
	return cmd
}

// parseMount reads src=/a,dst=/b,ro,policy=shared.
func parseMount(s string) (*v1.Mount, error) {
	m := &v1.Mount{}
	for _, field := range strings.Split(s, ",") {
		key, value, hasValue := strings.Cut(field, "=")
		switch {
		case (key == "src" || key == "source") && hasValue:
			m.Source = value
		case (key == "dst" || key == "destination" || key == "target") && hasValue:
			m.Destination = value
		case (key == "ro" || key == "readonly") && !hasValue:
			m.ReadOnly = true
		case key == "policy" && (value == "shared" || value == "copy"):
			m.Policy = value
		case key == "type" && value == "bind":
		default:
			return nil, fmt.Errorf("%q is not one of src=, dst=, ro, policy=shared, policy=copy", field)
		}
	}
	if m.Source == "" || m.Destination == "" {
		return nil, fmt.Errorf("src= and dst= are both needed")
	}
	return m, nil
}

func parseLabels(pairs []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, pair := range pairs {
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("%q is not KEY=VALUE", pair)
		}
		labels[key] = value
	}
	return labels, nil
}
