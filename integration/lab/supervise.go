package lab

import (
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// restartDelay is between the end of a service and its next start, as systemd
// would with RestartSec: long enough for a test to see that it is gone.
const restartDelay = time.Second

// supervisor is a host's process 1: it reaps whatever is orphaned, keeps the
// services running and runs programs for the machine.
type supervisor struct {
	spec initSpec

	mu       sync.Mutex
	services []*running
	// exits tells who waits for a child how it ended.
	exits map[int]chan exit
}

// running is a service with its fate.
type running struct {
	service
	state serviceState
	// gone is closed when the process of state.PID has ended.
	gone  chan struct{}
	timer *time.Timer
}

// supervise listens and reaps until the host is killed.
func supervise(spec initSpec) error {
	s := &supervisor{spec: spec, exits: map[int]chan exit{}}
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	// Process 1 outlives what a terminal sends to the group of `lab up`.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE)

	path := socketPath(spec.Dir)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listening for the machine: %w", err)
	}
	ready := os.NewFile(readyFD, "ready")
	if _, err := ready.WriteString("ready"); err != nil {
		return fmt.Errorf("reporting ready: %w", err)
	}
	ready.Close()
	go s.accept(ln)
	for range children {
		s.reap()
	}
	return nil
}

func (s *supervisor) accept(ln *net.UnixListener) {
	for {
		conn, err := ln.AcceptUnix()
		if err != nil {
			log.Fatalf("listening for the machine: %v", err)
		}
		go func() {
			defer conn.Close()
			if err := s.serve(conn); err != nil && !errors.Is(err, io.EOF) {
				log.Printf("request: %v", err)
			}
		}()
	}
}

func (s *supervisor) serve(conn *net.UnixConn) error {
	var req request
	fds, err := readWithFiles(conn, &req)
	closeFiles := sync.OnceFunc(func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
	defer closeFiles()
	if err != nil {
		return err
	}
	if req.Op == opExec {
		return s.exec(conn, req, fds, closeFiles)
	}
	var ans reply
	if err := s.handle(req); err != nil {
		ans.Error = err.Error()
	}
	ans.Services = s.states()
	return writeMessage(conn, ans)
}

func (s *supervisor) handle(req request) error {
	switch req.Op {
	case opStatus:
		return nil
	case opEnsure:
		return s.ensure(*req.Service)
	case opStart:
		return s.again(req.Name)
	case opKill:
		return s.kill(req.Name)
	default:
		return fmt.Errorf("unknown request %q", req.Op)
	}
}

func (s *supervisor) states() []serviceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	var states []serviceState
	for _, r := range s.services {
		states = append(states, r.state)
	}
	return states
}

// ensure has a service running with these settings.
func (s *supervisor) ensure(want service) error {
	s.mu.Lock()
	r := s.find(want.Name)
	if r == nil {
		r = &running{state: serviceState{Name: want.Name}}
		s.services = append(s.services, r)
	}
	changed := r.Config != want.Config || !slices.Equal(r.Args, want.Args)
	r.service = want
	if r.state.PID != 0 && !changed {
		s.mu.Unlock()
		return nil
	}
	s.mu.Unlock()
	if err := s.stop(r, syscall.SIGTERM); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.state.PID != 0 {
		return nil // another request was faster
	}
	r.state.Held, r.state.Starts = false, 0
	return s.start(r)
}

// kill ends a service as a crash would, and keeps it down until ensure.
func (s *supervisor) kill(name string) error {
	s.mu.Lock()
	r := s.find(name)
	s.mu.Unlock()
	if r == nil {
		return fmt.Errorf("no service %q runs here", name)
	}
	return s.stop(r, syscall.SIGKILL)
}

// again is ensure for a service whose settings are known.
func (s *supervisor) again(name string) error {
	s.mu.Lock()
	r := s.find(name)
	s.mu.Unlock()
	if r == nil {
		return fmt.Errorf("no service %q runs here", name)
	}
	return s.ensure(r.service)
}

// stopGrace is how long a service may take to stop before it is killed; above
// what transhipd gives its migrations.
const stopGrace = 30 * time.Second

