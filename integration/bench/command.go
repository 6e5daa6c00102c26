package main

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
	"syscall"
	"time"
)

// tool is tranship's command line, in a lab of the benchmark's own.
type tool struct {
	bin string // tranship, with transhipd beside it
	lab string
}

// findTool looks where `make build` puts it, or in dir.
func findTool(dir, lab string) (*tool, error) {
	if dir == "" {
		root, err := moduleRoot()
		if err != nil {
			return nil, err
		}
		dir = filepath.Join(root, "bin")
	}
	bin, err := filepath.Abs(filepath.Join(dir, "tranship"))
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(bin); err != nil {
		return nil, fmt.Errorf("%w: `make build` makes it", err)
	}
	return &tool{bin: bin, lab: lab}, nil
}

func moduleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("run it inside the repository: `make bench`")
		}
		dir = filepath.Dir(dir)
	}
}

// command prepares tranship. When ctx ends it is interrupted, so that what it
// does is undone by itself.
func (t *tool) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, t.bin, args...)
	cmd.Env = append(os.Environ(), "TRANSHIP_LAB="+t.lab)
	// A group of its own: Ctrl-C at the terminal is for this program, which ends
	// the others in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

// inHost prepares a program that runs in a host.
func (t *tool) inHost(ctx context.Context, host string, args ...string) *exec.Cmd {
	return t.command(ctx, append([]string{"lab", "exec", host, "--"}, args...)...)
}

func run(ctx context.Context, cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err == nil {
		return stdout.Bytes(), nil
	}
	if ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), err)
	}
	return stdout.Bytes(), fmt.Errorf("%s: %w%s", strings.Join(cmd.Args[1:], " "), err, tail(stderr.String()))
}

func commandOf(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, name, args...)
}

// tranship runs the command line to its end and returns its standard output.
func (t *tool) tranship(ctx context.Context, args ...string) ([]byte, error) {
	return run(ctx, t.command(ctx, args...))
}

// on runs a program in a host to its end and returns its standard output.
func (t *tool) on(ctx context.Context, host string, args ...string) ([]byte, error) {
	return run(ctx, t.inHost(ctx, host, args...))
}

// host is where leak takes its inventories.
type host struct {
	tool *tool
	name string
}

// Exec implements leak.Host.
func (h host) Exec(ctx context.Context, args ...string) ([]byte, error) {
	return h.tool.on(ctx, h.name, args...)
}

// measures waits until the host's daemon has measured its own load: by then it has
// every file open that it reads all the time.
func (h host) measures(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, measurePatience)
	defer cancel()
	for {
		out, err := h.Exec(ctx, "tranship", "nodes", "-o", "json")
		if err != nil {
			return fmt.Errorf("%s: its daemon has not measured its load: %w", h.name, err)
		}
		var doc struct {
			Nodes []struct {
				Self    bool     `json:"self"`
				CPULoad *float64 `json:"cpu_load"`
			}
		}
		if err := document(out, &doc); err != nil {
			return err
		}
		for _, n := range doc.Nodes {
			if n.Self && n.CPULoad != nil {
				return nil
			}
		}
	}
}

// measurePatience is far more than the few seconds that a new daemon needs.
const measurePatience = 30 * time.Second

// document reads one JSON document into v.
func document(out []byte, v any) error {
	if err := json.Unmarshal(out, v); err != nil {
		return fmt.Errorf("%.300q: %w", out, err)
	}
	return nil
}

// tail is the end of what a command said, for an error.
func tail(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	lines = lines[max(0, len(lines)-15):]
	if len(lines) == 1 && lines[0] == "" {
		return ""
	}
	return "\n  " + strings.Join(lines, "\n  ")
}

// often is for what costs nothing to ask, seldom for what starts a process.
const (
	often  = 2 * time.Millisecond
	seldom = 100 * time.Millisecond
)

// poll asks until ok, for conditions that nobody announces.
func poll(ctx context.Context, what string, every, patience time.Duration, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s: not within %s", what, patience))
	defer cancel()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		done, err := ok()
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}
