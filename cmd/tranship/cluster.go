package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/peers/cluster"
	"github.com/tranship/tranship/daemon/peers/pki"
)

const (
	defaultConfig = "/etc/tranship/config.toml"
	defaultPKI    = "/etc/tranship/pki"
	// peerPort is that of the peer API, and of joining.
	peerPort = "7443"
)

func newClusterCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "cluster", Short: "Make a cluster, let hosts join it, take them out"}
	cmd.AddCommand(newClusterInit(g), newClusterToken(g), newClusterJoin(g), newClusterLeave(g), newClusterRevoke(g))
	return cmd
}

// hostFiles are what init and join find and make on a host whose daemon need not
// run.
type hostFiles struct {
	config, pki  string
	name, listen string

	gossip string
}

func (f *hostFiles) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", defaultConfig, "transhipd's configuration; made when it is missing")
	cmd.Flags().StringVar(&f.pki, "pki", defaultPKI, "where the certificate goes")
	cmd.Flags().StringVar(&f.name, "name", "", "this host's name in the pool (default: the configuration's, else the host's)")
	cmd.Flags().StringVar(&f.listen, "listen", "", "ADDRESS:PORT that other hosts reach this one at, if the configuration is missing")
}

// complete reads the configuration, of which these keys matter here.
func (f *hostFiles) complete() (fresh bool, err error) {
	var c struct {
		Node string
		Peer struct{ Listen, Advertise string }
		Clus struct{ Gossip string } `toml:"cluster"`
	}
	raw, err := os.ReadFile(f.config)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		fresh = true
	case err != nil:
		return false, err
	default:
		if err := toml.Unmarshal(raw, &c); err != nil {
			return false, fmt.Errorf("configuration %s: %w", f.config, err)
		}
	}
	if c.Node != "" && f.name != "" && c.Node != f.name {
		return false, usagef("--name %s: %s calls this host %s", f.name, f.config, c.Node)
	}
	if f.name == "" {
		f.name = c.Node
	}
	if f.name == "" {
		host, err := os.Hostname()
		if err != nil {
			return false, err
		}
		f.name = strings.ToLower(host)
	}
	if err := pki.CheckName(f.name); err != nil {
		return false, usagef("%w; choose one with --name", err)
	}
	if c.Peer.Advertise != "" {
		c.Peer.Listen = c.Peer.Advertise
	}
	if !fresh && c.Peer.Listen == "" {
		return false, usagef("%s has no peer.listen: set the ADDRESS:PORT that other hosts reach this one at", f.config)
	}
	if !fresh && f.listen != "" && f.listen != c.Peer.Listen {
		return false, usagef("--listen %s: %s says %s", f.listen, f.config, c.Peer.Listen)
	}
	if f.listen == "" {
		f.listen = c.Peer.Listen
	}
	at, err := netip.ParseAddrPort(f.listen)
	if err != nil || at.Addr().IsUnspecified() || at.Port() == 0 {
		return false, usagef("--listen %q: give the ADDRESS:PORT that other hosts reach this one at, like 192.0.2.11:%s", f.listen, peerPort)
	}
	if f.gossip = c.Clus.Gossip; f.gossip == "" {
		f.gossip = netip.AddrPortFrom(at.Addr(), at.Port()+1).String()
	}
	return fresh, nil
}

// writeConfig makes the smallest configuration that there is.
func (f *hostFiles) writeConfig() error {
	if err := os.MkdirAll(filepath.Dir(f.config), 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("node = %q\n\n[peer]\nlisten = %q     # UDP: control and pages; TCP, with the CA's key: joining hosts\n", f.name, f.listen)
	return pki.Replace(f.config, []byte(text), 0o644)
}

// report prints what a host is now.
func (f *hostFiles) report(cmd *cobra.Command, g *globals, authority, next string) error {
	cert, err := pki.ReadCert(filepath.Join(f.pki, pki.CertFile))
	if err != nil {
		return err
	}
	host, err := pki.IdentityOf(cert)
	if err != nil {
		return err
	}
	if g.output == outputJSON {
		return printJSON(cmd.OutOrStdout(), control.ClusterDocument{Document: control.NewDocument(), Node: host.Name, ID: host.ID, Authority: authority})
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", next)
	return err
}

func newClusterInit(g *globals) *cobra.Command {
	var f hostFiles
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a cluster with this host as its first, which keeps the CA's key",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fresh, err := f.complete()
			if err != nil {
				return err
			}
			if have, err := cluster.Joined(f.pki); err != nil {
				return err
			} else if have {
				return fmt.Errorf("%s has the certificate of a cluster already", f.pki)
			}
			if _, err := cluster.Found(f.pki, f.name, cluster.Seed{Name: f.name, Address: f.listen, Gossip: f.gossip}); err != nil {
				return err
			}
			if fresh {
				if err := f.writeConfig(); err != nil {
					return err
				}
			}
			return f.report(cmd, g, f.name, fmt.Sprintf(
				"%s is the first host of a new cluster; its CA's key is %s: keep a copy of it in a safe place.\nNext: start transhipd (systemctl restart transhipd), then for each other host: tranship cluster token",
				f.name, filepath.Join(f.pki, pki.CAKeyFile)))
		},
	}
	f.flags(cmd)
	return cmd
}

