//go:build integration

// Package profile checks, in a lab and under load, that what tranship shows of
// shards is what other witnesses say. `make test` runs it, as root.
package profile

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/internal/testenv"
)

var theLab *lab.Lab

const (
	// limit bounds any single wait: far above what anything takes.
	limit = 2 * time.Minute
	image = "tranship.test/loads:1"
	// observe is the time over which accounts are compared.
	observe = 30 * time.Second
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "profile: needs root: make test runs it")
		if os.Getenv(testenv.StrictVariable) == "1" {
			return 1
		}
		return 0
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	err := lab.Down(ctx)
	if err == nil {
		theLab, err = lab.Up(ctx, lab.Options{Hosts: 2})
	}
	if err == nil {
		err = theLab.Image(ctx, "default", lab.ImageSpec{
			Name: image, Bins: []string{"/bin/sh", "/bin/sleep", "/usr/bin/stress-ng", "/usr/bin/iperf3", "/usr/bin/redis-server", "/usr/bin/fio", "/bin/dd"}, Cmd: []string{"sh"},
		})
	}
	if err == nil {
		err = startMoves(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "profile:", err)
		return 1
	}
	defer func() {
		if err := lab.Down(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, "profile:", err)
		}
	}()
	return m.Run()
}

func host(t *testing.T, name string) *lab.Host {
	t.Helper()
	h, err := theLab.Host(name)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func must(t *testing.T, h *lab.Host, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), limit)
	defer cancel()
	out, err := h.Exec(ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// start runs a shard until the test ends and returns its address and pid.
func start(t *testing.T, h *lab.Host, name string, args ...string) (ip string, pid int) {
	t.Helper()
	must(t, h, append([]string{"tranship", "run", "--name", name, image}, args...)...)
	removeAtEnd(t, name)
	var doc struct {
		Shards []struct {
			Name, IP string
			PID      int
		}
	}
	if err := json.Unmarshal([]byte(must(t, h, "tranship", "ps", "--local", "-o", "json")), &doc); err != nil {
		t.Fatal(err)
	}
	for _, s := range doc.Shards {
		if s.Name == name {
			ip, _, _ = strings.Cut(s.IP, "/")
			return ip, s.PID
		}
	}
	t.Fatalf("%s is not among the shards", name)
	return "", 0
}

// removeAtEnd removes a shard, wherever it is by then, when the test ends.
func removeAtEnd(t *testing.T, name string) {
	t.Helper()
	t.Cleanup(func() {
		for _, h := range theLab.Hosts() {
			_, _ = h.Exec(context.Background(), "tranship", "rm", "-f", name)
		}
	})
}

// scrape reads the host's metrics from inside its network namespace: the first
// thread that dials enters it, and ends.
func scrape(t *testing.T, h *lab.Host) string {
	t.Helper()
	netns := filepath.Join(filepath.Dir(h.Root()), "ns", "net")
	type answer struct {
		text string
		err  error
	}
	done := make(chan answer)
	go func() {
		runtime.LockOSThread() // and never unlocked
		text, err := func() (string, error) {
			fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return "", err
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return "", err
			}
			conn, err := net.DialTimeout("tcp", "127.0.0.1:9464", 5*time.Second)
			if err != nil {
				return "", err
			}
			defer conn.Close()
			client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
				DisableKeepAlives: true,
				DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
			}}
			resp, err := client.Get("http://metrics/metrics")
			if err != nil {
				return "", err
			}
			defer resp.Body.Close()
			raw, err := io.ReadAll(resp.Body)
			return string(raw), err
		}()
		done <- answer{text, err}
	}()
	a := <-done
	if a.err != nil {
		t.Fatalf("metrics of %s: %v", h.Name(), a.err)
	}
	return a.text
}

// series finds a value in a scrape: the metric's name, then what its labels
// must contain.
func series(text, name string, labels ...string) (float64, bool) {
next:
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, name+"{") && !strings.HasPrefix(line, name+" ") {
			continue
		}
		for _, l := range labels {
			if !strings.Contains(line, l) {
				continue next
			}
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64)
		return v, err == nil
	}
	return 0, false
}

// fresh returns a scrape of a sample that was taken just now: accounts that are
// read next are of the same moment, give or take the poll.
func fresh(t *testing.T, h *lab.Host) string {
	t.Helper()
	const clock = "tranship_profile_sampling_seconds_total"
	before, _ := series(scrape(t, h), clock)
	for end := time.Now().Add(limit); time.Now().Before(end); <-time.After(10 * time.Millisecond) {
		text := scrape(t, h)
		if v, ok := series(text, clock); ok && v != before {
			return text
		}
	}
	t.Fatal("no samples are taken")
	return ""
}

// tight is how close together accounts must be read, of which a sample was taken
// in between: a thousandth of the time over which they are compared.
const tight = 30 * time.Millisecond

