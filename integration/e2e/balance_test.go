//go:build integration

package e2e

import (
	"context"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// decision is one of `tranship plan -o json`.
type decision struct {
	ID                                              int
	Kind, Shard, Reason, Words, To, Outcome, Detail string
	Rounds                                          int
	Benefit, Price                                  float64
	Real                                            *struct {
		Bytes      float64 `json:"bytes"`
		BlackoutMs float64 `json:"blackout_ms"`
	}
	Asked []struct{ Node, Code, Words string }
}

type planned struct {
	SchemaVersion int `json:"schema_version"`
	At, Autopilot string
	Overload      []struct {
		WithinS     float64 `json:"within_s"`
		Probability float64
	}
	Decisions []decision
	Held      []struct{ Shard, From, Reason string }
}

func planOf(t *testing.T, host string, flags ...string) planned {
	t.Helper()
	var p planned
	out := must(t, host, append([]string{"tranship", "plan", "-o", "json"}, flags...)...)
	if err := json.Unmarshal([]byte(out), &p); err != nil || p.SchemaVersion != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	return p
}

// awaitCalmly is await for what the waiting itself must not outweigh: every look
// costs CPU that the shards are measured by.
func awaitCalmly(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(300 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(limit)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s\nhost-1: %s", what, must(t, "host-1", "tranship", "plan", "--history"))
		}
		<-tick.C
	}
}

