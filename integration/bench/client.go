package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
	"github.com/tranship/tranship/integration/workload/pgcheck"
	"github.com/tranship/tranship/integration/workload/redischeck"
)

// clientVerb makes this program a client: CLIENT redis-load|redis-run|pg-init|pg-run ADDRESS [NUMBER…].
const clientVerb = "client"

// clientTimeout is far above any blackout, also that of 4 GiB written and read
// back: a connection that hangs longer is broken.
const clientTimeout = 60 * time.Second

// requestTimeout is a request's own. Its clock runs on while the client is paused
// with a request under way, which lasts as long as the other subject moves; that
// a client which works hangs is noticed by clientTimeout.
const requestTimeout = time.Hour

// pgWorkers and pgRate keep PostgreSQL busy without taking the processor of a
// small machine from the migration.
const (
	pgWorkers = 4
	pgRate    = 200
)

// clientMain runs inside the host `client`. SIGUSR1 prints what it has seen,
// SIGUSR2 makes it forget the gaps so far, and SIGINT ends it, after everything
// was read back and compared.
func clientMain(args []string) int {
	if len(args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: client WHAT ADDRESS [NUMBER…]")
		return 2
	}
	numbers := make([]float64, 2)
	for i, arg := range args[2:] {
		v, err := strconv.ParseFloat(arg, 64)
		if err != nil || i >= len(numbers) {
			fmt.Fprintln(os.Stderr, "client: numbers:", args[2:])
			return 2
		}
		numbers[i] = v
	}
	rec := check.NewRecorder("client")
	forget := make(chan os.Signal, 1)
	signal.Notify(forget, syscall.SIGUSR2)
	go func() {
		for range forget {
			rec.Begin()
		}
	}()
	err := check.Run(context.Background(), os.Stdout, rec, 0, func(ctx context.Context) error {
		// Not before: only now are signals answered.
		if err := check.Print(os.Stdout, hello{PID: os.Getpid()}); err != nil {
			return err
		}
		return clientWork(ctx, args[0], args[1], numbers, rec)
	})
	signal.Stop(forget)
	close(forget)
	if err != nil && !errors.Is(err, check.ErrNotOK) {
		fmt.Fprintln(os.Stderr, err)
	}
	if err != nil {
		return 1
	}
	return 0
}

func clientWork(ctx context.Context, what, addr string, numbers []float64, rec *check.Recorder) error {
	timeout := requestTimeout
	if what == "redis-load" || what == "pg-init" { // which nobody pauses
		timeout = clientTimeout
	}
	redis := redischeck.Options{Addr: addr, Timeout: timeout}
	pg := pgcheck.Options{URL: "postgres://postgres@" + addr + "/postgres?sslmode=disable", Timeout: timeout}
	switch what {
	case "redis-load":
		return redischeck.Load(ctx, redis, int64(numbers[0]), 1, rec)
	case "redis-run":
		return redischeck.Run(ctx, redischeck.RunOptions{
			Options: redis, OverwriteRate: int64(numbers[0]), RequestRate: numbers[1], NoReconnect: true,
		}, rec)
	case "pg-init":
		return pgcheck.Init(ctx, pg, int64(numbers[0]), rec)
	case "pg-run":
		return pgcheck.Run(ctx, pg, pgWorkers, pgRate, rec)
	}
	return fmt.Errorf("unknown client %q", what)
}

// hello is a client's first line: its pid in its own host, for signals.
type hello struct {
	PID int `json:"pid"`
}

// client is a client under way, seen from the machine.
type client struct {
	tool    *tool
	cmd     *exec.Cmd
	pid     int
	reports chan check.Report
	stderr  strings.Builder
	ended   chan struct{} // closed when it has ended; err and last are set before
	err     error
	last    check.Report
}

// startClient starts one and waits until it has had its first answers.
func startClient(ctx context.Context, t *tool, self string, args ...string) (*client, error) {
	c := &client{tool: t, reports: make(chan check.Report, 1), ended: make(chan struct{})}
	c.cmd = t.inHost(context.WithoutCancel(ctx), "client", append([]string{self, clientVerb}, args...)...)
	c.cmd.Stderr = &c.stderr
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start a client: %w", err)
	}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	var h hello
	if !lines.Scan() || json.Unmarshal(lines.Bytes(), &h) != nil || h.PID == 0 {
		_ = c.cmd.Process.Signal(os.Interrupt)
		return nil, errors.Join(fmt.Errorf("a client did not begin%s", tail(c.stderr.String())), c.cmd.Wait())
	}
	c.pid = h.PID
	go c.read(lines, out)
	err = poll(ctx, "the client works", seldom, 3*time.Minute, func() (bool, error) {
		r, err := c.report(ctx)
		return r.Requests > 0, err
	})
	if err != nil {
		c.kill()
		return nil, err
	}
	return c, nil
}

