package main

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
)

// fake is a tranship whose every command can fail. Times are virtual.
type fake struct {
	calls  []string
	fail   string                  // the command that contains it fails
	change func(*migration)        // what migrate answers
	report func(rep *check.Report) // what the client says in the end
	hang   string                  // the command that contains it lasts until ctx ends
	client *fakeClient
	moved  int
}

var _ cli = (*fake)(nil)

func (f *fake) Run(ctx context.Context, args ...string) ([]byte, error) {
	line := strings.Join(args, " ")
	f.calls = append(f.calls, line)
	if f.hang != "" && strings.Contains(line, f.hang) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	if f.fail != "" && strings.Contains(line, f.fail) {
		return nil, errors.New("it failed")
	}
	switch {
	case strings.Contains(line, " run -o json "):
		return []byte(`{"schema_version":1,"name":"redis-0","ip":"10.89.1.7"}`), nil
	case strings.Contains(line, " load "):
		return json.Marshal(check.Report{SchemaVersion: 1, OK: true, Final: true, Requests: 1})
	case strings.Contains(line, " migrate "):
		time.Sleep(2 * time.Second) //nolint:forbidigo // virtual: as long as a move takes
		f.moved++
		m := migration{
			SchemaVersion: 1, From: args[2], To: args[len(args)-1], Outcome: "done",
			TotalMS: 2000, BlackoutMS: 150, BytesRaw: 300 << 20, BytesSent: 100 << 20,
		}
		m.Rounds = append(m.Rounds, struct {
			Pages int64 `json:"pages"`
		}{1})
		if f.change != nil {
			f.change(&m)
		}
		return json.Marshal(m)
	}
	return nil, nil
}

func (f *fake) Start(ctx context.Context, args ...string) (process, error) {
	line := strings.Join(args, " ")
	f.calls = append(f.calls, line)
	if f.fail != "" && strings.Contains(line, f.fail) {
		return nil, errors.New("it failed")
	}
	f.client = &fakeClient{began: time.Now(), ended: make(chan struct{}), report: f.report}
	if f.hang == "gives up" {
		close(f.client.ended)
	}
	return f.client, nil
}

type fakeClient struct {
	began  time.Time
	ended  chan struct{}
	asked  bool
	report func(*check.Report)
}

var _ process = (*fakeClient)(nil)

func (c *fakeClient) Interrupt() error {
	if !c.asked {
		c.asked = true
		select {
		case <-c.ended:
		default:
			close(c.ended)
		}
	}
	return nil
}

func (c *fakeClient) Ended() <-chan struct{} { return c.ended }

func (c *fakeClient) Wait() ([]byte, error) {
	<-c.ended
	rep := check.Report{SchemaVersion: 1, OK: true, Final: true, Requests: 1000, LongestGapMS: 180}
	for _, at := range []time.Duration{4 * time.Second, 10 * time.Second} { // within the moves
		rep.Gaps = append(rep.Gaps, check.Gap{At: c.began.Add(at).UTC().Format(time.RFC3339Nano), MS: 180})
	}
	rep.Gaps = append(rep.Gaps, check.Gap{At: time.Now().UTC().Format(time.RFC3339Nano), MS: 0.1})
	if c.report != nil {
		c.report(&rep)
	}
	out, err := json.Marshal(rep)
	if err == nil && !rep.OK {
		err = errors.New("exit status 1")
	}
	return append([]byte("an earlier line\n"), out...), err
}

