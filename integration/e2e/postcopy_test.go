//go:build integration

package e2e

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/workload/memcheck"
)

// TestPostCopyLosesNoPage moves a shard that rewrites its memory four times as
// fast as the link carries it, and breaks what can break while its last pages
// are still at the source. A client talks to it all along.
func TestPostCopyLosesNoPage(t *testing.T) {
	needChecks(t)
	const name, link = "postcopy", "400mbit"
	ip := runShard(t, name, checksImage, "memcheck", "--features=plain", "--size=24MiB", "--rate=200MiB/s",
		"--hot=100", "--compressible=0", "--procs=2", "--threads=1", "--verify=2000")
	addr := ip + ":" + strconv.Itoa(memcheck.DefaultPort)
	awaitListening(t, ip, memcheck.DefaultPort)
	askMemcheck(t, "client", addr, "stat") // answers once all of it is written
	c := startClient(t, "watch", "memcheck", "watch", "--addr", addr)
	awaitConnections(t, ip, 1)
	f := &faulty{t: t, name: name, ip: ip, from: "host-1", to: "host-2"}
	flags := []string{"--mode", "postcopy", "--bandwidth", link}

	// moved checks a migration that brought the shard to the other host, from where
	// the next one goes.
	moved := func(t *testing.T, r result, code int) {
		t.Helper()
		if code != 0 || r.Outcome != "done" {
			t.Fatalf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
		}
		await(t, "one running copy, on "+f.to, func() bool {
			running := slices.DeleteFunc(where(t, name), func(s shard) bool { return s.Status != "running" })
			return len(running) == 1 && running[0].Node == f.to && running[0].Migration == ""
		})
		c.mustGoOn(t, 5)
		f.from, f.to = f.to, f.from
	}

	t.Run("nothing breaks", func(t *testing.T) {
		f.t = t
		shared := sharedPages(t, f.from, name) // the frozen round sends what changed of them
		r := mustMigrate(t, name, f.from, f.to, flags...)
		moved(t, r, 0)
		n := len(r.Rounds)
		if n < 3 || n > 4 || r.Rounds[n-2].Pages > shared || r.Rounds[n-1].Pages <= shared {
			t.Errorf("two rounds, a frozen one without private pages (%d are shared), and what was fetched: %+v", shared, r.Rounds)
		}
		for _, round := range r.Rounds {
			if round.ThrottledCPUs != 0 {
				t.Errorf("round %d was slowed", round.N)
			}
		}
		if !slices.ContainsFunc(r.Phases, func(p struct {
			Name string
			Ms   float64
		},
		) bool {
			return p.Name == "post-copy"
		}) {
			t.Errorf("phases %+v", r.Phases)
		}
	})

	t.Run("it cannot be cancelled", func(t *testing.T) {
		f.t = t
		release, wait := f.pauseAt(f.to, "destination.post-copy", flags...)
		if out, err := on(t, f.from, "tranship", "cancel", f.pendingID()); err == nil || !strings.Contains(err.Error(), "can no longer be cancelled") {
			t.Errorf("cancel: %q, %v", out, err)
		}
		for host, want := range map[string]string{f.from: "runs on " + f.to, f.to: "are still on " + f.from} {
			for _, command := range []string{"ps", "migrations"} {
				await(t, command+" on "+host+" says where its pages are", func() bool {
					return strings.Contains(must(t, host, "tranship", command, "-o", "json"), want)
				})
			}
		}
		release()
		r, code := wait()
		moved(t, r, code)
	})

	for _, kill := range []struct{ what, point string }{
		{"the destination's daemon is killed", "destination.post-copy"},
		{"the source's daemon is killed", "source.fetch"},
		{"the source's daemon is killed before it knows that the shard runs", "source.yielded"},
		{"the source's daemon is killed when it begins to serve", "source.serving"},
		{"the destination's daemon is killed when it has every page", "destination.release"},
	} {
		t.Run(kill.what, func(t *testing.T) {
			f.t = t
			source := strings.HasPrefix(kill.point, "source.")
			host := f.to
			if source {
				host = f.from
			}
			hit, _ := arm(t, host, kill.point, "kill")
			wait := f.begin(flags...)
			await(t, kill.point+" is reached", hit)
			await(t, "the daemon has died", func() bool {
				_, err := on(t, host, "tranship", "ps", "--local")
				return err != nil
			})
			f.restart(host)
			r, code := wait()
			f.awaitNothingPending()
			if source && code != 0 {
				// A daemon that comes back may be in doubt, and says so to a command that
				// asks before the destination has answered.
				t.Logf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
				r.Outcome, code = outcomeOf(t, host, r.ID), 0
			}
			moved(t, r, code)
		})
	}

	t.Run("the page server is killed", func(t *testing.T) {
		f.t = t
		release, wait := f.pauseAt(f.to, "destination.post-copy", flags...)
		server, holder := pageServer(t, f.to)
		must(t, f.to, "kill", "-KILL", strconv.Itoa(server))
		awaitPageServer(t, f.to, server, holder)
		release()
		r, code := wait()
		moved(t, r, code)
	})

	t.Run("the link is cut", func(t *testing.T) {
		f.t = t
		release, wait := f.pauseAt(f.to, "destination.post-copy", flags...)
		f.cut(true)
		t.Cleanup(func() { f.cut(false) })
		release()
		time.Sleep(3 * time.Second) //nolint:forbidigo // is how long the link is away
		f.cut(false)
		r, code := wait()
		f.awaitNothingPending()
		moved(t, r, code)
	})
	f.t = t
	c.end(t) // verifies every page

	// Its pages are asked for a moment before it counts as the destination's.
	remove := func(t *testing.T) {
		t.Helper()
		await(t, "it is removed", func() bool {
			_, err := on(t, "host-2", "tranship", "rm", "-f", name)
			return err == nil
		})
	}
	t.Run("an operator takes it back from a host that is lost", func(t *testing.T) {
		f.t = t
		mustMigrate(t, name, f.from, f.to)
		f.from, f.to = f.to, f.from // host-1 → host-2 from here on
		release, wait := f.pauseAt("host-2", "destination.post-copy", flags...)
		id := f.pendingID()
		await(t, "the source serves", func() bool {
			return strings.Contains(must(t, "host-1", "tranship", "ps", "-o", "json"), "runs on host-2")
		})
		f.cut(true)
		t.Cleanup(func() { f.cut(false) })
		remove(t) // the operator makes sure that it is off
		must(t, "host-1", "tranship", "migrations", "resolve", id, "--keep", "here")
		if r, code := wait(); code != 1 || r.Outcome != "aborted" {
			t.Errorf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
		}
		release()
		f.cut(false)
		f.awaitNothingPending()
		await(t, "one running copy, on host-1", func() bool {
			at := where(t, name)
			return len(at) == 1 && at[0].Node == "host-1" && at[0].Status == "running" && at[0].Migration == ""
		})
		// It is what it was at the freeze, every page.
		if s := askMemcheck(t, "client", addr, "verify"); len(s.Errors) != 0 {
			t.Errorf("%+v", s)
		}
	})

	t.Run("the destination loses it", func(t *testing.T) {
		f.t = t
		release, wait := f.pauseAt("host-2", "destination.post-copy", flags...)
		id := f.pendingID()
		await(t, "the source serves", func() bool {
			return strings.Contains(must(t, "host-1", "tranship", "ps", "-o", "json"), "runs on host-2")
		})
		server, holder := pageServer(t, "host-2")
		must(t, "host-2", "kill", "-KILL", strconv.Itoa(server), strconv.Itoa(holder))
		release()
		// Nobody has to know that it waits for an operator.
		if r, code := wait(); code != 7 || r.Outcome != "in-doubt" || r.Code != "pages-lost" {
			t.Errorf("exit code %d, outcome %q, code %q: %s", code, r.Outcome, r.Code, r.Reason)
		}
		for _, command := range []string{"ps", "migrations"} {
			if out := must(t, "host-1", "tranship", command, "-o", "json"); !strings.Contains(out, "was lost on host-2") {
				t.Errorf("tranship %s: %s", command, out)
			}
		}
		if err := hostOf(t, "host-1").KillDaemon(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.restart("host-1")
		must(t, "host-1", "tranship", "migrations", "resolve", id, "--keep", "here")
		f.awaitNothingPending()
		await(t, "its remains on host-2 are removed", func() bool {
			_, err := on(t, "host-2", "tranship", "rm", name)
			return err == nil
		})
		await(t, "one running copy, on host-1", func() bool {
			at := where(t, name)
			return len(at) == 1 && at[0].Node == "host-1" && at[0].Status == "running" && at[0].Migration == ""
		})
		if s := askMemcheck(t, "client", addr, "verify"); len(s.Errors) != 0 {
			t.Errorf("%+v", s)
		}
	})

	t.Run("it can be removed", func(t *testing.T) {
		f.t = t
		release, wait := f.pauseAt("host-2", "destination.post-copy", flags...)
		remove(t)
		release()
		if r, code := wait(); code != 0 || r.Outcome != "done" {
			t.Errorf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
		}
		f.awaitNothingPending()
		await(t, "nothing is left of it", func() bool { return len(where(t, name)) == 0 })
	})
}

// sharedPages is how many pages the shared mappings of a shard's processes have,
// each segment counted once.
func sharedPages(t *testing.T, host, name string) int64 {
	t.Helper()
	pid := pidString(t, host, name)
	pids := append([]string{pid}, strings.Fields(must(t, host, "cat", "/proc/"+pid+"/task/"+pid+"/children"))...)
	segments, pages := map[string]bool{}, int64(0)
	for _, pid := range pids {
		for line := range strings.Lines(must(t, host, "cat", "/proc/"+pid+"/maps")) {
			// address perms offset dev inode pathname, of proc_pid_maps(5)
			f := strings.Fields(line)
			if len(f) < 5 || f[1][3] != 's' || segments[f[3]+" "+f[4]] {
				continue
			}
			segments[f[3]+" "+f[4]] = true
			from, to, _ := strings.Cut(f[0], "-")
			start, err := strconv.ParseUint(from, 16, 64)
			end, err2 := strconv.ParseUint(to, 16, 64)
			if err != nil || err2 != nil {
				t.Fatalf("%q", line)
			}
			pages += int64((end - start) / 4096)
		}
	}
	return pages
}

// outcomeOf is what a host says of a migration by now.
func outcomeOf(t *testing.T, host, id string) string {
	t.Helper()
	var doc struct{ Outcome string }
	if err := json.Unmarshal([]byte(must(t, host, "tranship", "migrations", id, "-o", "json")), &doc); err != nil {
		t.Fatal(err)
	}
	return doc.Outcome
}

// begin starts a migration and returns what awaits its end.
func (f *faulty) begin(flags ...string) (wait func() (result, int)) {
	f.t.Helper()
	type ended struct {
		r    result
		code int
	}
	done := make(chan ended, 1)
	t := f.t
	from, to := f.ends()
	go func() {
		r, code, _ := migrate(t, f.name, from, to, flags...)
		done <- ended{r, code}
	}()
	return func() (result, int) {
		f.t.Helper()
		select {
		case e := <-done:
			return e.r, e.code
		case <-time.After(2 * limit):
			f.t.Fatal("the migration does not end")
		}
		panic("unreachable")
	}
}
