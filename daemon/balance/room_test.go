package balance

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// asking is a request for room for a shard of so many CPUs.
func asking(name string, cpus float64) *v1.BookRequest {
	var d allocate.Demand
	for i := range d {
		d[i][allocate.CPU], d[i][allocate.Memory] = allocate.Certain(cpus), allocate.Certain(64<<20)
	}
	r := allocate.Request{Reason: allocate.Overload, Takes: 2 * time.Second, Shard: allocate.Shard{
		Workload: "w", Bytes: 64 << 20, Demand: d, Peak: allocate.Certain(cpus), Usage: allocate.Amount{allocate.CPU: cpus, allocate.Memory: 64 << 20},
	}}
	return bookMessage("default", name, &r)
}

func ready(t *testing.T) *rig {
	t.Helper()
	p := newPool()
	r := p.add(t, "host-1", On)
	p.round(t, r)
	return r
}

func (r *rig) book(peer string, m *v1.BookRequest) string {
	r.t.Helper()
	resp, err := r.b.Book(peer, m)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetVeto()
}

func TestPromisesAddUp(t *testing.T) {
	r := ready(t)
	if v := r.book("host-2", asking("a", 1.5)); v != "" {
		t.Fatalf("veto %s", v)
	}
	if v := r.book("host-3", asking("b", 1.5)); v != string(allocate.VetoUsage) {
		t.Errorf("the second: %q", v)
	}
	// Asking again for the same is not asking for more.
	if v := r.book("host-2", asking("a", 1.5)); v != "" {
		t.Errorf("again: %s", v)
	}
	if _, err := r.b.Unbook("host-2", &v1.UnbookRequest{Namespace: "default", Name: "a"}); err != nil {
		t.Fatal(err)
	}
	if v := r.book("host-3", asking("b", 1.5)); v != "" {
		t.Errorf("after the first was given back: %s", v)
	}
}

func TestAPromiseIsItsSourcesAlone(t *testing.T) {
	r := ready(t)
	r.book("host-2", asking("a", 1.5))
	if v := r.book("host-3", asking("a", 0.1)); v != string(vetoTaken) {
		t.Errorf("another host takes the name: %q", v)
	}
	if _, err := r.b.Unbook("host-3", &v1.UnbookRequest{Namespace: "default", Name: "a"}); connect.CodeOf(err) != connect.CodePermissionDenied {
		t.Errorf("another host ends it: %v", err)
	}
	if held := r.plan().GetHeld(); len(held) != 1 || held[0].GetFrom() != "host-2" {
		t.Errorf("%v", held)
	}
	r.run("b", 0.1)
	r.pool.round(t, r)
	if v := r.book("host-2", asking("b", 0.1)); v != string(vetoTaken) {
		t.Errorf("a shard that is here: %q", v)
	}
}

func TestAPromiseRunsOutUnlessTheShardIsOnItsWay(t *testing.T) {
	r := ready(t)
	r.book("host-2", asking("a", 1.5))
	later := func() {
		r.pass(2 * time.Minute)
		r.pool.round(t, r)
	}
	r.facts.Arriving["default/a"] = true
	later()
	if v := r.book("host-3", asking("b", 1.5)); v != string(allocate.VetoUsage) {
		t.Errorf("while the first is still on its way: %q", v)
	}
	delete(r.facts.Arriving, "default/a")
	later()
	if v := r.book("host-3", asking("b", 1.5)); v != "" {
		t.Errorf("after the first did not come: %q", v)
	}
	if len(r.b.booked) != 1 || r.b.counts.expired != 1 {
		t.Errorf("%v, %v ran out", r.b.booked, r.b.counts.expired)
	}
}

func TestASourceThatNamesADayKeepsRoomForMinutes(t *testing.T) {
	r := ready(t)
	m := asking("a", 1)
	m.TakesMs = (23 * time.Hour).Milliseconds()
	resp, err := r.b.Book("host-2", m)
	if err != nil || resp.GetVeto() != "" {
		t.Fatal(err, resp)
	}
	if hold := time.Duration(resp.GetHoldsMs()) * time.Millisecond; hold > 3*time.Minute {
		t.Errorf("it holds %v", hold)
	}
}

