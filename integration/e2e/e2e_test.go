//go:build integration

// Package e2e moves real shards between the hosts of a lab and checks, from
// outside, that nothing noticed. `make test` runs it, as root.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/internal/testenv"
)

var theLab *lab.Lab

// limit bounds any single wait of a test: far above what anything takes on a
// slow machine, far below the test's own time-out.
const limit = 60 * time.Second

// moveLimit is the limit of a migration, which may be one of gigabytes.
const moveLimit = 5 * time.Minute

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "e2e: needs root: make test runs it")
		if os.Getenv(testenv.StrictVariable) == "1" {
			return 1
		}
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := lab.Down(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	var err error
	if theLab, err = lab.Up(ctx, lab.Options{Hosts: 3}); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	defer func() {
		if os.Getenv("TRANSHIP_KEEP_LAB") == "1" {
			return
		}
		if err := lab.Down(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
		}
	}()
	if err := awaitLoad(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	code := m.Run()
	if dir, err := workDir(); err == nil {
		_ = os.RemoveAll(dir)
	}
	return code
}

// awaitLoad waits until every daemon has measured its host: from then on it has
// the files open that it keeps open, and no guard takes them for a leak.
func awaitLoad(ctx context.Context) error {
	for _, h := range theLab.Hosts() {
		for measured := false; !measured; {
			out, err := h.Exec(ctx, "tranship", "nodes", "-o", "json")
			if err != nil {
				return err
			}
			var doc struct {
				Nodes []struct {
					Self    bool     `json:"self"`
					CPULoad *float64 `json:"cpu_load"`
				}
			}
			if err := json.Unmarshal(out, &doc); err != nil {
				return err
			}
			for _, n := range doc.Nodes {
				measured = measured || n.Self && n.CPULoad != nil
			}
		}
	}
	return nil
}

// on runs a command on a host and returns its standard output.
func on(t *testing.T, host string, args ...string) (string, error) {
	t.Helper()
	return onWithin(t, limit, host, args...)
}

// onWithin is on for what may take longer.
func onWithin(t *testing.T, limit time.Duration, host string, args ...string) (string, error) {
	t.Helper()
	// Clean-up runs when the test's own context has ended.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), limit)
	defer cancel()
	cmd := hostOf(t, host).Command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%s on %s: %w\n%s", strings.Join(args, " "), host, err, stderr.String())
	}
	return stdout.String(), err
}

