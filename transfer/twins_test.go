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
	// inside, if not nil, gets EachTwin's context, whose end EachTwin waits for.
	inside chan context.Context
	reads  int
}

var _ Twins = (*neighbour)(nil)

func (n *neighbour) accept(context.Context, string, string) (Sink, error) { return n, nil }

func (n *neighbour) EachTwin(ctx context.Context, limit checkpoint.Pages, found func(Twin, []byte) error) error {
	if n.inside != nil {
		n.inside <- ctx
		<-ctx.Done()
		return context.Cause(ctx)
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

// besideOne is a session with a host where a shard with the same memory runs.
func besideOne(t *testing.T, seed uint64, pages int) (*memory, *neighbour, *Session) {
	t.Helper()
	m := noiseMemory(seed, pages)
	sink := beside(m)
	return m, sink, newHost(t, hostOptions{accept: sink.accept}).dial(t, Options{})
}

// comparing begins a round and has it ask for pages of other shards, of which it
// must be told want.
func comparing(t *testing.T, s *Session, m *memory, n int, pages, want checkpoint.Pages) *Round {
	t.Helper()
	r, told, err := m.asking(t, s, n, pages)
	if err != nil || told != want {
		t.Errorf("told of %d pages, %v; want %d", told, err, want)
	}
	return r
}

func (m *memory) asking(t *testing.T, s *Session, n int, pages checkpoint.Pages) (r *Round, told checkpoint.Pages, err error) {
	t.Helper()
	r, err = s.Round(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	r.ReadAgain(m.readAgain)
	done := make(chan struct{})
	r.AskTwins(pages, func(n checkpoint.Pages, e error) {
		told, err = n, e
		close(done)
	})
	<-done
	return r, told, err
}

// finish sends the first pages and closes the round.
func (m *memory) finish(t *testing.T, r *Round, to int) RoundStats {
	t.Helper()
	sendErr := m.send(r, 0, to, 20)
	stats, err := r.Close()
	if err := errors.Join(sendErr, err); err != nil {
		t.Fatal(err)
	}
	return stats
}

func TestPagesOfAnotherShardAreNotSent(t *testing.T) {
	const pages = 3 * wire.MaxTags / 2 // more than a frame tells of
	m := noiseMemory(40, pages)
	clear(m.procs[1][:10*page]) // of zero pages nothing is told
	sink := beside(m)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	r, told, err := m.asking(t, s, 0, pages)
	if err != nil || told > pages-10 || told < pages-15 { // one run in fourteen has two pages with one tag
		t.Fatalf("told of %d pages, %v", told, err)
	}
	stats := m.finish(t, r, pages)
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
	m, sink, s := besideOne(t, 41, pages)
	r := comparing(t, s, m, 0, pages, pages)
	sink.overwrite(100, 101)
	sink.overwrite(255, 300)
	stats := m.finish(t, r, pages)
	sink.equal(t, m)
	if stats.Twins != pages-46 || stats.Sent != pages {
		t.Errorf("%+v", stats)
	}
}

func TestADyingShardsPagesAreSent(t *testing.T) {
	const pages = 100
	m, sink, s := besideOne(t, 42, pages)
	r := comparing(t, s, m, 0, pages, pages)
	sink.mu.Lock()
	sink.memory = nil
	sink.mu.Unlock()
	stats := m.finish(t, r, pages)
	sink.equal(t, m)
	if stats.Twins != 0 || stats.Sent != pages {
		t.Errorf("%+v", stats)
	}
}

func TestWhatWasToldHoldsForOneRound(t *testing.T) {
	const pages = 60
	m, sink, s := besideOne(t, 43, pages)
	m.finish(t, comparing(t, s, m, 0, pages, pages), 20)
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
	m, sink, s := besideOne(t, 44, 300)
	if stats := m.finish(t, comparing(t, s, m, 0, 200, 200), 300); stats.Twins != 200 || stats.Sent != 300 {
		t.Errorf("%+v", stats)
	}
	sink.equal(t, m)
	m.finish(t, comparing(t, s, m, 1, 1<<40, 300), 300)
	m.finish(t, comparing(t, s, m, 2, -1, 0), 300)
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
	m.finish(t, comparing(t, s, m, 0, 30, 0), 30)
	plain.equal(t, m)

	sink := beside(m)
	sink.err = errors.New("no memory today")
	h = newHost(t, hostOptions{accept: sink.accept})
	s = h.dial(t, Options{})
	r, _, err := m.asking(t, s, 0, 30)
	var remote *RemoteError
	if !errors.As(err, &remote) || remote.Code != CodeSink {
		t.Errorf("%v", err)
	}
	m.finish(t, r, 30) // what came before the error may be used
	sink.equal(t, m)
}

// A round that is over waits for no answer, and the receiver stops looking.
func TestARoundEndsItsQuestion(t *testing.T) {
	m := noiseMemory(46, 10)
	sink := beside(m)
	sink.inside = make(chan context.Context)
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	r, err := s.Round(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan error, 1)
	r.ReadAgain(m.readAgain)
	r.AskTwins(10, func(_ checkpoint.Pages, err error) { told <- err })
	looking := <-sink.inside
	if stats := m.finish(t, r, 10); stats.Twins != 0 || stats.Sent != 10 {
		t.Errorf("%+v", stats)
	}
	if err := <-told; err != nil {
		t.Errorf("told %v", err)
	}
	<-looking.Done()
	sink.equal(t, m)
}

func TestOneQuestionForPagesIsAnsweredAtATime(t *testing.T) {
	m := noiseMemory(48, 10)
	sink := beside(m)
	sink.inside = make(chan context.Context)
	h := newHost(t, hostOptions{accept: sink.accept})
	p := h.raw(t, alpnPages)
	p.hello()
	ask := wire.Ask{Seed: 1, Pages: 10}.Append(nil)
	first := p.say(ask)
	<-sink.inside
	nothing := func([]byte) { t.Error("told of pages") }
	var remote *RemoteError
	if _, err := readTags(p.say(ask), 10, nothing); !errors.As(err, &remote) || remote.Code != CodeBusy {
		t.Errorf("%v", err)
	}
	first.CancelRead(streamAborted)
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
	if n, err := readTags(p.say(wire.Ask{Seed: 42, Pages: 4}.Append(nil)), 4, func([]byte) {}); err != nil || n != 4 {
		t.Fatalf("%d pages, %v", n, err)
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
			if n, err := readTags(bytes.NewReader(answer), 1, func([]byte) {}); err == nil {
				t.Errorf("%d pages", n)
			}
		})
	}
}
