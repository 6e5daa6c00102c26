package probe

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// observe is how long loads are watched.
const observe = 4 * time.Second

// after is a condition that time itself is.
func after(d time.Duration) { <-time.After(d) }

func TestCPUTimeIsTheCgroups(t *testing.T) {
	r := newRig(t)
	p := r.open("")
	type subject struct {
		name, load string
		cg         cgroup
		slot       int
		before     reading
	}
	subjects := []*subject{
		{name: "threads", load: "threads"}, {name: "forks", load: "forks"}, {name: "spin", load: "spin"},
	}
	for _, s := range subjects {
		s.cg = r.cgroup(s.name)
		var err error
		if s.slot, err = p.Track(s.name, s.cg.id()); err != nil {
			t.Fatal(err)
		}
		s.cg.start(s.load)
	}
	nested := r.cgroup(subjects[0].cg.path + "/nested")
	nested = r.cgroup(nested.path + "/deeper")
	nested.start("threads")
	for _, s := range subjects {
		s.before = readWith(t, p, s.slot, s.cg.cpu)
	}
	after(observe)
	for _, s := range subjects {
		u := readWith(t, p, s.slot, s.cg.cpu)
		agree(t, "CPU time of "+s.name, s.before, u, cpuNs, 0.01)
		if u.Voluntary == s.before.Voluntary && s.name != "spin" {
			t.Errorf("%s was never switched", s.name)
		}
	}
	// A cgroup that appears within a shard later counts to it at once.
	late := r.cgroup(subjects[2].cg.path + "/late")
	before := readWith(t, p, subjects[2].slot, subjects[2].cg.cpu)
	late.start("threads")
	after(observe / 2)
	agree(t, "CPU time with a cgroup that came later", before, readWith(t, p, subjects[2].slot, subjects[2].cg.cpu), cpuNs, 0.01)
}

func TestWaitIsWhatSchedstatSays(t *testing.T) {
	r := newRig(t)
	p := r.open("")
	cg := r.cgroup("wait")
	slot, err := p.Track("wait", cg.id())
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, load := range []string{"threads", "threads", "spin", "spin", "spin"} {
		pid := cg.start(load)
		pids = append(pids, pid)
	}
	account := func() float64 { return waited(t, pids...) }
	before := readWith(t, p, slot, account)
	after(observe)
	u := readWith(t, p, slot, account)
	agree(t, "wait", before, u, waitNs, 0.05)
	n := uint64(0)
	for i := range u.Wait {
		n += u.Wait[i] - before.Wait[i]
	}
	// Every arrival on a CPU is one wait; a switch leads to at most one.
	switches := u.Voluntary + u.Forced - before.Voluntary - before.Forced
	within(t, "waits", float64(n), float64(switches), 0.01)
}

func TestFaultsAreTheCgroups(t *testing.T) {
	r := newRig(t)
	p := r.open("")
	cg := r.cgroup("faults")
	slot, err := p.Track("faults", cg.id())
	if err != nil {
		t.Fatal(err)
	}
	cg.start("faults")
	cg.start("forks")
	account := func() float64 { all, _ := cg.faults(); return all }
	before := readWith(t, p, slot, account)
	after(observe)
	agree(t, "faults", before, readWith(t, p, slot, account), faults, 0.01)
}

func TestBlockBytesAreTheCgroups(t *testing.T) {
	r := newRig(t)
	p := r.open("")
	// Not in the test's directory, which may be a tmpfs.
	dir, err := os.MkdirTemp("/var/tmp", "tranship-probe-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for _, name := range []string{"one", "two"} {
		cg := r.cgroup(name)
		cg.accountBlock(dir)
		slot, err := p.Track(name, cg.id())
		if err != nil {
			t.Fatal(err)
		}
		mib := map[string]int{"one": 48, "two": 17}[name]
		file := filepath.Join(dir, name)
		cg.run("dd", "if=/dev/zero", "of="+file, "bs=64k", fmt.Sprintf("count=%d", mib*16), "oflag=direct", "status=none")
		// A completion that interrupts a task which this kernel hides has no latency
		// (block.bpf.c); it hits one reading in three here, not five in a row.
		complete := false
		for range 5 {
			before := read(t, p, slot)
			cg.run("dd", "if="+file, "of=/dev/null", "bs=256k", "iflag=direct", "status=none")
			u := read(t, p, slot)
			ops, timed := u.ReadOps-before.ReadOps, uint64(0)
			for i := range u.Read {
				timed += u.Read[i] - before.Read[i]
			}
			if ops == 0 || timed > ops || u.ReadNs == before.ReadNs {
				t.Fatalf("%s: %d operations, %d in the histogram, %d ns", name, ops, timed, u.ReadNs-before.ReadNs)
			}
			if complete = timed == ops; complete {
				break
			}
		}
		if !complete {
			t.Errorf("%s: no reading has all its operations in the histogram", name)
		}
		u := read(t, p, slot)
		in, out := cg.block()
		within(t, name+" reads", float64(u.ReadBytes), in, 0.01)
		within(t, name+" writes", float64(u.WriteBytes), out, 0.01)
		if in < float64(mib<<20) || out < float64(mib<<20) {
			t.Errorf("%s: the load did not reach a device: %v in, %v out", name, in, out)
		}
	}
}

