package lazypages

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/pagestore"
	"github.com/tranship/tranship/internal/testenv"
)

func someSnapshot() snapshot {
	return snapshot{
		pid: 7, hostPID: 4242, start: 1 << 40, children: 3,
		spaces: []savedSpace{
			{
				id: 0, fd: 12, windows: []window{{span{0x1000, 0x5000}, 0x9000}, {span{0x8000, 0x9000}, 0x1000}},
				echoes: []span{{0x9000, 0xa000}, {0x1000, 0x2000}}, pending: []span{{1, 5}, {9, 10}},
			},
			{id: 3, fd: 40, leaving: []window{{span{0x1000, 0x2000}, 0x1000}}},
		},
		forks: []savedFork{{0, 3}},
		moves: []savedMove{{0, 0x1000, 0x2000, 0x1000}},
	}
}

func TestASnapshotComesBackAsItWas(t *testing.T) {
	for _, want := range []snapshot{
		{pid: 1, fresh: true, spaces: []savedSpace{{fd: 5}}},
		someSnapshot(),
	} {
		raw := want.encode()
		got, err := parseSnapshot(raw)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
		for n := range raw {
			if _, err := parseSnapshot(raw[:n]); !errors.Is(err, errLog) {
				t.Fatalf("cut at %d of %d bytes: %v", n, len(raw), err)
			}
		}
		if _, err := parseSnapshot(append(raw, 0)); !errors.Is(err, errLog) {
			t.Errorf("with a byte more: %v", err)
		}
	}
}

// someLog is a log in which the kernel, played by a pipe, has written.
func someLog(t testing.TB) (*eventLog, []record) {
	t.Helper()
	l, err := createLog(filepath.Join(t.TempDir(), "log"), someSnapshot().encode(), 2*eventBatch)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.close() })
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeAll(p[:]) })
	message := func(event byte, args ...uint64) []byte {
		var words [3]uint64
		copy(words[:], args)
		raw := make([]byte, 8, slotSize)
		raw[0] = event
		for _, w := range words {
			raw = nativeEndian(raw, w)
		}
		return raw
	}
	fault := message(eventPagefault, 0, 0x7000)
	for _, raw := range [][]byte{fault, message(eventRemap, 0x1000, 0x2000, 0x1000), fault, message(eventFork, 33), fault, fault} {
		if _, err := unix.Write(p[1], raw); err != nil {
			t.Fatal(err)
		}
	}
	faults := 0
	events, err := l.read(p[0], 3, func(addr uint64) {
		if faults++; addr != 0x7000 {
			t.Errorf("a fault at %#x", addr)
		}
	})
	if err != nil || len(events) != 2 || faults != 4 {
		t.Fatalf("%+v, %d faults, %v", events, faults, err)
	}
	for _, r := range []record{
		{kind: slotShift, space: 4, args: [3]uint64{1, 2, 3}}, {kind: slotApplied, space: 3}, {kind: slotDrop, space: 4},
	} {
		if !l.append(r.kind, r.space, r.args[:]...) {
			t.Fatal("full")
		}
	}
	// A batch of nothing but faults leaves no trace.
	if _, err := unix.Write(p[1], bytes.Repeat(fault, 20)); err != nil {
		t.Fatal(err)
	}
	before := l.tail
	if events, err := l.read(p[0], 0, func(uint64) {}); err != nil || len(events) > 0 || l.tail != before {
		t.Fatalf("%+v, tail %d, was %d, %v", events, l.tail, before, err)
	}
	l.append(slotSettle, 3)
	return l, []record{
		{kind: slotRead, space: 3},
		{message: message1(t, message(eventRemap, 0x1000, 0x2000, 0x1000))},
		{message: message1(t, message(eventFork, 33))},
		{kind: slotShift, space: 4, args: [3]uint64{1, 2, 3}},
		{kind: slotApplied, space: 3},
		{kind: slotDrop, space: 4},
		{kind: slotSettle, space: 3},
	}
}