// configure restarts the daemons of hosts with lines put before and after their
// configuration as it was.
func configure(t *testing.T, was map[string]string, before, after string, hosts ...string) {
	t.Helper()
	var all sync.WaitGroup
	ctx := context.WithoutCancel(t.Context())
	for _, name := range hosts {
		h := hostOf(t, name)
		all.Go(func() {
			text := before + "\n" + was[name] + "\n" + after
			if err := os.WriteFile(inHost(t, name, "/etc/tranship/config.toml"), []byte(text), 0o600); err != nil {
				t.Error(err)
			}
			if err := h.KillDaemon(ctx); err != nil {
				t.Error(err)
			}
			if err := h.StartDaemon(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, at := range hosts {
		await(t, at+" reaches the others", func() bool {
			for _, n := range nodesOf(t, at) {
				if n.State != "alive" {
					return false
				}
			}
			return true
		})
	}
}

// historyOf is what host-1 has decided since the decision after.
func historyOf(t *testing.T, after int) []decision {
	t.Helper()
	return slices.DeleteFunc(planOf(t, "host-1", "--history", "--since", "1h").Decisions, func(d decision) bool { return d.ID <= after })
}

// lastDecision is where the history of host-1 ends now.
func lastDecision(t *testing.T) (id int) {
	t.Helper()
	for _, d := range historyOf(t, 0) {
		id = max(id, d.ID)
	}
	return id
}

func find(list []decision, kind, outcome string) *decision {
	for i := range list {
		if list[i].Kind == kind && list[i].Outcome == outcome {
			return &list[i]
		}
	}
	return nil
}

// spin runs a shard that uses what its quota lets it.
func spin(t *testing.T, host, name, cpus string) {
	t.Helper()
	must(t, host, "tranship", "run", "--name", name, "--cpus", cpus, "--label", "tranship.io/workload=spin", testImage, "sh", "-c", "while :; do :; done")
}

// lie has host-2 tell host-1 that it is empty until a veto is told: the first lie
// may have been for a round that had nothing to move yet.
func lie(t *testing.T, begun int) {
	t.Helper()
	vetoed := func() bool { return find(historyOf(t, begun), "move", "vetoed") != nil }
	awaitCalmly(t, "a veto", func() bool {
		told, release := arm(t, "host-2", "balance.lie.host-1", "error")
		defer release()
		awaitCalmly(t, "host-1 is told a lie", told)
		// The round that heard it has ended when another has begun and ended.
		rounds, last := 0, ""
		awaitCalmly(t, "a round after the lie", func() bool {
			if at := planOf(t, "host-1").At; at != last {
				rounds, last = rounds+1, at
			}
			return rounds > 2 || vetoed()
		})
		return vetoed()
	})
}

func TestTheAutopilotMovesBeforeTheOverloadAndSaysWhy(t *testing.T) {
	needImage(t)
	guard(t)
	hosts := []string{"host-1", "host-2", "host-3"}
	was := map[string]string{}
	for _, name := range hosts {
		raw, err := os.ReadFile(inHost(t, name, "/etc/tranship/config.toml"))
		if err != nil {
			t.Fatal(err)
		}
		was[name] = string(raw)
	}
	t.Cleanup(func() { configure(t, was, "", "", hosts...) })
	// Hosts as small as this share two processors with everything else, and what
	// the shards want is three times as much: they are also overloaded where the
	// machine gives them the half of it.
	small := "[host]\ncpus = 0.2\n[balance]\nevery_seconds = 2\n"
	configure(t, was, "", small, hosts...)
	names := []string{"spin-0", "spin-1", "spin-2", "spin-3", "spin-4", "spin-5"}
	t.Cleanup(func() {
		for _, h := range hosts {
			for _, name := range append(slices.Clone(names), "filler-2", "filler-3") {
				_, _ = on(t, h, "tranship", "rm", "-f", name)
			}
		}
	})
	begun := lastDecision(t)
	for _, name := range names {
		spin(t, "host-1", name, "0.1")
	}
	here := func() (n int) {
		for _, s := range shardsOn(t, "host-1") {
			if slices.Contains(names, s.Name) && s.Node == "host-1" && s.Status == "running" {
				n++
			}
		}
		return n
	}

	t.Log("advise, the default: it is told, and nothing moves")
	awaitCalmly(t, "advice that three rounds agree on", func() bool {
		d := find(planOf(t, "host-1").Decisions, "move", "advised")
		return d != nil && d.Rounds >= 3
	})
	p := planOf(t, "host-1")
	if d := find(p.Decisions, "move", "advised"); d != nil && (d.Reason != "overload" || !strings.Contains(d.Words, "host-1 is overloaded within")) || p.Autopilot != "advise" {
		t.Errorf("%+v", p)
	}
	if here() != len(names) {
		t.Fatalf("%d of %d shards are where they were", here(), len(names))
	}
	if words := must(t, "host-1", "tranship", "plan"); !strings.Contains(words, "[advised] move spin-") {
		t.Errorf("in words: %s", words)
	} else {
		t.Logf("in words:\n%s", words)
	}

	t.Log("on, and no target has room: the word of one that lies is not what counts")
	spin(t, "host-2", "filler-2", "0.8")
	spin(t, "host-3", "filler-3", "0.4")
	// Some shards had no target before either: now none may have one.
	awaitCalmly(t, "no target for any", func() bool {
		list := planOf(t, "host-1").Decisions
		return find(list, "move", "advised") == nil && slices.ContainsFunc(list, func(d decision) bool {
			return d.Reason == "no-target" && strings.Contains(d.Words, "host-2") && strings.Contains(d.Words, "host-3")
		})
	})
	// A busy machine may hold filler-3 so short that there is room beside it.
	must(t, "host-2", "tranship", "cordon", "host-3")
	t.Cleanup(func() { _, _ = on(t, "host-2", "tranship", "uncordon", "host-3") })
	configure(t, was, `autopilot = "on"`, small, "host-1")
	awaitCalmly(t, "host-1 knows of the cordon", func() bool { return nodesOf(t, "host-1")["host-3"].Cordoned })
	lie(t, begun)
	veto := find(historyOf(t, begun), "move", "vetoed")
	if len(veto.Asked) == 0 || veto.Asked[0].Node != "host-2" || veto.Asked[0].Code != "usage" && veto.Asked[0].Code != "overload" || !strings.Contains(veto.Detail, "host-2 refuses") {
		t.Errorf("%+v", veto)
	}
	if here() != len(names) {
		t.Fatalf("%d of %d shards are where they were", here(), len(names))
	}

	t.Log("on, with room: it is kept while the shard moves")
	must(t, "host-2", "tranship", "uncordon", "host-3")
	_, release2 := arm(t, "host-2", "destination.prepare", "pause")
	_, release3 := arm(t, "host-3", "destination.prepare", "pause")
	must(t, "host-2", "tranship", "rm", "-f", "filler-2")
	must(t, "host-3", "tranship", "rm", "-f", "filler-3")
	kept := ""
	awaitCalmly(t, "room at a target", func() bool {
		for _, h := range hosts[1:] {
			for _, r := range planOf(t, h).Held {
				if r.From == "host-1" && r.Reason == "overload" && strings.HasPrefix(r.Shard, "default/spin-") {
					kept = h
				}
			}
		}
		return kept != ""
	})
	t.Logf("the target, in words:\n%s", must(t, kept, "tranship", "plan"))
	release2()
	release3()
	awaitCalmly(t, "a move that is done", func() bool { return find(historyOf(t, begun), "move", "done") != nil })
	done := find(historyOf(t, begun), "move", "done")
	if done.Reason != "overload" || done.Benefit <= done.Price || done.Real == nil || done.Real.BlackoutMs <= 0 || !slices.Contains(hosts[1:], done.To) {
		t.Errorf("%+v", done)
	}
	running := false
	for _, s := range shardsOn(t, done.To) {
		running = running || s.Name == done.Shard && s.Node == done.To && s.Status == "running"
	}
	if !running {
		t.Errorf("%s does not run on %s", done.Shard, done.To)
	}
	awaitCalmly(t, "the room is given back", func() bool {
		for _, r := range planOf(t, done.To).Held {
			if r.Shard == "default/"+done.Shard {
				return false
			}
		}
		return true
	})
	metrics := must(t, "host-1", "curl", "-s", "http://127.0.0.1:9464/metrics")
	if want := `tranship_balance_decisions_total{kind="move",outcome="done",reason="overload"}`; !strings.Contains(metrics, want) {
		t.Errorf("the metrics lack %s", want)
	}

	t.Logf("the history, in words:\n%s", must(t, "host-1", "tranship", "plan", "--history"))
	t.Log("it outlives the daemon")
	configure(t, was, "", small, "host-1")
	var after *decision // another move may have ended meanwhile
	for _, d := range historyOf(t, begun) {
		if d.ID == done.ID {
			after = &d
		}
	}
	if after == nil || after.Outcome != "done" || after.Shard != done.Shard || after.Real == nil || after.Words != done.Words {
		t.Errorf("%+v, was %+v", after, done)
	}
}

func TestALimitGrowsUnderARunningShard(t *testing.T) {
	needImage(t)
	guard(t)
	t.Cleanup(func() { _, _ = on(t, "host-1", "tranship", "rm", "-f", "grow") })
	begun := lastDecision(t)
	must(t, "host-1", "tranship", "run", "--name", "grow", "--cpus", "0.05", "--label", "tranship.io/autopilot=on", "--label", "tranship.io/request-cpus=0.02",
		"--label", "tranship.io/limit-cpus=0.2", testImage, "sh", "-c", "while :; do :; done")
	look := func() (pid int, cpus float64) {
		var doc struct {
			Shards []struct {
				Name string
				PID  int `json:"pid"`
				CPUs float64
			}
		}
		if err := json.Unmarshal([]byte(must(t, "host-1", "tranship", "ps", "-o", "json")), &doc); err != nil {
			t.Fatal(err)
		}
		for _, s := range doc.Shards {
			if s.Name == "grow" {
				return s.PID, s.CPUs
			}
		}
		t.Fatal("grow is gone")
		return 0, 0
	}
	pid, before := look()
	if before != 0.05 {
		t.Fatalf("a limit of %v CPUs", before)
	}
	awaitCalmly(t, "a larger limit", func() bool {
		d := find(historyOf(t, begun), "resize", "done")
		return d != nil && d.Shard == "grow" && d.Reason == "grow"
	})
	same, after := look()
	if same != pid || after <= before || after > 0.2 {
		t.Errorf("process %d with a limit of %v CPUs, was %d with %v", same, after, pid, before)
	}
	// What the kernel holds it to, by its own file.
	out := must(t, "host-1", "sh", "-c", "cat /sys/fs/cgroup/cpu*/tranship/default/grow/cpu.cfs_quota_us 2>/dev/null || cut -d' ' -f1 /sys/fs/cgroup/tranship/default/grow/cpu.max")
	if quota := strings.Fields(out); len(quota) == 0 || quota[0] == "5000" {
		t.Errorf("the kernel's quota is %q", out)
	}
	h := hostOf(t, "host-1")
	if err := h.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if kept, limit := look(); kept != pid || limit < after {
		t.Errorf("after the daemon's death process %d with a limit of %v CPUs", kept, limit)
	}
}
