// Package criu is the only door to CRIU. It dumps a shard without its private
// anonymous memory, holds nothing after the images are complete, and says what
// stock `runc restore` must be told so that tranship serves the pages.
//
// Flow of a dump: Start (before the freeze, CRIU's start costs tens of
// milliseconds) → Dump (the shard is frozen; returns when the images are
// complete and CRIU waits in its post-dump notification) → the caller freezes
// the cgroup again → Kill. CRIU never decides what becomes of the tasks: from
// the post-dump notification on only the cgroup freezer holds them, so that
// neither CRIU's death nor the daemon's lets the source run. See
// docs/adr/0002-criu-is-killed-after-the-dump.md.
package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// maxResponse bounds one message of CRIU's RPC; the largest real one (a feature
// list) is below 1 KiB.
const maxResponse = 64 << 10

// worker is one `criu swrk` process and the socket to it. go-criu's own Criu
// type is not used for dumps: it gives no handle on the process, and killing it
// is how a dump ends here.
type worker struct {
	cmd  *exec.Cmd
	sock *os.File
	done chan struct{} // closed once the process was reaped
	err  error         // from Wait, valid after done
}

func startWorker(path string, u *Unchanged) (*worker, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket to criu: %w", err)
	}
	remote := os.NewFile(uintptr(fds[1]), "criu-remote")
	defer remote.Close()
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		return nil, fmt.Errorf("socket to criu: %w", err)
	}
	local := os.NewFile(uintptr(fds[0]), "criu-local")

	cmd := exec.Command(path, "swrk", "3")
	cmd.ExtraFiles = []*os.File{remote}
	// A CRIU without its daemon has nobody to report to; its death only returns
	// the tasks to the state that the cgroup freezer says. Not Pdeathsig: that
	// fires when the starting thread ends, not the process.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := u.start(cmd.Start); err != nil {
		_ = local.Close()
		return nil, fmt.Errorf("start %s swrk: %w", path, err)
	}
	w := &worker{cmd: cmd, sock: local, done: make(chan struct{})}
	go func() {
		w.err = cmd.Wait()
		close(w.done)
	}()
	return w, nil
}

func (w *worker) send(req *rpc.CriuReq) error {
	b, err := proto.Marshal(req)
	if err != nil {
		return fmt.Errorf("encode criu request: %w", err)
	}
	if _, err := w.sock.Write(b); err != nil {
		return fmt.Errorf("send to criu: %w", err)
	}
	return nil
}

// receive waits for the next message. When ctx ends first the worker is killed:
// its socket has no other way to stop waiting without losing a message.
func (w *worker) receive(ctx context.Context) (*rpc.CriuResp, error) {
	stop := context.AfterFunc(ctx, func() { _ = w.sock.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, maxResponse)
	n, err := w.sock.Read(buf)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("criu went away: %w", err)
	}
	if n == 0 {
		return nil, errors.New("criu went away")
	}
	resp := &rpc.CriuResp{}
	if err := proto.Unmarshal(buf[:n], resp); err != nil {
		return nil, fmt.Errorf("decode criu response: %w", err)
	}
	return resp, nil
}

// kill ends the process with SIGKILL and reaps it. May run twice.
func (w *worker) kill() {
	// The process is our child and unreaped until done is closed, so its id
	// cannot have been given away.
	select {
	case <-w.done:
	default:
		_ = w.cmd.Process.Kill()
		<-w.done
	}
	_ = w.sock.Close()
}
