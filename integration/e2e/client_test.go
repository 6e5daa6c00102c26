//go:build integration

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
)

// client is a checker that runs outside of the shard while it moves.
type client struct {
	name    string
	cmd     *exec.Cmd
	reports chan check.Report // one for each SIGUSR1, and the last one
	ready   chan struct{}     // closed by the first line that is no report
	stderr  strings.Builder
	ended   chan struct{} // closed when it has ended; err is set before
	err     error
	last    check.Report
}

// startClient starts a checker on the client host; it ends with the test.
func startClient(t *testing.T, name string, args ...string) *client {
	t.Helper()
	c := &client{name: name, reports: make(chan check.Report, 1), ready: make(chan struct{}), ended: make(chan struct{})}
	// Not the test's context: it ends before clean-up, which asks for the end itself.
	c.cmd = hostOf(t, "client").Command(t.Context(), append([]string{checker(t)}, args...)...)
	c.cmd.Stderr = &c.stderr
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go c.read(out)
	t.Cleanup(func() {
		_ = c.cmd.Process.Signal(syscall.SIGINT)
		for {
			select {
			case <-c.reports:
			case <-c.ended:
				return
			}
		}
	})
	return c
}

// read takes the client's lines until it ends.
func (c *client) read(out io.Reader) {
	defer close(c.ended)
	first := sync.OnceFunc(func() { close(c.ready) })
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r check.Report
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil || r.Program == "" {
			first()
			continue
		}
		if r.Final {
			c.last = r
			continue
		}
		c.reports <- r
	}
	c.err = c.cmd.Wait()
}

// report asks the client what it has seen so far.
func (c *client) report(t *testing.T) check.Report {
	t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatalf("%s: %v", c.name, err)
	}
	select {
	case r := <-c.reports:
		if r.ErrorCount != 0 || r.Reconnects != 0 {
			t.Fatalf("%s: %d errors, %d reconnects: %s", c.name, r.ErrorCount, r.Reconnects, r.Errors)
		}
		return r
	case <-c.ended:
		t.Fatalf("%s ended early: %v, errors %q\n%s", c.name, c.err, c.last.Errors, c.stderr.String())
	case <-time.After(limit):
		t.Fatalf("%s does not report", c.name)
	}
	panic("unreachable")
}

// mustGoOn waits until the client has had so many more answers.
func (c *client) mustGoOn(t *testing.T, requests int64) {
	t.Helper()
	from := c.report(t).Requests
	await(t, fmt.Sprintf("%d more requests of %s", requests, c.name), func() bool {
		return c.report(t).Requests >= from+requests
	})
}

// end ends the client, which then verifies everything, and returns its last
// report: it must be without an error.
func (c *client) end(t *testing.T) check.Report {
	t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatalf("%s: %v", c.name, err)
	}
	select {
	case <-c.ended:
	case <-time.After(limit):
		t.Fatalf("%s does not end", c.name)
	}
	r := c.last
	if c.err != nil || !r.OK || r.ErrorCount != 0 || r.Reconnects != 0 {
		t.Fatalf("%s: %v, %d requests, %d errors, %d reconnects: %s\n%s", c.name, c.err, r.Requests, r.ErrorCount, r.Reconnects, r.Errors, c.stderr.String())
	}
	t.Logf("%s: %d requests, 0 errors, 0 reconnects, longest gap %.0f ms, %v", c.name, r.Requests, r.LongestGapMS, r.Facts)
	return r
}

// gapIn is the longest gap that began or ended between two times. A report
// keeps the longest ones only: 0 means that it was shorter than those.
func gapIn(t *testing.T, r check.Report, from, to time.Time) float64 {
	t.Helper()
	longest := 0.0
	for _, g := range r.Gaps {
		at, err := time.Parse(time.RFC3339Nano, g.At)
		if err != nil {
			t.Fatal(err)
		}
		if end := at.Add(time.Duration(g.MS * float64(time.Millisecond))); at.Before(to) && end.After(from) {
			longest = max(longest, g.MS)
		}
	}
	return longest
}

// awaitConnections waits until the client host has so many TCP connections to
// or from an address: from then on the client answers to signals.
func awaitConnections(t *testing.T, ip string, n int) {
	t.Helper()
	await(t, fmt.Sprintf("%d connections with %s", n, ip), func() bool {
		out := must(t, "client", "ss", "-Htn", "state", "established", "dst", ip)
		return strings.Count(out, "\n") >= n
	})
}

// awaitListening waits until something in the shard accepts connections.
func awaitListening(t *testing.T, ip string, port int) {
	t.Helper()
	await(t, fmt.Sprintf("%s listens on port %d", ip, port), func() bool {
		_, err := on(t, "client", "bash", "-c", fmt.Sprintf("exec 3<>/dev/tcp/%s/%d", ip, port))
		return err == nil
	})
}