func TestTheDemo(t *testing.T) {
	for _, c := range []struct {
		name string
		fake fake
		code int
		out  string // in the output or the error
	}{
		{"all goes well", fake{}, exitDone, "0 errors, 0 reconnects"},
		{"the lab does not come up", fake{fail: "lab up"}, exitWrong, "bring up the lab: it failed"},
		{"the lab does not go down", fake{fail: "lab down"}, exitWrong, "it failed"},
		{"the shard does not start", fake{fail: "run -o json"}, exitWrong, "start the shard: it failed"},
		{"redis cannot be filled", fake{fail: " load "}, exitWrong, "fill Redis"},
		{"the client does not start", fake{fail: "redis-client run"}, exitWrong, "it failed"},
		{"a move fails", fake{fail: "migrate"}, exitWrong, "move redis-0 from host-1 to host-2: it failed"},
		{"a move is aborted", fake{change: func(m *migration) { m.Outcome, m.Reason = "aborted", "no room" }}, exitWrong, "was aborted: no room"},
		{"a move without a blackout", fake{change: func(m *migration) { m.BlackoutMS = 0 }}, exitWrong, "claims a blackout"},
		{"a move of too few bytes", fake{change: func(m *migration) { m.BytesRaw = 1 }}, exitWrong, "less than Redis holds"},
		{"another document", fake{change: func(m *migration) { *m = migration{} }}, exitWrong, "not the document"},
		{"the client saw an error", fake{report: func(r *check.Report) { r.OK, r.ErrorCount, r.Errors = false, 1, []string{"broken"} }}, exitWrong, "the client saw 1 errors: [broken]"},
		{"the client connected again", fake{report: func(r *check.Report) { r.Reconnects = 1 }}, exitWrong, "connect again 1 times"},
		{"the client's report is not final", fake{report: func(r *check.Report) { r.Final = false }}, exitWrong, "not the document"},
		{"the client gives up on the way", fake{hang: "gives up"}, exitWrong, "the client gave up"},
		{"it never ends", fake{hang: "migrate"}, exitWrong, "the demo took longer than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out, errs strings.Builder
				code := play(t.Context(), &c.fake, "/demo", &out, &errs)
				if code != c.code || !strings.Contains(out.String()+errs.String(), c.out) {
					t.Errorf("exit code %d instead of %d, and %q is not in:\n%s%s", code, c.code, c.out, out.String(), errs.String())
				}
				if last := c.fake.calls[len(c.fake.calls)-1]; last != "lab down" {
					t.Errorf("the last command was %q", last)
				}
				if c.fake.client != nil && !c.fake.client.asked {
					t.Error("the client was never ended")
				}
				if c.code == exitDone && c.fake.moved != 2 {
					t.Errorf("%d moves", c.fake.moved)
				}
			})
		})
	}
}

func TestAnInterruptedDemoCleansUp(t *testing.T) {
	for _, during := range []string{"lab up", "lab image", "redis-client load", "migrate"} {
		t.Run(during, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				f := &fake{hang: during}
				time.AfterFunc(30*time.Second, cancel)
				var out, errs strings.Builder
				if code := play(ctx, f, "/demo", &out, &errs); code != exitInterrupted {
					t.Errorf("exit code %d: %s%s", code, out.String(), errs.String())
				}
				if f.calls[len(f.calls)-1] != "lab down" || strings.Contains(out.String(), "Nothing of it is left") {
					t.Errorf("calls %q, output %s", f.calls, out.String())
				}
			})
		})
	}
}

func TestTheWaitDuringAMove(t *testing.T) {
	began := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	m := move{began: began, end: began.Add(2 * time.Second)}
	gap := func(at time.Duration, ms float64) check.Gap {
		return check.Gap{At: began.Add(at).Format(time.RFC3339Nano), MS: ms}
	}
	last := gap(time.Hour, 0.1)
	for _, c := range []struct {
		name string
		gaps []check.Gap
		want string
	}{
		{"the longest within it", []check.Gap{gap(time.Second, 20), gap(1500*time.Millisecond, 150), last}, "150 ms"},
		{"one that began before it", []check.Gap{gap(-50*time.Millisecond, 100), last}, "100 ms"},
		{"not one that is over before it", []check.Gap{gap(-time.Second, 900), last}, "< 900 ms"},
		{"not one after it", []check.Gap{gap(3*time.Second, 900.5), last}, "< 901 ms"},
		{"no gaps at all", nil, "?"},
	} {
		if got := waitDuring(m, check.Report{Gaps: c.gaps}); got != c.want {
			t.Errorf("%s: %s instead of %s", c.name, got, c.want)
		}
	}
}

func TestACommandLineTellsWhatItRanAndSaid(t *testing.T) {
	c := &commandLine{bin: "/bin/sh"}
	out, err := c.Run(t.Context(), "-c", `echo out; for i in $(seq 30); do echo line $i >&2; done; echo "lab $TRANSHIP_LAB" >&2; exit 3`)
	if string(out) != "out\n" || err == nil {
		t.Fatalf("%q, %v", out, err)
	}
	for _, want := range []string{"exit status 3", "line 30", "lab " + labName} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	if slices.Contains(strings.Fields(err.Error()), "5") {
		t.Errorf("more than the end of its words: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("why it ended")
	p, err := c.Start(ctx, "-c", `trap 'echo last words; exit 1' INT; echo ready; while :; do sleep 0.05; done`)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Ended():
		t.Fatal("it ended by itself")
	case <-time.After(300 * time.Millisecond): // the shell sets its trap meanwhile
	}
	cancel(why)
	if out, err := p.Wait(); !errors.Is(err, why) || !strings.Contains(string(out), "last words") {
		t.Errorf("%q, %v", out, err)
	}
	if err := p.Interrupt(); err != nil {
		t.Errorf("interrupting what has ended: %v", err)
	}
	if _, err := (&commandLine{bin: "/nonexistent"}).Run(t.Context()); err == nil {
		t.Error("a program that is not there ran")
	}
}
