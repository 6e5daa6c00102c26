package migrate

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"reflect"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/s2"
	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/lazypages"
	"github.com/tranship/tranship/checkpoint/pagestore"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

func TestWhatASetHasOfAnExtentAndWhatItLacksMakeTheWhole(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 7))
	for range 300 {
		set, model := extentSet{}, map[uint64]bool{}
		for range rng.IntN(12) {
			e := checkpoint.Extent{PID: 1, Addr: rng.Uint64N(100) * checkpoint.PageSize, Pages: checkpoint.Pages(1 + rng.IntN(9))}
			set.add(e)
			for at := e.Addr; at < e.End(); at += checkpoint.PageSize {
				model[at] = true
			}
		}
		e := checkpoint.Extent{PID: 1, Addr: rng.Uint64N(90) * checkpoint.PageSize, Pages: checkpoint.Pages(1 + rng.IntN(40))}
		got := map[uint64]bool{}
		last := uint64(0)
		for _, part := range set.common(e) {
			if part.Addr < last || part.Pages <= 0 {
				t.Fatalf("%v out of order", part)
			}
			last = part.End()
			for at := part.Addr; at < part.End(); at += checkpoint.PageSize {
				got[at] = true
			}
		}
		want := map[uint64]bool{}
		for at := e.Addr; at < e.End(); at += checkpoint.PageSize {
			if model[at] {
				want[at] = true
			}
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("%v of %v: %v", set, e, got)
		}
	}
}

