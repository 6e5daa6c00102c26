package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
)

// daemon is a transhipd without containers: handlers of the real API over a
// runtime and a migration manager that answer what the test says.
type daemon struct {
	transhipv1connect.UnimplementedMigrationsHandler
	fakeRuntime

	check     []*v1.Finding
	migrate   func(ctx context.Context, req *v1.MigrateRequest, send func(*v1.MigrateEvent) error) error
	known     func(id string) *v1.Migration
	cancelled chan string
	address   string
}

func startDaemon(t *testing.T) *daemon {
	t.Helper()
	d := &daemon{cancelled: make(chan string, 1)}
	mux := http.NewServeMux()
	control.Mount(mux, control.Services{
		Node: "host-1", Runtime: &d.fakeRuntime,
		Self: func(context.Context) *v1.Node {
			return &v1.Node{
				Name: "host-1", Self: true, State: control.NodeAlive, Cpus: 2, MemoryTotalBytes: 8 << 30,
				Versions: &v1.Versions{Tranship: "1.2.3", Protocol: 1},
			}
		},
	})
	mux.Handle(transhipv1connect.NewMigrationsHandler(d))
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	var served sync.WaitGroup
	served.Go(func() { srv.Serve(l) })
	t.Cleanup(func() { srv.Close(); served.Wait() })
	d.address = "unix://" + socket
	return d
}

func (d *daemon) Check(context.Context, *connect.Request[v1.CheckRequest]) (*connect.Response[v1.CheckResponse], error) {
	return connect.NewResponse(&v1.CheckResponse{Findings: d.check}), nil
}

func (d *daemon) Migrate(ctx context.Context, req *connect.Request[v1.MigrateRequest], s *connect.ServerStream[v1.MigrateEvent]) error {
	return d.migrate(ctx, req.Msg, s.Send)
}

func (d *daemon) Cancel(_ context.Context, req *connect.Request[v1.CancelRequest]) (*connect.Response[v1.CancelResponse], error) {
	d.cancelled <- req.Msg.GetId()
	return connect.NewResponse(&v1.CancelResponse{Migration: &v1.Migration{Id: req.Msg.GetId(), Outcome: outcomeAborted}}), nil
}

func (d *daemon) ListMigrations(_ context.Context, req *connect.Request[v1.ListMigrationsRequest]) (*connect.Response[v1.ListMigrationsResponse], error) {
	resp := &v1.ListMigrationsResponse{}
	if d.known != nil {
		resp.Migrations = append(resp.Migrations, d.known(req.Msg.GetId()))
	}
	return connect.NewResponse(resp), nil
}

// fakeRuntime has one shard, web.
type fakeRuntime struct {
	ran runtime.RunSpec
	err error
}

var _ control.Runtime = (*fakeRuntime)(nil)

var webShard = runtime.Shard{
	Namespace: "default", Name: "web", Image: "img", Status: runtime.StatusRunning, PID: 7, MemoryUsed: 1 << 20,
	Command: []string{"serve"}, CreatedAt: time.UnixMilli(1_700_000_000_000),
}

func (f *fakeRuntime) Run(_ context.Context, s runtime.RunSpec) (*runtime.Shard, error) {
	f.ran = s
	return &webShard, f.err
}

func (f *fakeRuntime) List(context.Context, string) ([]runtime.Shard, error) {
	return []runtime.Shard{webShard}, f.err
}

func (f *fakeRuntime) Namespaces(context.Context) ([]string, error) {
	return []string{"default"}, f.err
}

func (f *fakeRuntime) Shard(_ context.Context, _, name string) (*runtime.Shard, error) {
	if name != "web" {
		return nil, fmt.Errorf("%w: %s", runtime.ErrNotFound, name)
	}
	return &webShard, f.err
}

func (f *fakeRuntime) Describe(context.Context, string, string) (*runtime.Record, error) {
	return &runtime.Record{Spec: json.RawMessage(`{"ociVersion":"1.0.2"}`)}, f.err
}

func (f *fakeRuntime) Logs(_ context.Context, _, _ string, _ int64, _ bool, emit func([]byte) error) error {
	return errors.Join(emit([]byte("line\n")), f.err)
}

