package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/tranship/tranship/integration/lab"
)

// newLabCommand is the lab: hosts out of namespaces on this machine.
func newLabCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "lab",
		Short: "Hosts out of namespaces on this machine, to try and to test",
	}
	cmd.AddCommand(newLabUp(), newLabDown(), newLabStatus(g), newLabExec(), newLabImage(g), newLabInit())
	return cmd
}

func newLabUp() *cobra.Command {
	var opts lab.Options
	var bandwidth string
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Bring up the lab, or what is missing of it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if bandwidth != "" {
				rate, err := lab.ParseBitRate(bandwidth)
				if err != nil {
					return usagef("%w", err)
				}
				opts.Bandwidth = rate
			}
			opts.Progress = progressLines(cmd.ErrOrStderr())
			_, err := lab.Up(cmd.Context(), opts)
			return err
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&opts.Hosts, "hosts", 2, "hosts in the pool")
	flags.StringVar(&bandwidth, "bandwidth", "", "limit of each host's link, like 1gbit (default: none)")
	flags.BoolVar(&opts.Etcd, "etcd", false, "run an etcd on the client host")
	flags.BoolVar(&opts.NoDaemon, "no-daemon", false, "containerd only, without transhipd")
	_ = flags.MarkHidden("no-daemon")
	return cmd
}

// progressLines writes whole lines, whoever calls it at the same time.
func progressLines(w io.Writer) func(string) {
	var mu sync.Mutex
	return func(line string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintln(w, line)
	}
}

func newLabDown() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "End the lab and remove every trace of it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// An interrupted clean-up would leave what it is there to remove.
			return lab.Down(context.WithoutCancel(cmd.Context()))
		},
	}
}

func newLabStatus(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "What of the lab runs",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			st := lab.Status{SchemaVersion: 1, Hosts: []lab.HostStatus{}}
			l, err := lab.Open()
			switch {
			case err == nil:
				st = l.Status(cmd.Context())
			case !errors.Is(err, lab.ErrDown):
				return err
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), st)
			}
			return printLabStatus(cmd.OutOrStdout(), st)
		},
	}
}

func printLabStatus(w io.Writer, st lab.Status) error {
	if !st.Up {
		_, err := fmt.Fprintln(w, "no lab is up")
		return err
	}
	var rows [][]string
	for _, h := range st.Hosts {
		service := func(name string) string {
			s, ok := h.Services[name]
			switch {
			case !ok:
				return "-"
			case s.Answers:
				return fmt.Sprint(s.PID)
			case s.Running:
				return fmt.Sprintf("%d (does not answer)", s.PID)
			}
			return "down"
		}
		rows = append(rows, []string{h.Name, strings.Join(h.Addresses, ","), strconv.Itoa(h.PID), service("containerd"), service("transhipd")})
	}
	return printTable(w, []string{"HOST", "ADDRESSES", "PID", "CONTAINERD", "TRANSHIPD"}, rows)
}

func newLabExec() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec HOST -- CMD [ARG…]",
		Short: "Run a program in a host",
		Long: "Run a program in a host, on this terminal or these pipes. Signals reach it and its exit code is returned;\n" +
			"the build's binaries, ctr and criu are on its PATH.",
		Args: cobra.MinimumNArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, words := args[0], args[1:]
			if words[0] == "--" {
				words = words[1:]
			}
			if len(words) == 0 {
				return usagef("which program? tranship lab exec %s -- CMD", name)
			}
			l, err := lab.Open()
			if err != nil {
				return err
			}
			h, err := l.Host(name)
			if err != nil {
				return usagef("%w", err)
			}
			// Signals are for the program, so they must not end this one; --timeout
			// does.
			ctx := context.WithoutCancel(cmd.Context())
			if end, ok := cmd.Context().Deadline(); ok {
				var cancel context.CancelFunc
				ctx, cancel = context.WithDeadline(ctx, end)
				defer cancel()
			}
			code, err := h.Run(ctx, words)
			if code == 0 {
				return err
			}
			// The program's own exit code, not one of tranship's meanings.
			return &exitError{code: code, err: err}
		},
	}
	// What follows the host is the program's, flags included.
	cmd.Flags().SetInterspersed(false)
	return cmd
}

// newLabInit is how the lab starts the first process of a host.
func newLabInit() *cobra.Command {
	return &cobra.Command{
		Use:    lab.InitVerb + " SPEC",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE:   func(_ *cobra.Command, args []string) error { return lab.Init(args[0]) },
	}
}