// stop ends a service's process, if any, and holds it down.
func (s *supervisor) stop(r *running, sig syscall.Signal) error {
	s.mu.Lock()
	r.state.Held = true
	if r.timer != nil {
		r.timer.Stop()
	}
	pid, gone := r.state.PID, r.gone
	if pid != 0 {
		// Under the lock it cannot have been reaped: the pid is still its.
		if err := syscall.Kill(pid, sig); err != nil {
			s.mu.Unlock()
			return fmt.Errorf("stopping %s: %w", r.Name, err)
		}
	}
	s.mu.Unlock()
	if pid == 0 {
		return nil
	}
	select {
	case <-gone:
		return nil
	case <-time.After(stopGrace):
	}
	s.mu.Lock()
	if r.state.PID == pid {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	s.mu.Unlock()
	<-gone
	return nil
}

// start runs a service; the lock is held.
func (s *supervisor) start(r *running) error {
	logFile, err := os.OpenFile(filepath.Join(s.spec.Dir, r.Name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer logFile.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	pid, ended, err := s.fork(r.Args, baseEnv(s.spec.BinDir), "/", []uintptr{null.Fd(), logFile.Fd(), logFile.Fd()})
	if err != nil {
		return fmt.Errorf("starting %s: %w", r.Name, err)
	}
	r.state.PID = pid
	r.state.Starts++
	gone := make(chan struct{})
	r.gone = gone
	go func() {
		how := <-ended
		log.Printf("%s (process %d) ended: %+v", r.Name, pid, how)
		s.mu.Lock()
		defer s.mu.Unlock()
		r.state.PID = 0
		close(gone)
		if r.state.Held {
			return
		}
		r.timer = time.AfterFunc(restartDelay, func() { s.restart(r) })
	}()
	return nil
}

// restart is start after a crash, unless somebody was faster.
func (s *supervisor) restart(r *running) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.state.Held || r.state.PID != 0 {
		return
	}
	if err := s.start(r); err != nil {
		log.Printf("%v", err)
		r.timer = time.AfterFunc(restartDelay, func() { s.restart(r) })
	}
}

func (s *supervisor) find(name string) *running {
	for _, r := range s.services {
		if r.Name == name {
			return r
		}
	}
	return nil
}

// fork starts a program in a session of its own. The lock is held, so that
// the child's end cannot be reaped before somebody waits for it.
func (s *supervisor) fork(args, env []string, dir string, files []uintptr) (int, <-chan exit, error) {
	path, err := lookPath(args[0], dir, env)
	if err != nil {
		return 0, nil, err
	}
	pid, err := syscall.ForkExec(path, args, &syscall.ProcAttr{
		Dir: dir, Env: env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, nil, fmt.Errorf("%s: %w", path, err)
	}
	ended := make(chan exit, 1)
	s.exits[pid] = ended
	return pid, ended, nil
}

// reap collects every child that has ended, its own and those it inherited.
func (s *supervisor) reap() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		how := exit{Code: ws.ExitStatus()}
		if ws.Signaled() {
			how = exit{Code: 128 + int(ws.Signal()), Signal: int(ws.Signal())}
		}
		if ended, ok := s.exits[pid]; ok {
			delete(s.exits, pid)
			ended <- how // has room for the one exit it ever gets
		}
	}
}

// exec runs a program with the caller's descriptors. The connection is the
// caller: its messages are signals to pass on, its end is the end of the
// program, because nobody is left who waits for it. The descriptors are given
// away once the program has them: who reads its output must see it closed when
// the program closes it.
func (s *supervisor) exec(conn *net.UnixConn, req request, fds []int, given func()) error {
	if len(req.Args) == 0 || len(fds) != 3 {
		return writeMessage(conn, reply{Error: "a program and three descriptors are needed"})
	}
	dir := req.Dir
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		dir = "/" // the caller's directory may not exist in this host
	}
	s.mu.Lock()
	pid, ended, err := s.fork(req.Args, req.Env, dir, []uintptr{uintptr(fds[0]), uintptr(fds[1]), uintptr(fds[2])})
	s.mu.Unlock()
	given()
	if err != nil {
		return writeMessage(conn, reply{Error: err.Error(), Exit: &exit{Code: notFoundCode(err)}})
	}
	if err := writeMessage(conn, reply{PID: pid}); err != nil {
		s.signalGroup(pid, syscall.SIGKILL)
		return err
	}
	finished := make(chan struct{})
	defer close(finished)
	go func() {
		for {
			var msg request
			if err := readMessage(conn, &msg); err != nil {
				select {
				case <-finished:
				default:
					s.signalGroup(pid, syscall.SIGKILL)
				}
				return
			}
			s.signalGroup(pid, syscall.Signal(msg.Signal))
		}
	}()
	how := <-ended
	return writeMessage(conn, reply{Exit: &how})
}

// signalGroup signals an executed program and what shares its group, as a
// terminal would. Once the program is reaped it does nothing: background
// processes that it left behind are meant to stay.
func (s *supervisor) signalGroup(pid int, sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.exits[pid]; ok {
		_ = syscall.Kill(-pid, sig)
	}
}

// notFoundCode is the shell's: 127 for a missing program, else 126.
func notFoundCode(err error) int {
	if errors.Is(err, os.ErrNotExist) {
		return 127
	}
	return 126
}

// lookPath finds a program on the PATH of env, not of this process, relative
// to dir.
func lookPath(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, nil
	}
	for _, v := range env {
		list, ok := strings.CutPrefix(v, "PATH=")
		if !ok {
			continue
		}
		for _, at := range filepath.SplitList(list) {
			path := filepath.Join(at, name)
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && unix.Access(path, unix.X_OK) == nil {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("%s: %w on the host's PATH", name, os.ErrNotExist)
}