func newClusterToken(g *globals) *cobra.Command {
	ttl := cluster.DefaultTokenTTL
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Make a token with which one host can join, once, soon",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ttl < time.Second || ttl > cluster.MaxTokenTTL {
				return usagef("--ttl %v is not between 1s and %v", ttl, cluster.MaxTokenTTL)
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Cluster.Token(cmd.Context(), connect.NewRequest(&v1.TokenRequest{TtlMs: ttl.Milliseconds()}))
			if err != nil {
				return err
			}
			m := resp.Msg
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), control.TokenDocument{
					Document: control.NewDocument(), Token: m.GetToken(), ExpiresAt: time.UnixMilli(m.GetExpiresUnixMs()).UTC(), Address: m.GetAddress(),
				})
			}
			fmt.Fprintf(cmd.ErrOrStderr(), "Within %v, on the host that is to join:\n  tranship cluster join %s --token TOKEN\n", ttl, m.GetAddress())
			_, err = fmt.Fprintln(cmd.OutOrStdout(), m.GetToken())
			return err
		},
	}
	cmd.Flags().DurationVar(&ttl, "ttl", ttl, "how long it is good")
	return cmd
}

func newClusterJoin(g *globals) *cobra.Command {
	var f hostFiles
	var token string
	cmd := &cobra.Command{
		Use:   "join ADDRESS[:PORT] --token TOKEN",
		Short: "Make this host a member of the token's cluster",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			fresh, err := f.complete()
			if err != nil {
				return err
			}
			if token == "-" { // so that it stands in no process list
				if _, err := fmt.Fscan(cmd.InOrStdin(), &token); err != nil {
					return usagef("--token -: %w", err)
				}
			}
			if _, err := cluster.ParseToken(token); err != nil {
				return usagef("--token: %w", err)
			}
			address := args[0]
			if _, _, err := net.SplitHostPort(address); err != nil {
				address = net.JoinHostPort(strings.Trim(address, "[]"), peerPort)
			}
			joined, err := cluster.Join(cmd.Context(), address, token, f.name, f.pki)
			if err != nil {
				return joinError(err)
			}
			if fresh {
				if err := f.writeConfig(); err != nil {
					return err
				}
			}
			if s := joined.Skew.Abs(); s > cluster.MaxSkew {
				fmt.Fprintf(cmd.ErrOrStderr(), "tranship: the clocks of this host and %s are %v apart; shards cannot move between them until they are synchronised (NTP)\n",
					joined.Authority, s.Round(time.Second))
			}
			return f.report(cmd, g, joined.Authority, f.name+" has joined.\nNext: start transhipd (systemctl restart transhipd)")
		},
	}
	f.flags(cmd)
	cmd.Flags().StringVar(&token, "token", "", "what tranship cluster token printed, or - to read it from standard input")
	return cmd
}

// joinError gives what the other host, or nobody, said its exit code.
func joinError(err error) error {
	var no *cluster.RefusedError
	var op *net.OpError
	switch {
	case errors.As(err, &no), errors.Is(err, cluster.ErrWrongCA):
		return &exitError{code: exitRefused, err: err}
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.As(err, &op):
		return &exitError{code: exitUnreachable, err: err}
	}
	return err
}

func newClusterLeave(g *globals) *cobra.Command {
	req := &v1.LeaveRequest{}
	cmd := &cobra.Command{
		Use:   "leave",
		Short: "Take this host out of its cluster; drain it first",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			who, err := client.Nodes.Version(cmd.Context(), connect.NewRequest(&v1.VersionRequest{}))
			if err != nil {
				return err
			}
			if _, err := client.Cluster.Leave(cmd.Context(), connect.NewRequest(req)); err != nil {
				return err
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), control.ClusterDocument{Document: control.NewDocument(), Node: who.Msg.GetNode()})
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s has left; its shards run on, and cannot move\n", who.Msg.GetNode())
			return err
		},
	}
	cmd.Flags().BoolVar(&req.Force, "force", false, "even if shards run here, or the host with the CA's key does not answer")
	return cmd
}

func newClusterRevoke(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke NODE",
		Short: "Shut a host that is lost out of the cluster, for good",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			resp, err := client.Cluster.Revoke(cmd.Context(), connect.NewRequest(&v1.RevokeRequest{Node: args[0]}))
			if err != nil {
				return err
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), control.RevokeDocument{
					Document: control.NewDocument(), Node: args[0], Told: append([]string{}, resp.Msg.GetTold()...), NotTold: append([]string{}, resp.Msg.GetNotTold()...),
				})
			}
			fmt.Fprintf(cmd.OutOrStdout(), "%s is shut out; %d other hosts know it\n", args[0], len(resp.Msg.GetTold()))
			if late := resp.Msg.GetNotTold(); len(late) > 0 {
				fmt.Fprintf(cmd.ErrOrStderr(), "tranship: not reached, and told as soon as they answer: %s\n", strings.Join(late, ", "))
			}
			return nil
		},
	}
}
