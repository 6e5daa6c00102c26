//go:build integration

package e2e

import (
	"fmt"
	"strings"
	"testing"
)

func TestAShardKeepsItsStateItsFilesItsLogAndItsAddress(t *testing.T) {
	needImage(t)
	ip := runShard(t, "redis-0", testImage, "redis-server", "--save", "", "--protected-mode", "no", "--dir", "/tmp")
	cli := func(args ...string) string {
		return strings.TrimSpace(must(t, "client", append([]string{"redis-cli", "-h", ip}, args...)...))
	}
	if got := cli("set", "key", "value"); got != "OK" {
		t.Fatal(got)
	}
	cli("save") // a file in the writable layer
	at := "host-1"
	for i := range 6 {
		to := map[string]string{"host-1": "host-2", "host-2": "host-1"}[at]
		mustMigrate(t, "redis-0", at, to)
		at = to
		if got := cli("get", "key"); got != "value" {
			t.Fatalf("after move %d: %q", i+1, got)
		}
		if got := cli("incr", "moves"); got != fmt.Sprint(i+1) {
			t.Fatalf("after move %d: the counter is %s", i+1, got)
		}
		cli("save")
	}
	logs := must(t, at, "tranship", "logs", "redis-0")
	if n := strings.Count(logs, "DB saved on disk"); n != 7 {
		t.Errorf("the log has %d of 7 lines about saves:\n%s", n, logs)
	}
	if got := where(t, "redis-0"); len(got) != 1 || got[0].Node != at {
		t.Errorf("the shard is at %+v, and should be on %s alone", got, at)
	}
}

// Who moves a shard on as soon as it has arrived need not know that the rest of
// its memory is still being placed.
func TestAShardMovesOnAtOnce(t *testing.T) {
	needChecks(t)
	ip := runShard(t, "restless", checksImage, "redis-server", "--save", "", "--protected-mode", "no")
	awaitListening(t, ip, 6379)
	must(t, "client", checker(t), "redis", "load", "--addr", ip+":6379", "--bytes", "64MiB")
	hit, release := arm(t, "host-2", "destination.fill", "pause")
	mustMigrate(t, "restless", "host-1", "host-2")
	await(t, "its memory is being placed", hit)
	// It waits for that, as long as it may.
	if _, code, err := migrate(t, "restless", "host-2", "host-1", "--timeout", "300ms"); code == 0 || code == 3 {
		t.Errorf("exit code %d, %v", code, err)
	}
	release()
	mustMigrate(t, "restless", "host-2", "host-1")
	mustMigrate(t, "restless", "host-1", "host-2")
}
