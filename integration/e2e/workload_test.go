//go:build integration

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// workloadFile writes a workload file that every host sees, and returns its path.
func workloadFile(t *testing.T, text string) string {
	t.Helper()
	dir, err := workDir()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, strings.NewReplacer("/", "-", ",", "").Replace(t.Name())+".toml")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(path) })
	return path
}

// redisWorkload is a file with the workload web, shards of Redis, two on a host at most.
func redisWorkload(shards int, memory string) string {
	return fmt.Sprintf(`
[[workload]]
name = "web"
tenant = "e2e"
priority = 4
image = %q
command = ["redis-server", "--save", "", "--protected-mode", "no"]
shards = %d
autopilot = "off"
env = { ME = "{index}" }

[workload.size]
cpus = { request = 0.05, limit = 0.5 }
memory = { request = "16M", limit = %q }

[workload.spread]
per_host = 2
`, checksImage, shards, memory)
}

// changed is what `tranship workload apply -o json` prints of one workload.
type changed struct {
	Workload, Owner, Outcome, Reason string
	Done                             int
	Steps                            []struct{ Op, Shard, Node, Detail string }
	Refused                          []string
}

// workload runs a verb that changes one workload and returns what it did, with
// its exit code.
func workload(t *testing.T, host string, args ...string) (changed, int) {
	t.Helper()
	out, err := on(t, host, append([]string{"tranship", "workload", "-o", "json"}, args...)...)
	var doc struct {
		SchemaVersion int `json:"schema_version"`
		Workloads     []changed
	}
	if strings.TrimSpace(out) != "" {
		if jerr := json.Unmarshal([]byte(out), &doc); jerr != nil || doc.SchemaVersion != 1 {
			t.Fatalf("workload %v printed %q: %v", args, out, jerr)
		}
	}
	if err != nil {
		t.Log(err)
	}
	if len(doc.Workloads) == 0 {
		return changed{}, exitCodeOf(err)
	}
	return doc.Workloads[0], exitCodeOf(err)
}

// mustChange is workload for one that ends well with so many steps.
func mustChange(t *testing.T, outcome string, steps int, host string, args ...string) {
	t.Helper()
	if c, code := workload(t, host, args...); code != 0 || c.Outcome != outcome || len(c.Steps) != steps {
		t.Fatalf("workload %v: exit code %d: %+v\nwanted %s with %d steps", args, code, c, outcome, steps)
	}
}

// workloadShard is a shard with what a workload gives it.
type workloadShard struct {
	Name, Node, Status, IP string
	PID                    int               `json:"pid"`
	Memory                 int64             `json:"memory_limit_bytes"`
	Labels                 map[string]string `json:"labels"`
}

