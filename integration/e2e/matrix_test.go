//go:build integration

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/integration/workload/check"
	"github.com/tranship/tranship/integration/workload/memcheck"
	"github.com/tranship/tranship/integration/workload/pgcheck"
)

// Each test starts one workload as a shard on host-1, loads it from outside or
// lets it load itself, moves it there and back three times, and verifies it
// from outside after every move and at the end.

const (
	checksImage   = "tranship.test/checks:1"
	pythonImage   = "tranship.test/python:1"
	postgresImage = "tranship.test/postgres:1"

	moves = 6 // there and back three times
)

// checker is the program that is all clients, and some servers.
func checker(t *testing.T) string {
	t.Helper()
	return goBuilt(t, "checker", "integration/workload/cmd/checker")
}

// needChecks imports the image with memcheck, the checker and redis.
func needChecks(t *testing.T) {
	t.Helper()
	program := built(t, "memcheck", func(ctx context.Context, out string) error { return memcheck.Build(ctx, out) })
	importImage(t, lab.ImageSpec{Name: checksImage, Bins: []string{program, checker(t), "/usr/bin/redis-server", "/bin/sh"}, Cmd: []string{"memcheck"}})
}

// moved is a move as it was seen from outside.
type moved struct {
	result
	began, end time.Time
}

// thereAndBack moves a shard between the hosts, each move a test of its own,
// and after each has it verified from outside.
func thereAndBack(t *testing.T, name string, before func(t *testing.T), verify func(t *testing.T, at string)) []moved {
	t.Helper()
	var all []moved
	for i := range moves {
		from, to := "host-1", "host-2"
		if i%2 == 1 {
			from, to = to, from
		}
		if !t.Run(fmt.Sprintf("move %d to %s", i+1, to), func(t *testing.T) {
			if before != nil {
				before(t)
			}
			m := moved{began: time.Now()}
			m.result = mustMigrate(t, name, from, to)
			m.end = time.Now()
			m.mustBeSplit(t)
			all = append(all, m)
			verify(t, to)
			if got := where(t, name); len(got) != 1 || got[0].Node != to || got[0].Status != "running" {
				t.Errorf("the shard is at %+v, and should run on %s alone", got, to)
			}
		}) {
			t.FailNow()
		}
	}
	return all
}

// logGaps tells what a client saw of each move.
func logGaps(t *testing.T, all []moved, r check.Report) {
	t.Helper()
	for i, m := range all {
		t.Logf("move %d: blackout %.0f ms, longest gap of the client %.0f ms", i+1, m.BlackoutMs, gapIn(t, r, m.began, m.end))
	}
}

// askMemcheck runs a request of memcheck's control port, on a new connection
// each time, in a host or in a network namespace of it.
func askMemcheck(t *testing.T, host, addr, request string, through ...string) memcheck.Stat {
	t.Helper()
	out, err := on(t, host, append(through, checker(t), "memcheck", request, "--addr", addr)...)
	var s memcheck.Stat
	if jerr := json.Unmarshal([]byte(out), &s); jerr != nil && err == nil {
		t.Fatalf("memcheck %s printed %q: %v", request, out, jerr)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(s.Errors, "\n"))
	}
	if request != "reset" && (s.Err() != nil || request == "verify" && !s.Complete) {
		t.Fatalf("memcheck %s: complete %v: %v", request, s.Complete, s.Err())
	}
	return s
}

func TestMemcheckMoves(t *testing.T) {
	needChecks(t)
	ip := runShard(t, "memcheck-0", checksImage, "memcheck", "--size=24MiB", "--rate=8MiB/s", "--procs=2", "--threads=2", "--verify=1000")
	addr := ip + ":" + strconv.Itoa(memcheck.DefaultPort)
	awaitListening(t, ip, memcheck.DefaultPort)
	c := startClient(t, "watch", "memcheck", "watch", "--addr", addr)
	awaitConnections(t, ip, 1)
	all := thereAndBack(t, "memcheck-0",
		func(t *testing.T) { askMemcheck(t, "client", addr, "reset") },
		func(t *testing.T, _ string) {
			c.mustGoOn(t, 20)
			s := askMemcheck(t, "client", addr, "stat")
			t.Logf("longest pause %.0f ms, of the watch thread %.0f ms", s.LongestPauseMS, s.WatchPauseMS)
			s = askMemcheck(t, "client", addr, "verify")
			if s.Connections.Failed != 0 {
				t.Errorf("%d connections failed", s.Connections.Failed)
			}
		})
	logGaps(t, all, c.end(t))
}

func TestRedisMovesUnderItsClient(t *testing.T) {
	needChecks(t)
	ip := runShard(t, "redis-load", checksImage, "redis-server", "--save", "", "--protected-mode", "no")
	addr := ip + ":6379"
	awaitListening(t, ip, 6379)
	must(t, "client", checker(t), "redis", "load", "--addr", addr, "--bytes", "32MiB")
	c := startClient(t, "redis client", "redis", "run", "--addr", addr, "--no-reconnect", "--request-rate", "1000", "--overwrite-rate", "4MB/s")
	awaitConnections(t, ip, 1)
	all := thereAndBack(t, "redis-load", nil, func(t *testing.T, _ string) { c.mustGoOn(t, 200) })
	logGaps(t, all, c.end(t))
}

