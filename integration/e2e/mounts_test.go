//go:build integration

package e2e

import (
	"strings"
	"testing"
)

func TestACopiedMountMovesWithTheShardAndNothingElseIsOverwritten(t *testing.T) {
	needImage(t)
	const dir = "/var/lib/tranship/e2e-data" // every host of the lab has its own /var/lib/tranship
	must(t, "host-1", "mkdir", dir)
	for _, host := range []string{"host-1", "host-2"} {
		t.Cleanup(func() { must(t, host, "rm", "-rf", dir) })
	}
	ip := runShard(t, "mounted", "--mount", "src="+dir+",dst=/data,policy=copy",
		testImage, "redis-server", "--save", "", "--protected-mode", "no", "--dir", "/data")
	cli := func(args ...string) string {
		return strings.TrimSpace(must(t, "client", append([]string{"redis-cli", "-h", ip}, args...)...))
	}
	cli("set", "a", "1")
	cli("save")

	// What is somebody else's is not touched.
	must(t, "host-2", "mkdir", dir)
	must(t, "host-2", "sh", "-c", "echo mine > "+dir+"/mine")
	if _, code, _ := migrate(t, "mounted", "host-1", "host-2"); code != 3 {
		t.Fatalf("exit code %d although %s exists on host-2", code, dir)
	}
	if got := must(t, "host-2", "cat", dir+"/mine"); got != "mine\n" {
		t.Fatalf("somebody else's file is now %q", got)
	}
	must(t, "host-2", "rm", "-rf", dir)

	// A migration that fails takes its copy away again.
	arm(t, "host-1", "source.seal", "error for the test")
	if _, code, _ := migrate(t, "mounted", "host-1", "host-2"); code != 1 {
		t.Fatalf("exit code %d", code)
	}
	await(t, "the copy is gone", func() bool {
		_, err := on(t, "host-2", "test", "-e", dir)
		return err != nil
	})

	mustMigrate(t, "mounted", "host-1", "host-2")
	before := must(t, "host-2", "sha256sum", dir+"/dump.rdb")
	if want := must(t, "host-1", "sha256sum", dir+"/dump.rdb"); before != want {
		t.Errorf("the copy differs: %s, %s", before, want)
	}
	cli("set", "a", "2")
	cli("save")
	// Back over the old copy, which may be overwritten.
	mustMigrate(t, "mounted", "host-2", "host-1")
	if got, want := must(t, "host-1", "sha256sum", dir+"/dump.rdb"), must(t, "host-2", "sha256sum", dir+"/dump.rdb"); got != want {
		t.Errorf("the copy differs: %s, %s", got, want)
	}
	if got := cli("get", "a"); got != "2" {
		t.Errorf("a is %q", got)
	}
	cli("save")
}
