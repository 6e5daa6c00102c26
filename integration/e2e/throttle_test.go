//go:build integration

package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/tranship/tranship/integration/workload/memcheck"
)

// cpuLimitOf is what the kernel says of a shard's CPU limit, "none" or the files'
// text.
func cpuLimitOf(t *testing.T, host, name string) string {
	t.Helper()
	top := filepath.Join(hostOf(t, host).Root(), "sys/fs/cgroup")
	files := []string{"cpu/tranship/default/" + name + "/cpu.cfs_quota_us", "cpu/tranship/default/" + name + "/cpu.cfs_period_us"}
	if _, err := os.Stat(top + "/cgroup.controllers"); err == nil {
		files = []string{"tranship/default/" + name + "/cpu.max"}
	}
	var all []string
	for _, f := range files {
		raw, err := os.ReadFile(filepath.Join(top, f))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, strings.TrimSpace(string(raw)))
	}
	switch limit := strings.Join(all, " "); limit {
	case "-1 100000", "max 100000":
		return "none"
	default:
		return limit
	}
}

// TestAShardThatWritesFasterThanTheLinkIsSlowed moves a shard that rewrites its
// memory four times as fast as the link carries it. Whatever ends the migration,
// nothing of the slowing is left.
func TestAShardThatWritesFasterThanTheLinkIsSlowed(t *testing.T) {
	needChecks(t)
	const name, link = "writes", "400mbit"
	ip := runShard(t, name, checksImage, "memcheck", "--features=plain", "--size=64MiB", "--rate=200MiB/s",
		"--hot=100", "--compressible=0", "--procs=1", "--threads=1", "--verify=5000")
	addr := ip + ":" + strconv.Itoa(memcheck.DefaultPort)
	awaitListening(t, ip, memcheck.DefaultPort)
	askMemcheck(t, "client", addr, "stat") // answers once all of it is written
	c := startClient(t, "watch", "memcheck", "watch", "--addr", addr)
	awaitConnections(t, ip, 1)
	f := &faulty{t: t, name: name, ip: ip}
	unlimited := func(what, host string) {
		t.Helper()
		await(t, what+": its own limit", func() bool { return cpuLimitOf(t, host, name) == "none" })
	}
	unlimited("before", "host-1")

	release, wait := f.pauseAt("host-1", "source.throttled", "--bandwidth", link)
	if got := cpuLimitOf(t, "host-1", name); got == "none" {
		t.Error("it is slowed, and the kernel does not know")
	}
	must(t, "host-1", "tranship", "cancel", f.pendingID())
	release()
	if r, code := wait(); code != 4 {
		t.Fatalf("cancelled: %+v, exit code %d", r, code)
	}
	unlimited("cancelled", "host-1")

	hit, _ := arm(t, "host-1", "source.throttled", "kill")
	r, code, err := migrate(t, name, "host-1", "host-2", "--bandwidth", link)
	if !hit() {
		t.Fatalf("never slowed: %+v, exit code %d, %v", r, code, err)
	}
	f.restart("host-1")
	unlimited("killed", "host-1")
	c.mustGoOn(t, 5)

	r = mustMigrate(t, name, "host-1", "host-2", "--bandwidth", link)
	for _, round := range r.Rounds {
		t.Logf("round %d: %d MiB, at %.2f CPU", round.N, round.BytesRaw>>20, round.ThrottledCPUs)
	}
	last := r.Rounds[len(r.Rounds)-1]
	if r.Rounds[0].ThrottledCPUs != 0 || r.Rounds[len(r.Rounds)-2].ThrottledCPUs == 0 {
		t.Error("it was to be slowed, and not at once")
	}
	if all := r.Rounds[0].BytesRaw; last.BytesRaw > all/3 {
		t.Errorf("%d of %d bytes were left for the blackout", last.BytesRaw, all)
	}
	unlimited("moved", "host-2")
	c.mustGoOn(t, 5)

	// A limit that was asked for is kept, if need be by staying.
	r, code, err = migrate(t, name, "host-2", "host-1", "--bandwidth", link, "--no-throttle", "--max-blackout", "300ms")
	if code != 1 || r.Code != "max-blackout" || !strings.Contains(r.Reason, "--mode postcopy") {
		t.Fatalf("without a way to keep the limit: %+v, exit code %d, %v", r, code, err)
	}
	c.mustGoOn(t, 5)

	r = mustMigrate(t, name, "host-2", "host-1", "--bandwidth", link, "--no-throttle")
	for _, round := range r.Rounds {
		if round.ThrottledCPUs != 0 {
			t.Errorf("round %d was slowed", round.N)
		}
	}
	c.end(t) // verifies every page
}
