package track

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// ProcessesOf finds, of the given host pids, the processes in the pid namespace of
// a shard's init process and in namespaces below it, ordered by PID. Processes that
// end meanwhile, and zombies, are left out.
func ProcessesOf(hostPIDs []int, initHostPID int) ([]checkpoint.Process, error) {
	init, err := readIdentity(initHostPID)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", initHostPID, err)
	}
	namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", initHostPID))
	if err != nil {
		return nil, fmt.Errorf("pid namespace of process %d: %w", initHostPID, err)
	}
	level := len(init.pids)
	var procs []checkpoint.Process
	for _, hostPID := range hostPIDs {
		id, err := readIdentity(hostPID)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", hostPID, err)
		}
		if id.dead || len(id.pids) < level {
			continue
		}
		inside, err := inNamespace(hostPID, namespace, len(id.pids)-level)
		if err != nil {
			return nil, fmt.Errorf("pid namespace of process %d: %w", hostPID, err)
		}
		if inside {
			procs = append(procs, checkpoint.Process{PID: checkpoint.PID(id.pids[level-1]), HostPID: hostPID})
		}
	}
	slices.SortFunc(procs, func(a, b checkpoint.Process) int { return cmp.Compare(a.PID, b.PID) })
	return procs, nil
}

// identity is what /proc/PID/status tells of a process.
type identity struct {
	// pids are its ids from the daemon's pid namespace down to its own.
	pids []int
	dead bool
}

func readIdentity(hostPID int) (identity, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", hostPID))
	if err != nil {
		return identity{}, procError(err)
	}
	return parseIdentity(raw)
}

func parseIdentity(raw []byte) (identity, error) {
	state, ok := statusField(raw, "State")
	if !ok || state == "" {
		return identity{}, errors.New("status without a state")
	}
	nspid, ok := statusField(raw, "NSpid")
	if !ok {
		return identity{}, errors.New("status without NSpid")
	}
	var id identity
	for _, field := range strings.Fields(nspid) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return identity{}, fmt.Errorf("NSpid %q: %w", nspid, err)
		}
		id.pids = append(id.pids, pid)
	}
	if len(id.pids) == 0 {
		return identity{}, errors.New("status without NSpid")
	}
	// A main thread that has exited looks like a zombie while other threads run.
	threads, _ := statusField(raw, "Threads")
	id.dead = state[0] == 'X' || state[0] == 'Z' && (threads == "0" || threads == "1")
	return id, nil
}

// inNamespace says whether a process is in a pid namespace, or in one depth
// levels below it.
func inNamespace(hostPID int, namespace string, depth int) (bool, error) {
	path := fmt.Sprintf("/proc/%d/ns/pid", hostPID)
	if depth == 0 {
		link, err := os.Readlink(path)
		if err = procError(err); errors.Is(err, errGone) {
			return false, nil
		}
		return link == namespace, err
	}
	f, err := os.Open(path)
	if err = procError(err); errors.Is(err, errGone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for ; depth > 0; depth-- {
		parent, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_PARENT)
		if err := errors.Join(err, f.Close()); err != nil {
			return false, err
		}
		f = os.NewFile(uintptr(parent), path)
	}
	link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	return link == namespace, errors.Join(err, f.Close())
}
