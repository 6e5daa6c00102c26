package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// GhostLimit is the largest unlinked-but-open file that goes into the images.
// CRIU's default of 1 MiB refuses what databases do with temporary files.
const GhostLimit = 1 << 30

const dumpLog = "dump.log"

// DumpConfig says what to dump and how the container was made.
type DumpConfig struct {
	// InitPID is the host pid of the container's first process.
	InitPID int
	// ImageDir receives the images, WorkDir CRIU's log. Both exist.
	ImageDir, WorkDir string
	// Root is the container's root filesystem on the host (the bundle's rootfs).
	Root string
	// FreezeCgroup is the freezer cgroup's directory, already FROZEN by the
	// caller: CRIU then seizes without its 100 ms polls and, should it fail,
	// leaves the cgroup frozen.
	FreezeCgroup string
	// ExternalMounts are the mount points that the restoring runtime provides.
	ExternalMounts []ExternalMount
	// External are CRIU external resources, such as net[4026532]:extRootNetNS.
	External []string
	// TCPEstablished keeps established connections; without it CRIU refuses them.
	TCPEstablished bool
	// LazyPages leaves private anonymous memory out of the images.
	LazyPages bool
	// Parent is a directory of image.WriteParent, relative to ImageDir; "" for
	// none. The dump depends on it until image.Settle.
	Parent string
	// IgnoreCgroups skips CRIU's cgroup walk: right only for a shard without
	// cgroups of its own below the container's.
	IgnoreCgroups bool
	LogLevel      int
	// Reached, if any, is told of CRIU's notifications as they come (criu/include/
	// action-scripts.h): query-ext-files once all tasks are held and collected,
	// post-dump when their state is in the images.
	Reached func(script string)
}

// Dumper is a CRIU that was started but has not been asked for anything yet.
type Dumper struct {
	w         *worker
	unchanged bool
	once      sync.Once
}

// StartDumper starts CRIU, for a dump with DumpConfig.Parent if u is not nil;
// ErrNoUnchanged when it can be started without u alone. The caller must Kill it
// in every case.
func StartDumper(path string, u *Unchanged) (*Dumper, error) {
	w, err := startWorker(path, u)
	if err != nil {
		return nil, err
	}
	return &Dumper{w: w, unchanged: u != nil}, nil
}

// Unchanged says whether it takes DumpConfig.Parent.
func (d *Dumper) Unchanged() bool { return d.unchanged }

// PID is CRIU's host pid.
func (d *Dumper) PID() int { return d.w.cmd.Process.Pid }

// Dump writes the images and returns once they are complete, with the tasks
// held by CRIU (ptrace), the cgroup thawed. The caller must freeze the cgroup
// before Kill if the tasks are to stay stopped. On error CRIU has undone its
// part, or was killed and ReleaseSockets does the rest.
func (d *Dumper) Dump(ctx context.Context, cfg DumpConfig) error {
	images, err := os.Open(cfg.ImageDir)
	if err != nil {
		return fmt.Errorf("criu dump: %w", err)
	}
	defer images.Close()
	work, err := os.Open(cfg.WorkDir)
	if err != nil {
		return fmt.Errorf("criu dump: %w", err)
	}
	defer work.Close()

	kind := rpc.CriuReqType_DUMP
	if err := d.w.send(&rpc.CriuReq{Type: &kind, Opts: cfg.rpc(images, work)}); err != nil {
		return dumpError(cfg, err)
	}
	for {
		resp, err := d.w.receive(ctx)
		if err != nil {
			return dumpError(cfg, err)
		}
		if !resp.GetSuccess() {
			return dumpError(cfg, fmt.Errorf("criu refused (%s, errno %d)", resp.GetCrErrmsg(), resp.GetCrErrno()))
		}
		if resp.GetType() != rpc.CriuReqType_NOTIFY {
			// With notifications asked for, CRIU cannot finish without post-dump.
			return dumpError(cfg, errors.New("criu ended without its post-dump notification"))
		}
		script := resp.GetNotify().GetScript()
		if cfg.Reached != nil {
			cfg.Reached(script)
		}
		if script == "post-dump" {
			return nil
		}
		notify := rpc.CriuReqType_NOTIFY
		if err := d.w.send(&rpc.CriuReq{Type: &notify, NotifySuccess: proto.Bool(true)}); err != nil {
			return dumpError(cfg, err)
		}
	}
}

