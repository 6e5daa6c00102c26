// Command checker is every program that checks a shard, in one static binary:
// servers and clients that run inside a shard, and the clients outside. Each
// prints one line of JSON at its end (and at SIGUSR1) and exits with 1 if
// anything was wrong.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/tranship/tranship/integration/workload/check"
	"github.com/tranship/tranship/integration/workload/holder"
	"github.com/tranship/tranship/integration/workload/httpcheck"
	"github.com/tranship/tranship/integration/workload/memcheck"
	"github.com/tranship/tranship/integration/workload/pgcheck"
	"github.com/tranship/tranship/integration/workload/redischeck"
	"github.com/tranship/tranship/integration/workload/tcpcheck"
	"github.com/tranship/tranship/integration/workload/workcheck"
)

const (
	exitWrong = 1 // the check ran and found something
	exitUsage = 2
)

func main() {
	root := &cobra.Command{
		Use:           "checker",
		Short:         "Programs that check a shard from inside and outside",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(redisCommand(), httpCommand(), tcpCommand(), pgCommand(), memcheckCommand(), workCommand(), holdCommand())
	err := root.ExecuteContext(context.Background())
	switch {
	case errors.Is(err, check.ErrNotOK):
		os.Exit(exitWrong) // the report says what
	case err != nil:
		fmt.Fprintln(os.Stderr, "checker:", err)
		os.Exit(exitUsage)
	}
}

// group is a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short}
	c.AddCommand(commands...)
	return c
}

// verb is a command that runs until it is done, or told to end, and reports.
func verb(use, short string, run func(ctx context.Context, rec *check.Recorder) error) *cobra.Command {
	var duration time.Duration
	c := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			rec := check.NewRecorder(cmd.CommandPath())
			return check.Run(cmd.Context(), os.Stdout, rec, duration, func(ctx context.Context) error { return run(ctx, rec) })
		},
	}
	c.Flags().DurationVar(&duration, "duration", 0, "end after this time; 0 goes on until SIGINT")
	return c
}

// listen opens a listener and says where, which is also how one knows that it is open.
func listen(addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	return l, check.Print(os.Stdout, struct {
		Ready  bool   `json:"ready"`
		Listen string `json:"listen"`
	}{true, l.Addr().String()})
}

func redisCommand() *cobra.Command {
	var o redischeck.RunOptions
	var bytes, overwrite check.Bytes = 256 << 20, 0
	var seed uint64
	common := func(c *cobra.Command) *cobra.Command {
		c.Flags().StringVar(&o.Addr, "addr", "127.0.0.1:6379", "redis")
		c.Flags().DurationVar(&o.Timeout, "timeout", 30*time.Second, "of one request, a blackout included")
		return c
	}
	load := common(verb("load", "Empty the database and fill it with keys", func(ctx context.Context, rec *check.Recorder) error {
		return redischeck.Load(ctx, o.Options, int64(bytes), seed, rec)
	}))
	load.Flags().Var(&bytes, "bytes", "of values")
	load.Flags().Uint64Var(&seed, "seed", 1, "another seed, other values")

	run := common(verb("run", "Write and verify over one connection, then read everything back", func(ctx context.Context, rec *check.Recorder) error {
		o.OverwriteRate = int64(overwrite)
		return redischeck.Run(ctx, o, rec)
	}))
	run.Flags().Var(&overwrite, "overwrite-rate", "bytes of values to replace a second, such as 50MB/s")
	run.Flags().Float64Var(&o.RequestRate, "request-rate", 0, "requests a second; 0 is one after the other without pause")
	run.Flags().BoolVar(&o.NoReconnect, "no-reconnect", false, "end when the connection breaks")
	run.Flags().StringVar(&o.StatePath, "state", "", "write what every key holds to this file, for verify")

	var statePath string
	verify := common(verb("verify", "Read everything back and compare", func(ctx context.Context, rec *check.Recorder) error {
		if statePath == "" {
			return redischeck.Verify(ctx, o.Options, nil, rec)
		}
		state, err := redischeck.LoadState(statePath)
		if err != nil {
			return err
		}
		return redischeck.Verify(ctx, o.Options, &state, rec)
	}))
	verify.Flags().StringVar(&statePath, "state", "", "compare exactly with what run wrote here")
	return group("redis", "Check a redis", load, run, verify)
}

// serveVerb is the verb serve of a group: it ends when it is told to.
func serveVerb(about string, serve func(ctx context.Context) error) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: about,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return serve(ctx)
		},
	}
}

