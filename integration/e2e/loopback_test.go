//go:build integration

package e2e

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tranship/tranship/integration/workload/check"
)

// A connection within the shard that is as full as it can be: its ends are dumped
// and restored one after the other, nothing may be lost between the two, and
// what was on its way must not wait for TCP to send it again.
func TestAFullConnectionWithinAShardMoves(t *testing.T) {
	needChecks(t)
	const name = "loop"
	runShard(t, name, checksImage, "checker", "tcp", "loop", "--frame-rate", "0", "--payload", "256KiB")
	frames := int64(0)
	thereAndBack(t, name, nil, func(t *testing.T, at string) {
		var r check.Report
		await(t, "frames go on after the move", func() bool {
			r = reportOf(t, at, name)
			return !r.OK || r.Requests > frames+20
		})
		if !r.OK {
			t.Fatalf("%+v", r)
		}
		frames = r.Requests
		// The network namespace is new, so these are counts since the restore.
		counts := must(t, at, "cat", "/proc/"+pidString(t, at, name)+"/net/netstat")
		if n := counterOf(t, counts, "TCPTimeouts"); n != 0 {
			t.Errorf("%d times TCP waited for what had not come", n)
		}
	})
}

// counterOf finds a counter in what /proc/PID/net/netstat says: lines in pairs,
// names and then values.
func counterOf(t *testing.T, netstat, name string) int {
	t.Helper()
	lines := strings.Split(netstat, "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		if at := slices.Index(names, name); at > 0 && at < len(values) {
			n, err := strconv.Atoi(values[at])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s in %q", name, netstat)
	return 0
}

// reportOf has a checker in a shard say how it is, and returns what it said last.
func reportOf(t *testing.T, host, name string) check.Report {
	t.Helper()
	must(t, host, "kill", "-USR1", pidString(t, host, name))
	var r check.Report
	lines := strings.Split(strings.TrimSpace(must(t, host, "tranship", "logs", name)), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if json.Unmarshal([]byte(lines[i]), &r) == nil && r.Program != "" {
			return r
		}
	}
	return check.Report{OK: true}
}
