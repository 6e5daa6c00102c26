package lazypages

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tranship/tranship/checkpoint"
)

// owe takes pages of a process out of the store again, or leaves something older
// in their place, and promises them instead. Some that the process had dropped
// are promised, too: nobody will ever want those.
func (r *rig) owe(pid checkpoint.PID, spec taskSpec) {
	r.t.Helper()
	if r.owed == nil {
		return
	}
	var extents []checkpoint.Extent
	buf := make([]byte, page)
	for i := range spec.Pages {
		k, stale := spec.dumpedKind(i)
		if !r.owed(i) || k != dataKind && !stale {
			continue
		}
		at := spec.Base + i*page
		var err error
		if mix(i)%2 == 0 {
			fillPage(buf, spec.content(i)^0xbad)
			err = r.store.PutPages(pid, at, buf)
		} else {
			err = r.store.ZeroPages(pid, at, 1)
		}
		if err != nil {
			r.t.Fatal(err)
		}
		if n := len(extents); n > 0 && extents[n-1].End() == at {
			extents[n-1].Pages++
		} else {
			extents = append(extents, checkpoint.Extent{PID: pid, Addr: at, Pages: 1})
		}
	}
	if err := r.store.Owe(map[checkpoint.PID][]checkpoint.Extent{pid: extents}); err != nil {
		r.t.Fatal(err)
	}
}

// source is where the owed pages are: it has the content of every process.
type source struct {
	mu    sync.Mutex
	specs map[checkpoint.PID]taskSpec
	sent  map[checkpoint.Extent]int // pages that were delivered
}

func (r *rig) source() *source {
	s := &source{specs: map[checkpoint.PID]taskSpec{}, sent: map[checkpoint.Extent]int{}}
	for _, task := range r.tasks {
		s.specs[checkpoint.PID(task.pid)] = task.spec
	}
	return s
}

func (s *source) fetch(w Want) []byte {
	data := make([]byte, w.Bytes())
	rest := data
	for _, e := range w.Extents {
		for i := range uint64(e.Pages) {
			spec := s.specs[e.PID]
			fillPage(rest[:page], spec.content((e.Addr+i*page-spec.Base)/page))
			rest = rest[page:]
		}
	}
	return data
}

// pull works as one puller until every page is there. before is asked when an
// answer is on its way, and may take its time; false loses it and the connection.
func (s *source) pull(r *rig, urgent bool, limit checkpoint.Pages, before func() bool) error {
	for {
		p, err := r.client.Pull(r.ctx)
		if err != nil {
			if st, statusErr := ReadStatus(r.cfg.Control); statusErr == nil && st.State == StateDone {
				return nil
			}
			return err
		}
		again, err := s.work(p, urgent, limit, before)
		_ = p.Close()
		if !again || err != nil {
			return err
		}
	}
}

func (s *source) work(p *Pull, urgent bool, limit checkpoint.Pages, before func() bool) (again bool, err error) {
	for {
		w, whole, err := p.Want(urgent, limit)
		if whole || err != nil {
			return false, err
		}
		if n := w.Pages(); n == 0 || n > limit {
			return false, fmt.Errorf("%d pages are wanted, at most %d were to be", n, limit)
		}
		if !before() {
			return true, nil
		}
		if err := p.Deliver(s.fetch(w)); err != nil {
			return false, err
		}
		s.mu.Lock()
		for _, e := range w.Extents {
			for i := range e.Pages {
				s.sent[checkpoint.Extent{PID: e.PID, Addr: e.Addr + uint64(i)*page, Pages: 1}]++
			}
		}
		s.mu.Unlock()
	}
}

// once fails if a page was delivered twice.
func (s *source) once(t *testing.T) {
	t.Helper()
	for e, n := range s.sent {
		if n > 1 {
			t.Errorf("%v arrived %d times", e, n)
		}
	}
}

func always() bool { return true }

