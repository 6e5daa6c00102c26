// Package lazypages fills the memory of a restored shard from its page store.
// It is the lazy-pages daemon that CRIU's restore hands its userfaultfds to, in
// a process of its own, so that the death of the tranship daemon costs nothing.
// Flow: Serve listens (server.go), receives tasks (receive.go), and serves each
// with its children in one goroutine (family.go) over what was dumped
// (images.go), what is missing (pageset.go) and where it is now (layout.go);
// the daemon follows through a control socket (control.go, client.go), and pulls
// through it what the store is still owed (pull.go, wanted.go). If it dies, the
// userfaultfds stay open (holder.go), and TakeOver goes on where the event log
// ends (eventlog.go, takeover.go).
//
// It refuses to close a userfaultfd while a page with content is missing: if it
// cannot go on, it kills the tasks first (kill.go).
package lazypages

import (
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/tranship/tranship/checkpoint"
)

// Config says what to serve.
type Config struct {
	// Store is the directory of the page store, complete.
	Store string
	// Images is the directory of CRIU's images; mm-PID.img and pagemap-PID.img
	// of every task are read.
	Images string
	// Socket is where CRIU connects: lazy-pages.socket in its work directory.
	Socket string
	// Control is where the daemon connects. The last Status is left at
	// StatusFile(Control), for a daemon that was away.
	Control string

	// Hold starts a second process that keeps the userfaultfds if this one dies
	// (holder.go), so that TakeOver can go on.
	Hold bool
	// FillAfter is how long after the restore filling in the background begins.
	// Faults are answered meanwhile, and what else is left of the migration has the
	// processors.
	FillAfter time.Duration

	Log *slog.Logger
	// Ready is called once both sockets accept connections; may be nil.
	Ready func()

	// mayFill is asked before each piece of background filling, for tests that
	// need the filling to last; nil is always.
	mayFill func() bool
}

// Task is a restored process whose memory is to be filled.
type Task struct {
	// PID is the id in the shard's pid namespace, HostPID in this one.
	PID     checkpoint.PID
	HostPID int
	// PIDFD refers to the process without a doubt, UFFD to its memory. Both
	// belong to whoever has the Task.
	PIDFD, UFFD int
}

// State is how far a server has come; the states follow each other in this
// order, and failed may follow each but done.
type State string

const (
	// StateListening: CRIU has not connected.
	StateListening State = "listening"
	// StateRestoring: CRIU is handing over tasks; faults are answered.
	StateRestoring State = "restoring"
	// StateFinished: CRIU has restored every task, which run from now on; faults
	// are answered, and nothing else until Config.FillAfter.
	StateFinished State = "finished"
	// StateFilling: what has not faulted is being placed.
	StateFilling State = "filling"
	// StateDone: every page is placed; the store holds none any more.
	StateDone State = "done"
	// StateFailed: no task runs. Before StateFinished the store is untouched
	// and another restore may be tried.
	StateFailed State = "failed"
)

// Final reports whether no other state follows.
func (s State) Final() bool { return s == StateDone || s == StateFailed }

// finished reports whether the shard has begun to run.
func (s State) finished() bool {
	return s == StateFinished || s == StateFilling || s == StateDone
}

// Status is what the control socket and the status file tell.
type Status struct {
	SchemaVersion int   `json:"schema_version"`
	State         State `json:"state"`
	// Tasks were handed over by CRIU, Forks were made by them while filling.
	Tasks int64 `json:"tasks"`
	Forks int64 `json:"forks"`
	// InitHostPID is, in the server's pid namespace, the task with the lowest id in
	// the shard's; 0 before StateFinished.
	InitHostPID int `json:"init_host_pid"`
	// Placed pages came from the store; Zeroes answered faults on holes.
	Placed checkpoint.Pages `json:"placed_pages"`
	Zeroes checkpoint.Pages `json:"zero_pages"`
	// Remaining pages are still to be placed, counted once a process.
	Remaining checkpoint.Pages `json:"remaining_pages"`
	Faults    int64            `json:"faults"`
	// Owed are those of the remaining pages that have not arrived.
	Owed checkpoint.Pages `json:"owed_pages"`
	// FinishedAt is when CRIU's word came that the restore has finished.
	FinishedAt time.Time `json:"finished_at,omitzero"`
	// FillMs is how long filling took or has taken.
	FillMs float64 `json:"fill_ms"`
	// Takeovers is how many servers before this one died. What is counted above
	// is counted since the last.
	Takeovers int `json:"takeovers"`
	// Finished says that StateFinished was reached, which StateFailed hides.
	Finished bool   `json:"finished"`
	Error    string `json:"error,omitempty"`
}

// counters are written by the families and read by Status.
type counters struct {
	placed, zeroes, faults, forks atomic.Int64
}
