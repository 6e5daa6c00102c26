package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
)

// owner answers what the test says, and keeps what it was asked.
type owner struct {
	transhipv1connect.UnimplementedWorkloadsHandler
	plan    *v1.WorkloadPlan
	outcome string
	asked   []*v1.ChangeWorkloadRequest
}

func (o *owner) Change(_ context.Context, r *connect.Request[v1.ChangeWorkloadRequest], s *connect.ServerStream[v1.WorkloadEvent]) error {
	o.asked = append(o.asked, r.Msg)
	outcome, reason := o.outcome, ""
	if r.Msg.GetDryRun() && outcome == "done" {
		outcome = "planned"
	}
	if len(o.plan.GetRefused()) > 0 {
		outcome, reason = "refused", o.plan.GetRefused()[0]
	}
	return errors.Join(
		s.Send(&v1.WorkloadEvent{Plan: o.plan}),
		s.Send(&v1.WorkloadEvent{Note: "+ shard web-0 on host-2", Done: 1, All: 1}),
		s.Send(&v1.WorkloadEvent{Result: &v1.WorkloadResult{Outcome: outcome, Reason: reason}}))
}

func (o *owner) ListWorkloads(context.Context, *connect.Request[v1.ListWorkloadsRequest]) (*connect.Response[v1.ListWorkloadsResponse], error) {
	return connect.NewResponse(&v1.ListWorkloadsResponse{UnreachableNodes: []string{"host-9"}, Workloads: []*v1.Workload{{
		Name: "web", Namespace: "default", Owner: "host-1", Wanted: 2, Priority: 5, Shards: []*v1.Shard{
			{Name: "web-0", Node: "host-2", Status: "running", Labels: map[string]string{"tranship.io/index": "0"}},
			{Name: "old", Node: "host-1", Status: "running"},
		},
	}}}), nil
}

func startOwner(t *testing.T, o transhipv1connect.WorkloadsHandler) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.Handle(transhipv1connect.NewWorkloadsHandler(o))
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: mux}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
	return "unix://" + socket
}

// workloadCLI runs a verb and returns its output, what it says on stderr, and
// its exit code.
func workloadCLI(t *testing.T, address string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	root, g := newRoot()
	defer g.release()
	var out, errs bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&errs)
	root.SetArgs(append([]string{"--host", address, "workload"}, args...))
	err := root.ExecuteContext(t.Context())
	if err != nil {
		errs.WriteString(explain(err, address))
	}
	return out.String(), errs.String(), exitCode(err)
}

func TestApplyShowsTheDifferenceAndDoesWhatWasShown(t *testing.T) {
	file := filepath.Join(t.TempDir(), "w.toml")
	if err := os.WriteFile(file, []byte("[[workload]]\nname = \"web\"\nimage = \"i\"\nshards = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	steps := []*v1.WorkloadStep{{Op: "add", Shard: "web-0", Node: "host-2"}}
	for _, c := range []struct {
		name    string
		plan    *v1.WorkloadPlan
		outcome string
		args    []string
		out     string // a part of stdout
		err     string // of stderr
		code    int
		asked   int
	}{
		{"it is done", &v1.WorkloadPlan{Workload: "web", Steps: steps, Fingerprint: "f"}, "done", []string{"apply", "-f", file, "--yes"}, "+ shard web-0 on host-2\n", "[1/1] + shard web-0", 0, 2},
		{"a dry run", &v1.WorkloadPlan{Workload: "web", Steps: steps}, "done", []string{"apply", "-f", file, "--dry-run"}, "+ shard web-0 on host-2\n", "", 0, 1},
		{"nothing to do", &v1.WorkloadPlan{Workload: "web"}, "nothing", []string{"apply", "-f", file}, "web: nothing to do\n", "", 0, 1},
		{"refused", &v1.WorkloadPlan{Workload: "web", Refused: []string{"web-0 fits no host: host-1 is cordoned"}}, "", []string{"apply", "-f", file}, "", "refused: web-0 fits no host", 3, 1},
		{"it fails", &v1.WorkloadPlan{Workload: "web", Steps: steps}, "failed", []string{"scale", "web", "--shards", "3"}, "", "workload web: ", 1, 1},
		{"scaled", &v1.WorkloadPlan{Workload: "web", Steps: steps}, "done", []string{"scale", "web", "--memory", "64m", "-y"}, "", "", 0, 2},
		{"removed", &v1.WorkloadPlan{Workload: "web", Steps: steps}, "done", []string{"rm", "web", "-y"}, "", "", 0, 2},
		{"nothing to scale", nil, "", []string{"scale", "web"}, "", "nothing to scale", 2, 0},
		{"no file", nil, "", []string{"apply"}, "", "--file is missing", 2, 0},
		{"a file that is not there", nil, "", []string{"apply", "-f", file + ".none"}, "", "no such file", 2, 0},
		{"no name", nil, "", []string{"rm"}, "", "accepts 1 arg", 2, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &owner{plan: c.plan, outcome: c.outcome}
			out, errs, code := workloadCLI(t, startOwner(t, o), c.args...)
			if code != c.code || !strings.Contains(out, c.out) || !strings.Contains(errs, c.err) || len(o.asked) != c.asked {
				t.Errorf("exit code %d, asked %d times\n%s\n%s", code, len(o.asked), out, errs)
			}
			if c.asked == 2 && (!o.asked[0].GetDryRun() || o.asked[1].GetDryRun() || o.asked[1].GetExpect() != c.plan.GetFingerprint()) {
				t.Errorf("asked %v", o.asked)
			}
		})
	}
}

func TestADryRunOfAFileTellsWhatItWouldHaveBegun(t *testing.T) {
	file := filepath.Join(t.TempDir(), "w.toml")
	one := "[[workload]]\nname = \"NAME\"\nimage = \"i\"\nshards = 1\n"
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(one, "NAME", "cache")+strings.ReplaceAll(one, "NAME", "web")), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args  []string
		asked int
		told  bool
	}{{[]string{"apply", "-f", file, "--dry-run"}, 2, true}, {[]string{"apply", "-f", file}, 4, false}} {
		o := &owner{plan: &v1.WorkloadPlan{Steps: []*v1.WorkloadStep{{Op: "add", Shard: "cache-0", Node: "host-2"}, {Op: "remove", Shard: "cache-1"}}}, outcome: "done"}
		if _, errs, code := workloadCLI(t, startOwner(t, o), c.args...); code != 0 || len(o.asked) != c.asked {
			t.Fatalf("exit code %d, asked %d times: %s", code, len(o.asked), errs)
		}
		last := o.asked[c.asked-1].GetPlanned()
		if (len(last) == 1) != c.told || c.told && (last[0].GetNode()["cache-0"] != "host-2" || len(last[0].GetNode()) != 1 || !strings.Contains(string(last[0].GetSpecJson()), `"cache"`)) {
			t.Errorf("%v: web is asked for with %v", c.args, last)
		}
	}
}

