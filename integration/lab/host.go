package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Host is one host of the lab, or its client.
type Host struct {
	lab *Lab
	rec nodeRecord
}

// Name is the host's name, in the pool and on the network.
func (h *Host) Name() string { return h.rec.Name }

// Addr is the address among hosts.
func (h *Host) Addr() netip.Addr { return h.plan().Host.Addr() }

func (h *Host) plan() nodePlan {
	// The plan is a function of names, so it needs no options.
	p := newPlan(Options{}, h.lab.state)
	for _, n := range p.nodes {
		if n.Name == h.rec.Name {
			return n
		}
	}
	return nodePlan{}
}

// Command prepares a program to run in the host, with the build, the private
// CRIU and ctr on its PATH. Streams, exit code and signals pass through; when
// ctx ends it gets SIGTERM, and SIGKILL ten seconds later.
func (h *Host) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(h.lab.state.BinDir, "tranship"), append([]string{"lab", "exec", h.rec.Name, "--"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// Exec runs a program in the host to its end and returns its standard output;
// its standard error is part of the error.
func (h *Host) Exec(ctx context.Context, args ...string) ([]byte, error) {
	out, err := h.Command(ctx, args...).Output()
	if err == nil {
		return out, nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(ended.Stderr)))
	}
	return out, fmt.Errorf("%s: %s: %w", h.rec.Name, strings.Join(args, " "), err)
}

// Run runs a program in the host on this process's standard streams, passes
// signals on, and returns its exit code, 128 + n after signal n. When ctx ends,
// so does the program. Standard input and output are given away: when the
// program closes them they are closed, so here they become /dev/null.
func (h *Host) Run(ctx context.Context, args []string) (int, error) {
	conn, err := dialInit(ctx, h.rec.Name)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	// Init kills what it runs for a connection that closes.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	dir, err := os.Getwd()
	if err != nil {
		dir = "/"
	}
	req := request{Op: opExec, Args: args, Env: h.callerEnv(), Dir: dir}
	if err := writeWithFiles(conn, req, 0, 1, 2); err != nil {
		return 0, fmt.Errorf("asking the init of %s: %w", h.rec.Name, err)
	}
	var started reply
	if err := readMessage(conn, &started); err != nil {
		return 0, fmt.Errorf("asking the init of %s: %w", h.rec.Name, err)
	}
	if started.Exit != nil {
		return started.Exit.Code, errors.New(started.Error)
	}
	if started.Error != "" {
		return 0, errors.New(started.Error)
	}
	if err := giveAway(0, 1); err != nil {
		return 0, err
	}
	done := make(chan struct{})
	forwarded := make(chan struct{})
	go func() {
		defer close(forwarded)
		for {
			select {
			case <-done:
				return
			case sig := <-signals:
				// A program that has just ended needs no signal any more.
				_ = writeMessage(conn, request{Signal: int(sig.(syscall.Signal))})
			}
		}
	}()
	var ended reply
	err = readMessage(conn, &ended)
	close(done)
	<-forwarded
	if ctx.Err() != nil {
		return 0, fmt.Errorf("%s: %w", args[0], context.Cause(ctx))
	}
	if err != nil || ended.Exit == nil {
		return 0, fmt.Errorf("%s went away while %s ran: %w", h.rec.Name, args[0], errors.Join(err, ErrDown))
	}
	return ended.Exit.Code, nil
}

// giveAway replaces descriptors by /dev/null.
func giveAway(fds ...int) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for _, fd := range fds {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
	}
	return nil
}

// callerEnv is the environment of `lab exec`: the caller's, but with the
// host's PATH first.
func (h *Host) callerEnv() []string {
	path := hostPath(h.lab.state.BinDir)
	if own := os.Getenv("PATH"); own != "" {
		path += ":" + own
	}
	env := []string{"PATH=" + path, "HOSTNAME=" + h.rec.Name}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PATH=") && !strings.HasPrefix(v, "HOSTNAME=") {
			env = append(env, v)
		}
	}
	return env
}

// PIDs returns the host's services and its init by name, as pids of the
// machine. What is down is missing.
func (h *Host) PIDs(ctx context.Context) (map[string]int, error) {
	ans, err := call(ctx, h.rec.Name, request{Op: opStatus})
	if err != nil {
		return nil, err
	}
	outer := pidsOf(h.rec.PID)
	pids := map[string]int{"init": h.rec.PID}
	for _, st := range ans.Services {
		if pid, ok := outer[st.PID]; ok && st.PID != 0 {
			pids[st.Name] = pid
		}
	}
	return pids, nil
}

// pidsOf maps pids of a host to those of the machine.
func pidsOf(init int) map[int]int {
	pids := map[int]int{}
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", init))
	if err != nil {
		return pids
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if at, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err != nil || at != ns {
			continue
		}
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(raw), "\n") {
			if all, ok := strings.CutPrefix(line, "NSpid:"); ok {
				fields := strings.Fields(all)
				if inner, err := strconv.Atoi(fields[len(fields)-1]); err == nil {
					pids[inner] = pid
				}
			}
		}
	}
	return pids
}

// KillDaemon kills transhipd with SIGKILL and keeps it down until StartDaemon
// or the next Up. A transhipd that dies otherwise is started again after a
// second, as systemd would.
func (h *Host) KillDaemon(ctx context.Context) error { return h.KillService(ctx, serviceDaemon) }

// KillService is KillDaemon for containerd, transhipd or etcd.
func (h *Host) KillService(ctx context.Context, name string) error {
	_, err := call(ctx, h.rec.Name, request{Op: opKill, Name: name})
	return err
}

// StartDaemon starts a killed transhipd and waits until it answers.
func (h *Host) StartDaemon(ctx context.Context) error { return h.StartService(ctx, serviceDaemon) }

// StartService is StartDaemon for containerd, transhipd or etcd.
func (h *Host) StartService(ctx context.Context, name string) error {
	if _, err := call(ctx, h.rec.Name, request{Op: opStart, Name: name}); err != nil {
		return err
	}
	return awaitService(ctx, h.rec, name)
}

// CutLink pulls the host's cable: every packet from and to it is lost.
func (h *Host) CutLink() error { return h.setLink(false) }

// RestoreLink puts the cable back.
func (h *Host) RestoreLink() error { return h.setLink(true) }

func (h *Host) setLink(up bool) error {
	hub, _ := h.lab.state.node(switchName)
	if err := setLink(hub.PID, h.rec.Name, up); err != nil {
		return fmt.Errorf("cable to %s: %w", h.rec.Name, err)
	}
	return nil
}

// SetBandwidth limits the host's link in both directions; 0 is no limit.
func (h *Host) SetBandwidth(rate BitRate) error {
	hub, _ := h.lab.state.node(switchName)
	return wireHost(hub.PID, h.rec.PID, h.plan(), rate)
}

// Root is the host's root directory, seen from the machine: with it, files in
// the host's own mounts (/run, /var/lib/tranship) have a path.
func (h *Host) Root() string { return fmt.Sprintf("/proc/%d/root", h.rec.PID) }

// LogPath is where a service of the host logs, on the machine.
func (h *Host) LogPath(name string) string {
	return filepath.Join(nodeDir(h.rec.Name), name+".log")
}

// probeContainerd asks for the version: containerd listens only after every
// plugin has started.
func probeContainerd(ctx context.Context, socket string) error {
	if err := unix.Access(socket, unix.F_OK); err != nil {
		return fmt.Errorf("containerd's socket: %w", err)
	}
	out, err := exec.CommandContext(ctx, "ctr", "--address", socket, "version").CombinedOutput()
	if err != nil {
		return fmt.Errorf("containerd: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
