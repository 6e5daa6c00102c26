package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
	"github.com/tranship/tranship/integration/workload/redischeck"
)

// clientVerb makes this program the client: CLIENT load|run ADDRESS.
const clientVerb = "redis-client"

const (
	dataset = 256 << 20
	// What the client asks of Redis: enough that a pause of a millisecond shows
	// and pre-copy has something to chase, without taking the CPU of a small
	// machine from the migration.
	requestRate   = 2000
	overwriteRate = 8 << 20
	// clientTimeout is far above any blackout: a connection that hangs longer is broken.
	clientTimeout = 30 * time.Second
)

func clientMain(args []string) int {
	if len(args) != 2 {
		fmt.Fprintf(os.Stderr, "usage: %s load|run ADDRESS\n", clientVerb)
		return 2
	}
	o := redischeck.Options{Addr: args[1], Timeout: clientTimeout}
	rec := check.NewRecorder("client")
	err := check.Run(context.Background(), os.Stdout, rec, 0, func(ctx context.Context) error {
		switch args[0] {
		case "load":
			return redischeck.Load(ctx, o, dataset, 1, rec)
		case "run":
			return redischeck.Run(ctx, redischeck.RunOptions{
				Options: o, RequestRate: requestRate, OverwriteRate: overwriteRate, NoReconnect: true,
			}, rec)
		}
		return fmt.Errorf("%s: load or run", args[0])
	})
	switch {
	case errors.Is(err, check.ErrNotOK):
		return 1 // the report says what
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