// stuck is an owner that gets nowhere, in a dry run or in earnest.
type stuck struct {
	owner
	dry     bool
	reached chan struct{}
	left    chan struct{} // the daemon heard that nobody waits any more
}

func (s *stuck) Change(ctx context.Context, r *connect.Request[v1.ChangeWorkloadRequest], stream *connect.ServerStream[v1.WorkloadEvent]) error {
	if r.Msg.GetDryRun() && !s.dry {
		return s.owner.Change(ctx, r, stream)
	}
	if err := stream.Send(&v1.WorkloadEvent{Plan: s.plan}); err != nil {
		return err
	}
	close(s.reached)
	<-ctx.Done()
	close(s.left)
	return ctx.Err()
}

func TestCtrlCEndsAnApply(t *testing.T) {
	file := filepath.Join(t.TempDir(), "w.toml")
	if err := os.WriteFile(file, []byte("[[workload]]\nname = \"web\"\nimage = \"i\"\nshards = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dry := range []bool{true, false} {
		s := &stuck{dry: dry, reached: make(chan struct{}), left: make(chan struct{})}
		s.plan, s.outcome = &v1.WorkloadPlan{Workload: "web", Steps: []*v1.WorkloadStep{{Op: "add", Shard: "web-0", Node: "host-2"}}}, "done"
		at := startOwner(t, s)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { <-s.reached; cancel() }()
		root, g := newRoot()
		var out, errs bytes.Buffer
		root.SetOut(&out)
		root.SetErr(&errs)
		root.SetArgs([]string{"--host", at, "-o", "json", "workload", "apply", "-f", file})
		err := root.ExecuteContext(ctx)
		g.release()
		if exitCode(err) != exitCancelled {
			t.Errorf("while it is planned: %v: exit code %d: %v", dry, exitCode(err), err)
		}
		var doc control.WorkloadChangesDocument
		if jerr := json.Unmarshal(out.Bytes(), &doc); jerr != nil || doc.SchemaVersion != 1 || !dry && (len(doc.Workloads) != 1 || doc.Workloads[0].Outcome != "cancelled") {
			t.Errorf("%v: %s", jerr, out.String())
		}
		<-s.left
	}
}

func TestAWorkloadsMistakesAreToldWithoutADaemon(t *testing.T) {
	file := filepath.Join(t.TempDir(), "w.toml")
	if err := os.WriteFile(file, []byte("[[workload]]\nname = \"web\"\nimage = \"i\"\nshards = -1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, errs, code := workloadCLI(t, "unix:///nowhere", "apply", "-f", file)
	if code != 2 || !strings.Contains(errs, file+":4: shards: -1 shards are not possible; ") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

func TestWorkloadsAreListed(t *testing.T) {
	at := startOwner(t, &owner{})
	out, errs, code := workloadCLI(t, at, "ls")
	if code != 0 || !strings.Contains(out, "1/2 +1") || !strings.Contains(out, "host-1:1 host-2:1") || !strings.Contains(errs, "host-9 does not answer") {
		t.Errorf("%d\n%s%s", code, out, errs)
	}
	out, _, code = workloadCLI(t, at, "ls", "-o", "json")
	var doc control.WorkloadsDocument
	if err := json.Unmarshal([]byte(out), &doc); err != nil || code != 0 || doc.SchemaVersion != 1 || len(doc.Workloads) != 1 || doc.Workloads[0].Running != 1 || doc.Workloads[0].Joined != 1 {
		t.Errorf("%d %v\n%s", code, err, out)
	}
	out, _, _ = workloadCLI(t, at, "ls", "web")
	if !strings.Contains(out, "joined") {
		t.Error(out)
	}
}
