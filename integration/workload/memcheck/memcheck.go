// Package memcheck builds and speaks to memcheck, a C program that checks its
// own memory, registers, files and channels while it is moved. It is C because
// it needs fork without exec and its hands on single mappings and registers;
// static, so that one file is a whole image.
//
// The sources travel inside this package: [Build] needs a C compiler, and
// nothing else of the repository. A [Client] holds one connection to the control
// port; [Watch] keeps asking over it and is the outside half of the check, for
// a program cannot notice that all of it went back in time.
package memcheck

import (
	"bufio"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

//go:embed c/*.c c/*.h
var sources embed.FS

// DefaultPort is where memcheck listens when --listen does not say otherwise.
const DefaultPort = 7070

// Build compiles memcheck into the static binary out, with $CC or cc. Warnings
// are errors only where the sources are tested, not at somebody else's compiler.
func Build(ctx context.Context, out string, flags ...string) error {
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "cc"
	}
	dir, err := os.MkdirTemp("", "memcheck-")
	if err != nil {
		return fmt.Errorf("build memcheck: %w", err)
	}
	defer os.RemoveAll(dir)
	entries, err := sources.ReadDir("c")
	if err != nil {
		return fmt.Errorf("build memcheck: %w", err)
	}
	args := append([]string{"-static", "-pthread", "-O2", "-g"}, flags...)
	args = append(args, "-o", out)
	for _, e := range entries {
		raw, err := sources.ReadFile("c/" + e.Name())
		if err != nil {
			return fmt.Errorf("build memcheck: %w", err)
		}
		path := filepath.Join(dir, e.Name())
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			return fmt.Errorf("build memcheck: %w", err)
		}
		if strings.HasSuffix(path, ".c") {
			args = append(args, path)
		}
	}
	args = append(args, "-lm") // after the objects that need it
	if msg, err := exec.CommandContext(ctx, cc, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("build memcheck with %s: %w\n%s", cc, err, msg)
	}
	return nil
}

// Stat is what the control port answers to stat, verify and quit.
type Stat struct {
	OK         bool     `json:"ok"`
	ErrorCount uint32   `json:"error_count"`
	Errors     []string `json:"errors"` // the first ten

	VerifiedPages uint64 `json:"verified_pages"`
	Writes        uint64 `json:"writes"` // pages
	Forks         uint64 `json:"forks"`
	Records       uint64 `json:"records"`
	Messages      uint64 `json:"messages"`
	StreamBytes   uint64 `json:"stream_bytes"`
	MapOps        uint64 `json:"map_ops"`
	// Resizes that the kernel refused because a range is several mappings: never
	// natively, but after a restore, which maps each by itself. No error.
	MremapRefused uint64            `json:"mremap_refused"`
	RegisterRuns  uint64            `json:"register_rounds"`
	Signals       uint64            `json:"signals"`
	Backwards     uint64            `json:"clock_backwards"`
	Steps         map[string]uint64 `json:"steps"` // by feature

	Threads   []Thread `json:"threads"`
	Processes int      `json:"processes"`

	// The longest time in which some thread did not run, by three clocks.
	// CLOCK_MONOTONIC of another machine differs by a constant that is no pause.
	LongestPauseMS         float64 `json:"longest_pause_ms"`
	LongestPauseBoottimeMS float64 `json:"longest_pause_boottime_ms"`
	LongestPauseRealtimeMS float64 `json:"longest_pause_realtime_ms"`
	LongestPauseAtUnixNS   int64   `json:"longest_pause_at_unix_ns"`
	// The same of the threads that only sleep and look at the clock: no work of
	// their own delays them, so it is the better measure of a blackout.
	WatchPauseMS       float64 `json:"watch_pause_ms"`
	WatchPauseAtUnixNS int64   `json:"watch_pause_at_unix_ns"`
	SlowestPassMS      uint64  `json:"slowest_pass_ms"`

	PID              int    `json:"pid"`
	UptimeMS         uint64 `json:"uptime_ms"`
	UptimeRealtimeMS uint64 `json:"uptime_realtime_ms"`
	UnixNS           int64  `json:"unix_ns"`
	MonotonicNS      int64  `json:"monotonic_ns"`
	BoottimeNS       int64  `json:"boottime_ns"`

	Connections struct {
		Accepted uint64 `json:"accepted"`
		Open     int    `json:"open"`
		Requests uint64 `json:"requests"`
		Failed   uint64 `json:"failed"`
	} `json:"connections"`

	// Of this connection, including the request that is answered.
	YourRequests uint64 `json:"your_requests"`
	// Only of verify: all threads looked at all they own, and how long it took.
	Complete bool    `json:"complete"`
	VerifyMS float64 `json:"verify_ms"`
	// Only of mark.
	Previous uint64 `json:"previous"`

	Answer string `json:"answer"`
	Error  string `json:"error"`
}

