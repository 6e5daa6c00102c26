// Command transhipd is the daemon of a tranship host: flags → Config → daemon.Run.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/tranship/tranship/checkpoint/lazypages"
	"github.com/tranship/tranship/daemon"
)

// version is set by the linker.
var version = "unknown"

// memoryLimit makes the collector work harder before the daemon takes more than
// 256 MiB from the shards that it moves; QUIC's windows alone may hold 64.
const memoryLimit = 192 << 20

func main() {
	// The daemon starts itself again as page server: a process of its own, whose
	// descriptors keep a half-filled shard alive when the daemon dies.
	if len(os.Args) > 1 && os.Args[1] == daemon.PageServerCommand {
		os.Exit(lazypages.Main(os.Args[2:]))
	}
	os.Exit(run())
}

func run() int {
	config := flag.String("config", daemon.DefaultConfigPath, "configuration file")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: transhipd [--config FILE]\n\nThe daemon of a tranship host. Options:\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if *showVersion {
		fmt.Println("transhipd", version)
		return 0
	}
	if flag.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "transhipd: unexpected argument %q\n", flag.Arg(0))
		return 2
	}
	cfg, err := daemon.LoadConfig(*config)
	if err != nil {
		fmt.Fprintf(os.Stderr, "transhipd: %v\n", err)
		return 2
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(memoryLimit)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := daemon.Run(ctx, cfg, version); err != nil {
		fmt.Fprintf(os.Stderr, "transhipd: %v\n", err)
		return 1
	}
	return 0
}
