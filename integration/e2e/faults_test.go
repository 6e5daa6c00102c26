//go:build integration

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// faulty is a Redis whose memory and connection are checked after a fault.
type faulty struct {
	t    *testing.T
	name string
	ip   string
	n    int
	// from and to are where a fault's migration goes, host-1 → host-2 if empty.
	from, to string
}

// ends are the two ends of the next migration.
func (f *faulty) ends() (from, to string) {
	if f.from == "" {
		return "host-1", "host-2"
	}
	return f.from, f.to
}

func startFaulty(t *testing.T, name string) *faulty {
	needImage(t)
	f := &faulty{t: t, name: name}
	f.ip = runShard(t, name, testImage, "redis-server", "--save", "", "--protected-mode", "no", "--dir", "/tmp")
	// 16 MiB, so that pre-copy and filling have something to do.
	out := f.cli("eval", "for i = 1, 4096 do redis.call('set', 'k' .. i, string.rep(tostring(i) .. ' ', 700)) end return 1", "0")
	if out != "1" {
		t.Fatal(out)
	}
	f.digest()
	return f
}

func (f *faulty) cli(args ...string) string {
	f.t.Helper()
	return strings.TrimSpace(must(f.t, "client", append([]string{"redis-cli", "-h", f.ip}, args...)...))
}

func (f *faulty) digest() string { f.t.Helper(); return f.cli("debug", "digest") }

// mustBeWholeAt awaits that exactly one copy runs, on the host named if any, and
// checks that its memory is what it was.
func (f *faulty) mustBeWholeAt(want, digest string) string {
	f.t.Helper()
	var at string
	await(f.t, fmt.Sprintf("one running copy of %s, on %q", f.name, want), func() bool {
		// What a host prepared for a shard that has not come is not running.
		running := slices.DeleteFunc(where(f.t, f.name), func(s shard) bool { return s.Status != "running" })
		if len(running) != 1 || running[0].Migration != "" {
			return false
		}
		at = running[0].Node
		return want == "" || at == want
	})
	if got := f.digest(); got != digest {
		f.t.Fatalf("memory changed: digest %s, was %s", got, digest)
	}
	f.n++
	if got := f.cli("incr", "faults"); got != fmt.Sprint(f.n) {
		f.t.Fatalf("the counter is %s, want %d", got, f.n)
	}
	f.cli("del", "faults")
	f.n = 0
	// Whatever happened, its loopback carries again what it sends.
	inside := []string{"nsenter", "--net=/run/tranship/netns/default--" + f.name, "timeout", "10", "redis-cli", "ping"}
	if out, err := on(f.t, at, inside...); err != nil || strings.TrimSpace(out) != "PONG" {
		f.t.Fatalf("over loopback: %q, %v", out, err)
	}
	return at
}

// sourcePoints and destinationPoints are the failpoints on a migration's road,
// with where the shard is after the daemon that hit them was killed there.
var sourcePoints = []struct{ point, at string }{
	{"source.reserve", "host-1"},
	{"source.prepare", "host-1"},
	{"source.pre-copy", "host-1"},
	{"source.round", "host-1"},
	{"source.before-freeze", "host-1"},
	{"source.frozen", "host-1"},
	{"source.dumped", "host-1"},
	{"source.seal", "host-1"},
	{"source.before-yield", "host-1"},
	{"source.yielded", "host-2"},
	{"source.discard", "host-2"},
}

var destinationPoints = []struct{ point, at string }{
	{"destination.reserve", "host-1"},
	{"destination.prepare", "host-1"},
	{"destination.seal", "host-1"},
	{"destination.commit", "host-2"}, // sealed: it comes back and the source, which has yielded, asks again
	{"destination.restored", ""},     // the restore had ended: either is right
	{"destination.fill", "host-2"},
	{"destination.placed", "host-2"},
}

func TestKillingTheSourcesDaemonLeavesOneWholeCopy(t *testing.T) {
	f := startFaulty(t, "kill-source")
	digest := f.digest()
	for _, p := range sourcePoints {
		t.Run(p.point, func(t *testing.T) {
			f.t = t
			f.killAt("host-1", p.point)
			if at := f.mustBeWholeAt(p.at, digest); at != "host-1" {
				mustMigrate(t, f.name, at, "host-1")
			}
		})
	}
	f.t = t
}

