package lazypages

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// readyEnv names the descriptor on which a spawned server says that it listens.
const readyEnv = "TRANSHIP_PAGE_SERVER_READY_FD"

const readyWord = "listening\n"

// TakeOverFlag makes Main go on for a server that has died.
const TakeOverFlag = "--take-over"

// Main runs a server as a process of its own:
//
//	transhipd page-server [--take-over] --dir STORE --images DIR --socket WORK/lazy-pages.socket --control PATH [--fill-after DURATION]
//
// It leaves the session of whoever started it and is deaf to the signals by
// which daemons are stopped: while it is away, faults wait. With --take-over it
// goes on for one that has died (TakeOver). It returns the exit code: 0 done or
// stopped, 1 failed, 2 usage.
func Main(args []string) int {
	cfg, takeOver, err := parseArgs(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "page-server:", err)
		return 2
	}
	return runServer(cfg, takeOver)
}

func parseArgs(args []string) (cfg Config, takeOver bool, err error) {
	var level slog.Level
	fs := flag.NewFlagSet("page-server", flag.ContinueOnError)
	fs.StringVar(&cfg.Store, "dir", "", "page store")
	fs.StringVar(&cfg.Images, "images", "", "directory of CRIU's images")
	fs.StringVar(&cfg.Socket, "socket", "", "lazy-pages.socket in CRIU's work directory")
	fs.StringVar(&cfg.Control, "control", "", "control socket")
	fs.DurationVar(&cfg.FillAfter, "fill-after", 0, "time between the restore and filling in the background")
	fs.BoolVar(&takeOver, strings.TrimLeft(TakeOverFlag, "-"), false, "go on for a server that has died")
	fs.TextVar(&level, "log-level", slog.LevelInfo, "debug, info, warn or error")
	if err := fs.Parse(args); err != nil {
		return Config{}, false, err
	}
	for _, need := range []string{"dir", "images", "socket", "control"} {
		if fs.Lookup(need).Value.String() == "" {
			return Config{}, false, fmt.Errorf("--%s is missing", need)
		}
	}
	cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	cfg.Hold = true
	return cfg, takeOver, nil
}

func runServer(cfg Config, takeOver bool) int {
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTSTP)
	if _, err := unix.Setsid(); err != nil && !errors.Is(err, unix.EPERM) { // EPERM: leads one already
		cfg.Log.Warn("leave the session", "err", err)
	}
	if err := spare(); err != nil {
		cfg.Log.Info("not out of the OOM killer's way", "err", err)
	}
	cfg.Ready = func() {
		if err := sayReady(); err != nil {
			cfg.Log.Warn("say that the server listens", "err", err)
		}
	}
	serve := Serve
	if takeOver {
		serve = TakeOver
	}
	if err := serve(context.Background(), cfg); err != nil {
		cfg.Log.Error("page server failed", "err", err)
		return 1
	}
	return 0
}

// spare makes the OOM killer choose another process as long as there is one:
// this one's death would cost the whole shard.
func spare() error {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return fmt.Errorf("oom_score_adj: %w", err)
	}
	return nil
}

func sayReady() error {
	var fd int
	value := os.Getenv(readyEnv)
	if value == "" {
		return nil
	}
	if _, err := fmt.Sscan(value, &fd); err != nil || fd < 3 {
		return fmt.Errorf("%s=%q is not a descriptor", readyEnv, value)
	}
	f := os.NewFile(uintptr(fd), "ready")
	_, err := f.WriteString(readyWord)
	return errors.Join(err, f.Close())
}

// Process is a spawned server.
type Process struct {
	*Client
	cmd *exec.Cmd
}

// Spawn starts a server: argv is the program and the words that bring it to
// Main, such as "/proc/self/exe", "page-server". It returns once the server
// listens. The server outlives the caller; ctx bounds the start alone. Its log
// goes to logFile.
func Spawn(ctx context.Context, argv []string, cfg Config, logFile string) (*Process, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start a page server: %w", err)
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start a page server: %w", err)
	}
	defer r.Close()
	cmd := command(cfg, argv...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{w}
	cmd.Env = append(os.Environ(), readyEnv+"=3")
	err = cmd.Start()
	err = errors.Join(err, w.Close())
	if err != nil {
		return nil, fmt.Errorf("start a page server: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(unixEpoch) })()
	word, err := bufio.NewReader(r).ReadString('\n')
	if err == nil && word == readyWord {
		return &Process{Client: &Client{path: cfg.Control}, cmd: cmd}, nil
	}
	killErr := cmd.Process.Kill()
	if errors.Is(killErr, os.ErrProcessDone) {
		killErr = nil
	}
	_ = cmd.Wait() // its exit code says less than its log
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return nil, errors.Join(fmt.Errorf("start a page server: %w: %s", err, tail(logFile)), killErr)
}

func command(cfg Config, argv ...string) *exec.Cmd {
	args := append(append([]string{}, argv[1:]...),
		"--dir", cfg.Store, "--images", cfg.Images, "--socket", cfg.Socket, "--control", cfg.Control,
		"--fill-after", cfg.FillAfter.String())
	cmd := exec.Command(argv[0], args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/" // keeps no mount busy
	return cmd
}

// PID is the server's host pid.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Wait returns when the process has ended; nil if every page was placed.
func (p *Process) Wait() error {
	if err := p.cmd.Wait(); err != nil {
		return fmt.Errorf("page server: %w", err)
	}
	return nil
}

// tail is the end of a log, for an error.
func tail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const size = 2 << 10
	if end, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, end-size), io.SeekStart)
	}
	raw, err := io.ReadAll(io.LimitReader(f, size))
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(raw))
}
