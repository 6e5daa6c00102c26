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

// version is set by the linker.
var version = "unknown"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string) int {
	root, g := newRoot()
	defer g.release()
	root.SetArgs(args)
	if err := root.ExecuteContext(ctx); err != nil {
		if text := explain(err, g.host); text != "" {
			fmt.Fprintf(os.Stderr, "tranship: %s\n", text)
		}
		return exitCode(err)
	}
	return exitDone
}

func newRoot() (*cobra.Command, *globals) {
	root := &cobra.Command{
		Use:           "tranship",
		Short:         "Move running containers between containerd hosts, live",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	g := bindGlobals(root)
	root.AddCommand(verbs(g)...)
	countUsageErrors(root)
	return root, g
}
