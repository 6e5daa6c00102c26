//go:build integration

package e2e

import (
	"context"
	"testing"
)

// Containers that ctr made move as well. Their networks are not tranship's, so
// they are asked where they are, each time on a new connection.

// runCtr starts memcheck with ctr on host-1; it is removed, wherever it is by
// then, when the test ends.
func runCtr(t *testing.T, name string, flags []string, memcheck ...string) {
	t.Helper()
	guard(t) // its clean-up must come after the one below
	// Whether the container came to be is not known when ctr fails.
	t.Cleanup(func() {
		for _, h := range []string{"host-1", "host-2"} {
			_, _ = hostOf(t, h).Exec(context.Background(), "tranship", "rm", "-f", name)
		}
	})
	args := append([]string{"ctr", "run", "--detach", "--null-io"}, flags...)
	args = append(args, checksImage, name, "memcheck", "--size=16MiB", "--rate=4MiB/s", "--procs=1", "--sparse=64MiB")
	must(t, "host-1", append(args, memcheck...)...)
}

// moveCtr moves memcheck there and back, asked on the host through a command
// that enters its network.
func moveCtr(t *testing.T, name, addr string, through func(t *testing.T, host string) []string) {
	t.Helper()
	ask := func(t *testing.T, host, request string) {
		t.Helper()
		askMemcheck(t, host, addr, request, through(t, host)...)
	}
	await(t, name+" answers", func() bool {
		_, err := on(t, "host-1", append(through(t, "host-1"), checker(t), "memcheck", "stat", "--addr", addr)...)
		return err == nil
	})
	at := "host-1"
	thereAndBack(t, name,
		func(t *testing.T) { ask(t, at, "reset") },
		func(t *testing.T, now string) {
			at = now
			s := askMemcheck(t, at, addr, "stat", through(t, at)...)
			t.Logf("longest pause %.0f ms, of the watch thread %.0f ms", s.LongestPauseMS, s.WatchPauseMS)
			ask(t, at, "verify")
		})
}

func TestAContainerOfCtrWithTheHostsNetworkMoves(t *testing.T) {
	needChecks(t)
	const addr = "127.0.0.1:7171"
	// Its connections stay behind, so it may have none of its own.
	runCtr(t, "ctr-host", []string{"--net-host"}, "--listen="+addr, "--features=all,-loopback")
	moveCtr(t, "ctr-host", addr, func(*testing.T, string) []string { return nil })
}

func TestAContainerOfCtrWithoutANetworkMoves(t *testing.T) {
	needChecks(t)
	runCtr(t, "ctr-none", nil)
	moveCtr(t, "ctr-none", "127.0.0.1:7070", func(t *testing.T, host string) []string {
		return []string{"nsenter", "--net", "--target", pidString(t, host, "ctr-none"), "--"}
	})
}

func TestAContainerOfCtrInANamespaceThatBothHostsHaveMoves(t *testing.T) {
	needChecks(t)
	const ns = "e2e"
	for _, h := range []string{"host-1", "host-2"} {
		must(t, h, "ip", "netns", "add", ns)
		t.Cleanup(func() {
			// ip netns bound /run/netns to itself, and leaves that.
			must(t, h, "sh", "-ec", "ip netns del "+ns+"; umount -l /run/netns; rmdir /run/netns")
		})
		must(t, h, "ip", "-n", ns, "link", "set", "lo", "up")
	}
	runCtr(t, "ctr-ns", []string{"--with-ns", "network:/run/netns/" + ns})
	moveCtr(t, "ctr-ns", "127.0.0.1:7070", func(*testing.T, string) []string { return []string{"ip", "netns", "exec", ns} })
}
