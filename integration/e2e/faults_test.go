//go:build integration

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
)

// faulty is a Redis whose memory and connection are checked after a fault.
type faulty struct {
	t    *testing.T
	name string
	ip   string
	n    int
}

func startFaulty(t *testing.T, name string) *faulty {
	needImage(t)
	f := &faulty{t: t, name: name}
	f.ip = runShard(t, "host-1", name, testImage, "redis-server", "--save", "", "--protected-mode", "no", "--dir", "/tmp")
	// 16 MiB, so that pre-copy and filling have something to do.
	out := f.cli("eval", "for i = 1, 4096 do redis.call('set', 'k' .. i, string.rep(tostring(i) .. ' ', 700)) end return 1", "0")
	if out != "1" {
		t.Fatal(out)
	}
	f.digest()
	return f
}

func (f *faulty) cli(args ...string) string {
	f.t.Helper()
	return strings.TrimSpace(must(f.t, "client", append([]string{"redis-cli", "-h", f.ip}, args...)...))
}

func (f *faulty) digest() string { f.t.Helper(); return f.cli("debug", "digest") }

// mustBeWholeAt awaits that exactly one copy runs, on the host named if any, and
// checks that its memory is what it was.
func (f *faulty) mustBeWholeAt(want, digest string) string {
	f.t.Helper()
	var at string
	await(f.t, fmt.Sprintf("one running copy of %s, on %q", f.name, want), func() bool {
		places := where(f.t, f.name)
		if len(places) != 1 || places[0].Status != "running" || places[0].Migration != "" {
			return false
		}
		at = places[0].Node
		return want == "" || at == want
	})
	if got := f.digest(); got != digest {
		f.t.Fatalf("memory changed: digest %s, was %s", got, digest)
	}
	f.n++
	if got := f.cli("incr", "faults"); got != fmt.Sprint(f.n) {
		f.t.Fatalf("the counter is %s, want %d", got, f.n)
	}
	f.cli("del", "faults")
	f.n = 0
	return at
}

// sourcePoints and destinationPoints are the failpoints on a migration's road,
// with where the shard is after the daemon that hit them was killed there.
var sourcePoints = []struct{ point, at string }{
	{"source.reserve", "host-1"},
	{"source.prepare", "host-1"},
	{"source.pre-copy", "host-1"},
	{"source.round", "host-1"},
	{"source.before-freeze", "host-1"},
	{"source.frozen", "host-1"},
	{"source.dumped", "host-1"},
	{"source.seal", "host-1"},
	{"source.before-yield", "host-1"},
	{"source.yielded", "host-2"},
	{"source.discard", "host-2"},
}

var destinationPoints = []struct{ point, at string }{
	{"destination.reserve", "host-1"},
	{"destination.prepare", "host-1"},
	{"destination.seal", "host-1"},
	{"destination.commit", "host-2"}, // sealed: it comes back and the source, which has yielded, asks again
	{"destination.restored", ""},     // the restore had ended: either is right
	{"destination.fill", "host-2"},
}

func TestKillingTheSourcesDaemonLeavesOneWholeCopy(t *testing.T) {
	f := startFaulty(t, "kill-source")
	digest := f.digest()
	for _, p := range sourcePoints {
		t.Run(p.point, func(t *testing.T) {
			f.t = t
			f.killAt("host-1", p.point)
			if at := f.mustBeWholeAt(p.at, digest); at != "host-1" {
				mustMigrate(t, f.name, at, "host-1")
			}
		})
	}
	f.t = t
}

func TestKillingTheDestinationsDaemonLeavesOneWholeCopy(t *testing.T) {
	f := startFaulty(t, "kill-destination")
	digest := f.digest()
	for _, p := range destinationPoints {
		t.Run(p.point, func(t *testing.T) {
			f.t = t
			f.killAt("host-2", p.point)
			if at := f.mustBeWholeAt(p.at, digest); at != "host-1" {
				mustMigrate(t, f.name, at, "host-1")
			}
		})
	}
	f.t = t
}

// killAt migrates host-1 → host-2 and kills the daemon of host at a point.
func (f *faulty) killAt(host, point string) {
	f.t.Helper()
	hit, _ := arm(f.t, host, point, "kill")
	r, code, err := migrate(f.t, f.name, "host-1", "host-2")
	if !hit() {
		f.t.Fatalf("%s was never reached: outcome %q, exit code %d, %v", point, r.Outcome, code, err)
	}
	f.restart(host)
}

// restart brings a host's killed daemon back.
func (f *faulty) restart(host string) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), limit)
	defer cancel()
	if err := hostOf(f.t, host).StartDaemon(ctx); err != nil {
		f.t.Fatal(err)
	}
}