func TestKillingTheDestinationsDaemonLeavesOneWholeCopy(t *testing.T) {
	f := startFaulty(t, "kill-destination")
	digest := f.digest()
	for _, p := range destinationPoints {
		t.Run(p.point, func(t *testing.T) {
			f.t = t
			f.killAt("host-2", p.point)
			if at := f.mustBeWholeAt(p.at, digest); at != "host-1" {
				mustMigrate(t, f.name, at, "host-1")
			}
		})
	}
	f.t = t
}

// killAt migrates host-1 → host-2 and kills the daemon of host at a point.
func (f *faulty) killAt(host, point string) {
	f.t.Helper()
	hit, _ := arm(f.t, host, point, "kill")
	r, code, err := migrate(f.t, f.name, "host-1", "host-2")
	// The last of them come after the command's end.
	await(f.t, fmt.Sprintf("%s is reached: outcome %q, exit code %d, %v", point, r.Outcome, code, err), hit)
	f.restart(host)
}

// restart brings a host's killed daemon back.
func (f *faulty) restart(host string) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), limit)
	defer cancel()
	if err := hostOf(f.t, host).StartDaemon(ctx); err != nil {
		f.t.Fatal(err)
	}
}

// pauseAt starts a migration, waits until it stands at a point, and returns what
// lets it go on and what awaits its end.
func (f *faulty) pauseAt(host, point string, flags ...string) (release func(), wait func() (result, int)) {
	f.t.Helper()
	hit, release := arm(f.t, host, point, "pause")
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
	await(f.t, point+" is reached", func() bool {
		select {
		case e := <-done:
			f.t.Fatalf("%s was never reached: %+v, exit code %d", point, e.r, e.code)
		default:
		}
		return hit()
	})
	return release, func() (result, int) {
		f.t.Helper()
		select {
		case e := <-done:
			return e.r, e.code
		case <-time.After(limit):
			f.t.Fatal("the migration does not end")
		}
		panic("unreachable")
	}
}

