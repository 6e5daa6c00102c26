//go:build integration

package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/tranship/tranship/integration/workload/memcheck"
)

// pageServer is the process that serves pages on a host, and the one that holds
// the shard's memory with it; both are 0 when there is none.
func pageServer(t *testing.T, host string) (server, holder int) {
	t.Helper()
	out := must(t, host, "sh", "-c", `for p in /proc/[0-9]*; do
		case "$(tr '\0' ' ' <$p/cmdline 2>/dev/null)" in *" page-server "*) read -r name <$p/comm 2>/dev/null && echo $name ${p#/proc/};; esac
	done; true`)
	for line := range strings.Lines(out) {
		name, pid, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.Atoi(pid)
		switch {
		case err != nil:
			t.Fatalf("%q", line)
		case name == "tranship-hold":
			holder = n
		case name == "transhipd":
			server = n
		}
	}
	return server, holder
}

// awaitPageServer waits until another server than this one has a holder, and the
// holder from before is gone.
func awaitPageServer(t *testing.T, host string, oldServer, oldHolder int) (server, holder int) {
	t.Helper()
	await(t, fmt.Sprintf("another page server than %d, another holder than %d", oldServer, oldHolder), func() bool {
		server, holder = pageServer(t, host)
		return server != 0 && holder != 0 && server != oldServer && holder != oldHolder
	})
	return server, holder
}

// A shard whose filling is held back lives on what it touches: whoever serves its
// pages is killed, one after the other, and it must not notice. When nobody holds
// its memory any more, its missing pages would read as zeros, and it must not
// run.
func TestWhoeverHoldsAHalfFilledShardMayBeKilled(t *testing.T) {
	needChecks(t)
	const name = "half-filled"
	ip := runShard(t, name, checksImage, "memcheck", "--features=plain", "--size=64MiB", "--rate=4MiB/s",
		"--hot=20", "--procs=2", "--threads=2", "--verify=20000")
	addr := ip + ":" + strconv.Itoa(memcheck.DefaultPort)
	awaitListening(t, ip, memcheck.DefaultPort)
	askMemcheck(t, "client", addr, "stat") // answers once all of it is written
	c := startClient(t, "watch", "memcheck", "watch", "--addr", addr)
	awaitConnections(t, ip, 1)
	f := &faulty{t: t, name: name, ip: ip}

	_, release := arm(t, "host-2", "pages.fill", "pause")
	mustMigrate(t, name, "host-1", "host-2")
	server, holder := pageServer(t, "host-2")
	if server == 0 || holder == 0 {
		t.Fatalf("server %d, holder %d", server, holder)
	}
	kill := func(pids ...int) {
		t.Helper()
		args := []string{"kill", "-KILL"}
		for _, pid := range pids {
			args = append(args, strconv.Itoa(pid))
		}
		must(t, "host-2", args...)
	}

	kill(server)
	server, holder = awaitPageServer(t, "host-2", server, holder)
	c.mustGoOn(t, 5)

	kill(holder)
	await(t, "another holder", func() bool {
		s, h := pageServer(t, "host-2")
		if s != server {
			t.Fatalf("server %d was not killed, and now it is %d", server, s)
		}
		before := holder
		holder = h
		return h != 0 && h != before
	})
	c.mustGoOn(t, 5)

	// With the daemon away, nobody follows the server.
	ctx := t.Context()
	if err := hostOf(t, "host-2").KillDaemon(ctx); err != nil {
		t.Fatal(err)
	}
	kill(server)
	f.restart("host-2")
	server, holder = awaitPageServer(t, "host-2", server, holder)
	c.mustGoOn(t, 5)

	release()
	f.awaitNothingPending()
	if s := askMemcheck(t, "client", addr, "verify"); len(s.Errors) != 0 {
		t.Errorf("%+v", s)
	}
	await(t, "nobody holds its memory any more", func() bool {
		server, holder := pageServer(t, "host-2")
		return server == 0 && holder == 0
	})
	c.end(t)

	arm(t, "host-1", "pages.fill", "pause")
	mustMigrate(t, name, "host-2", "host-1")
	server, holder = pageServer(t, "host-1")
	must(t, "host-1", "kill", "-KILL", strconv.Itoa(server), strconv.Itoa(holder))
	await(t, "the shard is stopped", func() bool {
		for _, s := range where(t, name) {
			if s.Node != "host-1" || s.Status == "running" {
				return false
			}
		}
		return true
	})
	await(t, "tranship migrations says why", func() bool {
		return strings.Contains(must(t, "host-1", "tranship", "migrations", "-o", "json"), `"pages-lost"`)
	})
}