func TestCountsSurviveARestart(t *testing.T) {
	r := newRig(t)
	pin := bpffs(t)
	first := r.open(pin)
	if err := first.Pinned(); err != nil {
		t.Fatal(err)
	}
	cg := r.cgroup("restart")
	slot, err := first.Track("default/restart", cg.id())
	if err != nil {
		t.Fatal(err)
	}
	cg.start("threads")
	before := readWith(t, first, slot, cg.cpu)
	after(observe / 4)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	after(observe / 4) // nobody is there to read
	second := r.open(pin)
	at, ok := second.Tracked()["default/restart"]
	if !ok || at != slot || second.IdentityOf(at) != cg.id() {
		t.Fatalf("slot %d, found %v: %+v", at, ok, second.IdentityOf(at))
	}
	after(observe / 4)
	agree(t, "CPU time over a restart", before, readWith(t, second, at, cg.cpu), cpuNs, 0.01)
	// A second set of programs would have counted everything twice; a third
	// daemon of another version starts anew instead.
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	third, err := Open(Config{PinDir: pin, Unified: r.unified, Host: cg.id()})
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	if n := len(third.Tracked()); n != 0 {
		t.Errorf("%d slots of another version were taken over", n)
	}
	if entries, err := os.ReadDir(pin); err != nil || len(entries) != 1 {
		t.Errorf("%v %v", entries, err)
	}
}

func TestASlotIsCleanWhenItIsTakenAgain(t *testing.T) {
	r := newRig(t)
	// A host of its own: elsewhere others make cgroups, which take slots too.
	own := r.cgroup("own")
	p, err := Open(Config{Unified: r.unified, Host: own.id()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	cg := r.cgroup(own.path + "/again")
	slot, err := p.Track("a", cg.id())
	if err != nil {
		t.Fatal(err)
	}
	// Not one that ends within its first turn on a CPU: it came from outside.
	cg.run("sleep", "0.02")
	if u := read(t, p, slot); u.CpuNs == 0 {
		t.Fatal("nothing was counted")
	}
	if err := p.Release(slot); err != nil {
		t.Fatal(err)
	}
	host := read(t, p, HostSlot)
	cg.run("sleep", "0.02") // counts to the host now
	if u := read(t, p, HostSlot); u.CpuNs == host.CpuNs {
		t.Error("what no shard has does not count to the host")
	}
	for i := range MaxSlots - 1 {
		at, err := p.Track(fmt.Sprint("shard-", i), Identity{Tasks: 1<<40 + uint64(i)})
		if err != nil {
			t.Fatal(err)
		}
		if u, _, err := p.Read(at); err != nil || u != (Usage{}) {
			t.Fatalf("slot %d begins with %+v, %v", at, u, err)
		}
	}
	if _, err := p.Track("one too many", Identity{Tasks: 5}); !errors.Is(err, ErrFull) {
		t.Errorf("one too many: %v", err)
	}
}

func TestNothingIsLeftOfManyShards(t *testing.T) {
	r := newRig(t)
	p := r.open(bpffs(t))
	before, err := p.Entries()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3000 {
		id := Identity{Tasks: 1<<41 + uint64(i), Block: 1<<42 + uint64(i), Netns: 1<<31 + uint32(i)}
		at, err := p.Track(fmt.Sprint("shard-", i), id)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Release(at); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := p.Entries()
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range entries {
		if name != tcpMapConnections && n != before[name] {
			t.Errorf("map %s has %d entries, before %d", name, n, before[name])
		}
	}
	if len(p.Tracked()) != 0 {
		t.Error(p.Tracked())
	}
}

func TestWithoutTypesOfTheKernelEveryPartSaysSo(t *testing.T) {
	r := newRig(t)
	bogus := filepath.Join(t.TempDir(), "vmlinux")
	if err := os.WriteFile(bogus, []byte("not BTF"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := Open(Config{Unified: r.unified, Host: r.root(), BTF: bogus})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, part := range Parts {
		if p.Failed(part) == nil {
			t.Errorf("%s claims to count", part)
		}
	}
	if err := p.Refresh(); err != nil {
		t.Error(err)
	}
	if u, _, err := p.Read(HostSlot); err != nil || u != (Usage{}) {
		t.Error(u, err)
	}
}
