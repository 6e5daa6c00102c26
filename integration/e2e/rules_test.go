//go:build integration

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// zoned gives the hosts zones, a label and a tenant's quota until the test ends.
func zoned(t *testing.T) {
	t.Helper()
	guard(t)
	was, now := map[string]string{}, map[string]string{}
	for name, host := range map[string]string{
		"host-1": "zone = \"east\"\n", "host-2": "zone = \"west\"\nlabels = { disk = \"ssd\" }\n", "host-3": "zone = \"west\"\n",
	} {
		raw, err := os.ReadFile(inHost(t, name, "/etc/tranship/config.toml"))
		if err != nil {
			t.Fatal(err)
		}
		was[name], now[name] = string(raw), string(raw)+"\n[host]\n"+host
	}
	all := []string{"host-1", "host-2", "host-3"}
	t.Cleanup(func() { configure(t, was, "", "", all...) })
	configure(t, now, "", "[tenants.shop]\nshards = 3\n", all...)
}

// rulesDir is where cache has its volume, on the host that it runs on.
const rulesDir = "/var/lib/tranship/e2e-rules"

// ruled is a file of three workloads: cache on the host with the disk, web beside
// it, and batch anywhere else, in each zone once.
func ruled(image string) string {
	one := func(name string, shards int, rest string) string {
		return fmt.Sprintf(`
[[workload]]
name = %q
image = %q
command = ["redis-server", "--save", "", "--protected-mode", "no", "--dir", "/tmp"]
shards = %d
autopilot = "off"
tenant = "shop"
size = { cpus = { request = 0.1 }, memory = { request = "16M", limit = "64M" } }
%s`, name, image, shards, rest)
	}
	return one("web", 1, "pinned = true\nmax_blackout = \"900ms\"\naffinity = { near = [\"cache\"] }\n") +
		one("batch", 1, "affinity = { avoid = [\"cache\"] }\nspread = { per_zone = 1 }\n") +
		one("cache", 1, fmt.Sprintf("affinity = { zones = [\"west\"] }\n[[workload.volumes]]\nkind = \"copy\"\nsource = %q\ndestination = \"/tmp\"\n", rulesDir+"/{index}"))
}

// placesOf are the hosts of the shards of all workloads, by shard.
func placesOf(t *testing.T) map[string]string {
	t.Helper()
	var doc struct {
		Workloads []struct{ Shards []workloadShard }
	}
	if err := json.Unmarshal([]byte(must(t, "host-1", "tranship", "workload", "ls", "-o", "json")), &doc); err != nil {
		t.Fatal(err)
	}
	at := map[string]string{}
	for _, w := range doc.Workloads {
		for _, s := range w.Shards {
			if s.Status == "running" {
				at[s.Name] = s.Node
			}
		}
	}
	return at
}

// refusedWith says whether a change was refused, and with these words.
func refusedWith(t *testing.T, words string, args ...string) {
	t.Helper()
	if c, code := workload(t, "host-1", args...); code != 3 || !strings.Contains(strings.Join(append(c.Refused, c.Reason), "; "), words) {
		t.Errorf("workload %v: exit code %d, not refused with %q: %+v", args, code, words, c)
	}
}