func TestWhoTakesNothingSaysSo(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*rig)
		code   allocate.VetoCode
	}{
		"cordoned":                        {func(r *rig) { r.facts.Cordoned = true }, allocate.VetoCordoned},
		"being drained":                   {func(r *rig) { r.facts.Draining = true }, allocate.VetoLeaving},
		"has not looked for a long while": {func(r *rig) { r.pass(time.Hour) }, vetoNotReady},
		"full": {func(r *rig) {
			r.run("x", 1.95)
			r.pool.round(r.t, r)
		}, allocate.VetoUsage},
		"overloaded soon": {func(r *rig) {
			r.run("x", 1.95).Rates["cpu"] = 0.1
			r.pool.round(r.t, r)
		}, allocate.VetoOverload},
	} {
		t.Run(name, func(t *testing.T) {
			r := ready(t)
			tt.change(r)
			resp, err := r.b.Book("host-2", asking("a", 0.3))
			if err != nil || resp.GetVeto() != string(tt.code) || !strings.Contains(resp.GetWords(), "host-1 refuses") {
				t.Errorf("%v, %v", resp, err)
			}
		})
	}
}

func TestAnArrivalIsCountedAsItWasForecastAtHome(t *testing.T) {
	r := ready(t)
	r.book("host-2", asking("a", 1.5))
	r.run("a", 0.01) // here it has hardly begun
	if _, err := r.b.Unbook("host-2", &v1.UnbookRequest{Namespace: "default", Name: "a", Cost: &v1.BalanceCost{Bytes: 1}}); err != nil {
		t.Fatal(err)
	}
	r.pool.round(t, r)
	if held := r.plan().GetHeld(); len(held) != 0 {
		t.Errorf("still promised: %v", held)
	}
	if v := r.book("host-3", asking("b", 1.5)); v != string(allocate.VetoOverload) {
		t.Errorf("beside it: %q", v)
	}
}

// garbage is what no host can mean.
var garbage = map[string]func(*v1.RoomResponse){
	"no numbers":                  func(m *v1.RoomResponse) { m.Load = nil },
	"too many":                    func(m *v1.RoomResponse) { m.Load = append(m.Load, 1) },
	"a curve that falls":          func(m *v1.RoomResponse) { m.Load[0] = 9 },
	"NaN":                         func(m *v1.RoomResponse) { m.Load[4] = float32(math.NaN()) },
	"infinite":                    func(m *v1.RoomResponse) { m.Load[4] = float32(math.Inf(1)) },
	"negative use":                func(m *v1.RoomResponse) { m.Usage[0] = -1 },
	"endless capacity":            func(m *v1.RoomResponse) { m.Capacity[0] = math.Inf(1) },
	"no capacity":                 func(m *v1.RoomResponse) { m.Capacity[0] = 0 },
	"a link of nothing":           func(m *v1.RoomResponse) { m.LinkBytesPerSecond = 0 },
	"a cost that is none":         func(m *v1.RoomResponse) { m.CostPerHour = math.NaN() },
	"a zone that moves cursors":   func(m *v1.RoomResponse) { m.Zone = "\x1b[2J" },
	"a label without end":         func(m *v1.RoomResponse) { m.Labels = map[string]string{"a": strings.Repeat("b", 5000)} },
	"resources of another planet": func(m *v1.RoomResponse) { m.Capacity = append(m.Capacity, 1) },
}

func TestAPeerThatSaysWhatCannotBeIsNoTarget(t *testing.T) {
	for name, spoil := range garbage {
		t.Run(name, func(t *testing.T) {
			p, a, b := overloaded(t, On)
			c := p.add(t, "host-3", On)
			p.round(t, b, c)
			p.lies["host-2"] = func(m *v1.RoomResponse) *v1.RoomResponse {
				m = proto.CloneOf(m)
				spoil(m)
				return m
			}
			p.round(t, a)
			a.settle()
			if len(a.moved) == 0 || !strings.HasSuffix(a.moved[0], " host-3") {
				t.Errorf("moved: %v", a.moved)
			}
			faults := a.plan().GetFaults()
			if len(faults) != 1 || faults[0].GetNode() != "host-2" || !strings.Contains(faults[0].GetWhy(), "says of itself what cannot be") || strings.ContainsRune(faults[0].GetWhy(), '\x1b') {
				t.Errorf("%v", faults)
			}
		})
	}
}

