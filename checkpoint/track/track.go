// Package track finds which pages a running shard wrote, and reads them. It
// owns the descriptors that write-protect a process's memory and the short
// ptrace stop that obtains them; it refuses to send, store or freeze anything.
//
// Flow of one Collect, for each process: list its mappings, arm those that are
// not armed yet, take the written pages and arm them again, look which of them
// are populated, and only then tell the caller. A page is always protected
// before it is reported, and reported before it is read, so a write that comes
// later belongs to the next Collect: pages may be reported too often, never too
// seldom.
package track

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/tranship/tranship/checkpoint"
)

// Kind names a way of tracking.
type Kind string

const (
	// UffdWP is userfaultfd write-protection in its asynchronous form together
	// with PAGEMAP_SCAN: Linux 6.7 (Documentation/admin-guide/mm/userfaultfd.rst).
	UffdWP Kind = "uffd-wp"
	// SoftDirty is bit 55 of /proc/PID/pagemap with clear_refs: every supported
	// kernel that has CONFIG_MEM_SOFT_DIRTY. It stops a process while it reads
	// and clears the bits, because the kernel cannot do both at once.
	SoftDirty Kind = "soft-dirty"
	// None reports all populated memory every time.
	None Kind = "none"
)

// Options says in which state the processes are.
type Options struct {
	// Frozen says that the processes are stopped and stay so, in a cgroup
	// freezer: nothing is injected, registered or armed, and what is not tracked
	// is reported in full. Such a Collect changes nothing and may be repeated.
	Frozen bool
}

// Stats is what one Collect did.
type Stats struct {
	Processes int
	// Untracked counts the processes that were reported in full because they
	// could not be armed this time: no thread of theirs stopped soon enough.
	Untracked int
	// Deferred counts the processes that share another one's memory, as between
	// vfork and exec. They are reported once they are frozen.
	Deferred int
	// Regions counts the mappings looked at, Registered those newly armed.
	Regions, Registered int
	// Written counts the pages reported with content, Holes those without.
	Written, Holes checkpoint.Pages
	// Pause is the longest time for which one process was stopped.
	Pause time.Duration
	// Scan is the time spent in the kernel's page-table walks.
	Scan time.Duration
}

// Tracker reports the memory of a set of processes, incrementally.
//
// It covers the mappings that CRIU with lazy_pages leaves out of its images:
// private anonymous memory that is neither locked nor made of huge TLB pages.
// It may report more than was written, and more than those mappings.
//
// What it cannot see is a write by the kernel into a page that it had pinned
// before the page was armed, such as direct I/O under way. Where a process could
// have such I/O, what one Collect reported is reported again by the next; so at
// least one Collect must follow the end of such I/O, which the frozen one does.
// Memory pinned for longer (io_uring and RDMA buffers) is not covered: CRIU
// refuses such processes. Nor is process_vm_writev(2), or a write to /proc/PID/mem,
// if a Collect comes between the pinning of a page and the copy into it: a moment,
// unless the former has to bring its source in first. Nothing tells of such a
// write, and to report again all that any Collect reported would be no pre-copy.
//
// A Tracker is not for concurrent use.
type Tracker interface {
	Kind() Kind

	// Collect visits every extent that may differ from what earlier Collects
	// visited. Memory of a PID that no earlier Collect visited counts as zero,
	// so the first one visits what is populated, and holes are visited only
	// where there had been content.
	//
	// Extents of one PID do not overlap within one Collect; those with content
	// are at most MaxExtent long. They come from a running process, so what is
	// read for them may already be newer, or gone: the next Collect says so.
	// Memory that is no longer mapped is not mentioned.
	//
	// visit is called from this goroutine, and a process is never stopped
	// meanwhile. If it returns an error, or ctx ends, Collect returns that error,
	// and the next Collect reports the process it was at in full.
	//
	// A process that ended is skipped. One that cannot be tracked at all, or that
	// died although it was frozen, is a *ProcessError.
	Collect(ctx context.Context, procs []checkpoint.Process, opt Options, visit func(checkpoint.Extent) error) (Stats, error)

	// Close stops tracking and leaves nothing in any process. It may be called
	// after the processes have died, and more than once.
	Close() error
}

// MaxExtent bounds the length of an extent with content, so that a caller can
// read it into one buffer.
const MaxExtent checkpoint.Bytes = 4 << 20

// ProcessError says why one process cannot be tracked. The caller may fall back
// to another Kind, or refuse to move the shard while it runs.
type ProcessError struct {
	checkpoint.Process
	Op  string
	Err error
}

func (e *ProcessError) Error() string {
	return fmt.Sprintf("track process %d (host pid %d): %s: %v", e.PID, e.HostPID, e.Op, e.Err)
}

func (e *ProcessError) Unwrap() error { return e.Err }

var (
	// ErrForeignUserfaultfd: the process handles its own page faults.
	ErrForeignUserfaultfd = errors.New("the process uses userfaultfd itself")
	// ErrTraced: a debugger holds the process.
	ErrTraced = errors.New("the process is traced by another one")
	// ErrMainThreadExited: the kernel shows no memory of such a process, and
	// CRIU takes it for a zombie.
	ErrMainThreadExited = errors.New("its main thread has exited while others run")
	// ErrForeignABI: a 32-bit process on a 64-bit kernel.
	ErrForeignABI = errors.New("the process runs under another system call ABI")
	// ErrDied: a frozen process was killed, and what it had written last is lost.
	ErrDied = errors.New("the process died while it stood still")

	// errGone: the process ended. It never leaves the package.
	errGone = errors.New("the process is gone")
	// errBusy: no thread of the process stopped soon enough. It never leaves the
	// package: the process is reported in full instead.
	errBusy = errors.New("no thread of the process could be stopped")
)

// New returns a tracker of the given kind; Probe says which kinds can work.
func New(kind Kind, log *slog.Logger) (Tracker, error) {
	switch kind {
	case UffdWP:
		return &tracker{method: &uffdMethod{log: log}, shards: map[checkpoint.PID]*process{}}, nil
	case SoftDirty:
		m, err := newSoftDirtyMethod(log)
		if err != nil {
			return nil, err
		}
		return &tracker{method: m, shards: map[checkpoint.PID]*process{}}, nil
	case None:
		return &tracker{method: fullMethod{}, shards: map[checkpoint.PID]*process{}}, nil
	default:
		return nil, fmt.Errorf("no tracker of kind %q", kind)
	}
}