// Zones, nearness, quotas and volumes hold when shards are placed, replaced,
// grown and drained.
func TestAPoolKeepsTheRulesOfItsWorkloads(t *testing.T) {
	needChecks(t)
	needImage(t)
	guard(t)
	for _, h := range []string{"host-1", "host-2", "host-3"} {
		t.Cleanup(func() { _, _ = on(t, h, "rm", "-rf", rulesDir) })
	}
	zoned(t)
	for _, name := range []string{"web", "batch", "cache"} {
		removeWorkload(t, name)
	}
	file := workloadFile(t, ruled(checksImage))
	dry, err := on(t, "host-1", "tranship", "workload", "apply", "--dry-run", "-f", file)
	if err != nil || strings.Count(dry, "+ shard") != 3 {
		t.Errorf("a dry run of workloads that are near each other: %v\n%s", err, dry)
	}
	must(t, "host-1", "tranship", "workload", "apply", "-f", file)
	at := placesOf(t)
	if at["cache-0"] == "host-1" || at["web-0"] != at["cache-0"] || at["batch-0"] == at["cache-0"] {
		t.Fatalf("they run on %v", at)
	}
	if again := must(t, "host-1", "tranship", "workload", "apply", "-f", file); strings.Count(again, "nothing to do") != 3 {
		t.Errorf("applied again: %s", again)
	}

	refusedWith(t, "tenant shop may have 3 shards and would have 4", "scale", "cache", "--shards", "2")
	refusedWith(t, "cannot grow on", "apply", "-f", workloadFile(t, strings.ReplaceAll(ruled(checksImage), "request = 0.1", "request = 1.95")))

	// The volume outlives a replacement, and an image that nobody has replaces nothing.
	home := at["cache-0"]
	must(t, home, "sh", "-c", "echo mine > "+rulesDir+"/0/mine")
	pid := func() (pid int) {
		for _, s := range shardsOn(t, home) {
			if s.Name == "cache-0" {
				pid = s.PID
			}
		}
		return pid
	}
	before := pid()
	if c, code := workload(t, "host-1", "apply", "-f", workloadFile(t, ruled("none.test/none:1"))); code != 1 || pid() != before {
		t.Errorf("an image that nobody has: exit code %d, process %d became %d: %+v", code, before, pid(), c)
	}
	must(t, "host-1", "tranship", "workload", "apply", "-f", workloadFile(t, ruled(testImage)))
	if now := pid(); now == before || now == 0 {
		t.Errorf("with another image the process is still %d", now)
	}
	if got := must(t, home, "cat", rulesDir+"/0/mine"); got != "mine\n" {
		t.Errorf("in the volume there is %q", got)
	}

	// Drained, cache goes to the other host of its zone, web after it, and the
	// volume with them; the emptiest host is not theirs.
	other := map[string]string{"host-2": "host-3", "host-3": "host-2"}[home]
	t.Cleanup(func() { must(t, "host-1", "tranship", "uncordon", home) })
	if at["batch-0"] == other { // batch avoids cache wherever it goes
		must(t, "host-1", "tranship", "workload", "rm", "batch")
		delete(at, "batch-0")
	}
	must(t, "host-1", "tranship", "drain", home)
	if now := placesOf(t); now["cache-0"] != other || now["web-0"] != other || now["batch-0"] != at["batch-0"] {
		t.Errorf("drained, they run on %v", now)
	}
	if got := must(t, other, "cat", rulesDir+"/0/mine"); got != "mine\n" {
		t.Errorf("in the volume that moved there is %q", got)
	}
	// Now none of its zone is left for it.
	if at["batch-0"] != "" {
		must(t, "host-1", "tranship", "workload", "rm", "batch")
	}
	t.Cleanup(func() { must(t, "host-1", "tranship", "uncordon", other) })
	out, err := on(t, "host-1", "tranship", "drain", "-o", "json", other)
	var doc drained
	if jerr := json.Unmarshal([]byte(out), &doc); jerr != nil {
		t.Fatalf("%v: %s", jerr, out)
	}
	if exitCodeOf(err) != 3 || len(doc.Moved) != 0 || !slices.ContainsFunc(doc.Stayed, func(s struct{ Name, Code, Reason string }) bool {
		return s.Name == "cache-0" && s.Code == "no-target" && strings.Contains(s.Reason, `host-1 is in zone "east", not in west`)
	}) {
		t.Errorf("exit code %d: %s", exitCodeOf(err), out)
	}
	took := time.Now()
	for _, name := range []string{"web", "cache"} {
		mustChange(t, "done", 1, "host-1", "rm", name)
	}
	t.Logf("removed in %v", time.Since(took).Round(time.Millisecond))
}
