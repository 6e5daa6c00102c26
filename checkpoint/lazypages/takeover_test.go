package lazypages

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// killServer is what a daemon hears of a server that was killed.
func (r *rig) killServer() {
	r.t.Helper()
	if err := unix.Kill(r.proc.PID(), unix.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
	_ = r.proc.Wait()
}

func (r *rig) takeOver() error {
	r.t.Helper()
	proc, err := Spawn(r.ctx, []string{os.Args[0], "--take-over"}, r.cfg, filepath.Join(r.cfg.Images, "page-server.log"))
	if err == nil {
		r.proc = proc
	}
	return err
}

func (r *rig) mustTakeOver() {
	r.t.Helper()
	if err := r.takeOver(); err != nil {
		r.t.Fatal(err)
	}
}

// holder is the process that has the descriptors beside the server.
func (r *rig) holder() proc {
	r.t.Helper()
	s, err := readFillState(r.cfg.Store)
	if err != nil {
		r.t.Fatal(err)
	}
	return s.Holder
}

// isOver says whether the server has ended well.
func (r *rig) isOver() bool {
	st, err := ReadStatus(r.cfg.Control)
	return err == nil && st.State.Final()
}

// torment kills the server, its holder, or a server that is taking over, at
// random moments, until everything is placed or it was done so often.
func (r *rig) torment(seed uint64, times int, longest time.Duration) (takeovers, holders int) {
	r.t.Helper()
	rng := rand.New(rand.NewPCG(seed, 99))
	for range times {
		// A random moment of a server's life is what the test is about.
		time.Sleep(time.Duration(rng.Int64N(int64(longest)))) //nolint:forbidigo // as it says
		if rng.IntN(3) == 0 {
			if r.isOver() {
				return
			}
			// Another comes before the server may be killed, or both were.
			before := r.holder()
			if before.kill(r.ctx) == nil {
				for h := before; (h == before || !h.alive()) && !r.isOver(); h = r.holder() {
				}
				holders++
			}
			continue
		}
		r.killServer()
		if r.isOver() { // and maybe its holder is not, which the daemon sees to
			if err := LetGo(r.ctx, r.cfg.Store); err != nil {
				r.t.Fatal(err)
			}
			return
		}
		for rng.IntN(3) == 0 { // so early that it may not have begun
			r.killTakeOver(time.Duration(rng.Int64N(int64(longest))))
		}
		if err := r.takeOver(); err != nil {
			if r.isOver() {
				return
			}
			r.t.Fatal(err)
		}
		takeovers++
	}
	return
}

// killTakeOver starts a server that takes over, and kills it.
func (r *rig) killTakeOver(after time.Duration) {
	r.t.Helper()
	cmd := command(r.cfg, os.Args[0], "--take-over")
	log, err := os.OpenFile(filepath.Join(r.cfg.Images, "page-server.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	time.Sleep(after) //nolint:forbidigo // the moment is what is tried
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

func TestMemoryStaysRightWhateverIsKilled(t *testing.T) {
	for _, tc := range []struct {
		name    string
		threads int
		ops     int
		forks   bool
		wipe    uint64
		every   int
		owed    func(page uint64) bool
		after   time.Duration
	}{
		{"one thread", 1, 1500, false, 0, 10, nil, 0},
		{"four threads", 4, 600, false, 0, 10, nil, 0},
		{"forking all the time", 3, 80, true, 0, 10, nil, 0},
		{"forking before it is filled", 3, 80, true, 0, 10, nil, 150 * time.Millisecond},
		{"forking with memory that is wiped on fork", 1, 100, true, 300, 10, nil, 0},
		{"with pages that arrive", 4, 300, false, 0, 10, func(i uint64) bool { return mix(i/7)%2 == 0 }, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			r.seal = true
			r.every, r.owed, r.cfg.FillAfter = tc.every, tc.owed, tc.after
			r.spawn()
			r.connect()
			spec := newSpec(t, 3000, "chaos")
			spec.Threads, spec.Ops, spec.ForkOften, spec.Wipe = tc.threads, tc.ops, tc.forks, tc.wipe
			task := r.restore(spec)
			still := r.restore(taskSpec{Seed: spec.Seed, Base: spec.Base, Pages: 1000, Threads: 2, Scenario: "hold"})
			src := r.source()
			r.finish()
			var lanes sync.WaitGroup
			for lane := range 3 {
				if tc.owed != nil {
					lanes.Go(func() { src.pullThrough(r, lane == 0) })
				}
			}
			task.say("go")
			takeovers, holders := r.torment(spec.Seed, 16, 30*time.Millisecond)
			task.expect("ok")
			lanes.Wait()
			r.awaitDone()
			still.say("go")
			still.expect("holding")
			still.say("verify")
			still.expect("ok")
			t.Logf("%d servers and %d holders were killed", takeovers, holders)
			if takeovers == 0 {
				t.Error("nothing was killed while it filled")
			}
			r.mustHoldNothing()
		})
	}
}

// pullThrough pulls until every page is there, whoever serves.
func (s *source) pullThrough(r *rig, urgent bool) {
	for !r.isOver() && r.ctx.Err() == nil {
		p, err := r.client.Pull(r.ctx)
		if err != nil {
			time.Sleep(time.Millisecond) //nolint:forbidigo // nobody serves just now
			continue
		}
		again, err := s.work(p, urgent, 30, always)
		_ = p.Close()
		if !again && err == nil {
			return
		}
	}
}

// awaitDone takes over until the server that serves now ends well.
func (r *rig) awaitDone() {
	r.t.Helper()
	if _, err := r.client.WaitDone(r.ctx); err != nil {
		r.t.Fatal(err)
	}
	_ = r.proc.Wait()
	if size, err := r.store.Bytes(); err != nil || size != 0 {
		r.t.Fatalf("the store still takes %d bytes, %v", size, err)
	}
}

// mustHoldNothing checks that no process is left.
func (r *rig) mustHoldNothing() {
	r.t.Helper()
	s, err := readFillState(r.cfg.Store)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, p := range append(s.Strays, s.Holder, s.Server) {
		if p.alive() {
			r.t.Errorf("%v is alive", p)
		}
	}
	logs, err := filepath.Glob(filepath.Join(r.cfg.Store, "*"+logSuffix+"*"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, path := range logs {
		if !strings.HasSuffix(path, fmt.Sprint(logSuffix, s.Epoch)) {
			r.t.Errorf("%s is left", path)
		}
	}
}

// It counts from the end of the restore, whoever serves.
func TestFillingMayBeginLater(t *testing.T) {
	for _, tc := range []struct {
		name      string
		after     time.Duration
		clockStep time.Duration // between the restore and the takeover
	}{
		{"the time has passed when another takes over", time.Hour, 2 * time.Hour},
		{"the clock is set back", 20 * time.Millisecond, -2 * time.Hour},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			r.cfg.FillAfter = time.Hour
			r.spawn()
			r.connect()
			still, reader := r.restore(newSpec(t, 3000, "hold")), r.restore(newSpec(t, 1000, "hold"))
			r.finish()
			for _, task := range []*restored{still, reader} {
				task.say("go")
				task.expect("holding")
			}
			reader.say("verify") // faults are answered
			reader.expect("ok")
			st, err := r.client.Status(r.ctx)
			if err != nil {
				t.Fatal(err)
			}
			if st.State != StateFinished || st.Remaining < 1000 {
				t.Errorf("%+v", st)
			}
			r.killServer()
			state, err := readFillState(r.cfg.Store)
			if err != nil {
				t.Fatal(err)
			}
			state.FinishedAt = state.FinishedAt.Add(-tc.clockStep)
			if err := state.write(r.cfg.Store); err != nil {
				t.Fatal(err)
			}
			r.cfg.FillAfter = tc.after
			r.mustTakeOver()
			r.awaitDone()
			still.say("verify")
			still.expect("ok")
		})
	}
}

// half spawns a server that fills nothing by itself, with a task that holds.
func half(t *testing.T) (*rig, *restored) {
	t.Helper()
	r := newRig(t)
	r.every = 1 << 30
	r.spawn()
	r.connect()
	task := r.restore(newSpec(t, 3000, "hold"))
	r.finish()
	task.say("go")
	task.expect("holding")
	return r, task
}

func TestAThreadThatWaitsForItsPageOutlivesTheServer(t *testing.T) {
	r, task := half(t)
	r.killServer()
	task.say("verify") // waits, whichever page it begins with
	if h := Look(r.cfg.Store); !h.Held || h.Served {
		t.Fatalf("%+v", h)
	}
	r.mustTakeOver()
	task.expect("ok")
	r.awaitDone()
}

func TestClientsSeeTheEndOfAServerThatHasAHolder(t *testing.T) {
	r, task := half(t)
	waited := make(chan error, 1)
	go func() {
		_, err := r.client.WaitDone(r.ctx)
		waited <- err
	}()
	r.killServer()
	if err := <-waited; !errors.Is(err, ErrServerGone) {
		t.Fatalf("WaitDone: %v", err)
	}
	if _, err := r.client.Status(r.ctx); !errors.Is(err, ErrServerGone) {
		t.Fatalf("Status: %v", err)
	}
	// It closes one after the other.
	dir := fmt.Sprintf("/proc/%d/fd", r.holder().PID)
	for {
		held, other := 0, ""
		fds, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			switch link, _ := os.Readlink(filepath.Join(dir, fd.Name())); {
			case link == "anon_inode:[userfaultfd]":
				held++
			case strings.HasPrefix(link, "socket:"), strings.HasPrefix(link, "/"), strings.HasPrefix(link, "pipe:"):
				other = link
			}
		}
		if held != 1 {
			t.Fatalf("the holder has %d userfaultfds", held)
		}
		if other == "" {
			break
		}
		if r.ctx.Err() != nil {
			t.Fatalf("the holder has %s", other)
		}
	}
	r.mustTakeOver()
	task.say("verify")
	task.expect("ok")
	r.awaitDone()
}

func TestNobodyGoesOnWhenBothAreKilled(t *testing.T) {
	r, task := half(t)
	if err := unix.Kill(r.proc.PID(), unix.SIGSTOP); err != nil { // or it has another at once
		t.Fatal(err)
	}
	if err := r.holder().kill(r.ctx); err != nil {
		t.Fatal(err)
	}
	r.killServer()
	if h := Look(r.cfg.Store); h.Held || h.Served || h.FinishedAt.IsZero() {
		t.Fatalf("%+v", h)
	}
	if err := r.takeOver(); err == nil || !strings.Contains(err.Error(), ErrLost.Error()) {
		t.Fatalf("took over: %v", err)
	}
	task.mustBeKilled() // by the one who saw it first
}

func TestARestoreThatHadNotFinishedIsNotTakenOver(t *testing.T) {
	r := newRig(t)
	r.spawn()
	r.connect()
	task := r.restore(newSpec(t, 100, "hold"))
	r.killServer()
	if err := r.takeOver(); err == nil || !strings.Contains(err.Error(), errUnfinished.Error()) {
		t.Fatalf("took over: %v", err)
	}
	if err := LetGo(r.ctx, r.cfg.Store); err != nil {
		t.Fatal(err)
	}
	task.kill()
}

func TestAServerThatLivesIsNotTakenOver(t *testing.T) {
	r, task := half(t)
	first := r.proc
	if err := r.takeOver(); err == nil || !strings.Contains(err.Error(), errServed.Error()) {
		t.Fatalf("took over: %v", err)
	}
	if r.proc != first {
		t.Fatal("another serves")
	}
	if st, err := r.client.Status(r.ctx); err != nil || st.State != StateFilling {
		t.Fatalf("%+v, %v", st, err)
	}
	task.say("verify")
	task.expect("ok")
	r.awaitDone()
}

func TestADamagedLogIsRefusedAndNothingIsLostByThat(t *testing.T) {
	r, task := half(t)
	r.killServer()
	path := logPath(r.cfg.Store, checkpoint.PID(task.pid), 0)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	damaged := append([]byte{}, whole...)
	damaged[len(logMagic)+9] ^= 1
	if err := os.WriteFile(path, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.takeOver(); err == nil || !strings.Contains(err.Error(), errLog.Error()) {
		t.Fatalf("took over: %v", err)
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	r.mustTakeOver()
	task.say("verify")
	task.expect("ok")
	r.awaitDone()
}
