// Command tranship is the command line of a tranship host: it speaks to the
// local transhipd over a unix socket, and brings up the lab. One file a verb.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string) int {
	root := newRoot()
	root.SetArgs(args)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "tranship: %v\n", err)
		return exitCode(err)
	}
	return exitDone
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "tranship",
		Short:         "Move running containers between containerd hosts, live",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	g := bindGlobals(root)
	root.AddCommand(verbs(g)...)
	return root
}
