package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/tranship/tranship/daemon/control"
)

// globals are the flags that every verb has.
type globals struct {
	host           string
	namespace      string
	forceNamespace bool
	output         string
	timeout        time.Duration

	release func() // ends the context of --timeout
}

const (
	outputTable = "table"
	outputJSON  = "json"
)

// foreignNamespaces belong to other orchestrators (the daemon refuses them too).
var foreignNamespaces = []string{"k8s.io", "moby"}

func bindGlobals(root *cobra.Command) *globals {
	g := &globals{release: func() {}}
	host := os.Getenv("TRANSHIP_HOST")
	if host == "" {
		host = control.DefaultAddress
	}
	flags := root.PersistentFlags()
	flags.StringVar(&g.host, "host", host, "the daemon's address (TRANSHIP_HOST)")
	flags.StringVarP(&g.namespace, "namespace", "n", control.DefaultNamespace, "containerd's namespace")
	flags.BoolVar(&g.forceNamespace, "force-namespace", false, "act in namespaces of other orchestrators (k8s.io, moby)")
	flags.StringVarP(&g.output, "output", "o", outputTable, "table or json")
	flags.DurationVar(&g.timeout, "timeout", 0, "give up after this time (default: never)")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if g.output != outputTable && g.output != outputJSON {
			return usagef("--output %q: use table or json", g.output)
		}
		if g.timeout < 0 {
			return usagef("--timeout %v is negative", g.timeout)
		}
		if g.timeout > 0 {
			ctx, cancel := context.WithTimeout(cmd.Context(), g.timeout)
			g.release = cancel
			cmd.SetContext(ctx)
		}
		return nil
	}
	return g
}

// verbs are the commands, in the order in which help shows them.
func verbs(g *globals) []*cobra.Command {
	return []*cobra.Command{
		newRunCommand(g), newPsCommand(g), newInspectCommand(g), newLogsCommand(g), newStopCommand(g), newRmCommand(g),
		newCheckCommand(g), newMigrateCommand(g), newCancelCommand(g), newMigrationsCommand(g),
		newNodesCommand(g), newCordonCommand(g), newUncordonCommand(g), newDrainCommand(g), newWorkloadCommand(g), newClusterCommand(g), newTopCommand(g), newForecastCommand(g), newPlanCommand(g), newBacktestCommand(g), newSimulateCommand(g), newDoctorCommand(g), newLabCommand(g), newVersionCommand(g),
	}
}

// client connects to the daemon on behalf of a verb that reads.
func (g *globals) client() (*control.Client, error) {
	c, err := control.NewClient(g.host)
	if err != nil {
		return nil, usagef("%w", err)
	}
	return c, nil
}

// acting is client for a verb that changes something in the namespace.
func (g *globals) acting() (*control.Client, error) {
	if slices.Contains(foreignNamespaces, g.namespace) && !g.forceNamespace {
		return nil, &exitError{code: exitRefused, err: fmt.Errorf(
			"namespace %s belongs to another orchestrator, which would undo this; --force-namespace does it anyway", g.namespace)}
	}
	return g.client()
}

// printJSON writes one document.
func printJSON(w io.Writer, document any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(document)
}

// printTable writes rows under a header.
func printTable(w io.Writer, header []string, rows [][]string) error {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(table, strings.Join(header, "\t"))
	for _, row := range rows {
		fmt.Fprintln(table, strings.Join(row, "\t"))
	}
	return table.Flush()
}

// Exit codes are part of the contract.
const (
	exitDone        = 0
	exitFailed      = 1 // and the source runs
	exitUsage       = 2
	exitRefused     = 3
	exitCancelled   = 4
	exitDeadline    = 5
	exitUnreachable = 6
	exitInDoubt     = 7
)

// exitError is an error with the exit code that it stands for. A nil err has
// been told to the user already.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return &exitError{code: exitUsage, err: fmt.Errorf(format, args...)}
}

// exitCode maps what a verb returned to the contract's codes.
func exitCode(err error) int {
	var exit *exitError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &exit):
		return exit.code
	case errors.Is(err, control.ErrUnreachable):
		return exitUnreachable
	}
	var remote *connect.Error
	if errors.As(err, &remote) {
		switch remote.Code() {
		case connect.CodeInvalidArgument:
			return exitUsage
		case connect.CodePermissionDenied:
			return exitRefused
		case connect.CodeCanceled:
			return exitCancelled
		case connect.CodeDeadlineExceeded:
			return exitDeadline
		case connect.CodeUnavailable:
			return exitUnreachable
		}
		return exitFailed
	}
	switch {
	case errors.Is(err, context.Canceled):
		return exitCancelled
	case errors.Is(err, context.DeadlineExceeded):
		return exitDeadline
	}
	return exitFailed
}

// explain is what the user reads about err: the daemon's words without the
// protocol's, and what to do next.
func explain(err error, host string) string {
	var exit *exitError
	if errors.As(err, &exit) && exit.err == nil {
		return ""
	}
	if errors.Is(err, control.ErrUnreachable) {
		if errors.Is(err, os.ErrPermission) {
			return fmt.Sprintf("no permission for %s: use sudo, or join the group that owns the socket (tranship)", host)
		}
		return fmt.Sprintf("nobody answers at %s: is transhipd running? systemctl start transhipd", host)
	}
	var remote *connect.Error
	if errors.As(err, &remote) {
		switch remote.Code() {
		case connect.CodeCanceled:
			return "cancelled"
		case connect.CodeDeadlineExceeded:
			return "no answer within --timeout"
		}
		return remote.Message()
	}
	return err.Error()
}

// countUsageErrors gives cobra's own complaints (flags, arguments, unknown
// verbs) the exit code of a wrong usage.
func countUsageErrors(cmd *cobra.Command) {
	usage := func(cmd *cobra.Command, err error) error {
		return usagef("%w; see %s --help", err, cmd.CommandPath())
	}
	cmd.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if errors.Is(err, pflag.ErrHelp) {
			return err
		}
		return usage(cmd, err)
	})
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q", args[0])
			}
			return nil
		}
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	}
	if check := cmd.Args; check != nil {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if err := check(cmd, args); err != nil {
				return usage(cmd, err)
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		countUsageErrors(sub)
	}
}
