// Package checkpoint holds the nouns of the pages tower: which process of a
// shard, which address, how many pages. It imports no CRIU, no network and no
// container runtime; its sub-packages are the doors.
//
// Road of a page: track finds what was written, the caller reads it, transfer
// carries it, pagestore keeps it at the destination and lazypages places it
// under the restored process.
package checkpoint

import "fmt"

// PageSize is the page size of every supported platform, in bytes. Hosts with
// another page size (arm64 with 16 or 64 KiB) are refused by pre-flight.
const PageSize = 4096

// Pages counts pages of PageSize bytes.
type Pages int64

// Bytes returns the size of n pages.
func (n Pages) Bytes() Bytes { return Bytes(n) * PageSize }

// Bytes counts bytes.
type Bytes int64

// PID is a process id inside the shard's pid namespace: the number that CRIU
// writes into its images and that stays the same when the shard moves. It is
// never a host pid.
type PID int32

// sharedPIDs lies above all ids of processes (PID_MAX_LIMIT is 1<<22).
const sharedPIDs PID = 1 << 30

// SharedPID names the n-th piece of shared memory of a migration. Its pages
// travel as if they were a process's, address 0 being the first that was sent.
func SharedPID(n int) PID { return sharedPIDs + PID(n) }

// Shared says that p names shared memory.
func (p PID) Shared() bool { return p >= sharedPIDs }

// Process names one process (thread group) of a shard on the source host.
type Process struct {
	// PID is the id inside the shard's pid namespace.
	PID PID
	// HostPID is the id in the daemon's pid namespace.
	HostPID int
}

// Extent is a run of pages of one process. Addr is page-aligned.
type Extent struct {
	PID   PID
	Addr  uint64
	Pages Pages
	// Hole says that the pages are not populated: they read as zero. A hole is
	// sent as such, because the destination may hold older content there.
	Hole bool
}

// End returns the address after the last byte of the extent.
func (e Extent) End() uint64 { return e.Addr + uint64(e.Pages)*PageSize }

// Bytes returns the extent's size in bytes.
func (e Extent) Bytes() Bytes { return e.Pages.Bytes() }

func (e Extent) String() string {
	kind := "pages"
	if e.Hole {
		kind = "hole"
	}
	return fmt.Sprintf("pid %d %#x+%d %s", e.PID, e.Addr, e.Pages, kind)
}
