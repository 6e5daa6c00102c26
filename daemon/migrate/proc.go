package migrate

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// startTime is a process's start time in clock ticks since boot, field 22 of
// /proc/PID/stat (proc_pid_stat(5)): with the pid it names one process.
func startTime(pid int) (uint64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The command name, in parentheses, may hold anything, parentheses included.
	end := bytes.LastIndexByte(raw, ')')
	fields := bytes.Fields(raw[end+1:])
	const after = 22 - 3 // the first field behind the name is the third
	if end < 0 || len(fields) <= after {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, raw)
	}
	return strconv.ParseUint(string(fields[after]), 10, 64)
}

// releasePoll: CRIU lets go of a shard within a few milliseconds after it has
// restored it.
const releasePoll = 200 * time.Microsecond

// awaitReleased returns when no tracer holds a process any more: CRIU holds what it
// restores until it is complete. It returns the time of that, or of the end of
// ctx, or of the process.
func awaitReleased(ctx context.Context, pid int) time.Time {
	tick := time.NewTicker(releasePoll)
	defer tick.Stop()
	for {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil || !traced(raw) {
			return time.Now()
		}
		select {
		case <-ctx.Done():
			return time.Now()
		case <-tick.C:
		}
	}
}

// traced reads TracerPid of proc_pid_status(5).
func traced(status []byte) bool {
	_, rest, found := bytes.Cut(status, []byte("\nTracerPid:"))
	pid, _, _ := bytes.Cut(rest, []byte("\n"))
	return found && string(bytes.TrimSpace(pid)) != "0"
}

// sharedWritable lists the files, by the paths that the shard knows them by,
// that one of the processes has mapped shared and writable.
func sharedWritable(hostPIDs []int) []string {
	seen := map[string]bool{}
	var out []string
	for _, pid := range hostPIDs {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		if err != nil {
			continue // ended
		}
		for _, path := range parseSharedWritable(string(raw)) {
			if !seen[path] {
				seen[path] = true
				out = append(out, path)
			}
		}
	}
	return out
}

// parseSharedWritable reads a /proc/PID/maps (proc_pid_maps(5)).
func parseSharedWritable(maps string) []string {
	var out []string
	for line := range strings.Lines(maps) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 6)
		if len(fields) < 6 || len(fields[1]) != 4 || fields[1][1] != 'w' || fields[1][3] != 's' {
			continue
		}
		path := strings.TrimLeft(fields[5], " ")
		if !strings.HasPrefix(path, "/") || strings.HasSuffix(path, " (deleted)") {
			continue
		}
		// The kernel escapes newlines only, as \012.
		out = append(out, strings.ReplaceAll(path, `\012`, "\n"))
	}
	return out
}

// statusField is a field of /proc/PID/status, "" when the process is gone.
func statusField(pid int, name string) string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(raw)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// ownerOf is a process's real uid, 0 when the process is gone.
func ownerOf(pid int) int {
	uid, _, _ := strings.Cut(statusField(pid, "Uid"), "\t")
	n, _ := strconv.Atoi(uid)
	return n
}

// hasCapability says whether a capability is in a process's effective set.
func hasCapability(pid int, capability uint) bool {
	set, err := strconv.ParseUint(statusField(pid, "CapEff"), 16, 64)
	return err == nil && set&(1<<capability) != 0
}
