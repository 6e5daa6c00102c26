// Command demo is `make demo`: a Redis with 256 MiB of keys moves from one host
// to another and back, while a client reads and writes it over one connection.
//
// It brings up a lab of its own and takes it down again, whatever happens, and
// its exit code is 0 only if both moves were done and the client saw neither an
// error nor a new connection. It knows tranship by its command line alone.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	exitDone        = 0
	exitWrong       = 1
	exitInterrupted = 130 // 128 + SIGINT, as shells have it

	// limit bounds the whole demo: it takes about a minute, so a machine that
	// needs ten has a problem that waiting does not solve.
	limit = 10 * time.Minute
	// downLimit is for the clean-up, which Ctrl-C does not shorten.
	downLimit = 2 * time.Minute

	// labName keeps the demo away from a lab that somebody works in.
	labName = "demo"
)

func main() {
	// The demo is its own client: lab exec runs this program on the host `client`.
	if len(os.Args) > 1 && os.Args[1] == clientVerb {
		os.Exit(clientMain(os.Args[2:]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	os.Exit(run(ctx, os.Stdout, os.Stderr))
}

func run(ctx context.Context, stdout, stderr io.Writer) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(stderr, "demo: hosts are namespaces, which only root can make: run `make demo`, which asks sudo")
		return exitWrong
	}
	bin, err := findTranship()
	if err != nil {
		fmt.Fprintln(stderr, "demo:", err)
		return exitWrong
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(stderr, "demo:", err)
		return exitWrong
	}
	return play(ctx, &commandLine{bin: bin}, self, stdout, stderr)
}

// play is the demo with its clean-up and its verdict.
func play(ctx context.Context, c cli, self string, stdout, stderr io.Writer) int {
	limited, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the demo took longer than %s", limit))
	defer cancel()
	d := &demo{cli: c, self: self, out: stdout}
	err := d.run(limited)

	after, cancelDown := context.WithTimeout(context.WithoutCancel(ctx), downLimit)
	defer cancelDown()
	_, downErr := c.Run(after, "lab", "down")
	if downErr != nil {
		err = errors.Join(err, fmt.Errorf("take the lab down: %w", downErr))
	}
	switch {
	case ctx.Err() != nil && downErr == nil:
		fmt.Fprintln(stderr, "demo: interrupted; the lab is down again")
		return exitInterrupted
	case err != nil:
		fmt.Fprintln(stderr, "demo:", err)
		return exitWrong
	}
	d.say("The lab is down again. Nothing of it is left.")
	return exitDone
}

// findTranship looks where `make build` puts it.
func findTranship() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("run it inside the repository: `make demo`")
		}
		dir = filepath.Dir(dir)
	}
	bin := filepath.Join(dir, "bin", "tranship")
	if _, err := os.Stat(bin); err != nil {
		return "", fmt.Errorf("%w: `make build` makes it", err)
	}
	return bin, nil
}

// cli is tranship's command line.
type cli interface {
	// Run runs tranship to its end and returns its standard output, also beside
	// an error, which carries the end of its standard error.
	Run(ctx context.Context, args ...string) ([]byte, error)
	// Start begins tranship and returns; it ends by itself or by Interrupt.
	// When ctx ends it is interrupted.
	Start(ctx context.Context, args ...string) (process, error)
}

// process is a command under way.
type process interface {
	// Interrupt asks it to end. It may be called twice.
	Interrupt() error
	// Ended is closed when it has ended.
	Ended() <-chan struct{}
	// Wait waits for its end, as Run does.
	Wait() ([]byte, error)
}

type commandLine struct{ bin string }

func (c *commandLine) command(ctx context.Context, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.bin, args...)
	cmd.Env = append(os.Environ(), "TRANSHIP_LAB="+labName)
	// A group of its own: Ctrl-C at the terminal is for this program, which ends
	// the others in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	return cmd
}

func (c *commandLine) Run(ctx context.Context, args ...string) ([]byte, error) {
	p, err := c.Start(ctx, args...)
	if err != nil {
		return nil, err
	}
	return p.Wait()
}

func (c *commandLine) Start(ctx context.Context, args ...string) (process, error) {
	r := &running{cmd: c.command(ctx, args), ctx: ctx, name: "tranship " + strings.Join(args, " "), ended: make(chan struct{})}
	r.cmd.Stdout, r.cmd.Stderr = &r.stdout, &r.stderr
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", r.name, err)
	}
	go func() {
		defer close(r.ended)
		r.err = r.cmd.Wait()
	}()
	return r, nil
}

type running struct {
	cmd            *exec.Cmd
	ctx            context.Context // only for the cause of its end
	name           string
	stdout, stderr strings.Builder
	ended          chan struct{}
	err            error
}

func (r *running) Interrupt() error {
	if err := r.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("interrupt %s: %w", r.name, err)
	}
	return nil
}

func (r *running) Ended() <-chan struct{} { return r.ended }

func (r *running) Wait() ([]byte, error) {
	<-r.ended
	out := []byte(r.stdout.String())
	if r.err == nil {
		return out, nil
	}
	err := r.err
	if r.ctx.Err() != nil {
		err = errors.Join(context.Cause(r.ctx), err)
	}
	return out, fmt.Errorf("%s: %w%s", r.name, err, tail(r.stderr.String()))
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