// read takes the client's lines until it ends.
func (c *client) read(lines *bufio.Scanner, out io.Reader) {
	defer close(c.ended)
	for lines.Scan() {
		var r check.Report
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil || r.Program == "" {
			continue
		}
		if r.Final {
			c.last = r
			continue
		}
		c.reports <- r
	}
	_, _ = io.Copy(io.Discard, out)
	c.err = c.cmd.Wait()
}

// report asks what the client has seen. An error or a new connection is an error.
func (c *client) report(ctx context.Context) (check.Report, error) {
	if err := c.cmd.Process.Signal(syscall.SIGUSR1); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return check.Report{}, fmt.Errorf("ask the client: %w", err)
	}
	select {
	case r := <-c.reports:
		if r.ErrorCount != 0 || r.Reconnects != 0 {
			return r, fmt.Errorf("the client saw %d errors and reconnected %d times: %v", r.ErrorCount, r.Reconnects, r.Errors)
		}
		return r, nil
	case <-c.ended:
		return c.last, fmt.Errorf("the client ended early: %w, errors %v%s", c.err, c.last.Errors, tail(c.stderr.String()))
	case <-ctx.Done():
		return check.Report{}, context.Cause(ctx)
	case <-time.After(clientTimeout):
		return check.Report{}, errors.New("the client does not answer")
	}
}

// pause stops the client where it is; resume lets it go on and forgets that it
// stood still. Only the client of the subject that is moved works.
func (c *client) pause(ctx context.Context) error { return c.signalInside(ctx, "STOP") }

func (c *client) resume(ctx context.Context) error {
	if err := c.signalInside(ctx, "CONT"); err != nil {
		return err
	}
	return c.begin(ctx)
}

func (c *client) signalInside(ctx context.Context, name string) error {
	_, err := c.tool.on(ctx, "client", "kill", "-"+name, strconv.Itoa(c.pid))
	return err
}

// begin makes it forget the gaps so far, and waits until that has happened.
func (c *client) begin(ctx context.Context) error {
	before, err := c.report(ctx)
	if err != nil {
		return err
	}
	if err := c.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		return fmt.Errorf("tell the client: %w", err)
	}
	return poll(ctx, "the client begins anew", often, 10*time.Second, func() (bool, error) {
		r, err := c.report(ctx)
		return r.StartedAt != before.StartedAt && r.Requests > 0, err
	})
}

// goOn waits for so many more answers.
func (c *client) goOn(ctx context.Context, requests int64) (check.Report, error) {
	first, err := c.report(ctx)
	if err != nil {
		return first, err
	}
	var last check.Report
	err = poll(ctx, "the client goes on", often*5, clientTimeout, func() (bool, error) {
		last, err = c.report(ctx)
		return last.Requests >= first.Requests+requests, err
	})
	return last, err
}

// end ends the client, which reads everything back, and says what was wrong.
func (c *client) end(ctx context.Context) error {
	if err := c.signalInside(ctx, "CONT"); err != nil {
		return err
	}
	if err := c.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end the client: %w", err)
	}
	select {
	case <-c.ended:
	case <-ctx.Done():
		c.kill()
		return context.Cause(ctx)
	}
	if c.err != nil || !c.last.OK || c.last.Reconnects != 0 {
		return fmt.Errorf("the client saw %d errors and reconnected %d times: %v: %w%s", c.last.ErrorCount, c.last.Reconnects, c.last.Errors, c.err, tail(c.stderr.String()))
	}
	return nil
}

// kill ends it in any case and waits for that.
func (c *client) kill() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_ = c.signalInside(ctx, "KILL")
	for {
		select {
		case <-c.reports:
		case <-c.ended:
			return
		case <-ctx.Done():
			_ = c.cmd.Process.Kill()
			return
		}
	}
}
