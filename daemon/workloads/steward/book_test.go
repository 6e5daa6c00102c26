package steward

import (
	"encoding/json"
	"path/filepath"
	"testing"

	"github.com/tranship/tranship/daemon/workloads"
)

func spec(name string) *workloads.Spec {
	return &workloads.Spec{
		Name: name, Namespace: "default", Image: "img", Shards: 3,
		Size: workloads.Size{CPURequest: 0.1, CPULimit: 1, MemoryRequest: 16 << 20, MemoryLimit: 64 << 20},
	}
}

func rec(owner string, generation uint64, flags ...string) *Record {
	r := &Record{Name: "web", Owner: owner, Generation: generation, Spec: spec("web").Encode()}
	for _, f := range flags {
		switch f {
		case "confirmed":
			r.Confirmed = true
		case "deleted":
			r.Deleted = true
		}
	}
	return r
}

func TestOneOwnerOfANameWins(t *testing.T) {
	for _, c := range []struct {
		name        string
		have, offer *Record
		outOfPool   bool
		taken       bool
	}{
		{"the first offer", nil, rec("a", 1), false, true},
		{"the same again", rec("a", 1), rec("a", 1), false, true},
		{"another's offer at the same time", rec("a", 1), rec("b", 1), false, false},
		{"another's later offer", rec("a", 1), rec("b", 2), false, false},
		{"what was decided elsewhere", rec("a", 1), rec("b", 1, "confirmed"), false, true},
		{"an offer against what was decided", rec("a", 1, "confirmed"), rec("b", 2), false, false},
		{"the owner's next", rec("a", 1, "confirmed"), rec("a", 2, "confirmed"), false, true},
		{"the owner's last, late", rec("a", 3, "confirmed"), rec("a", 2, "confirmed"), false, false},
		{"the same, no longer confirmed", rec("a", 2, "confirmed"), rec("a", 2), false, false},
		{"an offer after a tombstone", rec("a", 3, "confirmed", "deleted"), rec("b", 4), false, true},
		{"an offer older than the tombstone", rec("a", 3, "confirmed", "deleted"), rec("b", 2), false, false},
		{"an offer for what a host that left owned", rec("a", 3, "confirmed"), rec("b", 4), true, true},
		{"a later decision, by whoever", rec("a", 3, "confirmed"), rec("b", 4, "confirmed"), false, true},
		{"two decisions of one generation: the greater name", rec("a", 3, "confirmed"), rec("b", 3, "confirmed"), false, true},
		{"two decisions of one generation: not the smaller", rec("b", 3, "confirmed"), rec("a", 3, "confirmed"), false, false},
		{"an offer taken back", rec("a", 1), rec("a", 1, "deleted"), false, true},
		{"taken back after it was decided", rec("a", 1, "confirmed"), rec("a", 1, "deleted"), false, false},
		{"another's offer taken back", rec("a", 1), rec("b", 1, "deleted"), false, false},
		{"nothing taken back", nil, rec("a", 1, "deleted"), false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := takes(c.have, c.offer, !c.outOfPool); got != c.taken {
				t.Errorf("taken: %v", got)
			}
		})
	}
}

func TestTheBookSurvives(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	open := func() *Book {
		t.Helper()
		b, err := OpenBook(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	b := open()
	everybody := []string{"a", "b"}
	r := rec("a", 1)
	r.Begun = []int{0, 1, 2}
	if taken, _, err := b.Offer(r, everybody); !taken || err != nil {
		t.Fatal(taken, err)
	}
	if taken, have, err := b.Offer(rec("b", 1), everybody); taken || err != nil || have.Owner != "a" {
		t.Fatal(taken, have, err)
	}
	for _, err := range []error{b.begin("default", "web-1"), b.begin("default", "web-2"), b.end("default", "web-1"), b.Meet("c", "id"), b.Meet("d", ""), b.Part("d"), b.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	b = open()
	defer b.Close()
	got, err := b.Get("web")
	if err != nil || got.spec() == nil || len(got.Begun) != 3 || got.Owner != "a" {
		t.Errorf("%+v %v", got, err)
	}
	if begun, err := b.begun(); err != nil || len(begun) != 1 || begun[0] != [2]string{"default", "web-2"} {
		t.Errorf("%v %v", begun, err)
	}
	if met, err := b.Met(); err != nil || len(met) != 1 || met["c"] != "id" {
		t.Errorf("%v %v", met, err)
	}
	if taken, _, err := b.Offer(rec("a", 1, "deleted"), everybody); !taken || err != nil {
		t.Error("an offer cannot be taken back", err)
	}
	if got, err := b.Get("web"); got != nil || err != nil {
		t.Errorf("%+v %v", got, err)
	}
}

// FuzzRecord: a host that sends anything at all costs an error, nothing else.
func FuzzRecord(f *testing.F) {
	f.Add(rec("a", 1, "confirmed").encode())
	f.Add(rec("a", 2, "confirmed", "deleted").encode())
	f.Add([]byte(`{"name":"x","owner":"y","generation":1,"spec":{"shards":-1}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := decodeRecord(raw)
		if err != nil {
			return
		}
		if !r.Deleted && r.spec() == nil {
			t.Error("a live record without a spec")
		}
		if !json.Valid(r.encode()) {
			t.Error("a record that cannot be kept")
		}
	})
}
