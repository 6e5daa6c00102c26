package main

import (
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

func newVersionCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the versions of this command, the daemon and what it works with",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			doc := control.VersionDocument{Document: control.NewDocument(), Client: version}
			resp, err := client.Nodes.Version(cmd.Context(), connect.NewRequest(&v1.VersionRequest{}))
			// A daemon that does not run is no reason not to say one's own version.
			if err != nil && !errors.Is(err, control.ErrUnreachable) {
				return err
			}
			if err == nil {
				v := control.VersionsOf(resp.Msg.GetVersions())
				doc.Node, doc.Daemon = resp.Msg.GetNode(), &v
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			fmt.Fprintf(cmd.OutOrStdout(), "tranship    %s\n", doc.Client)
			if doc.Daemon == nil {
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "transhipd   does not run at %s\n", g.host)
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "transhipd   %s on %s\nprotocol    %d\nkernel      %s %s\ncontainerd  %s\nrunc        %s\ncriu        %s\n",
				doc.Daemon.Tranship, doc.Node, doc.Daemon.Protocol, doc.Daemon.Kernel, doc.Daemon.Arch,
				doc.Daemon.Containerd, doc.Daemon.Runc, doc.Daemon.CRIU)
			return err
		},
	}
}