func shardsOfWeb(t *testing.T) map[string]workloadShard {
	t.Helper()
	var doc struct {
		Workloads []struct {
			Joined int
			Shards []workloadShard
		}
	}
	out, err := on(t, "host-2", "tranship", "workload", "ls", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	shards := map[string]workloadShard{}
	for _, w := range doc.Workloads {
		for _, s := range w.Shards {
			if s.Labels["tranship.io/workload"] != "web" {
				continue
			}
			if _, twice := shards[s.Name]; twice {
				t.Errorf("%s is there twice", s.Name)
			}
			shards[s.Name] = s
		}
	}
	return shards
}

func perHost(shards map[string]workloadShard) map[string]int {
	on := map[string]int{}
	for _, s := range shards {
		if s.Status == "running" {
			on[s.Node]++
		}
	}
	return on
}

// limitOf is the limit that the kernel enforces on a running shard.
func limitOf(t *testing.T, s workloadShard) string {
	t.Helper()
	script := fmt.Sprintf(`for f in $(find /sys/fs/cgroup -path '*/tranship/default/%[1]s/memory.limit_in_bytes' -o -path '*/tranship/default/%[1]s/memory.max'); do cat $f; done`, s.Name)
	return strings.TrimSpace(must(t, s.Node, "sh", "-c", script))
}

func removeWorkload(t *testing.T, name string) {
	t.Helper()
	guard(t)
	t.Cleanup(func() { _, _ = on(t, "host-1", "tranship", "workload", "rm", name) })
}

// TestWorkloads has one guard for all: each leaves nothing, so all do.
func TestWorkloads(t *testing.T) {
	needChecks(t)
	needImage(t)
	guard(t)
	t.Run("are spread, scaled, grown, moved and removed", spreadScaledGrownMovedAndRemoved)
	t.Run("mistakes in a file are told with their line", mistakesInAFile)
	t.Run("a host without the image is sent it", sentTheImage)
	t.Run("a container joins by its label", joinsByLabel)
}

func spreadScaledGrownMovedAndRemoved(t *testing.T) {
	removeWorkload(t, "web")
	file := workloadFile(t, redisWorkload(6, "128M"))
	mustChange(t, "planned", 6, "host-1", "apply", "-f", file, "--dry-run")
	if got := shardsOfWeb(t); len(got) != 0 {
		t.Fatalf("a dry run started %v", got)
	}
	mustChange(t, "done", 6, "host-1", "apply", "-f", file)
	even := map[string]int{"host-1": 2, "host-2": 2, "host-3": 2}
	if got := perHost(shardsOfWeb(t)); !maps.Equal(got, even) {
		t.Fatalf("six shards on %v", got)
	}
	mustChange(t, "nothing", 0, "host-1", "apply", "-f", file)
	mustChange(t, "nothing", 0, "host-3", "apply", "-f", file) // by way of its owner

	// A client that is connected all the while.
	web := shardsOfWeb(t)["web-0"]
	awaitListening(t, web.IP, 6379)
	must(t, "client", checker(t), "redis", "load", "--addr", web.IP+":6379", "--bytes", "8MiB")
	c := startClient(t, "web-0", "redis", "run", "--addr", web.IP+":6379", "--no-reconnect", "--request-rate", "100", "--overwrite-rate", "1MB/s")
	awaitConnections(t, web.IP, 1)

	mustChange(t, "done", 2, "host-2", "scale", "web", "--shards", "4")
	if got := shardsOfWeb(t); len(got) != 4 || got["web-4"].Name != "" || got["web-5"].Name != "" {
		t.Fatalf("scaled to four: %v", got)
	}
	mustChange(t, "done", 2, "host-3", "scale", "web", "--shards", "6")
	if got := perHost(shardsOfWeb(t)); !maps.Equal(got, even) {
		t.Fatalf("six again on %v", got)
	}

	// Grown in place: the same processes, another limit.
	before := shardsOfWeb(t)
	file = workloadFile(t, redisWorkload(6, "256M"))
	mustChange(t, "done", 6, "host-1", "apply", "-f", file)
	after := shardsOfWeb(t)
	for name, s := range after {
		if s.PID != before[name].PID || s.Node != before[name].Node || s.Memory != 256<<20 {
			t.Errorf("%s was %+v and is %+v", name, before[name], s)
		}
		if got := limitOf(t, s); got != "268435456" {
			t.Errorf("the kernel limits %s to %s", name, got)
		}
	}
	// The limit outlives the daemon, and goes along.
	h := hostOf(t, web.Node)
	if err := h.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	to := "host-2"
	if web.Node == to {
		to = "host-3"
	}
	for _, at := range []string{"host-1", "host-2", "host-3"} {
		await(t, "all answer "+at, func() bool {
			for _, n := range nodesOf(t, at) {
				if n.State != "alive" {
					return false
				}
			}
			return true
		})
	}
	mustMigrate(t, "web-0", web.Node, to)
	moved := shardsOfWeb(t)["web-0"]
	if moved.Node != to || moved.Memory != 256<<20 || limitOf(t, moved) != "268435456" {
		t.Errorf("after the move: %+v, and the kernel's limit is %s", moved, limitOf(t, moved))
	}
	c.mustGoOn(t, 20)
	c.end(t) // fails on any error and any reconnect
	mustChange(t, "nothing", 0, "host-1", "apply", "-f", file)

	// What cannot be is refused with numbers, and changes nothing.
	// Since the move one host has three, so that a seventh has a place and an eighth has none.
	if c, code := workload(t, "host-1", "scale", "web", "--shards", "8"); code != 3 || !strings.Contains(strings.Join(c.Refused, ""), "spread.per_host = 2") {
		t.Errorf("eight: exit code %d, %+v", code, c)
	}
	if c, code := workload(t, "host-1", "scale", "web", "--memory", "8m"); code != 3 || !strings.Contains(strings.Join(c.Refused, ""), "that it cannot give back") {
		t.Errorf("less than is in use: exit code %d, %+v", code, c)
	}
	mustChange(t, "done", 6, "host-2", "rm", "web")
	if got := shardsOfWeb(t); len(got) != 0 {
		t.Errorf("removed, and there is %v", got)
	}
}

func mistakesInAFile(t *testing.T) {
	for _, c := range []struct {
		name, text, want string
		code             int
	}{
		{"an unknown key", "[[workload]]\nname = \"bad\"\nimage = \"i\"\nshards = 1\nshard = 2\n", ":5: unknown key workload.shard", 2},
		{"a cycle", "[[workload]]\nname = \"bad\"\nimage = \"i\"\nshards = 1\naffinity = { near = [\"bad\"] }\n", ":5: affinity.near: bad is to be near itself, a cycle", 2},
		{"no room", "[[workload]]\nname = \"bad\"\nimage = \"i\"\nshards = 1\nsize = { cpus = { request = 4000 } }\n", "bad-0 fits no host: ", 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := on(t, "host-1", "tranship", "workload", "apply", "-f", workloadFile(t, c.text))
			if exitCodeOf(err) != c.code || !strings.Contains(err.Error(), c.want) {
				t.Errorf("exit code %d, wanted %d: %v", exitCodeOf(err), c.code, err)
			}
		})
	}
}