func httpCommand() *cobra.Command {
	var addr string
	serve := serveVerb("Serve HTTP with state in memory, inside a shard", func(ctx context.Context) error {
		l, err := listen(addr)
		if err != nil {
			return err
		}
		return httpcheck.NewServer().Serve(ctx, l)
	})
	serve.Flags().StringVar(&addr, "listen", "0.0.0.0:8080", "address")

	var o httpcheck.Options
	var size check.Bytes = 16 << 10
	run := verb("run", "Check an HTTP server over one keep-alive connection", func(ctx context.Context, rec *check.Recorder) error {
		o.ValueBytes = int(size)
		return httpcheck.Check(ctx, o, rec)
	})
	run.Flags().StringVar(&o.Addr, "addr", "127.0.0.1:8080", "server")
	run.Flags().DurationVar(&o.Timeout, "timeout", 30*time.Second, "of one request, a blackout included")
	run.Flags().IntVar(&o.Keys, "keys", 256, "how many values are kept in the server")
	run.Flags().Var(&size, "value-bytes", "size of a value")
	run.Flags().Float64Var(&o.Rate, "request-rate", 0, "requests a second; 0 is one after the other without pause")
	return group("http", "An HTTP server with state, and its check", serve, run)
}

func tcpCommand() *cobra.Command {
	var addr string
	var o tcpcheck.Options
	var payload check.Bytes = 16 << 10
	common := func(c *cobra.Command) *cobra.Command {
		c.Flags().DurationVar(&o.Timeout, "timeout", 30*time.Second, "without a frame, a blackout included")
		c.Flags().Var(&payload, "payload", "of a frame, at most")
		c.Flags().Float64Var(&o.Rate, "frame-rate", 200, "frames a second in each direction; 0 is as fast as it goes")
		return c
	}
	server := common(verb("server", "Wait for the client, outside", func(ctx context.Context, rec *check.Recorder) error {
		l, err := listen(addr)
		if err != nil {
			return err
		}
		o.Payload = int(payload)
		return tcpcheck.Server(ctx, l, o, rec)
	}))
	server.Flags().StringVar(&addr, "listen", "0.0.0.0:9000", "address")
	client := common(verb("client", "Connect to the server, inside a shard", func(ctx context.Context, rec *check.Recorder) error {
		o.Payload = int(payload)
		return tcpcheck.Client(ctx, addr, o, rec)
	}))
	client.Flags().StringVar(&addr, "addr", "127.0.0.1:9000", "server")
	loop := common(verb("loop", "Both in one process, over loopback", func(ctx context.Context, rec *check.Recorder) error {
		o.Payload = int(payload)
		return tcpcheck.Loop(ctx, o, rec)
	}))
	return group("tcp", "A shard that is a TCP client, and the server for it", server, client, loop)
}

func pgCommand() *cobra.Command {
	var o pgcheck.Options
	common := func(c *cobra.Command) *cobra.Command {
		c.Flags().StringVar(&o.URL, "url", "postgres://postgres@127.0.0.1:5432/postgres?sslmode=disable", "database")
		c.Flags().DurationVar(&o.Timeout, "timeout", 60*time.Second, "of one transaction, a blackout included")
		return c
	}
	var bytes check.Bytes = 16 << 20
	initialize := common(verb("init", "Make the tables anew", func(ctx context.Context, rec *check.Recorder) error {
		return pgcheck.Init(ctx, o, int64(bytes), rec)
	}))
	initialize.Flags().Var(&bytes, "bytes", "of accounts")

	var workers int
	var rate float64
	run := common(verb("run", "Transfer over one connection a worker, then verify", func(ctx context.Context, rec *check.Recorder) error {
		return pgcheck.Run(ctx, o, workers, rate, rec)
	}))
	run.Flags().IntVar(&workers, "workers", 4, "connections")
	run.Flags().Float64Var(&rate, "rate", 0, "transactions a second of all workers; 0 is without pause")
	verify := common(verb("verify", "Prove that the database is whole", func(ctx context.Context, rec *check.Recorder) error {
		return pgcheck.Verify(ctx, o, rec)
	}))

	s := pgcheck.ServeOptions{Stderr: os.Stderr}
	serve := &cobra.Command{
		Use:   "serve",
		Short: "Become a PostgreSQL server, inside a shard",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return pgcheck.Serve(cmd.Context(), s) },
	}
	serve.Flags().StringVar(&s.Data, "data", "/var/lib/postgresql/data", "data directory; made when it is empty")
	serve.Flags().StringVar(&s.Bin, "bin", "", "directory of initdb and postgres")
	serve.Flags().IntVar(&s.Port, "port", 5432, "TCP port")
	serve.Flags().StringVar(&s.Listen, "listen", "*", "address; anybody who reaches it may do anything")
	serve.Flags().StringVar(&s.Socket, "socket", "", "directory of a unix socket; none without")
	serve.Flags().StringVar(&s.SharedBuffers, "shared-buffers", "128MB", "as PostgreSQL writes it")
	serve.Flags().StringVar(&s.AsRoot, "as-root", "", "stay root, with the library that asroot made")

	var out string
	asRoot := &cobra.Command{
		Use:   "asroot",
		Short: "Compile, with $CC or cc, the library for serve --as-root",
		Long: "Compile, with $CC or cc, the library for serve --as-root. CRIU can dump other users' processes only\n" +
			"with CAP_SYS_RESOURCE, which root lacks on some machines.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return pgcheck.BuildAsRoot(cmd.Context(), out) },
	}
	asRoot.Flags().StringVar(&out, "out", "asroot.so", "the library")
	return group("pg", "A PostgreSQL server, and its check", serve, asRoot, initialize, run, verify)
}

