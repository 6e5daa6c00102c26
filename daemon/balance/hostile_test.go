package balance

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
	"unicode"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/control/transhipv1/transhipv1connect"
	"github.com/tranship/tranship/daemon/runtime"
)

func TestALieAboutSizesStaysSmall(t *testing.T) {
	lies := map[string]func(*v1.BookRequest){
		"a peak of all there is": func(m *v1.BookRequest) {
			for q := range m.Peak {
				m.Peak[q] = mostOfAShard
			}
		},
		"once in a hundred all there is": func(m *v1.BookRequest) {
			for i := 4; i < len(m.Demand); i += 5 {
				m.Demand[i] = mostOfAShard
			}
			m.Demand[9], m.Demand[29], m.Demand[49] = 64<<20, 64<<20, 64<<20 // but of memory, which is refused
		},
		"a disk that has no bound": func(m *v1.BookRequest) {
			m.Usage[allocate.Disk] = mostOfAShard
		},
	}
	for name, lie := range lies {
		t.Run(name, func(t *testing.T) {
			p := newPool()
			r, other := p.add(t, "host-1", On), p.add(t, "host-2", On)
			for i := range 4 {
				r.run(fmt.Sprintf("web-%d", i), 0.2, runtime.LabelWorkload, fmt.Sprintf("web-%d", i))
			}
			p.round(t, other, r)
			for i, from := range []string{"host-3", "host-4"} {
				m := asking(fmt.Sprintf("lie-%d", i), 0.01)
				m.Workload = m.GetName()
				lie(m)
				if v := r.book(from, m); v != "" && v != string(allocate.VetoOverload) {
					t.Fatalf("veto %s", v)
				}
			}
			for range 30 { // as long as it takes for what holds to be acted upon
				r.pass(time.Second)
				r.b.round(t.Context())
			}
			r.settle()
			if len(r.moved) > 0 {
				t.Errorf("its own shards fled: %v", r.moved)
			}
			if loss := r.plan().GetLoss(); !(loss >= 0 && loss < 1e6) {
				t.Errorf("expected loss %v", loss)
			}
			said, err := r.b.Room(t.Context(), "host-2", &v1.RoomRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := peerOf("host-1", nil, said); err != nil {
				t.Errorf("it passes the lie on, and is believed no more: %v", err)
			}
		})
	}
}

func TestAMoveOfMoreMemoryThanIsUsedKeepsRoomForNoLonger(t *testing.T) {
	r := ready(t)
	m := asking("a", 1)
	m.Bytes, m.DirtyBytesPerSecond, m.TakesMs = 1e14, 1e8, (24 * time.Hour).Milliseconds()
	resp, err := r.b.Book("host-2", m)
	if err != nil || resp.GetVeto() != "" {
		t.Fatal(err, resp)
	}
	if hold := time.Duration(resp.GetHoldsMs()) * time.Millisecond; hold > 3*time.Minute {
		t.Errorf("it holds %v", hold)
	}
}

func TestARequestThatIsRefusedLeavesNothingOfTheOneBefore(t *testing.T) {
	r := ready(t)
	for i := range 10 {
		name := fmt.Sprintf("a-%d", i)
		if v := r.book("host-2", asking(name, 0.5)); v != "" {
			t.Fatalf("%s: veto %s", name, v)
		}
		if v := r.book("host-2", asking(name, 50)); v == "" {
			t.Fatal("50 CPUs of 2 were promised")
		}
	}
	if len(r.b.booked) != 0 || len(r.plan().GetHeld()) != 0 {
		t.Errorf("%d are kept, %v", len(r.b.booked), r.plan().GetHeld())
	}
	if v := r.book("host-3", asking("a-3", 1.5)); v != "" {
		t.Errorf("another host's shard of such a name: %s", v)
	}

	// One that is on its way comes, whatever else its source asks for.
	r = ready(t)
	r.book("host-2", asking("a", 1.5))
	r.facts.Arriving["default/a"] = true
	r.pool.round(t, r)
	r.book("host-2", asking("a", 50))
	if v := r.book("host-3", asking("b", 1.5)); v != string(allocate.VetoUsage) {
		t.Errorf("beside one on its way: %q", v)
	}
}

func TestToldTwiceIsToldOnce(t *testing.T) {
	r := ready(t)
	r.book("host-2", asking("a", 1.5))
	tell := func(dirty float64) {
		t.Helper()
		_, err := r.b.Unbook("host-2", &v1.UnbookRequest{Namespace: "default", Name: "a", Cost: &v1.BalanceCost{Bytes: 1, DirtyBytesPerSecond: dirty}})
		if err != nil {
			t.Fatal(err)
		}
	}
	tell(5)
	for range 6 {
		r.pass(time.Minute)
		r.pool.round(t, r)
		tell(7)
	}
	if len(r.b.booked) != 0 {
		t.Error("a shard that never came is counted for ever")
	}
	if got, _ := r.b.costs.dirty(r.clock(), "default/a"); got != 5 {
		t.Errorf("it is thought to write %v bytes/s", got)
	}
	if v := r.book("host-3", asking("b", 1.5)); v != "" {
		t.Errorf("its room: %s", v)
	}
}

func TestWhoMovesNothingKeepsRoomForATenthOfTheTime(t *testing.T) {
	const step, steps = 5 * time.Second, 2 * 720
	book := func(r *rig, name string) {
		m := asking(name, 0.1)
		m.TakesMs = step.Milliseconds() // so that a promise is a whole number of steps
		r.book("host-2", m)
	}
	unbook := func(r *rig, peer, name string, cost *v1.BalanceCost) {
		if _, err := r.b.Unbook(peer, &v1.UnbookRequest{Namespace: "default", Name: name, Cost: cost}); err != nil {
			r.t.Fatal(err)
		}
	}
	for way, ask := range map[string]func(r *rig, was, is string){
		"under ever new names": func(r *rig, _, is string) { book(r, is) },
		"under the same names": func(r *rig, _, is string) { book(r, is[:1]) },
		"given back for another": func(r *rig, was, is string) {
			unbook(r, "host-2", was, nil)
			book(r, is)
		},
		"told to have arrived": func(r *rig, was, is string) {
			unbook(r, "host-2", was, &v1.BalanceCost{Bytes: 1})
			book(r, is)
		},
		"given up by asking for too much": func(r *rig, was, is string) {
			r.book("host-2", asking(was, 50))
			book(r, is)
		},
	} {
		t.Run(way, func(t *testing.T) {
			r := ready(t)
			kept, refused := time.Duration(0), 0
			for i := range steps {
				for _, name := range []string{"a", "b"} {
					ask(r, fmt.Sprint(name, i-1), fmt.Sprint(name, i))
				}
				kept += time.Duration(len(r.plan().GetHeld())) * step
				if r.book("host-3", asking("c", 0.1)) != "" {
					refused++
				} else {
					unbook(r, "host-3", "c", nil)
				}
				r.pool.round(t, r) // a step
			}
			// What it may owe, the tenth that is forgiven, and the last promises that it got.
			if most := idleMost + steps*step/forgiven + 2*(40*time.Second); kept > most {
				t.Errorf("of %v it kept a place for %v, at most %v", 2*steps*step, kept, most)
			}
			if refused > steps/10 {
				t.Errorf("another host was refused %d of %d times", refused, steps)
			}
			if got := r.b.counts.idle; got < kept*9/10 || r.b.counts.vetoes[vetoIdle] == 0 {
				t.Errorf("of %v the metric knows %v; %v", kept, got, r.b.counts.vetoes)
			}
			r.pass(time.Hour)
			r.pool.round(t, r)
			if v := r.book("host-2", asking("later", 0.1)); v != "" {
				t.Errorf("an hour later: %s", v)
			}
		})
	}
}

func TestWhoMovesShardsOwesNothing(t *testing.T) {
	r := ready(t)
	for i := range 100 {
		name := fmt.Sprint("a-", i)
		id := allocate.ShardID("default/" + name)
		if v := r.book("host-2", asking(name, 0.1)); v != "" {
			t.Fatalf("move %d: %s", i, v)
		}
		r.facts.Arriving[id] = true
		for range 60 { // longer than the promise lasts
			r.pool.round(t, r)
		}
		delete(r.facts.Arriving, id)
		r.run(name, 0.1)
		if _, err := r.b.Unbook("host-2", &v1.UnbookRequest{Namespace: "default", Name: name, Cost: &v1.BalanceCost{Bytes: 1}}); err != nil {
			t.Fatal(err)
		}
		r.pool.round(t, r)
		delete(r.shards, name)
	}
	if got := r.b.owed(r.clock(), "host-2"); got > 0 || r.b.counts.expired > 0 {
		t.Errorf("it owes %v; %v promises ran out", got, r.b.counts.expired)
	}
}

func TestAFloodOfQuestionsIsItsSendersAlone(t *testing.T) {
	r := ready(t)
	ask := map[string]func(peer string) error{
		"room": func(peer string) error { _, err := r.b.Room(t.Context(), peer, &v1.RoomRequest{}); return err },
		"book": func(peer string) error { _, err := r.b.Book(peer, asking("a", 0.1)); return err },
		"unbook": func(peer string) error {
			_, err := r.b.Unbook(peer, &v1.UnbookRequest{Namespace: "default", Name: "none"})
			return err
		},
	}
	for what, ask := range ask {
		flooder := "flooder-" + what
		answered := 0
		var last error
		for range 10 * questionsBurst {
			if last = ask(flooder); last == nil {
				answered++
			}
		}
		if answered != questionsBurst || connect.CodeOf(last) != connect.CodeResourceExhausted || !strings.Contains(last.Error(), "no more than 20 questions a second of "+flooder) {
			t.Errorf("%s: %d answered, last %v", what, answered, last)
		}
		if err := ask(flooder + "-not"); err != nil && connect.CodeOf(err) == connect.CodeResourceExhausted {
			t.Errorf("%s: another host is not heard: %v", what, err)
		}
	}
	r.pass(time.Second)
	if err := ask["room"]("flooder-room"); err != nil {
		t.Errorf("a second later: %v", err)
	}
}

// grumpy answers with errors that no terminal should see.
type grumpy struct {
	transhipv1connect.UnimplementedRoomsHandler
}

func (grumpy) Room(context.Context, *connect.Request[v1.RoomRequest]) (*connect.Response[v1.RoomResponse], error) {
	return nil, connect.NewError(connect.CodeUnavailable, errors.New("\x1b[2Jnothing\r\nhere\u009b31m"+strings.Repeat("!", 5000)))
}

func TestWordsOfAPeersErrorsMoveNoCursor(t *testing.T) {
	_, handler := transhipv1connect.NewRoomsHandler(grumpy{})
	srv := httptest.NewServer(handler)
	defer srv.Close()
	_, err := transhipv1connect.NewRoomsClient(srv.Client(), srv.URL).Room(t.Context(), connect.NewRequest(&v1.RoomRequest{}))
	if err == nil {
		t.Fatal("it answered")
	}
	words := plain(fmt.Errorf("host-2: %w", err))
	if strings.ContainsFunc(words, func(r rune) bool { return !unicode.IsPrint(r) }) || !strings.HasPrefix(words, "[2Jnothinghere31m!!") || len(words) > 4*maxText {
		t.Errorf("%d bytes: %.80q", len(words), words)
	}
}

func TestHostsWhoseClocksAreMinutesApart(t *testing.T) {
	for _, apart := range []time.Duration{-10 * time.Minute, 10 * time.Minute} {
		t.Run(apart.String(), func(t *testing.T) {
			p, a, b := overloaded(t, On)
			b.pass(apart)
			p.round(t, b)
			hold := func(want time.Duration) {
				t.Helper()
				m := asking("x", 0.1)
				resp, err := b.b.Book("host-9", m)
				if err != nil || resp.GetVeto() != "" {
					t.Fatal(err, resp)
				}
				if got := time.Duration(resp.GetHoldsMs()) * time.Millisecond; (got - want).Abs() > time.Second {
					t.Errorf("room is kept for %v, want %v", got, want)
				}
			}
			hold(2*time.Second + b.b.acting.Config().Hold)
			b.pass(time.Minute)
			p.round(t, b)
			if held := b.plan().GetHeld(); len(held) > 0 {
				t.Errorf("a minute later it is still kept: %v", held)
			}

			p.round(t, a)
			a.settle()
			if len(a.moved) == 0 || !strings.HasSuffix(a.moved[0], " host-2") {
				t.Fatalf("moved: %v", a.moved)
			}
			name, _, _ := strings.Cut(a.moved[0], " ")
			if got, ok := b.b.costs.dirty(b.clock(), allocate.ShardID("default/"+name)); !ok || got == 0 {
				t.Errorf("what the move cost is not known here: %v, %v", got, ok)
			}
			// It rests by the clock of the host where it is, however much that needs room.
			c := p.add(t, "host-3", On)
			b.run("y-0", 0.9, runtime.LabelWorkload, "y")
			b.run("y-1", 0.9, runtime.LabelWorkload, "y")
			p.round(t, c, b)
			b.settle()
			if len(b.moved) == 0 || strings.Contains(strings.Join(b.moved, ","), name) {
				t.Errorf("host-2 moved %v", b.moved)
			}
			for _, d := range append(a.history(), b.history()...) {
				if d.GetOutcome() == outcomeFailed {
					t.Errorf("%v", d)
				}
			}
		})
	}
}
