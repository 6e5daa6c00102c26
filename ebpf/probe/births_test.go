package probe

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// isA finds the birth of a cgroup of the rig.
func isA(cg cgroup) func(*Birth) bool {
	return func(b *Birth) bool { return strings.HasSuffix(b.Path, "/"+cg.path) }
}

// work uses a tenth of a second of CPU. Under v1 the account is of another
// hierarchy than what is counted by: it begins up to a millisecond and a half
// earlier, with the join of that one.
func work(cg cgroup) {
	cg.r.t.Helper()
	cg.run("dd", "if=/dev/zero", "of=/dev/null", "bs=1M", "count=2500", "status=none")
}

func TestAShardCountsFromItsFirstInstruction(t *testing.T) {
	r := newRig(t)
	p := r.open("")
	cg := r.cgroup("early")
	cg.run("sleep", "0.02")
	nested := r.cgroup(cg.path + "/nested")
	nested.run("sleep", "0.02") // in a slot of its own, as long as nobody knows better
	work(cg)
	own := cg.cpu() - nested.cpu()
	at, err := p.Track("default/early", cg.id())
	if err != nil {
		t.Fatal(err)
	}
	if born, ok := p.Born(at); !ok || born <= 0 {
		t.Errorf("born at %v", born)
	}
	within(t, "CPU time before anybody asked", float64(read(t, p, at).CpuNs), own, 0.05)
	if p.IdentityOf(at) != cg.id() {
		t.Errorf("%+v", p.IdentityOf(at))
	}
}

func TestAShardThatHasEndedIsClaimedByItsPath(t *testing.T) {
	r := newRig(t)
	pin := bpffs(t)
	p := r.open(pin)
	before, err := p.Entries()
	if err != nil {
		t.Fatal(err)
	}
	live := func(restart bool) {
		t.Helper()
		cg := r.cgroup("brief")
		work(cg)
		used := cg.cpu()
		for _, top := range r.tops {
			if err := unix.Rmdir(top + "/" + cg.path); err != nil && err != unix.ENOENT {
				t.Fatal(err)
			}
		}
		if restart { // what was noted while no daemon ran is found by the next
			if err := p.Close(); err != nil {
				t.Fatal(err)
			}
			p = r.open(pin)
		}
		b, ok, err := p.Claim("default/brief", isA(cg))
		if err != nil || !ok {
			t.Fatalf("%v %v", ok, err)
		}
		if b.Ended <= b.Born || b.Ended-b.Born > time.Minute {
			t.Errorf("from %v to %v", b.Born, b.Ended)
		}
		within(t, "CPU time of one that has ended", float64(read(t, p, b.Slot).CpuNs), used, 0.05)
		if _, ok, _ := p.Claim("default/again", isA(cg)); ok {
			t.Error("claimed twice")
		}
		if err := p.Release(b.Slot); err != nil {
			t.Fatal(err)
		}
	}
	live(false)
	live(true)
	live(false)
	after, err := p.Entries()
	if err != nil || after[schedMapCgroups] != before[schedMapCgroups] {
		t.Errorf("%v, before %v, %v", after, before, err)
	}
}

func TestWhatNobodyClaimsIsTheHosts(t *testing.T) {
	r := newRig(t)
	p := r.open("")
	cg := r.cgroup("nobodys")
	cg.run("sleep", "0.02")
	all, err := p.Births()
	if err != nil {
		t.Fatal(err)
	}
	found := Birth{}
	for _, b := range all {
		if isA(cg)(&b) {
			found = b
		}
	}
	if found.Slot == 0 || found.ID != cg.id() {
		t.Fatalf("%+v, want %+v", found, cg.id())
	}
	gone, err := p.Expire(found.Born + 1)
	if err != nil {
		t.Fatal(err)
	}
	have := false
	for _, at := range gone {
		have = have || at == found.Slot
	}
	if !have {
		t.Errorf("%d is not among %v", found.Slot, gone)
	}
	slot, host := read(t, p, found.Slot), read(t, p, HostSlot)
	cg.run("sleep", "0.02")
	if now := read(t, p, found.Slot); now.CpuNs != slot.CpuNs {
		t.Error("it counts on")
	}
	if now := read(t, p, HostSlot); now.CpuNs == host.CpuNs {
		t.Error("the host does not")
	}
	// Found late: a slot of its own from now on.
	at, err := p.Track("default/late", cg.id())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := p.Born(at); ok {
		t.Error("it counts from its birth")
	}
}

func TestMoreBirthsThanSpareSlotsAreCountedLate(t *testing.T) {
	r := newRig(t)
	p := r.open("")
	var last cgroup
	for range spareSlots + 10 {
		last = r.cgroup("many")
	}
	at, err := p.Track("default/last", last.id())
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := p.Born(at); ok {
		t.Error("a slot was found where none is")
	}
	if all, err := p.Births(); err != nil || len(all) < spareSlots {
		t.Errorf("%d births, %v", len(all), err)
	}
	next := r.cgroup("next")
	if at, err = p.Track("default/next", next.id()); err != nil {
		t.Fatal(err)
	}
	if _, ok := p.Born(at); !ok {
		t.Error("there are no spare slots again")
	}
}