func (f *fakeRuntime) Stop(context.Context, string, string, time.Duration) error { return f.err }

func (f *fakeRuntime) Remove(context.Context, string, string, bool) error { return f.err }

// tranship runs the command line and returns what a shell would see.
func (d *daemon) tranship(t *testing.T, ctx context.Context, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	return capture(t, func() int { return run(ctx, append([]string{"--host", d.address}, args...)) })
}

// capture swaps the process's own streams: the CLI writes progress there.
func capture(t *testing.T, f func() int) (code int, stdout, stderr string) {
	t.Helper()
	var out [2]bytes.Buffer
	var copies sync.WaitGroup
	var writers [2]*os.File
	for i, stream := range []**os.File{&os.Stdout, &os.Stderr} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		saved := *stream
		*stream, writers[i] = w, w
		defer func() { *stream = saved }()
		copies.Go(func() { io.Copy(&out[i], r); r.Close() })
	}
	code = f()
	writers[0].Close()
	writers[1].Close()
	copies.Wait()
	return code, out[0].String(), out[1].String()
}

func TestEveryOutcomeHasItsExitCode(t *testing.T) {
	d := startDaemon(t)
	ctx := t.Context()
	for _, tt := range []struct {
		name   string
		err    error // of the runtime
		args   []string
		want   int
		stderr string // contains
	}{
		{name: "listing shards", args: []string{"ps"}},
		{name: "help", args: []string{"--help"}},
		{name: "a verb without its shard", args: []string{"inspect"}, want: 2, stderr: "--help"},
		{name: "an unknown verb", args: []string{"fly"}, want: 2, stderr: `unknown command "fly"`},
		{name: "an unknown verb of a group", args: []string{"lab", "fly"}, want: 2},
		{name: "an unknown flag", args: []string{"ps", "--fast"}, want: 2},
		{name: "an output format that is none", args: []string{"ps", "-o", "yaml"}, want: 2},
		{name: "a size that is none", args: []string{"run", "--memory", "much", "img"}, want: 2, stderr: "512m"},
		{name: "a mount without a destination", args: []string{"run", "--mount", "src=/a", "img"}, want: 2},
		{name: "an address outside the subnet", err: fmt.Errorf("%w: address 1.2.3.4 is outside", runtime.ErrInvalid), args: []string{"run", "--ip", "1.2.3.4", "img"}, want: 2, stderr: "outside"},
		{name: "an address that is none", args: []string{"run", "--ip", "web", "img"}, want: 2},
		{name: "another host's name", args: []string{"run", "--node", "host-2", "img"}, want: 2, stderr: "host-2"},
		{name: "a shard that is not there", args: []string{"inspect", "db"}, want: 1, stderr: "tranship ps"},
		{name: "a name that is taken", err: runtime.ErrExists, args: []string{"run", "img"}, want: 1, stderr: "tranship rm"},
		{name: "removing a running shard", err: runtime.ErrRunning, args: []string{"rm", "web"}, want: 1, stderr: "rm -f"},
		{name: "Kubernetes' namespace", args: []string{"-n", "k8s.io", "stop", "web"}, want: 3, stderr: "--force-namespace"},
		{name: "Kubernetes' namespace by force", args: []string{"-n", "k8s.io", "--force-namespace", "stop", "web"}},
		{name: "looking into Kubernetes' namespace", args: []string{"-n", "k8s.io", "ps"}},
		{name: "an address of the daemon that is none", args: []string{"--host", "tcp://localhost", "ps"}, want: 2, stderr: "unix:///"},
		{name: "a daemon that is not there", args: []string{"--host", "unix:///nowhere/s", "ps"}, want: 6, stderr: "systemctl start transhipd"},
		{name: "a migration without a daemon", args: []string{"--host", "unix:///nowhere/s", "migrate", "web", "host-2"}, want: 6},
		{name: "a time limit that has passed", args: []string{"--timeout", "1ns", "ps"}, want: 5},
		{name: "an internal error", err: errors.New("disk on fire"), args: []string{"ps"}, want: 1, stderr: "tranship: disk on fire"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d.err = tt.err
			code, stdout, stderr := d.tranship(t, ctx, tt.args...)
			if code != tt.want {
				t.Errorf("exit code %d, want %d\nstdout: %s\nstderr: %s", code, tt.want, stdout, stderr)
			}
			if !strings.Contains(stderr, tt.stderr) {
				t.Errorf("stderr %q lacks %q", stderr, tt.stderr)
			}
			if code != 0 && stdout != "" {
				t.Errorf("a failure wrote to stdout: %q", stdout)
			}
		})
	}
}