func TestMemoryThatChangesWhileItsPagesArriveStaysRight(t *testing.T) {
	for _, tc := range []struct {
		name    string
		threads int
		ops     int
		forks   bool
		wipe    uint64
		spawn   bool
		every   int64                  // one in so many pieces is filled
		owed    func(page uint64) bool // nil is all
	}{
		{"one thread, every page", 1, 600, false, 0, false, 1, nil},
		{"eight threads, every second page", 8, 150, false, 0, false, 4, func(i uint64) bool { return i%2 == 0 }},
		{"eight threads, runs", 8, 150, false, 0, false, 1, func(i uint64) bool { return mix(i/37)%3 > 0 }},
		{"forking all the time", 4, 40, true, 0, false, 8, func(i uint64) bool { return mix(i/7)%2 == 0 }},
		{"forking with memory that is wiped on fork", 1, 40, true, 300, false, 8, nil},
		{"served by a process of its own", 6, 100, false, 0, true, 1, func(i uint64) bool { return mix(i/5)%2 == 0 }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			if r.owed = tc.owed; r.owed == nil {
				r.owed = func(uint64) bool { return true }
			}
			var asked atomic.Int64
			r.cfg.mayFill = func() bool { return asked.Add(1)%tc.every == 0 }
			if tc.spawn {
				r.spawn()
			} else {
				r.serve()
			}
			r.connect()
			spec := newSpec(t, 6_000, "chaos")
			spec.Threads, spec.Ops, spec.ForkOften, spec.Wipe = tc.threads, tc.ops, tc.forks, tc.wipe
			task := r.restore(spec)
			src := r.source()
			var lanes sync.WaitGroup
			// What was asked for first may come last, or be lost on the way.
			for lane := range 5 {
				lanes.Go(func() {
					rng := rand.New(rand.NewPCG(spec.Seed, uint64(lane)))
					limit := checkpoint.Pages(1 + rng.IntN(40))
					err := src.pull(r, lane == 0, limit, func() bool {
						// A link takes its time, and not the same for all.
						time.Sleep(time.Duration(rng.IntN(1+lane)) * time.Millisecond) //nolint:forbidigo // is the link
						return rng.IntN(8) > 0
					})
					if err != nil {
						t.Errorf("lane %d: %v", lane, err)
					}
				})
			}
			task.say("go")
			r.finish()
			task.expect("ok")
			lanes.Wait()
			st := r.waitDone()
			t.Logf("%+v", st)
		})
	}
}

func TestFaultsAloneBringEveryPage(t *testing.T) {
	r := newRig(t)
	r.owed = func(uint64) bool { return true }
	r.serve()
	r.connect()
	spec := newSpec(t, 3000, "read")
	task := r.restore(spec)
	src := r.source()
	task.say("go")
	r.finish()
	ended := make(chan error, 1)
	go func() { ended <- src.pull(r, true, 4, always) }()
	task.expect("ok")
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if st := r.waitDone(); st.Faults == 0 || st.Owed != 0 {
		t.Errorf("%+v", st)
	}
	src.once(t)
}

