package transfer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/wire"
)

// neighbour is a Sink beside which another shard runs.
type neighbour struct {
	*store
	mu     sync.Mutex
	memory []byte // of its one process, 77, from address 0
	err    error  // of EachTwin
	asked  checkpoint.Pages
	inside chan struct{} // if not nil, EachTwin waits for it
	reads  int
}

var _ Twins = (*neighbour)(nil)

func (n *neighbour) accept(context.Context, string, string) (Sink, error) { return n, nil }

func (n *neighbour) EachTwin(_ context.Context, limit checkpoint.Pages, found func(Twin, []byte) error) error {
	if n.inside != nil {
		n.inside <- struct{}{}
		<-n.inside
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = limit
	for at := 0; at < min(len(n.memory), int(limit.Bytes())); at += page {
		if err := found(Twin{77, uint64(at)}, n.memory[at:at+page]); err != nil {
			return err
		}
	}
	return n.err
}

func (n *neighbour) ReadTwin(at Twin, dst []byte) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.reads++
	if at.Process != 77 || at.Addr >= uint64(len(n.memory)) {
		return errors.New("no such process")
	}
	copy(dst, n.memory[at.Addr:])
	return nil
}

// looked is how often a page was read again.
func (n *neighbour) looked() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.reads
}

// overwrite changes pages of the neighbour's memory.
func (n *neighbour) overwrite(from, to int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	fillNoise(n.memory[from*page:to*page], 99)
}

func beside(m *memory) *neighbour {
	return &neighbour{store: newStore(), memory: bytes.Clone(m.procs[1])}
}

func ask(t *testing.T, s *Session, pages checkpoint.Pages, want checkpoint.Pages) {
	t.Helper()
	if n, err := s.AskTwins(t.Context(), pages); err != nil || n != want {
		t.Fatalf("%d pages of other shards, %v; want %d", n, err, want)
	}
}

func TestPagesOfAnotherShardAreNotSent(t *testing.T) {
	const pages = 3 * wire.MaxTags / 2 // more than a frame tells of
	m := noiseMemory(40, pages)
	clear(m.procs[1][:10*page]) // of zero pages nothing is told
	sink := beside(m)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	told, err := s.AskTwins(t.Context(), pages)
	if err != nil || told > pages-10 || told < pages-15 { // one run in fourteen has two pages with one tag
		t.Fatalf("told of %d pages, %v", told, err)
	}
	stats := m.referring(t, s, 0, pages)
	sink.equal(t, m)
	if stats.Twins != told || stats.Zeros != 10 || stats.Copies != 0 || stats.Sent != pages-10 {
		t.Errorf("told of %d pages: %+v", told, stats)
	}
	if limit := checkpoint.Bytes(pages * 20); stats.BytesSent > limit+2*(pages-10-told).Bytes() {
		t.Errorf("%d bytes for %d pages that are there", stats.BytesSent, pages)
	}
	if again := m.referring(t, s, 1, pages); again.Unchanged != pages || again.Sent != 0 {
		t.Errorf("what another shard had is not remembered: %+v", again)
	}
}

func TestWhatTheOtherShardHasNoMoreIsSent(t *testing.T) {
	const pages = 500
	m := noiseMemory(41, pages)
	sink := beside(m)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	ask(t, s, pages, pages)
	sink.overwrite(100, 101)
	sink.overwrite(255, 300)
	stats := m.referring(t, s, 0, pages)
	sink.equal(t, m)
	if stats.Twins != pages-46 || stats.Sent != pages {
		t.Errorf("%+v", stats)
	}
}

func TestADyingShardsPagesAreSent(t *testing.T) {
	const pages = 100
	m := noiseMemory(42, pages)
	sink := beside(m)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	ask(t, s, pages, pages)
	sink.mu.Lock()
	sink.memory = nil
	sink.mu.Unlock()
	stats := m.referring(t, s, 0, pages)
	sink.equal(t, m)
	if stats.Twins != 0 || stats.Sent != pages {
		t.Errorf("%+v", stats)
	}
}