func must(t *testing.T, host string, args ...string) string {
	t.Helper()
	out, err := on(t, host, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func hostOf(t *testing.T, name string) *lab.Host {
	t.Helper()
	guard(t)
	if name == "client" {
		return theLab.Client()
	}
	h, err := theLab.Host(name)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func exitCodeOf(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		return -1
	}
	return 0
}

// result is the contract's document of a migration.
type result struct {
	SchemaVersion int     `json:"schema_version"`
	ID            string  `json:"id"`
	Shard         string  `json:"shard"`
	From          string  `json:"from"`
	To            string  `json:"to"`
	Outcome       string  `json:"outcome"`
	Reason        string  `json:"reason"`
	Code          string  `json:"code"`
	Tracker       string  `json:"tracker"`
	TotalMs       float64 `json:"total_ms"`
	BlackoutMs    float64 `json:"blackout_ms"`
	Phases        []struct {
		Name string
		Ms   float64
	} `json:"phases"`
	Rounds []struct {
		N, Pages      int64
		BytesRaw      int64   `json:"bytes_raw"`
		ThrottledCPUs float64 `json:"throttled_cpus"`
		As            struct {
			Copy, Twin int64
		} `json:"pages_as"`
	} `json:"rounds"`
	BytesRaw     int64     `json:"bytes_raw"`
	BytesSent    int64     `json:"bytes_sent"`
	Pages        int64     `json:"pages"`
	StartedAt    time.Time `json:"started_at"`
	FrozenAtMs   float64   `json:"frozen_at_ms"`
	ClockErrorMs float64   `json:"clock_error_ms"`
	Blackout     []struct {
		Name, Node, Of string
		AtMs           float64 `json:"at_ms"`
		Ms             float64 `json:"ms"`
	} `json:"blackout"`
}

// mustBeSplit checks that a blackout is told by its parts, on one clock.
func (r result) mustBeSplit(t *testing.T) {
	t.Helper()
	if r.ClockErrorMs <= 0 {
		t.Error("nobody measured the clocks")
	}
	last := 0.0
	for _, want := range []struct{ name, of, node string }{
		{"freeze", "", r.From},
		{"criu dump", "", r.From},
		{"seize tasks", "criu dump", r.From},
		{"write images", "criu dump", r.From},
		{"last pages", "", r.From},
		{"send images", "", r.From},
		{"seal", "", r.From},
		{"journal", "", r.From},
		{"criu restore", "", r.To},
		{"restore", "criu restore", r.To},
		{"link up", "", r.To},
	} {
		found := false
		for _, s := range r.Blackout {
			if s.Name != want.name || s.Of != want.of || s.Node != want.node {
				continue
			}
			found = true
			switch {
			case s.Ms < 0:
				t.Errorf("%s took %v ms", s.Name, s.Ms)
			case s.AtMs < 0 && s.Of != "criu restore": // CRIU does not say when
				t.Errorf("%s began %v ms after the freeze", s.Name, s.AtMs)
			case s.Name == "criu restore":
				last = s.AtMs + s.Ms
			}
		}
		if !found {
			t.Errorf("no %s of %q on %s in %+v", want.name, want.of, want.node, r.Blackout)
		}
	}
	// The blackout ends with CRIU's restore, and so does the account of it.
	if off := last - r.BlackoutMs; off > 0.1 || off < -0.1 {
		t.Errorf("a blackout of %.1f ms, and the restore ended after %.1f", r.BlackoutMs, last)
	}
}

// migrate moves a shard and returns the result and the exit code.
func migrate(t *testing.T, shard, from, to string, flags ...string) (result, int, error) {
	t.Helper()
	args := append([]string{"tranship", "migrate", "-o", "json", shard, to}, flags...)
	out, err := onWithin(t, moveLimit, from, args...)
	var r result
	if strings.TrimSpace(out) != "" {
		if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
			t.Fatalf("migrate printed %q: %v", out, jerr)
		}
	}
	return r, exitCodeOf(err), err
}

// mustMigrate moves a shard or ends the test.
func mustMigrate(t *testing.T, shard, from, to string, flags ...string) result {
	t.Helper()
	r, _, err := migrate(t, shard, from, to, flags...)
	if err != nil {
		t.Fatalf("migrate %s to %s: %v (%s)", shard, to, err, r.Reason)
	}
	if r.Outcome != "done" || r.From != from || r.To != to {
		t.Fatalf("migrate %s to %s: %+v", shard, to, r)
	}
	t.Logf("%s → %s: blackout %.0f ms, total %.0f ms, %d rounds, %d pages; %v", from, to, r.BlackoutMs, r.TotalMs, len(r.Rounds), r.Pages, r.Phases)
	return r
}

// shard is a row of `tranship ps -o json`.
type shard struct {
	Name      string `json:"name"`
	Node      string `json:"node"`
	Status    string `json:"status"`
	IP        string `json:"ip"`
	PID       int    `json:"pid"`
	Migration string `json:"migration_id"`
	Note      string `json:"note"`
}

func shardsOn(t *testing.T, host string) []shard {
	t.Helper()
	var doc struct{ Shards []shard }
	if err := json.Unmarshal([]byte(must(t, host, "tranship", "ps", "-o", "json")), &doc); err != nil {
		t.Fatal(err)
	}
	return doc.Shards
}

// where lists the places that have a shard, as the hosts themselves see it.
func where(t *testing.T, name string) []shard {
	t.Helper()
	var out []shard
	for _, host := range []string{"host-1", "host-2"} {
		for _, s := range shardsOn(t, host) {
			if s.Name == name && s.Node == host {
				out = append(out, s)
			}
		}
	}
	return out
}

// runShard starts a shard on host-1 and returns its address; it is removed,
// wherever it is by then, when the test ends.
func runShard(t *testing.T, name string, args ...string) string {
	t.Helper()
	const host = "host-1"
	must(t, host, append([]string{"tranship", "run", "--name", name}, args...)...)
	t.Cleanup(func() {
		for _, h := range []string{"host-1", "host-2"} {
			_, _ = hostOf(t, h).Exec(context.Background(), "tranship", "rm", "-f", name)
		}
	})
	for _, s := range shardsOn(t, host) {
		if s.Name == name {
			ip, _, _ := strings.Cut(s.IP, "/")
			return ip
		}
	}
	t.Fatalf("%s is not among the shards of %s", name, host)
	return ""
}

// await polls until ok, for conditions that nothing announces.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// programs are host programs that become the image of most tests.
var programs = []string{"/bin/sh", "/bin/sleep", "/bin/date", "/bin/cat", "/usr/bin/redis-server", "/usr/bin/redis-cli"}

const testImage = "tranship.test/programs:1"

func needImage(t *testing.T) {
	t.Helper()
	importImage(t, lab.ImageSpec{Name: testImage, Bins: programs, Cmd: []string{"sh"}})
}

// arm sets a failpoint on a host; it is gone when the test ends.
func arm(t *testing.T, host, point, action string) (hit func() bool, release func()) {
	t.Helper()
	dir := filepath.Join(hostOf(t, host).Root(), lab.FailpointDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, point)
	_ = os.Remove(path + ".hit")
	if err := os.WriteFile(path, []byte(action), 0o600); err != nil {
		t.Fatal(err)
	}
	release = func() { _ = os.Remove(path) }
	t.Cleanup(func() {
		release()
		_ = os.Remove(path + ".hit")
	})
	return func() bool {
		_, err := os.Stat(path + ".hit")
		return err == nil
	}, release
}