// Lives is an error if CRIU has died. While it lives, after Dump, it holds the
// tasks. The kernel lets go of a dead tracer's tasks and shows its death in one
// step (kernel/exit.c, exit_notify), so whoever finds it alive after the cgroup was
// frozen knows that no task ran in between.
func (d *Dumper) Lives() error {
	// Without reaping it: that is the worker's.
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, d.PID(), &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err == nil && info.Signo == 0 {
		return nil
	}
	if err == nil || errors.Is(err, unix.ECHILD) {
		err = errors.New("it died while it held the tasks")
	}
	return fmt.Errorf("criu dump: %w", err)
}

// Kill ends CRIU. Tasks that it still traces are let go into whatever their
// cgroup freezer says; a parasite that was still inside one leaves by itself
// when its socket closes. May run twice.
func (d *Dumper) Kill() { d.once.Do(d.w.kill) }

func (cfg DumpConfig) rpc(images, work *os.File) *rpc.CriuOpts {
	mode := rpc.CriuCgMode_SOFT
	if cfg.IgnoreCgroups {
		mode = rpc.CriuCgMode_IGNORE
	}
	// The daemon takes the shard's link off the bridge for the whole blackout,
	// so there is nothing to filter; the method is recorded in the inventory and
	// so holds for the restore as well.
	lock := rpc.CriuNetworkLockMethod_SKIP
	opts := &rpc.CriuOpts{
		ImagesDirFd:       proto.Int32(int32(images.Fd())),
		WorkDirFd:         proto.Int32(int32(work.Fd())),
		LogFile:           proto.String(dumpLog),
		LogLevel:          proto.Int32(int32(cfg.LogLevel)),
		Pid:               proto.Int32(int32(cfg.InitPID)),
		Root:              proto.String(cfg.Root),
		External:          cfg.External,
		ManageCgroups:     proto.Bool(true),
		ManageCgroupsMode: &mode,
		NetworkLock:       &lock,
		NotifyScripts:     proto.Bool(true),
		TcpEstablished:    proto.Bool(cfg.TCPEstablished),
		FileLocks:         proto.Bool(true),
		LinkRemap:         proto.Bool(true),
		GhostLimit:        proto.Uint32(GhostLimit),
		OrphanPtsMaster:   proto.Bool(true),
		LazyPages:         proto.Bool(cfg.LazyPages),
		// Never alive by CRIU's own decision: it is killed before it decides.
		LeaveRunning: proto.Bool(false),
	}
	if cfg.Parent != "" {
		opts.TrackMem, opts.ParentImg = proto.Bool(true), proto.String(cfg.Parent)
	}
	if cfg.FreezeCgroup != "" {
		opts.FreezeCgroup = proto.String(cfg.FreezeCgroup)
	}
	for _, m := range cfg.ExternalMounts {
		opts.ExtMnt = append(opts.ExtMnt, &rpc.ExtMountMap{Key: proto.String(m.At), Val: proto.String(m.Key)})
	}
	return opts
}

// LogError is a CRIU failure with the tail of its log.
type LogError struct {
	Op   string
	Err  error
	Tail string
}

func (e *LogError) Error() string {
	if e.Tail == "" {
		return fmt.Sprintf("criu %s: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("criu %s: %v; its log ends with:\n%s", e.Op, e.Err, e.Tail)
}

func (e *LogError) Unwrap() error { return e.Err }

func dumpError(cfg DumpConfig, err error) error {
	return &LogError{Op: "dump", Err: err, Tail: ErrorTail(filepath.Join(cfg.WorkDir, dumpLog))}
}
