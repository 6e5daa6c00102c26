//go:build integration

package e2e

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// Each case makes a shard and asks for a move that pre-flight must refuse: with
// exit code 3, with the finding, and with the shard running on as the same
// process as before. One guard is for all: each leaves nothing, so all do.
func TestARefusedShardIsLeftAlone(t *testing.T) {
	needChecks(t)
	guard(t)
	hold := func(kind string) func(t *testing.T, name string) {
		return func(t *testing.T, name string) {
			runShard(t, name, checksImage, "checker", "hold", kind)
			await(t, kind+" is open", func() bool {
				out, err := on(t, "host-1", "tranship", "logs", name)
				return err == nil && strings.Contains(out, `"holds"`)
			})
		}
	}
	ctr := func(flags ...string) func(t *testing.T, name string) {
		return func(t *testing.T, name string) { runCtr(t, name, flags) }
	}
	plain := func(t *testing.T, name string) {
		runShard(t, name, checksImage, "checker", "http", "serve")
	}
	for _, c := range []struct {
		name  string
		start func(t *testing.T, name string)
		to    string
		code  string
	}{
		{"no such shard", nil, "host-2", "unknown-shard"},
		{"no such host", plain, "host-9", "unknown-node"},
		{"the host where it is", plain, "host-1", "same-host"},
		{"io_uring", hold("io_uring"), "host-2", "io-uring"},
		{"a userfaultfd of its own", hold("userfaultfd"), "host-2", "userfaultfd"},
		{"a perf event", ctrHold("perf_event"), "host-2", "descriptor"},
		{"an MPTCP socket", ctrHold("mptcp"), "host-2", "mptcp"},
		{"a device", ctr("--device", "/dev/fuse"), "host-2", "device"},
		{"a bind mount that nobody spoke for", ctr("--mount", "type=bind,src=/var/tmp,dst=/mnt,options=rbind:ro"), "host-2", "mount-policy"},
		{"the pid namespace of somebody else", ctr("--with-ns", "pid:/proc/1/ns/pid"), "host-2", "pid-namespace"},
		{"interfaces that somebody else made", withLink, "host-2", "private-links"},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := "refused-" + strings.ReplaceAll(c.code, "_", "-")
			before := 0
			if c.start != nil {
				c.start(t, name)
				before = pidOf(t, "host-1", name)
			}
			for _, verb := range []string{"check", "migrate"} {
				out, err := on(t, "host-1", "tranship", verb, "-o", "json", name, c.to)
				if got := exitCodeOf(err); got != 3 {
					t.Errorf("%s: exit code %d, %v: %s", verb, got, err, out)
				}
				if verb == "check" && !slices.Contains(refusals(t, out), c.code) {
					t.Errorf("check found %s, want %s", out, c.code)
				}
			}
			if c.start == nil {
				return
			}
			if after := pidOf(t, "host-1", name); after != before {
				t.Errorf("process %d became %d", before, after)
			}
		})
	}
}

// ctrHold opens what needs the host's own network or rights.
func ctrHold(kind string) func(t *testing.T, name string) {
	return func(t *testing.T, name string) {
		guard(t)
		t.Cleanup(func() { must(t, "host-1", "tranship", "rm", "-f", name) })
		must(t, "host-1", "ctr", "run", "--detach", "--null-io", "--privileged", checksImage, name, "checker", "hold", kind)
	}
}

// withLink gives a container of ctr an interface, as `ctr run --cni` does.
func withLink(t *testing.T, name string) {
	runCtr(t, name, nil)
	enter := func(args ...string) {
		must(t, "host-1", append([]string{"nsenter", "--net", "--target", pidString(t, "host-1", name), "--", "ip", "link"}, args...)...)
	}
	enter("add", "cni0", "type", "veth", "peer", "name", "cni1")
	enter("set", "cni0", "up")
}

// pidOf is the process id, as the machine counts, of a shard's first process.
func pidOf(t *testing.T, host, name string) int {
	t.Helper()
	for _, s := range shardsOn(t, host) {
		if s.Name == name && s.Node == host && s.PID > 0 {
			return s.PID
		}
	}
	t.Fatalf("%s does not run on %s", name, host)
	return 0
}

func pidString(t *testing.T, host, name string) string {
	t.Helper()
	return strconv.Itoa(pidOf(t, host, name))
}

// refusals are the codes of what check found, warnings left out.
func refusals(t *testing.T, out string) []string {
	t.Helper()
	var doc struct {
		Findings []struct {
			Code    string
			Message string
			Advice  string
			Warning bool
		}
	}
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatalf("check printed %q: %v", out, err)
	}
	var codes []string
	for _, f := range doc.Findings {
		if f.Warning {
			continue
		}
		if f.Message == "" || strings.Contains(f.Message, "\n") || f.Advice == "" {
			t.Errorf("a refusal is one line and says what to do: %+v", f)
		}
		codes = append(codes, f.Code)
	}
	return codes
}