func TestWhatWasToldHoldsForOneRound(t *testing.T) {
	const pages = 60
	m := noiseMemory(43, pages)
	sink := beside(m)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	ask(t, s, pages, pages)
	m.referring(t, s, 0, 20)
	if stats := m.referring(t, s, 1, pages); stats.Twins != 0 || stats.Sent != pages-20 || sink.looked() != 20 {
		t.Errorf("%+v, %d pages were read", stats, sink.looked())
	}
	sink.equal(t, m)

	// A sender that refers to it nevertheless is told that it is gone.
	r, err := s.Round(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	r.ReadAgain(m.readAgain)
	s.memory.twins = map[uint32]struct{}{}
	for at := 0; at < pages; at++ {
		fillNoise(m.procs[1][at*page:(at+1)*page], uint64(1000+at))
		s.memory.twins[uint32(xxh3.Hash128Seed(m.procs[1][at*page:(at+1)*page], s.memory.seed).Lo)] = struct{}{}
	}
	sendErr := m.send(r, 0, pages, 20)
	stats, err := r.Close()
	if err := errors.Join(sendErr, err); err != nil || stats.Twins != 0 || stats.Sent != pages {
		t.Errorf("%v, %+v", err, stats)
	}
	sink.equal(t, m)
}

func TestOnlySomePagesOfOtherShardsAreAskedFor(t *testing.T) {
	m := noiseMemory(44, 300)
	sink := beside(m)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	ask(t, s, 200, 200)
	if stats := m.referring(t, s, 0, 300); stats.Twins != 200 || stats.Sent != 300 {
		t.Errorf("%+v", stats)
	}
	sink.equal(t, m)
	ask(t, s, 1<<40, 300)
	sink.mu.Lock()
	defer sink.mu.Unlock()
	if sink.asked != wire.MaxTwins {
		t.Errorf("asked for %d pages", sink.asked)
	}
}

func TestAReceiverThatCannotTellIsNoError(t *testing.T) {
	m := noiseMemory(45, 30)
	plain := newStore()
	h := newHost(t, hostOptions{accept: plain.accept})
	s := h.dial(t, Options{})
	ask(t, s, 30, 0)
	m.referring(t, s, 0, 30)
	plain.equal(t, m)

	sink := beside(m)
	sink.err = errors.New("no memory today")
	h = newHost(t, hostOptions{accept: sink.accept})
	s = h.dial(t, Options{})
	var remote *RemoteError
	if _, err := s.AskTwins(t.Context(), 30); !errors.As(err, &remote) || remote.Code != CodeSink {
		t.Errorf("%v", err)
	}
	if stats := m.referring(t, s, 0, 30); stats.Twins != 0 {
		t.Errorf("%+v", stats)
	}
	sink.equal(t, m)
}

func TestOneQuestionForPagesIsAnsweredAtATime(t *testing.T) {
	m := noiseMemory(46, 10)
	sink := beside(m)
	sink.inside = make(chan struct{})
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	first := make(chan error, 1)
	go func() {
		_, err := s.AskTwins(t.Context(), 10)
		first <- err
	}()
	<-sink.inside
	var remote *RemoteError
	if _, err := s.AskTwins(t.Context(), 10); !errors.As(err, &remote) || remote.Code != CodeBusy {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.AskTwins(ctx, 10); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	sink.inside <- struct{}{}
	if err := <-first; err != nil {
		t.Error(err)
	}
}

// A peer may name pages by any hash: it gets what has it, or nothing.
func TestTheReceiverKeepsOnlyTwinsWithTheHash(t *testing.T) {
	m := noiseMemory(47, 4)
	sink := beside(m)
	h := newHost(t, hostOptions{accept: sink.accept})
	p := h.raw(t, alpnPages)
	p.hello()
	sum := func(data []byte, seed uint64) []byte {
		is := xxh3.Hash128Seed(data, seed)
		return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, is.Hi), is.Lo)
	}
	one := m.procs[1][:page]
	if tags, err := readTags(p.say(wire.Ask{Seed: 42, Pages: 4}.Append(nil)), 4); err != nil || len(tags) != 4 {
		t.Fatalf("%v, %v", tags, err)
	}
	sameTag := sum(one, 42)
	sameTag[0]++
	sums := slices.Concat(sum(one, 42), sameTag, sum(bytes.Repeat([]byte{1}, page), 42), make([]byte, 16))
	say := func(seed, epoch uint64, missing []byte) {
		t.Helper()
		copies := wire.Copies{Seed: seed, Sums: sums, Runs: []wire.Copy{{PID: 2, Addr: 4 * page, Pages: 4}}}
		answer, err := readAnswer(t.Context(), p.say(join(wire.OpenRound{Epoch: epoch}, copies, wire.EndRound{Tally: wire.Tally{Copies: 4}})))
		if err != nil || !bytes.Equal(answer.Missing, missing) || answer.Copies+answer.Missed != 4 {
			t.Fatalf("%+v, %v", answer, err)
		}
	}
	say(43, 1, []byte{0b1111}) // hashes with another seed
	say(42, 1, []byte{0b1110})
	sink.store.mu.Lock()
	if got := sink.pages[2][4*page]; !bytes.Equal(got[:], one) || len(sink.pages[2]) != 1 {
		t.Errorf("%d pages are kept", len(sink.pages[2]))
	}
	sink.store.mu.Unlock()
	say(42, 2, []byte{0b1111}) // of the next round
}

func TestTagsAreRefused(t *testing.T) {
	have := wire.Have{Tags: []byte{0, 0, 0, 1, 0, 0, 0, 2}}
	for name, answer := range map[string][]byte{
		"more than were asked for": join(wire.Have{Tags: make([]byte, 0)}, have)[2:],
		"other than are told of":   join(wire.Have{Tags: have.Tags[:4]}, wire.Answer{Bytes: 2}),
		"without an end":           have.Append(nil)[:6],
		"of another kind":          join(wire.Ask{}),
		"after a failure":          join(wire.Answer{Code: "sink", Text: "broken"}),
	} {
		t.Run(name, func(t *testing.T) {
			if tags, err := readTags(bytes.NewReader(answer), 1); err == nil {
				t.Errorf("%v", tags)
			}
		})
	}
}