func TestAnAnswerThatIsNotWhatWasAskedForIsRefused(t *testing.T) {
	data := make([]byte, 3*checkpoint.PageSize)
	for i := range data {
		data[i] = byte(i / 100)
	}
	sum := xxh3.Hash(data)
	other := append([]byte{data[0] ^ 1}, data[1:]...)
	for _, tt := range []struct {
		name string
		resp *v1.FetchResponse
		ok   bool
	}{
		{"raw", &v1.FetchResponse{Content: data, Digest: sum}, true},
		{"compressed", &v1.FetchResponse{Content: s2.Encode(nil, data), S2: true, Digest: sum}, true},
		{"a bit changed", &v1.FetchResponse{Content: other, Digest: sum}, false},
		{"a bit changed, compressed", &v1.FetchResponse{Content: s2.Encode(nil, other), S2: true, Digest: sum}, false},
		{"too short", &v1.FetchResponse{Content: data[checkpoint.PageSize:], Digest: xxh3.Hash(data[checkpoint.PageSize:])}, false},
		{"too long once unpacked", &v1.FetchResponse{Content: s2.Encode(nil, make([]byte, 1<<20)), S2: true}, false},
		{"not compressed at all", &v1.FetchResponse{Content: data, S2: true, Digest: sum}, false},
		{"nothing", &v1.FetchResponse{}, false},
	} {
		got, err := unpack(tt.resp, len(data))
		if tt.ok && (err != nil || !reflect.DeepEqual(got, data)) || !tt.ok && !errors.Is(err, errBadAnswer) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestOnlyOwedPagesAreServed asks for what a destination may not have. Nothing
// of it is read, so there need be no process.
func TestOnlyOwedPagesAreServed(t *testing.T) {
	const base = 0x7f0000000000
	s := &serving{owed: extentSet{}, hosts: map[checkpoint.PID]int{1: 1 << 30}, entry: &Entry{Shard: "s"}}
	s.owed.add(checkpoint.Extent{PID: 1, Addr: base, Pages: 1000})
	s.owed.add(checkpoint.Extent{PID: 2, Addr: base, Pages: 10}) // it has ended
	run := func(addr uint64, pages int64) *v1.PageRun { return &v1.PageRun{Address: addr, Pages: pages} }
	for name, req := range map[string]*v1.FetchRequest{
		"no page":               {Pid: 1},
		"before the first":      {Pid: 1, Runs: []*v1.PageRun{run(base-checkpoint.PageSize, 2)}},
		"behind the last":       {Pid: 1, Runs: []*v1.PageRun{run(base+999*checkpoint.PageSize, 2)}},
		"half a page":           {Pid: 1, Runs: []*v1.PageRun{run(base+1, 1)}},
		"a negative number":     {Pid: 1, Runs: []*v1.PageRun{run(base, -1)}},
		"too many":              {Pid: 1, Runs: []*v1.PageRun{run(base, int64(lazypages.MaxPull)+1)}},
		"too many in two runs":  {Pid: 1, Runs: []*v1.PageRun{run(base, int64(lazypages.MaxPull)), run(base, 1)}},
		"another process":       {Pid: 3, Runs: []*v1.PageRun{run(base, 1)}},
		"a process that is not": {Pid: 2, Runs: []*v1.PageRun{run(base, 1)}},
		"far away":              {Pid: 1, Runs: []*v1.PageRun{run(pagestore.AddressLimit, 1)}},
	} {
		if _, err := s.fetch(t.Context(), req); !errors.Is(err, runtime.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNothingIsReadOfAShardThatIsNotFrozenAnyMore(t *testing.T) {
	m := &Manager{serving: map[string]*serving{}}
	s := &serving{m: m, entry: &Entry{ID: "x", Shard: "s"}}
	m.serving["x"] = s
	m.endServing("x")
	m.endServing("x")
	if _, err := s.read(os.Getpid(), nil, 1); err == nil {
		t.Error("it is read")
	}
}

func TestPagesOfAProcessThatDiedAreLostAndNotZero(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	s := &serving{entry: &Entry{Shard: "s"}}
	if data, err := s.read(cmd.Process.Pid, []checkpoint.Extent{{PID: 1, Addr: 0x1000, Pages: 1}}, 1); err == nil {
		t.Errorf("%d bytes of a process that is gone", len(data))
	}
}

func TestAVerdictIsCarriedOutOnceOrNever(t *testing.T) {
	life, stop := context.WithCancel(t.Context())
	s := &serving{m: &Manager{life: life}, verdicts: make(chan verdict), over: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := s.decide(ctx, keepThere, ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("before it is served: %v", err)
	}
	go func() {
		v := <-s.verdicts
		v.done <- nil
		close(s.over)
	}()
	for range 2 { // the second is a repetition
		if err := s.decide(t.Context(), keepThere, ""); err != nil {
			t.Error(err)
		}
	}
	stop()
	s = &serving{m: s.m, verdicts: make(chan verdict), over: make(chan struct{})}
	if err := s.decide(t.Context(), keepThere, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("when the daemon stops: %v", err)
	}
}

func TestWhatIsFetchedKeepsBelowTheBandwidth(t *testing.T) {
	at := time.Unix(1000, 0)
	p := pace{rate: 1e6}
	var delay time.Duration
	for range 100 {
		delay = p.reserve(at, 100_000)
	}
	if want := 9900*time.Millisecond - paceCredit; delay < want-time.Millisecond || delay > want+time.Millisecond {
		t.Errorf("the hundredth waits %v, want %v", delay, want)
	}
	if delay := (&pace{}).reserve(at, 1<<30); delay != 0 {
		t.Errorf("unlimited waits %v", delay)
	}
}

func TestPostCopyIsNeverThrottled(t *testing.T) {
	req := &v1.MigrateRequest{Shard: "s", Node: "n", Mode: ModePostCopy}
	if err := normalise(req); err != nil || !req.GetNoThrottle() {
		t.Errorf("%v, no throttle %v", err, req.GetNoThrottle())
	}
	o := &outgoing{req: req}
	if o.maxRounds() != 2 {
		t.Errorf("%d rounds", o.maxRounds())
	}
}

func TestACommittedMigrationCannotBeCancelled(t *testing.T) {
	o := &outgoing{entry: &Entry{ID: "x", Shard: "s", Peer: "there"}}
	o.committed.Store(true)
	m := &Manager{outgoing: map[string]*outgoing{"x": o}}
	_, err := m.Cancel(t.Context(), connect.NewRequest(&v1.CancelRequest{Id: "x"}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Error(err)
	}
}

func TestASealWithoutTheListOfOwedPagesIsRefused(t *testing.T) {
	raw := pagestore.AppendOwed(nil, map[checkpoint.PID][]checkpoint.Extent{1: {{PID: 1, Addr: 0x1000, Pages: 3}}})
	in := &incoming{entry: &Entry{Mode: ModePostCopy, State: Running}}
	if err := in.owe(xxh3.Hash(raw)); err == nil {
		t.Error("sealed without a list")
	}
	if err := in.takeOwed(bytes.NewReader(raw[:len(raw)-1])); !errors.Is(err, pagestore.ErrOwedList) {
		t.Errorf("a list that is cut: %v", err)
	}
	if err := in.takeOwed(bytes.NewReader(raw)); err != nil {
		t.Fatal(err)
	}
	if err := in.owe(xxh3.Hash(raw) + 1); err == nil {
		t.Error("sealed with another list than was sent")
	}
	in.arrived.Store(checkpoint.PageSize)
	if got := in.stillOwed(); got != 2*checkpoint.PageSize {
		t.Errorf("%d bytes are still to come", got)
	}
	in.entry.Mode = ModePreCopy
	if err := in.takeOwed(bytes.NewReader(raw)); err == nil {
		t.Error("owed pages without post-copy")
	}
}