func memcheckCommand() *cobra.Command {
	var addr string
	var timeout, interval time.Duration
	ask := func(use, short string, do func(context.Context, *memcheck.Client) (any, error)) *cobra.Command {
		c := &cobra.Command{
			Use:   use,
			Short: short,
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
				defer stop()
				client, err := memcheck.Dial(ctx, addr)
				if err != nil {
					return err
				}
				defer client.Close()
				client.RequestTimeout = timeout
				answer, err := do(ctx, client)
				if err != nil {
					return err
				}
				if err := check.Print(os.Stdout, answer); err != nil {
					return err
				}
				if s, ok := answer.(memcheck.Stat); ok && s.Err() != nil {
					return check.ErrNotOK
				}
				return nil
			},
		}
		c.Flags().StringVar(&addr, "addr", fmt.Sprintf("127.0.0.1:%d", memcheck.DefaultPort), "control port")
		c.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "of one request, a blackout included")
		return c
	}
	watch := verb("watch", "Ask all the time over one connection; notices a rollback", func(ctx context.Context, rec *check.Recorder) error {
		return memcheck.Watch(ctx, addr, interval, rec)
	})
	watch.Flags().StringVar(&addr, "addr", fmt.Sprintf("127.0.0.1:%d", memcheck.DefaultPort), "control port")
	watch.Flags().DurationVar(&interval, "interval", 10*time.Millisecond, "between two requests")

	var out string
	build := &cobra.Command{
		Use:   "build",
		Short: "Compile memcheck, with $CC or cc",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return memcheck.Build(cmd.Context(), out) },
	}
	build.Flags().StringVar(&out, "out", "memcheck", "the binary")
	return group("memcheck", "Build and ask memcheck, the program that checks its own memory", build, watch,
		ask("stat", "What it has counted and found", func(ctx context.Context, c *memcheck.Client) (any, error) { return c.Stat(ctx) }),
		ask("verify", "Make it look at everything now", func(ctx context.Context, c *memcheck.Client) (any, error) { return c.Verify(ctx) }),
		ask("quit", "End it", func(ctx context.Context, c *memcheck.Client) (any, error) { return c.Quit(ctx) }),
		ask("reset", "Forget the longest pauses", func(ctx context.Context, c *memcheck.Client) (any, error) {
			return map[string]bool{"ok": true}, c.Reset(ctx)
		}),
	)
}

func workCommand() *cobra.Command {
	var addr string
	var cost time.Duration
	serve := serveVerb("Serve requests that cost CPU, inside a shard", func(ctx context.Context) error {
		l, err := listen(addr)
		if err != nil {
			return err
		}
		return workcheck.Serve(ctx, l, cost)
	})
	serve.Flags().StringVar(&addr, "listen", "0.0.0.0:7000", "address")
	serve.Flags().DurationVar(&cost, "cost", 5*time.Millisecond, "CPU time of a request")
	load := &cobra.Command{
		Use:   "load OPTIONS",
		Short: "Put a load of a pattern on servers, and count the requests that are late",
		Long:  "Put a load of a pattern on servers, and count the requests that are late.\nOPTIONS is workcheck.LoadOptions as JSON.",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			var o workcheck.LoadOptions
			if err := json.Unmarshal([]byte(args[0]), &o); err != nil {
				return fmt.Errorf("options: %w", err)
			}
			counts, err := workcheck.Load(ctx, o)
			if err != nil {
				return err
			}
			return check.Print(os.Stdout, counts)
		},
	}
	return group("work", "A server whose requests cost CPU, and a load for it", serve, load)
}

func holdCommand() *cobra.Command {
	return &cobra.Command{
		Use:       "hold KIND",
		Short:     "Keep something open that no checkpoint can carry",
		Args:      cobra.ExactArgs(1),
		ValidArgs: holder.Kinds(),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			return holder.Hold(ctx, args[0], func() error {
				return check.Print(os.Stdout, struct {
					Holds string `json:"holds"`
				}{args[0]})
			})
		},
	}
}