func message1(t testing.TB, raw []byte) message {
	t.Helper()
	m, err := decodeMessage(raw)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func nativeEndian(b []byte, v uint64) []byte {
	for range 8 {
		b, v = append(b, byte(v)), v>>8
	}
	return b
}

func TestALogIsReadAsItWasWritten(t *testing.T) {
	l, want := someLog(t)
	raw, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	head, got, err := parseLog(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(head, someSnapshot().encode()) {
		t.Error("another snapshot")
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
}

func TestALogThatIsCutIsABeginningOfIt(t *testing.T) {
	l, want := someLog(t)
	raw, err := os.ReadFile(l.path)
	if err != nil {
		t.Fatal(err)
	}
	head := len(raw) - len(l.mem)
	for n := range raw {
		_, got, err := parseLog(raw[:n])
		switch {
		case err != nil && n >= head:
			t.Fatalf("cut at %d of %d bytes: %v", n, len(raw), err)
		case err != nil && !errors.Is(err, errLog):
			t.Fatalf("cut at %d of %d bytes: %v", n, len(raw), err)
		case err == nil && len(got) > 0 && !reflect.DeepEqual(got, want[:len(got)]):
			t.Fatalf("cut at %d of %d bytes: %+v", n, len(raw), got)
		}
	}
}

func TestAFullLogTakesNothing(t *testing.T) {
	l, _ := someLog(t)
	for l.room() > 0 {
		if !l.append(slotSettle, 0) {
			t.Fatal("refused with room")
		}
	}
	if l.append(slotSettle, 0) {
		t.Error("accepted without room")
	}
	if err := l.close(); err != nil {
		t.Error(err)
	}
	if err := l.close(); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestALogOnAFullTmpfsIsNotBegun(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	if err := os.WriteFile(path, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := createLog(path, nil, 1<<56); err == nil {
		t.Fatal("it has room for everything")
	}
	if raw, err := os.ReadFile(path); err != nil || string(raw) != "before" {
		t.Errorf("the one before is %q, %v", raw, err)
	}
}

func FuzzParseLog(f *testing.F) {
	l, _ := someLog(f)
	raw, err := os.ReadFile(l.path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, someSnapshot().encode())
	f.Fuzz(func(_ *testing.T, raw, head []byte) {
		_, _, _ = parseLog(raw)
		_, _ = parseSnapshot(head)
		page := os.Getpagesize()
		_, _, _ = parseLog(append(appendHead(nil, head), raw[:len(raw)%page]...))
	})
}

// Whatever a log says, following it ends, and with an error or spaces that have
// descriptors.
func FuzzReplay(f *testing.F) {
	l, _ := someLog(f)
	f.Add(append([]byte{}, l.mem...), someSnapshot().encode())
	f.Fuzz(func(t *testing.T, slots, head []byte) {
		records, err := parseSlots(slots)
		if err != nil || len(records) > 1000 {
			return
		}
		snap, err := parseSnapshot(head)
		if err != nil || len(snap.spaces) > 100 {
			return
		}
		fam := &family{count: &counters{}, log: slog.New(slog.DiscardHandler), probe: prober{make([]byte, checkpoint.PageSize)}}
		fds, err := fam.takeAll(snap, records, func(int) (int, error) { return 1 << 30, nil })
		if err != nil {
			t.Fatal(err)
		}
		spaces, err := fam.resume(snap, dumped{}, fds)
		if err != nil {
			return
		}
		_ = fam.replay(spaces, records, fds)
	})
}

func TestARunAfterRunOfPagesSurvivesASnapshot(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var live pageSet
	for page := uint64(5); page < 50_000; page += 1 + rng.Uint64N(900) {
		end := page + 1 + rng.Uint64N(700)
		live.appendRun(page, end)
		page = end
	}
	f := &family{live: live}
	sp := &space{fd: 3, pending: live.clone(), owed: &f.owed}
	for range 50 {
		from := rng.Uint64N(50_000)
		sp.pending.clear(from, from+rng.Uint64N(300))
	}
	f.spaces = []*space{sp}
	got, err := parseSnapshot(f.snapshot().encode())
	if err != nil {
		t.Fatal(err)
	}
	g := &family{live: live}
	spaces, err := g.resume(got, dumped{}, map[int]int{0: 3})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(spaces[0].pending, sp.pending) {
		t.Errorf("%d pages came back, %d were pending", spaces[0].pending.count, sp.pending.count)
	}
}

// smallTmpfs is a directory of half a megabyte, and what fills all of it.
func smallTmpfs(t *testing.T) (dir string, fill func() (empty func())) {
	t.Helper()
	testenv.NeedRoot(t)
	dir = t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=512k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	other := filepath.Join(dir, "other")
	return dir, func() func() {
		if err := os.WriteFile(other, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		return func() {
			if err := os.Remove(other); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Another shard that comes may fill the tmpfs, and gives up a moment later.
func TestALogThatFindsNoRoomIsBegunOnceThereIs(t *testing.T) {
	dir, fill := smallTmpfs(t)
	empty := fill()
	tried := make(chan struct{})
	f := &family{logPath: filepath.Join(dir, "log"), log: slog.New(onWarning(sync.OnceFunc(func() { close(tried) })))}
	begun := make(chan error, 1)
	go func() { begun <- f.beginLog() }()
	select {
	case <-tried:
	case err := <-begun:
		t.Fatalf("without room: %v", err)
	}
	empty()
	if err := <-begun; err != nil {
		t.Fatal(err)
	}
	if err := f.note(slotGaveUp, &space{}, 0, page); err != nil {
		t.Error(err)
	}
	if err := f.events.close(); err != nil {
		t.Error(err)
	}
}

// onWarning is a log that calls a function for each warning.
type onWarning func()

var _ slog.Handler = onWarning(nil)

func (onWarning) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }
func (h onWarning) Handle(context.Context, slog.Record) error      { h(); return nil }
func (h onWarning) WithAttrs([]slog.Attr) slog.Handler             { return h }
func (h onWarning) WithGroup(string) slog.Handler                  { return h }

func TestPlacedPagesAreGivenBackOnceThereIsRoomToNoteThem(t *testing.T) {
	dir, fill := smallTmpfs(t)
	store, err := pagestore.Create(filepath.Join(dir, "store"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := store.PutPages(1, 0x10000, bytes.Repeat([]byte{1}, 4*page)); err != nil {
		t.Fatal(err)
	}
	f := &family{task: Task{PID: 1}, store: store, filling: true, log: slog.New(slog.DiscardHandler)}
	if err := f.loadStore(); err != nil {
		t.Fatal(err)
	}
	f.spaces = []*space{{pending: f.live.empty(), owed: &f.owed}} // all is placed
	f.isTouch = make([]bool, len(f.live.groups))
	f.touchAll()
	empty := fill()
	if f.release() || f.refused.IsZero() {
		t.Fatal("there is room to note it")
	}
	empty()
	for deadline := time.Now().Add(10 * time.Second); !f.release(); {
		if time.Now().After(deadline) {
			t.Fatal("it was not tried again")
		}
	}
	if n, err := store.Bytes(); err != nil || n != 0 || len(f.touched) != 0 {
		t.Errorf("%d bytes are kept, and %d groups to look through, %v", n, len(f.touched), err)
	}
}