func (f *faulty) cut(on bool) {
	f.t.Helper()
	h := hostOf(f.t, "host-2")
	err := h.RestoreLink()
	if on {
		err = h.CutLink()
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

// A cut link is noticed after seconds of silence, so one point a phase, and two
// migrations at a time, which is as many as a host lets leave at once. The second
// stands before its freeze: no two shards of a host stand still together.
func TestALinkThatIsCutLeavesOneWholeCopy(t *testing.T) {
	all := []*faulty{startFaulty(t, "cut-1"), startFaulty(t, "cut-2")}
	digests := []string{all[0].digest(), all[1].digest()}
	for _, points := range [][]string{{"source.frozen", "source.prepare"}, {"source.yielded", "source.round"}, {"source.discard"}} {
		t.Run(strings.Join(points, " and "), func(t *testing.T) {
			type paused struct {
				release func()
				wait    func() (result, int)
			}
			var moves []paused
			for i, point := range points {
				all[i].t = t
				release, wait := all[i].pauseAt("host-1", point)
				moves = append(moves, paused{release, wait})
			}
			f := all[0]
			f.cut(true)
			t.Cleanup(func() { f.cut(false) })
			for _, m := range moves {
				m.release()
			}
			for i, point := range slices.Backward(points) {
				r, code := moves[i].wait()
				switch point {
				case "source.yielded":
					// Nobody can know; the command says so, and the hosts settle it once
					// they can talk again.
					if code != 7 || r.Outcome != "in-doubt" {
						t.Errorf("%s: exit code %d, outcome %q", point, code, r.Outcome)
					}
				case "source.discard":
					if code != 0 {
						t.Errorf("%s: exit code %d, outcome %q: %s", point, code, r.Outcome, r.Reason)
					}
				default:
					if code != 1 || r.Outcome != "aborted" {
						t.Errorf("%s: exit code %d, outcome %q", point, code, r.Outcome)
					}
					// Without the link being restored: the source goes on.
					all[i].mustBeWholeAt("host-1", digests[i])
				}
			}
			f.cut(false)
			// Both ends hear of each other again and settle what there is to settle;
			// then the same move works.
			f.awaitNothingPending()
			for i, point := range points {
				k := slices.IndexFunc(sourcePoints, func(p struct{ point, at string }) bool { return p.point == point })
				if all[i].mustBeWholeAt(sourcePoints[k].at, digests[i]) == "host-1" {
					mustMigrate(t, all[i].name, "host-1", "host-2")
				}
				mustMigrate(t, all[i].name, "host-2", "host-1")
			}
		})
	}
	for _, f := range all {
		f.t = t
	}
}

// awaitNothingPending waits until no host has an unfinished migration.
func (f *faulty) awaitNothingPending() {
	f.t.Helper()
	await(f.t, "every migration has ended on both hosts", func() bool {
		for _, host := range []string{"host-1", "host-2"} {
			out, err := on(f.t, host, "tranship", "migrations", "-o", "json")
			if err != nil || strings.Contains(out, `"running"`) || strings.Contains(out, `"in-doubt"`) {
				return false
			}
		}
		return true
	})
}

func TestKillingCRIULeavesTheSourceRunning(t *testing.T) {
	f := startFaulty(t, "kill-criu")
	digest := f.digest()
	// While it stands ready, while it dumps, and when it holds what it has dumped.
	for _, point := range []string{"source.before-freeze", "source.frozen", "source.held"} {
		t.Run(point, func(t *testing.T) {
			f.t = t
			release, wait := f.pauseAt("host-1", point)
			killed := killNamed(t, "host-1", "criu")
			if killed == 0 {
				t.Fatal("there is no criu to kill")
			}
			release()
			if r, code := wait(); code != 1 || r.Outcome != "aborted" {
				t.Errorf("exit code %d, outcome %q", code, r.Outcome)
			}
			f.mustBeWholeAt("host-1", digest)
			f.awaitNothingPending()
		})
	}
	f.t = t
	mustMigrate(t, f.name, "host-1", "host-2")
	f.mustBeWholeAt("host-2", digest)
}

// containerd may be restarted while a shard stands still. What it remembers of the
// shard is as before once it is back.
func TestARollbackWithoutContainerdIsCompletedOnceItIsBack(t *testing.T) {
	f := startFaulty(t, "containerd-away")
	digest := f.digest()
	const restart = "containerd.io/restart.status"
	must(t, "host-1", "ctr", "containers", "label", f.name, restart+"=running")
	_, wait := f.pauseAt("host-1", "source.frozen")
	h := hostOf(t, "host-1")
	if err := h.KillService(t.Context(), "containerd"); err != nil {
		t.Fatal(err)
	}
	must(t, "host-1", "tranship", "cancel", f.pendingID())
	if r, code := wait(); code != 4 || r.Outcome != "aborted" {
		t.Errorf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
	}
	if got := f.digest(); got != digest {
		t.Errorf("while containerd is away, memory changed: digest %s, was %s", got, digest)
	}
	if err := h.StartService(t.Context(), "containerd"); err != nil {
		t.Fatal(err)
	}
	await(t, "transhipd reaches containerd again", func() bool {
		_, err := on(t, "host-1", "tranship", "ps", "-o", "json")
		return err == nil
	})
	f.mustBeWholeAt("host-1", digest)
	if out := must(t, "host-1", "ctr", "containers", "info", f.name); !strings.Contains(out, `"`+restart+`": "running"`) {
		t.Errorf("containerd will not start it again if it ends:\n%s", out)
	}
	must(t, "host-1", "ctr", "containers", "label", f.name, restart+"=")
}

// What thaws a shard may be refused. It is tried until it works, by the next daemon
// too.
func TestAShardThatCannotBeThawedGoesOnOnceItCan(t *testing.T) {
	f := startFaulty(t, "stuck")
	digest := f.digest()
	release, wait := f.pauseAt("host-1", "source.frozen")
	file := strings.TrimSpace(must(t, "host-1", "sh", "-ec", `
		f=/sys/fs/cgroup/freezer/tranship/default/stuck/freezer.state v=FROZEN
		[ -e $f ] || f=/sys/fs/cgroup/tranship/default/stuck/cgroup.freeze v=1
		echo $v > /run/stuck
		mount --bind /run/stuck $f
		mount -o remount,bind,ro $f
		echo $f`))
	allow := sync.OnceFunc(func() { must(t, "host-1", "sh", "-ec", "umount "+file+"; rm /run/stuck") })
	t.Cleanup(allow)
	if out := must(t, "host-1", "tranship", "cancel", f.pendingID()); !strings.Contains(out, "in-doubt") {
		t.Errorf("cancelled: %s", out)
	}
	release()
	if r, code := wait(); code != 7 || r.Outcome != "in-doubt" || !strings.Contains(r.Reason, "thaw") {
		t.Errorf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
	}
	if s := where(t, f.name); len(s) != 1 || s[0].Status != "paused" || !strings.Contains(s[0].Note, "thaw") {
		t.Errorf("tranship ps says %+v", s)
	}
	if r, code, _ := migrate(t, f.name, "host-1", "host-2"); code != 3 {
		t.Errorf("a second migration: exit code %d: %s", code, r.Reason)
	}
	if err := hostOf(t, "host-1").KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.restart("host-1")
	allow()
	f.mustBeWholeAt("host-1", digest)
	f.awaitNothingPending()
	mustMigrate(t, f.name, "host-1", "host-2")
	f.mustBeWholeAt("host-2", digest)
}

func TestKillingTheDestinationsShimLeavesOneWholeCopy(t *testing.T) {
	f := startFaulty(t, "kill-shim")
	digest := f.digest()
	for _, point := range []string{"source.round", "source.before-freeze", "source.dumped", "source.before-yield", "source.yielded"} {
		t.Run(point, func(t *testing.T) {
			f.t = t
			release, wait := f.pauseAt("host-1", point)
			if killNamed(t, "host-2", "containerd-shim") == 0 {
				t.Fatal("there is no shim to kill")
			}
			release()
			if r, code := wait(); code != 1 || r.Outcome != "aborted" {
				t.Errorf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
			}
			f.mustBeWholeAt("host-1", digest)
			f.awaitNothingPending()
		})
	}
	t.Run("destination.restored", func(t *testing.T) {
		f.t = t
		release, wait := f.pauseAt("host-2", "destination.restored")
		if killNamed(t, "host-2", "containerd-shim") == 0 {
			t.Fatal("there is no shim to kill")
		}
		release()
		wait()
		f.mustBeWholeAt("host-1", digest)
		f.awaitNothingPending()
	})
	f.t = t
}

// killNamed sends SIGKILL to every process of a host whose name begins so.
func killNamed(t *testing.T, host, name string) int {
	t.Helper()
	out := must(t, host, "sh", "-c", `for p in /proc/[0-9]*; do read -r n < $p/comm 2>/dev/null && case "$n" in `+name+`*) echo ${p#/proc/};; esac; done; true`)
	n := 0
	for _, pid := range strings.Fields(out) {
		if _, err := on(t, host, "kill", "-9", pid); err == nil {
			n++
		}
	}
	return n
}

func TestCancellingLeavesTheSourceRunning(t *testing.T) {
	f := startFaulty(t, "cancel")
	digest := f.digest()
	for _, p := range sourcePoints {
		if p.at != "host-1" {
			continue // committed: too late
		}
		t.Run(p.point, func(t *testing.T) {
			f.t = t
			release, wait := f.pauseAt("host-1", p.point)
			id := f.pendingID()
			must(t, "host-1", "tranship", "cancel", id)
			release()
			if r, code := wait(); code != 4 || r.Outcome != "aborted" {
				t.Errorf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
			}
			f.mustBeWholeAt("host-1", digest)
			f.awaitNothingPending()
		})
	}
	f.t = t
}

func (f *faulty) pendingID() string {
	f.t.Helper()
	var doc struct {
		Migrations []struct{ ID, Outcome string }
	}
	from, _ := f.ends()
	if err := json.Unmarshal([]byte(must(f.t, from, "tranship", "migrations", "-o", "json")), &doc); err != nil {
		f.t.Fatal(err)
	}
	for _, m := range doc.Migrations {
		if m.Outcome == "running" {
			return m.ID
		}
	}
	f.t.Fatal("no migration is running")
	return ""
}

func TestADestinationWithoutRoomRefusesAndTheSourceRunsOn(t *testing.T) {
	f := startFaulty(t, "full")
	digest := f.digest()
	// The store is a tmpfs: one that is too small is a full disk and a host
	// without memory in one.
	must(t, "host-2", "mount", "-o", "remount,size=4m", "/run/tranship/store")
	t.Cleanup(func() { must(t, "host-2", "mount", "-o", "remount,size=90%", "/run/tranship/store") })
	r, code, _ := migrate(t, f.name, "host-1", "host-2")
	if code != 1 || r.Outcome != "aborted" || !strings.Contains(r.Reason, "full") && !strings.Contains(r.Reason, "no space") {
		t.Errorf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
	}
	f.mustBeWholeAt("host-1", digest)
	f.awaitNothingPending()
}

func TestASecondMigrationOfAShardIsRefused(t *testing.T) {
	f := startFaulty(t, "twice")
	digest := f.digest()
	release, wait := f.pauseAt("host-1", "source.pre-copy")
	r, code, _ := migrate(t, f.name, "host-1", "host-2")
	if code != 3 {
		t.Errorf("exit code %d, outcome %q: %s", code, r.Outcome, r.Reason)
	}
	release()
	if r, code := wait(); code != 0 {
		t.Errorf("the first migration: exit code %d: %s", code, r.Reason)
	}
	f.mustBeWholeAt("host-2", digest)
}

// Moved at once, shards share the link and the processors, but each stands still
// alone.
func TestShardsThatMoveAtOnceStandStillOneAfterTheOther(t *testing.T) {
	names := []string{"at-once-1", "at-once-2", "at-once-3"}
	var all []*faulty
	digests := map[string]string{}
	for _, name := range names {
		f := startFaulty(t, name)
		digests[name] = f.digest()
		all = append(all, f)
	}
	results := make(chan result, len(names))
	for _, name := range names {
		go func() {
			r, _, err := migrate(t, name, "host-1", "host-2")
			if err != nil {
				t.Errorf("%s: %v (%s)", name, err, r.Reason)
			}
			results <- r
		}()
	}
	type blackout struct{ from, to time.Time }
	var seen []blackout
	for range names {
		r := <-results
		from := r.StartedAt.Add(time.Duration(r.FrozenAtMs * float64(time.Millisecond)))
		b := blackout{from, from.Add(time.Duration(r.BlackoutMs * float64(time.Millisecond)))}
		t.Logf("%s: blackout %.0f ms, from %v", r.Shard, r.BlackoutMs, from.Format("05.000"))
		for _, other := range seen {
			// started_at has milliseconds.
			if b.from.Add(2*time.Millisecond).Before(other.to) && other.from.Add(2*time.Millisecond).Before(b.to) {
				t.Errorf("%s stood still from %v to %v, and another from %v to %v", r.Shard, b.from, b.to, other.from, other.to)
			}
		}
		seen = append(seen, b)
	}
	for _, f := range all {
		f.mustBeWholeAt("host-2", digests[f.name])
	}
}

func TestTwoShardsCanChangePlaces(t *testing.T) {
	a, b := startFaulty(t, "there"), startFaulty(t, "back")
	da, db := a.digest(), b.digest()
	mustMigrate(t, b.name, "host-1", "host-2")
	done := make(chan error, 2)
	for _, m := range []struct{ name, from, to string }{{a.name, "host-1", "host-2"}, {b.name, "host-2", "host-1"}} {
		go func() {
			_, _, err := migrate(t, m.name, m.from, m.to)
			done <- err
		}()
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	a.mustBeWholeAt("host-2", da)
	b.mustBeWholeAt("host-1", db)
}