func TestPostgreSQLMovesUnderTransactions(t *testing.T) {
	bins := []string{checker(t), "/usr/lib/postgresql/" + postgresVersion(t) + "/bin/postgres", "/usr/lib/postgresql/" + postgresVersion(t) + "/bin/initdb", "/bin/sh"}
	serve := []string{"checker", "pg", "serve", "--shared-buffers", "128MB"}
	// CRIU reads the limits of another user's processes, which takes
	// CAP_SYS_RESOURCE: where root lacks it PostgreSQL runs as root.
	if !have(t, capSysResource) {
		library := built(t, "asroot.so", pgcheck.BuildAsRoot)
		bins, serve = append(bins, library), append(serve, "--as-root", library)
	}
	importImage(t, lab.ImageSpec{Name: postgresImage, Bins: bins})
	ip := runShard(t, "postgres-0", append([]string{postgresImage}, serve...)...)
	url := "postgres://postgres@" + ip + ":5432/postgres?sslmode=disable"
	awaitListening(t, ip, 5432)
	const pgTable = 16 << 20
	must(t, "client", checker(t), "pg", "init", "--url", url, "--bytes", strconv.Itoa(pgTable))
	const workers = 4
	c := startClient(t, "transactions", "pg", "run", "--url", url, "--workers", strconv.Itoa(workers), "--rate", "200")
	awaitConnections(t, ip, workers)
	all := thereAndBack(t, "postgres-0", nil, func(t *testing.T, _ string) { c.mustGoOn(t, 50) })
	for _, m := range all {
		// The table lies in the shared buffers and is sent before the freeze.
		first, last := m.Rounds[0].BytesRaw, m.Rounds[len(m.Rounds)-1].BytesRaw
		if first < pgTable || last > first/2 {
			t.Errorf("%d MiB were sent in the first round and %d MiB in the last", first>>20, last>>20)
		}
	}
	logGaps(t, all, c.end(t)) // proves that the database is whole
	must(t, "client", checker(t), "pg", "verify", "--url", url)
}

const capSysResource = 24 // linux/capability.h

// have says whether this process has a capability, which a host's then has too.
func have(t *testing.T, capability uint) bool {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "\nCapEff:\t")
	line, _, _ := strings.Cut(rest, "\n")
	set, err := strconv.ParseUint(line, 16, 64)
	if err != nil {
		t.Fatalf("CapEff %q: %v", line, err)
	}
	return set>>capability&1 == 1
}

func postgresVersion(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/usr/lib/postgresql")
	if err != nil || len(entries) == 0 {
		t.Fatalf("PostgreSQL: %d versions, %v: make setup installs it", len(entries), err)
	}
	return entries[len(entries)-1].Name()
}

func TestAnHTTPServerInGoMoves(t *testing.T) {
	needChecks(t)
	ip := runShard(t, "http-go", checksImage, "checker", "http", "serve")
	moveHTTP(t, "http-go", ip)
}

func TestAnHTTPServerInPythonMoves(t *testing.T) {
	server := built(t, "httpd.py", func(_ context.Context, out string) error {
		raw, err := os.ReadFile("../workload/httpcheck/httpd.py")
		if err != nil {
			return err
		}
		return os.WriteFile(out, raw, 0o755)
	})
	importImage(t, lab.ImageSpec{Name: pythonImage, Bins: []string{server}})
	ip := runShard(t, "http-python", pythonImage, "httpd.py")
	moveHTTP(t, "http-python", ip)
}

// moveHTTP moves a server under two clients with a keep-alive connection each.
func moveHTTP(t *testing.T, name, ip string) {
	t.Helper()
	awaitListening(t, ip, 8080)
	var clients []*client
	for i := range 2 {
		clients = append(clients, startClient(t, fmt.Sprintf("client %d", i+1), "http", "run", "--addr", ip+":8080", "--request-rate", "300"))
	}
	awaitConnections(t, ip, len(clients))
	all := thereAndBack(t, name, nil, func(t *testing.T, _ string) {
		for _, c := range clients {
			c.mustGoOn(t, 50)
		}
	})
	for _, c := range clients {
		logGaps(t, all, c.end(t))
	}
}

func TestAShardThatIsATCPClientMoves(t *testing.T) {
	needChecks(t)
	const port = "9000"
	// The client's address among shards.
	out := strings.Fields(must(t, "client", "sh", "-c", "ip -4 -o addr show | grep -o '10\\.89\\.[0-9.]*' | head -1"))
	if len(out) != 1 {
		t.Fatalf("the client's address among shards: %q", out)
	}
	server := startClient(t, "tcp server", "tcp", "server", "--listen", "0.0.0.0:"+port)
	select {
	case <-server.ready:
	case <-time.After(limit):
		t.Fatal("the server does not listen")
	}
	ip := runShard(t, "tcp-client", checksImage, "checker", "tcp", "client", "--addr", out[0]+":"+port)
	awaitConnections(t, ip, 1)
	all := thereAndBack(t, "tcp-client", nil, func(t *testing.T, _ string) { server.mustGoOn(t, 100) })
	logGaps(t, all, server.end(t))
	// The server's farewell ends the client, which says in its log what it saw.
	var r check.Report
	await(t, "the shard's own report", func() bool {
		lines := strings.Split(strings.TrimSpace(must(t, "host-1", "tranship", "logs", "tcp-client")), "\n")
		return json.Unmarshal([]byte(lines[len(lines)-1]), &r) == nil && r.Final
	})
	if !r.OK || r.ErrorCount != 0 || r.Reconnects != 0 {
		t.Errorf("the shard saw %d errors: %s", r.ErrorCount, r.Errors)
	}
	t.Logf("the shard: %d frames, longest gap %.0f ms", r.Requests, r.LongestGapMS)
}