// besides reads accounts right before and right after a sample was taken, and
// returns a scrape of that sample with the accounts' middle. On a machine that is
// busy with something else it takes some attempts.
func besides(t *testing.T, h *lab.Host, accounts func() []float64) (string, []float64) {
	t.Helper()
	const clock = "tranship_profile_sampling_seconds_total"
	var before []float64
	var read time.Time
	last := math.NaN()
	for end := time.Now().Add(limit); time.Now().Before(end); {
		at := time.Now()
		now := accounts()
		text := scrape(t, h)
		v, ok := series(text, clock)
		if !ok {
			continue
		}
		if v != last && before != nil {
			after := accounts()
			if time.Since(read) <= 2*tight {
				for i := range after {
					after[i] = (before[i] + after[i]) / 2
				}
				return text, after
			}
		}
		before, read, last = now, at, v
	}
	t.Fatal("no sample is taken, or the machine is too busy to compare it with anything")
	return "", nil
}

func cpuBesides(t *testing.T, h *lab.Host, name string) (string, float64) {
	t.Helper()
	text, v := besides(t, h, func() []float64 { return []float64{cpuOf(t, h, name)} })
	return text, v[0]
}

func value(t *testing.T, text, name string, labels ...string) float64 {
	t.Helper()
	v, ok := series(text, name, labels...)
	if !ok {
		t.Errorf("no %s %v", name, labels)
	}
	return v
}

func shardLabel(name string) string { return fmt.Sprintf("shard=%q", name) }

// cgroupFile is a file of a shard's cgroup, as the host has it.
func cgroupFile(h *lab.Host, v1, v2, name string) string {
	top := h.Root() + "/sys/fs/cgroup"
	if _, err := os.Stat(top + "/cgroup.controllers"); err == nil {
		return filepath.Join(top, "tranship/default", name, v2)
	}
	controller, _, _ := strings.Cut(v1, ".")
	return filepath.Join(top, controller, "tranship/default", name, v1)
}

// cpuOf is the cgroup's own account, in seconds.
func cpuOf(t *testing.T, h *lab.Host, name string) float64 {
	t.Helper()
	path := cgroupFile(h, "cpuacct.usage", "cpu.stat", name)
	if strings.HasSuffix(path, "cpu.stat") {
		return keyed(t, path, "usage_usec") / 1e6
	}
	v, err := strconv.ParseFloat(strings.TrimSpace(read(t, path)), 64)
	if err != nil {
		t.Fatal(err)
	}
	return v / 1e9
}

func faultsOf(t *testing.T, h *lab.Host, name string) float64 {
	t.Helper()
	path := cgroupFile(h, "memory.stat", "memory.stat", name)
	if strings.Contains(path, "/memory/") {
		return keyed(t, path, "total_pgfault")
	}
	return keyed(t, path, "pgfault")
}

// waitOf sums what /proc/PID/schedstat says of every thread in the cgroup. Read
// from here, cgroup.procs has the machine's pids, not the host's.
func waitOf(t *testing.T, h *lab.Host, name string) float64 {
	t.Helper()
	sum := 0.0
	procs := cgroupFile(h, "cpuacct.usage", "cgroup.procs", name)
	for _, pid := range strings.Fields(read(t, filepath.Join(filepath.Dir(procs), "cgroup.procs"))) {
		stats, err := filepath.Glob("/proc/" + pid + "/task/*/schedstat")
		if err != nil || len(stats) == 0 {
			t.Fatalf("threads of %s: %v", pid, err)
		}
		for _, path := range stats {
			f := strings.Fields(read(t, path))
			ns, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			sum += ns / 1e9
		}
	}
	return sum
}

// deviceOf returns bytes and packets of eth0 inside a shard (proc_pid_net(5)).
func deviceOf(t *testing.T, h *lab.Host, pid int) (rxBytes, rxPackets, txBytes, txPackets float64) {
	t.Helper()
	for line := range strings.Lines(read(t, fmt.Sprintf("%s/proc/%d/net/dev", h.Root(), pid))) {
		name, rest, _ := strings.Cut(line, ":")
		if strings.TrimSpace(name) != "eth0" {
			continue
		}
		var v [16]float64
		for i, f := range strings.Fields(rest) {
			v[i], _ = strconv.ParseFloat(f, 64)
		}
		return v[0], v[1], v[8], v[9]
	}
	t.Fatal("the shard has no eth0")
	return
}

func read(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func keyed(t *testing.T, path, key string) float64 {
	t.Helper()
	for line := range strings.Lines(read(t, path)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == key {
			v, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("%s has no %s", path, key)
	return 0
}

func within(t *testing.T, what string, got, want, tolerance float64) {
	t.Helper()
	off := 0.0
	if want != 0 {
		off = got/want - 1
	}
	t.Logf("%s: %.3f, truth %.3f (%+.3f %%)", what, got, want, 100*off)
	if want <= 0 || off > tolerance || off < -tolerance {
		t.Errorf("%s: %.3f, truth %.3f", what, got, want)
	}
}

// eventually waits for a condition that nobody announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(limit); time.Now().Before(end); <-tick.C {
		if ok() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}
