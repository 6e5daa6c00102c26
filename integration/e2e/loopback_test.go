//go:build integration

package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/tranship/tranship/integration/workload/check"
)

// A connection within the shard that is as full as it can be: its ends are
// restored one after the other, and what was not sent yet must not go out while
// nobody is there to take it.
func TestAFullConnectionWithinAShardMoves(t *testing.T) {
	needChecks(t)
	const name = "loop"
	runShard(t, "host-1", name, checksImage, "checker", "tcp", "loop", "--frame-rate", "0", "--payload", "256KiB")
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
	})
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