func TestBeforeTheTasksRunOnlyWhatTheyWaitForIsWanted(t *testing.T) {
	r := newRig(t)
	r.owed = func(uint64) bool { return true }
	r.serve()
	r.connect()
	spec := newSpec(t, 500, "read")
	spec.Dense = true
	task := r.restore(spec)
	src := r.source()
	p, err := r.client.Pull(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	task.say("go") // CRIU has not finished, and its restorer may touch memory, too
	w, whole, err := p.Want(true, 1)
	if err != nil || whole || w.Pages() != 1 {
		t.Fatalf("%+v, whole %v, %v", w, whole, err)
	}
	if st, err := r.client.Status(r.ctx); err != nil || st.Finished {
		t.Fatalf("%+v, %v", st, err)
	}
	if err := p.Deliver(src.fetch(w)); err != nil {
		t.Fatal(err)
	}
	r.finish()
	ended := make(chan error, 1)
	go func() { ended <- src.pull(r, false, MaxPull, always) }()
	task.expect("ok")
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	r.waitDone()
}

func TestNothingIsWantedForATaskThatHasEnded(t *testing.T) {
	r := newRig(t)
	r.owed = func(uint64) bool { return true }
	r.serve()
	r.connect()
	task := r.restore(newSpec(t, 2000, "hold"))
	r.finish()
	p, err := r.client.Pull(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	w, whole, err := p.Want(false, MaxPull)
	if err != nil || whole {
		t.Fatalf("whole %v, %v", whole, err)
	}
	other, err := r.client.Pull(r.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	task.kill()
	// What is on its way comes too late, which is no error.
	for whole = false; !whole; {
		if _, whole, err = other.Want(true, 1); err != nil {
			if _, statusErr := ReadStatus(r.cfg.Control); statusErr != nil {
				t.Fatal(err, statusErr)
			}
			break // the server has ended
		}
	}
	if err := p.Deliver(make([]byte, w.Bytes())); err != nil && !errors.Is(err, ErrServerGone) {
		t.Errorf("too late: %v", err)
	}
	r.waitDone()
}

func TestAPullerThatBreaksTheProtocolLosesItsConnection(t *testing.T) {
	r := newRig(t)
	r.owed = func(uint64) bool { return true }
	r.serve()
	r.connect()
	task := r.restore(newSpec(t, 300, "hold"))
	r.finish()
	for name, abuse := range map[string]func(p *Pull) error{
		"a delivery that nobody wanted": func(p *Pull) error { return p.Deliver(make([]byte, page)) },
		"less than was wanted": func(p *Pull) error {
			if _, _, err := p.Want(false, 8); err != nil {
				t.Fatal(err)
			}
			return p.Deliver(make([]byte, page))
		},
		"two wants": func(p *Pull) error {
			if _, _, err := p.Want(false, 8); err != nil {
				t.Fatal(err)
			}
			_, _, err := p.Want(false, 8)
			return err
		},
		"too much": func(p *Pull) error {
			_, _, err := p.Want(false, MaxPull+1)
			return err
		},
		"nothing": func(p *Pull) error {
			_, _, err := p.Want(false, 0)
			return err
		},
	} {
		p, err := r.client.Pull(r.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := abuse(p); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
		}
		_ = p.Close()
	}
	src := r.source()
	if err := src.pull(r, false, MaxPull, always); err != nil {
		t.Fatal(err)
	}
	r.waitDone()
	task.say("go")
	task.expect("holding")
	task.say("verify")
	task.expect("ok")
}

func TestFaultsComeFirstThenTheirNeighbours(t *testing.T) {
	var owed pageSet
	owed.appendRun(1000, 1100)
	owed.appendRun(5000, 5100)
	needed := owed.clone()
	needed.clear(5050, 5060)
	var w wanted
	w.begin(&owed, &needed)
	take := func(urgent bool, limit checkpoint.Pages, want ...span) {
		t.Helper()
		got := w.take(urgent, limit)
		for i := range got {
			got[i] = span{got[i].start / page, got[i].end / page}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("got %v, want %v", got, want)
		}
	}
	take(true, 10)
	take(false, 10, span{1000, 1010})
	if !w.want(5045) || w.want(5045) {
		t.Error("what is known is no news")
	}
	take(true, 10, span{5045, 5050}) // nobody needs 5050
	if w.want(5046) {
		t.Error("what was asked for already is no news")
	}
	take(false, 40, span{5060, 5100}) // near the last fault
	if !w.want(1005) {
		t.Error("what is on its way with others may be slow")
	}
	take(true, 5, span{1005, 1006}) // the others are on their way
	take(true, 5)
	w.want(1050)
	take(true, 5, span{1050, 1055})
	take(true, 5)
	if left := w.settle(1050, 1055); left != 185 {
		t.Errorf("%d pages are left", left)
	}
	w.giveBack([]span{{1000 * page, 1010 * page}})
	w.near = 0
	take(false, 256, span{1000, 1050}, span{1055, 1100}, span{5000, 5045})
	take(false, 256)
}