// An owner and a host that are killed in the middle leave what the same command
// goes on from, and nothing else.
func TestAnApplyGoesOnAfterItsDaemonsWereKilled(t *testing.T) {
	needChecks(t)
	removeWorkload(t, "web")
	file := workloadFile(t, redisWorkload(3, "128M"))
	revive := func(host string) {
		t.Helper()
		if err := hostOf(t, host).StartDaemon(context.WithoutCancel(t.Context())); err != nil {
			t.Fatal(err)
		}
		for _, at := range []string{"host-1", "host-2", "host-3"} {
			await(t, host+" answers "+at, func() bool { return nodesOf(t, at)[host].State == "alive" })
		}
	}
	for _, c := range []struct{ host, point string }{{"host-1", "workload.written"}, {"host-2", "run.created"}} {
		hit, release := arm(t, c.host, c.point, "kill")
		got, code := workload(t, "host-1", "apply", "-f", file)
		// A host that is back in time is asked again, and then all is well.
		if code == 0 && c.point == "workload.written" {
			t.Fatalf("%s at %s: %+v", c.host, c.point, got)
		}
		await(t, c.host+" died at "+c.point, hit)
		release()
		revive(c.host)
	}
	if got, code := workload(t, "host-1", "apply", "-f", file); code != 0 {
		t.Fatalf("exit code %d: %+v", code, got)
	}
	mustChange(t, "nothing", 0, "host-1", "apply", "-f", file)
	if got := perHost(shardsOfWeb(t)); !maps.Equal(got, map[string]int{"host-1": 1, "host-2": 1, "host-3": 1}) {
		t.Errorf("three shards on %v", got)
	}
	mustChange(t, "done", 3, "host-1", "rm", "web")
}

func sentTheImage(t *testing.T) {
	removeWorkload(t, "web")
	for _, h := range []string{"host-1", "host-2"} {
		t.Cleanup(func() { _, _ = on(t, h, "tranship", "uncordon", h) })
		must(t, h, "tranship", "cordon", h)
	}
	must(t, "host-3", "ctr", "-n", "default", "images", "rm", "--sync", checksImage)
	mustChange(t, "done", 1, "host-1", "apply", "-f", workloadFile(t, redisWorkload(1, "128M")))
	if s := shardsOfWeb(t)["web-0"]; s.Node != "host-3" || s.Status != "running" {
		t.Errorf("%+v", s)
	}
	if list := must(t, "host-3", "ctr", "-n", "default", "images", "ls", "-q"); !slices.Contains(strings.Fields(list), checksImage) {
		t.Errorf("host-3 has %s", list)
	}
	mustChange(t, "done", 1, "host-1", "rm", "web")
}

func joinsByLabel(t *testing.T) {
	runShard(t, "old", "--label", "tranship.io/workload=web", "--label", "tranship.io/priority=2", testImage, "sleep", "1000")
	if s := shardsOfWeb(t)["old"]; s.Node != "host-1" || s.Labels["tranship.io/priority"] != "2" {
		t.Errorf("%+v", s)
	}
	if _, err := on(t, "host-1", "tranship", "run", "--name", "made-up", "--label", "tranship.io/index=0", testImage, "sleep", "1"); exitCodeOf(err) != 2 {
		t.Errorf("anybody can be a shard: %v", err)
	}
	if _, code := workload(t, "host-1", "rm", "web"); code != 1 {
		t.Errorf("nobody applied it, and rm ends with %d", code)
	}
}