func TestRunPassesEverythingOn(t *testing.T) {
	d := startDaemon(t)
	code, stdout, stderr := d.tranship(t, t.Context(), "-o", "json", "run", "--name", "web", "--ip", "10.89.1.7", "--memory", "512m",
		"--cpus", "1.5", "--env", "A=b", "--label", "k=v", "--mount", "src=/a,dst=/b,ro,policy=shared", "--net", "shard", "img", "serve", "--port", "80")
	if code != 0 {
		t.Fatalf("%d %s", code, stderr)
	}
	got := d.ran
	if got.Name != "web" || got.IP.String() != "10.89.1.7" || got.Memory != 512<<20 || got.CPUs != 1.5 ||
		strings.Join(got.Env, " ") != "A=b" || got.Labels["k"] != "v" || strings.Join(got.Command, " ") != "serve --port 80" ||
		got.Mounts[0] != (runtime.Mount{Source: "/a", Destination: "/b", ReadOnly: true, Policy: runtime.MountShared}) {
		t.Errorf("%+v", got)
	}
	doc := map[string]any{}
	if err := json.Unmarshal([]byte(stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if doc["schema_version"] != 1.0 || doc["name"] != "web" || doc["pid"] != 7.0 || doc["memory_used_bytes"] != float64(1<<20) {
		t.Errorf("%v", doc)
	}
}

func TestEveryDocumentHasASchemaVersion(t *testing.T) {
	d := startDaemon(t)
	d.known = func(id string) *v1.Migration { return &v1.Migration{Id: "m1", Outcome: outcomeDone} }
	for _, args := range [][]string{
		{"ps"}, {"nodes"}, {"inspect", "web"}, {"version"}, {"check", "web", "host-2"}, {"migrations"}, {"migrations", "m1"}, {"cancel", "m1"},
	} {
		_, stdout, stderr := d.tranship(t, t.Context(), append([]string{"-o", "json"}, args...)...)
		doc := map[string]any{}
		if err := json.Unmarshal([]byte(stdout), &doc); err != nil || doc["schema_version"] != 1.0 {
			t.Errorf("%v: %v %q %q", args, err, stdout, stderr)
		}
	}
}

func TestCheckTellsEveryReason(t *testing.T) {
	d := startDaemon(t)
	d.check = []*v1.Finding{
		{Code: "terminal", Message: "has a terminal", Advice: "run it without -t"},
		{Code: "host-network", Message: "uses the host's network", Warning: true},
	}
	code, stdout, _ := d.tranship(t, t.Context(), "check", "web", "host-2")
	if code != exitRefused || !strings.Contains(stdout, "has a terminal") || !strings.Contains(stdout, "→ run it without -t") || !strings.Contains(stdout, "warning  host-network") {
		t.Errorf("%d %q", code, stdout)
	}
	d.check = d.check[1:]
	if code, stdout, _ := d.tranship(t, t.Context(), "check", "web", "host-2"); code != exitDone || !strings.Contains(stdout, "can move") {
		t.Errorf("with a warning only: %d %q", code, stdout)
	}
}

func TestAMigrationEndsWithItsExitCode(t *testing.T) {
	result := func(outcome, code, reason string) func(context.Context, *v1.MigrateRequest, func(*v1.MigrateEvent) error) error {
		return func(_ context.Context, req *v1.MigrateRequest, send func(*v1.MigrateEvent) error) error {
			return errors.Join(
				send(&v1.MigrateEvent{Progress: &v1.Progress{Id: "m1", Phase: "pre-copy", Round: 1, BytesSent: 1 << 20, RemainingBytes: 1 << 20, EtaMs: 500}}),
				send(&v1.MigrateEvent{Result: &v1.Migration{
					Id: "m1", Shard: req.GetShard(), Namespace: req.GetNamespace(), From: "host-1", To: req.GetNode(), Mode: req.GetMode(),
					Outcome: outcome, Code: code, Reason: reason, StartedAtUnixMs: 1_700_000_000_123, BlackoutMs: 87.5, Pages: 3,
					Phases: []*v1.Phase{{Name: "reserve", Ms: 1.5}}, Rounds: []*v1.Round{{N: 1, Pages: 3, BytesRaw: 12288, BytesSent: 100, Ms: 2}},
				}}))
		}
	}
	for _, tt := range []struct {
		name    string
		args    []string
		migrate func(context.Context, *v1.MigrateRequest, func(*v1.MigrateEvent) error) error
		known   func(string) *v1.Migration
		want    int
		stderr  string
	}{
		{name: "done", migrate: result(outcomeDone, "", "")},
		{name: "failed", migrate: result(outcomeAborted, "link", "no route"), want: 1, stderr: "web runs on host-1 as before: no route"},
		{name: "refused by the destination", migrate: result(outcomeAborted, codeRefused, "no room"), want: 3, stderr: "no room"},
		{name: "cancelled by somebody", migrate: result(outcomeAborted, codeCancelled, "cancelled"), want: 4},
		{name: "too slow", migrate: result(outcomeAborted, codeDeadline, "deadline"), want: 5, stderr: "--deadline"},
		{name: "lost at the destination", migrate: result(outcomeInDoubt, codePagesLost, "nobody has its pages"), want: 7, stderr: "resolve m1 --keep here lets it go on"},
		{name: "not given back yet", migrate: result(outcomeInDoubt, codeReturning, "is to go on here, and does as soon as that can be done: thaw: no"), want: 7, stderr: "on host-1: web is to go on here"},
		{name: "in doubt", migrate: result(outcomeInDoubt, "in-doubt", "host-2 is silent"), want: 7, stderr: "migrations resolve m1 --keep here|there"},
		{
			name: "refused with findings", want: 3, stderr: "→ run it without -t",
			migrate: func(_ context.Context, _ *v1.MigrateRequest, send func(*v1.MigrateEvent) error) error {
				return send(&v1.MigrateEvent{Refused: []*v1.Finding{{Code: "terminal", Message: "has a terminal", Advice: "run it without -t"}}})
			},
		},
		{
			name: "a dry run that finds nothing", args: []string{"--dry-run"},
			migrate: result(outcomeAborted, "", "dry run: nothing was moved"),
		},
		{
			name: "a bad request", want: 2, stderr: "mode",
			migrate: func(context.Context, *v1.MigrateRequest, func(*v1.MigrateEvent) error) error {
				return connect.NewError(connect.CodeInvalidArgument, errors.New("mode: unknown"))
			},
		},
		{
			name: "a daemon that died and settled it", stderr: "lost the daemon",
			migrate: func(_ context.Context, _ *v1.MigrateRequest, send func(*v1.MigrateEvent) error) error {
				if err := send(&v1.MigrateEvent{Progress: &v1.Progress{Id: "m1"}}); err != nil {
					return err
				}
				panic(http.ErrAbortHandler) // cuts the connection
			},
			known: func(id string) *v1.Migration { return &v1.Migration{Id: id, Shard: "web", Outcome: outcomeDone} },
		},
		{
			name: "a stream without a result", want: 1, stderr: "runs on",
			migrate: func(_ context.Context, _ *v1.MigrateRequest, send func(*v1.MigrateEvent) error) error {
				return send(&v1.MigrateEvent{Progress: &v1.Progress{Id: "m1"}})
			},
			known: func(id string) *v1.Migration {
				return &v1.Migration{Id: id, Shard: "web", From: "host-1", Outcome: outcomeAborted, Reason: "restarted"}
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := startDaemon(t)
			d.migrate, d.known = tt.migrate, tt.known
			code, stdout, stderr := d.tranship(t, t.Context(), append([]string{"-o", "json", "migrate", "web", "host-2"}, tt.args...)...)
			if code != tt.want || !strings.Contains(stderr, tt.stderr) {
				t.Fatalf("exit code %d, want %d; stderr %q", code, tt.want, stderr)
			}
			if code == exitUsage {
				return
			}
			doc := map[string]any{}
			if err := json.Unmarshal([]byte(stdout), &doc); err != nil {
				t.Fatalf("%v: %q", err, stdout)
			}
			for _, key := range strings.Fields("schema_version id shard namespace from to mode outcome reason tracker started_at total_ms blackout_ms phases rounds bytes_raw bytes_sent pages blackout") {
				if doc[key] == nil {
					t.Errorf("the document lacks %s", key)
				}
			}
			if tt.name == "done" && (doc["blackout_ms"] != 87.5 || doc["started_at"] != "2023-11-14T22:13:20.123Z" ||
				doc["rounds"].([]any)[0].(map[string]any)["bytes_raw"] != 12288.0) {
				t.Errorf("%v", doc)
			}
		})
	}
}

func TestABlackoutIsShownByItsParts(t *testing.T) {
	d := startDaemon(t)
	d.migrate = nil
	d.known = func(id string) *v1.Migration {
		return &v1.Migration{
			Id: id, Shard: "web", From: "host-1", To: "host-2", Outcome: outcomeDone, BlackoutMs: 87.5, ClockErrorMs: 0.25,
			Blackout: []*v1.Phase{
				{Name: "criu restore", Node: "host-2", AtMs: 60, Ms: 27.5},
				{Name: "restore", Of: "criu restore", Node: "host-2", AtMs: -1, Ms: 20},
				{Name: "freeze", Node: "host-1", Ms: 1},
			},
		}
	}
	code, stdout, stderr := d.tranship(t, t.Context(), "migrations", "m1")
	if code != exitDone {
		t.Fatalf("%d %q", code, stderr)
	}
	var got []string
	for line := range strings.Lines(stdout) {
		if strings.Contains(line, "host-") && strings.HasSuffix(strings.TrimSpace(line), "ms") {
			got = append(got, strings.Join(strings.Fields(line), " "))
		}
	}
	want := []string{"freeze host-1 0.0ms 1.0ms", "criu restore host-2 60.0ms 27.5ms", "restore host-2 - 20.0ms"}
	if !slices.Equal(got, want) || !strings.Contains(stdout, "within 0.2ms") {
		t.Errorf("%q in\n%s", got, stdout)
	}
}

func TestCtrlCCancelsAndWaitsForTheEnd(t *testing.T) {
	for _, tt := range []struct {
		name string
		ends func(cancel context.CancelFunc)
		args []string
		want int
	}{
		{name: "Ctrl-C", ends: func(cancel context.CancelFunc) { cancel() }, want: exitCancelled},
		{name: "the time limit", ends: func(context.CancelFunc) {}, args: []string{"--timeout", "50ms"}, want: exitDeadline},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := startDaemon(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			d.migrate = func(sctx context.Context, _ *v1.MigrateRequest, send func(*v1.MigrateEvent) error) error {
				if err := send(&v1.MigrateEvent{Progress: &v1.Progress{Id: "m1"}}); err != nil {
					return err
				}
				tt.ends(cancel)
				select {
				case id := <-d.cancelled:
					return send(&v1.MigrateEvent{Result: &v1.Migration{Id: id, Shard: "web", From: "host-1", Outcome: outcomeAborted, Code: codeCancelled}})
				case <-sctx.Done():
					return sctx.Err()
				}
			}
			code, stdout, stderr := d.tranship(t, ctx, append(tt.args, "-o", "json", "migrate", "web", "host-2")...)
			if code != tt.want || !strings.Contains(stderr, "cancelling") || !strings.Contains(stderr, "web runs on host-1 as before") {
				t.Errorf("%d %q", code, stderr)
			}
			if !strings.Contains(stdout, `"outcome": "aborted"`) {
				t.Errorf("stdout %q", stdout)
			}
		})
	}
}
