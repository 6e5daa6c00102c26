package steward

import (
	"math"
	"strings"
	"testing"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// Any member can send anything; what it cannot is speak for another.
func TestOnlyItsOwnerWritesARecord(t *testing.T) {
	p := newPool(t, "a", "b", "c")
	if got, _, why := p.change(t, "a", apply(spec("web"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	c := p.hosts["c"]
	client, err := p.hosts["b"].Client("c")
	if err != nil {
		t.Fatal(err)
	}
	put := func(raw []byte) error {
		t.Helper()
		_, err := client.Put(t.Context(), connect.NewRequest(&v1.PutWorkloadRequest{Record: raw}))
		return err
	}
	record := func(owner, sealer string, generation uint64) []byte {
		t.Helper()
		r := rec(owner, generation, "confirmed")
		if sealer != "" {
			if err := p.hosts[sealer].sealed(r); err != nil {
				t.Fatal(err)
			}
		}
		return r.encode()
	}
	stranger := rec("a", 2, "confirmed")
	if err := (&Steward{Config: Config{Seals: newPool(t, "a").hosts["a"].Seals}}).sealed(stranger); err != nil {
		t.Fatal(err)
	}
	cut := rec("a", 2, "confirmed")
	if err := p.hosts["a"].sealed(cut); err != nil {
		t.Fatal(err)
	}
	cut.statement = []byte(strings.Replace(string(cut.statement), `"img"`, `"bad"`, 1))
	for name, raw := range map[string][]byte{
		"the owner's, without a seal":                   record("a", "", 2),
		"the owner's, sealed by another":                record("a", "b", 2),
		"the owner's, of a cluster with the same names": stranger.encode(),
		"the owner's, with another image":               cut.encode(),
		"the largest generation there is":               record("b", "b", math.MaxUint64),
	} {
		if err := put(raw); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
		if r, err := c.Book.Get("web"); err != nil || r.Owner != "a" || r.Generation != 1 || r.spec().Image != "img" {
			t.Errorf("%s: c has %+v %v", name, r, err)
		}
	}
	// The owner's own, whoever brings it.
	if err := put(record("a", "a", 2)); err != nil {
		t.Error(err)
	}
	if r, err := c.Book.Get("web"); err != nil || r.Generation != 2 {
		t.Errorf("%+v %v", r, err)
	}
}

// A host that has one bad record passes on the others.
func TestABadRecordIsNoReasonToMissTheOthers(t *testing.T) {
	p := newPool(t, "a", "b", "c")
	b, c := p.hosts["b"], p.hosts["c"]
	c.set(func() { c.down = true })
	if got, _, why := p.change(t, "a", apply(spec("web"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	forged := rec("c", 1, "confirmed")
	other := spec("another") // before web by name
	forged.Name, forged.Spec = other.Name, other.Encode()
	if taken, _, err := b.Book.Offer(forged, b.pool()); !taken || err != nil {
		t.Fatal(taken, err)
	}
	c.set(func() { c.down = false })
	if err := c.learn(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Book.Get("web"); err != nil || r == nil || r.Owner != "a" {
		t.Errorf("web: %+v %v", r, err)
	}
	if r, err := c.Book.Get("another"); err != nil || r != nil {
		t.Errorf("a record that nobody sealed: %+v %v", r, err)
	}
}

func TestWhoSaidItIsShownEverywhere(t *testing.T) {
	p := newPool(t, "a", "b", "c")
	if got, _, why := p.change(t, "a", apply(spec("web"))); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	if got, _, why := p.change(t, "b", scale("web", 2)); got != outcomeDone {
		t.Fatalf("%s %s", got, why)
	}
	list, err := Local{p.hosts["c"].Steward}.ListWorkloads(t.Context(), connect.NewRequest(&v1.ListWorkloadsRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	w := list.Msg.GetWorkloads()[0]
	if w.GetOwner() != "a" || w.GetChangedFrom() != "b" || w.GetChangedAtUnixMs() == 0 {
		t.Errorf("owner %s, changed from %s at %d", w.GetOwner(), w.GetChangedFrom(), w.GetChangedAtUnixMs())
	}
}

// What a host wrote before it was in a cluster, or in another one, others
// believe after its next start.
func TestAHostSealsWhatItWroteBefore(t *testing.T) {
	p := newPool(t, "a", "b")
	a, b := p.hosts["a"], p.hosts["b"]
	if taken, _, err := a.Book.Offer(rec("a", 1, "confirmed"), a.pool()); !taken || err != nil {
		t.Fatal(taken, err)
	}
	if err := b.learn(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if r, err := b.Book.Get("web"); r != nil || err != nil {
		t.Fatalf("%+v %v", r, err)
	}
	if err := a.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.learn(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if r, err := b.Book.Get("web"); err != nil || r == nil || r.spec() == nil {
		t.Errorf("%+v %v", r, err)
	}
}