// Thread is one thread of the program; its name is WORKER/ROLE.
type Thread struct {
	Name           string  `json:"name"`
	PID            int     `json:"pid"`
	TID            int     `json:"tid"`
	LongestPauseMS float64 `json:"longest_pause_ms"`
	Ticks          uint64  `json:"ticks"`
}

// Err is nil while the program has found nothing wrong.
func (s Stat) Err() error {
	if s.OK && s.ErrorCount == 0 {
		return nil
	}
	return fmt.Errorf("memcheck found %d errors:\n%s", s.ErrorCount, strings.Join(s.Errors, "\n"))
}

// Client is one connection to the control port. It is not for concurrent use
// and never reconnects: that the connection lives on is part of the check.
type Client struct {
	conn net.Conn
	in   *bufio.Reader
	sent uint64
	// RequestTimeout bounds one request, blackouts included.
	RequestTimeout time.Duration
}

// Dial connects to the control port at addr.
func Dial(ctx context.Context, addr string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("memcheck: %w", err)
	}
	return &Client{conn: conn, in: bufio.NewReaderSize(conn, 1<<16), RequestTimeout: 2 * time.Minute}, nil
}

// Close closes the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Stat asks for the counters.
func (c *Client) Stat(ctx context.Context) (Stat, error) { return c.ask(ctx, "stat") }

// Verify makes every thread look at all it owns, and waits for that.
func (c *Client) Verify(ctx context.Context) (Stat, error) {
	s, err := c.ask(ctx, "verify")
	if err == nil && !s.Complete {
		err = errors.New("memcheck verify: not every thread answered")
	}
	return s, err
}

// Reset forgets the longest pauses, so that each migration can be measured by itself.
func (c *Client) Reset(ctx context.Context) error {
	_, err := c.ask(ctx, "reset")
	return err
}

// Mark leaves n with the program and returns the mark that it held.
func (c *Client) Mark(ctx context.Context, n uint64) (previous uint64, err error) {
	s, err := c.ask(ctx, fmt.Sprintf("mark %d", n))
	return s.Previous, err
}

// Quit ends the program and returns its last words.
func (c *Client) Quit(ctx context.Context) (Stat, error) { return c.ask(ctx, "quit") }

func (c *Client) ask(ctx context.Context, command string) (Stat, error) {
	var s Stat
	deadline := time.Now().Add(c.RequestTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := c.conn.SetDeadline(deadline); err != nil {
		return s, fmt.Errorf("memcheck %s: %w", command, err)
	}
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := io.WriteString(c.conn, command+"\n"); err != nil {
		return s, fmt.Errorf("memcheck %s: %w", command, errors.Join(err, context.Cause(ctx)))
	}
	c.sent++
	line, err := c.in.ReadBytes('\n')
	if err != nil {
		return s, fmt.Errorf("memcheck %s: %w", command, errors.Join(err, context.Cause(ctx)))
	}
	if err := json.Unmarshal(line, &s); err != nil {
		return s, fmt.Errorf("memcheck %s: answer %.80q: %w", command, line, err)
	}
	if s.Error != "" {
		return s, fmt.Errorf("memcheck %s: %s", command, s.Error)
	}
	if s.YourRequests != 0 && s.YourRequests != c.sent {
		return s, fmt.Errorf("memcheck %s: the program counts %d requests on this connection, %d were sent", command, s.YourRequests, c.sent)
	}
	return s, nil
}