func TestARequestThatCannotBeComputedWithCostsNothing(t *testing.T) {
	for name, spoil := range map[string]func(*v1.BookRequest){
		"no name":            func(m *v1.BookRequest) { m.Name = "" },
		"a path":             func(m *v1.BookRequest) { m.Name = "../a" },
		"a priority of 10":   func(m *v1.BookRequest) { m.Priority = 10 },
		"NaN":                func(m *v1.BookRequest) { m.Demand[7] = float32(math.NaN()) },
		"half a forecast":    func(m *v1.BookRequest) { m.Demand = m.Demand[:30] },
		"half a peak":        func(m *v1.BookRequest) { m.Peak = m.Peak[:2] },
		"a peak that falls":  func(m *v1.BookRequest) { m.Peak = []float32{1, 2, 3, 2, 4} },
		"a peak of NaN":      func(m *v1.BookRequest) { m.Peak[4] = float32(math.NaN()) },
		"less than nothing":  func(m *v1.BookRequest) { m.Usage[1] = -5 },
		"memory without end": func(m *v1.BookRequest) { m.Bytes = math.Inf(1) },
		"a time before now":  func(m *v1.BookRequest) { m.TakesMs = -1 },
		"a year":             func(m *v1.BookRequest) { m.TakesMs = math.MaxInt64 },
		"a reason of its own": func(m *v1.BookRequest) {
			m.Reason = "because"
		},
		"a thousand to avoid": func(m *v1.BookRequest) { m.Avoid = make([]string, 1000) },
	} {
		t.Run(name, func(t *testing.T) {
			r := ready(t)
			r.book("host-2", asking("kept", 1))
			m := asking("a", 0.1)
			spoil(m)
			if _, err := r.b.Book("host-3", m); connect.CodeOf(err) != connect.CodeInvalidArgument {
				t.Errorf("%v", err)
			}
			if held := r.plan().GetHeld(); len(held) != 1 || held[0].GetShard() != "default/kept" {
				t.Errorf("%v", held)
			}
		})
	}
}

func TestRequestsSurviveTheWire(t *testing.T) {
	want := asking("a", 1.25)
	req, err := requestOf("host-2", want)
	if err != nil {
		t.Fatal(err)
	}
	if got := bookMessage("default", "a", &req); !proto.Equal(got, want) {
		t.Errorf("%v\n%v", got, want)
	}
	if req.From != "host-2" || req.Shard.ID != "default/a" || req.Shard.Peak != allocate.Certain(1.25) {
		t.Errorf("%+v", req)
	}
	want.Peak = nil // as a host asks that knows of no peaks
	if req, err := requestOf("host-2", want); err != nil || req.Shard.Peak != (allocate.Curve{}) {
		t.Errorf("peak %v, %v", req.Shard.Peak, err)
	}
}

func TestDecisionsAndCostsSurviveARestart(t *testing.T) {
	p, a, b := overloaded(t, On)
	path := a.b.cfg.StorePath
	p.round(t, a)
	a.settle()
	done := a.history()
	// A second one is under way when the daemon ends.
	if err := a.b.store.add(&v1.BalanceDecision{Kind: kindMove, Name: "x", AtUnixMs: a.clock().UnixMilli(), LastUnixMs: a.clock().UnixMilli(), Outcome: outcomeUnderWay}); err != nil {
		t.Fatal(err)
	}
	link := a.b.costs.Link
	if err := a.b.Close(); err != nil {
		t.Fatal(err)
	}
	a.open(On, path)
	p.round(t, b)
	got := a.history()
	if len(got) != len(done)+1 || got[0].GetOutcome() != outcomeInterrupted || got[1].GetWords() != done[0].GetWords() {
		t.Errorf("%v\n%v", got, done)
	}
	if link == 0 || a.b.costs.Link != link {
		t.Errorf("link %v, was %v", a.b.costs.Link, link)
	}
}

func TestTheStoreIsBounded(t *testing.T) {
	s, err := openStore(filepath.Join(t.TempDir(), "balance.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.db.NoSync = true // ten thousand writes
	for i := range keepDecisions + 50 {
		if err := s.add(&v1.BalanceDecision{LastUnixMs: int64(i)}); err != nil {
			t.Fatal(err)
		}
	}
	all, err := s.list(time.UnixMilli(0), 0)
	if err != nil || len(all) != keepDecisions || all[0].GetId() != keepDecisions+50 {
		t.Fatalf("%d decisions, %v", len(all), err)
	}
	recent, err := s.list(time.UnixMilli(keepDecisions+40), 0)
	if err != nil || len(recent) != 10 {
		t.Errorf("%d of the last ten, %v", len(recent), err)
	}
	if few, err := s.list(time.UnixMilli(0), 3); err != nil || len(few) != 3 {
		t.Errorf("%d of three, %v", len(few), err)
	}
}

func TestAFileThatIsNoStoreIsPutAside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "balance.db")
	if err := os.WriteFile(path, []byte(strings.Repeat("no store ", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := openStore(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := os.Stat(path + ".broken"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		t.Error("there is no new one")
	}
}
