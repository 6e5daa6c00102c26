package transfer

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
)

// noiseMemory is memory in which nothing shrinks.
func noiseMemory(seed uint64, pages int) *memory {
	m := &memory{base: 0x7f0000000000, procs: map[checkpoint.PID][]byte{1: make([]byte, pages*page)}, rng: rand.New(rand.NewPCG(seed, 3))}
	fillNoise(m.procs[1], seed)
	return m
}

// touch changes a counter in n pages from page at.
func (m *memory) touch(at, n int) {
	for i := at; i < at+n; i++ {
		m.procs[1][i*page+m.rng.IntN(page)]++
	}
}

func TestHotPagesAreSentAsWhatChanged(t *testing.T) {
	const pages, hot = 500, 200
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	m := noiseMemory(1, pages)
	m.round(t, s, 0, pages, 50)
	m.touch(0, hot)
	if stats := m.round(t, s, 1, pages, 50); stats.Deltas != 0 || stats.Sent != hot {
		t.Errorf("what is sent again for the first time: %+v", stats)
	}
	for n := 2; n < 6; n++ {
		m.touch(0, hot)
		stats := m.round(t, s, n, pages, 50)
		if stats.Deltas != hot || stats.Sent != hot || stats.BytesSent > hot*64 {
			t.Errorf("round %d: %+v", n, stats)
		}
		sink.equal(t, m)
	}
	fillNoise(m.procs[1][:hot*page], 2)
	if stats := m.round(t, s, 6, pages, 50); stats.Deltas != 0 || stats.Raw != hot {
		t.Errorf("pages that changed as a whole: %+v", stats)
	}
	sink.equal(t, m)
	if s.versions.bytes() != hot*page {
		t.Errorf("%d bytes of versions are kept", s.versions.bytes())
	}
}

func TestADeltaIsOnlyOfWhatWasAcknowledged(t *testing.T) {
	const pages = 100
	broken := errors.New("disk on fire")
	tests := []struct {
		name string
		// between happens between two rounds that would give deltas.
		between func(t *testing.T, h *host, s *Session, sink *store, m *memory)
	}{
		{"after a round that the sink broke", func(t *testing.T, _ *host, s *Session, sink *store, m *memory) {
			m.touch(0, pages)
			sink.fail(&sink.putErr, broken)
			r, err := s.Round(t.Context(), 5)
			if err != nil {
				t.Fatal(err)
			}
			_ = m.send(r, 0, pages, 10)
			if _, err := r.Close(); err == nil {
				t.Fatal("the round did not break")
			}
			sink.fail(&sink.putErr, nil)
		}},
		{"after the link was lost in a round", func(t *testing.T, _ *host, s *Session, _ *store, m *memory) {
			m.touch(0, pages)
			r, err := s.Round(t.Context(), 5)
			if err != nil {
				t.Fatal(err)
			}
			links, err := s.usable()
			if err != nil {
				t.Fatal(err)
			}
			_ = m.send(r, 0, pages/2, 10)
			links[0].conn.CloseWithError(codeIncomplete, "lost")
			_ = m.send(r, pages/2, pages, 10)
			if _, err := r.Close(); err == nil {
				t.Fatal("the round did not break")
			}
			if err := s.Redial(t.Context()); err != nil {
				t.Fatal(err)
			}
		}},
		{"after a hole", func(t *testing.T, _ *host, s *Session, _ *store, m *memory) {
			r, err := s.Round(t.Context(), 5)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Zero(1, m.base, pages); err != nil {
				t.Fatal(err)
			}
			if _, err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}},
		{"after all was forgotten", func(_ *testing.T, _ *host, s *Session, _ *store, _ *memory) { s.Forget(1) }},
		{"after the pages were zero", func(t *testing.T, _ *host, s *Session, _ *store, m *memory) {
			kept := bytes.Clone(m.procs[1])
			clear(m.procs[1])
			m.round(t, s, 5, pages, 10)
			m.procs[1] = kept
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sink := newStore()
			h := newHost(t, hostOptions{accept: sink.accept})
			s := h.dial(t, Options{})
			m := noiseMemory(7, pages)
			for n := range 4 {
				m.touch(0, pages)
				if stats := m.round(t, s, n, pages, 10); n > 1 && stats.Deltas != pages {
					t.Fatalf("round %d: %+v", n, stats)
				}
			}
			test.between(t, h, s, sink, m)
			m.touch(0, pages)
			if stats := m.round(t, s, 6, pages, 10); stats.Deltas != 0 {
				t.Errorf("deltas: %+v", stats)
			}
			sink.equal(t, m)
			// And then there are acknowledged versions again.
			for n := range 3 {
				m.touch(0, pages)
				if stats := m.round(t, s, 7+n, pages, 10); n == 2 && stats.Deltas != pages {
					t.Errorf("round %d: %+v", 7+n, stats)
				}
				sink.equal(t, m)
			}
		})
	}
}

func TestADeltaOfAPageThatTheReceiverHasOtherwiseIsNotStored(t *testing.T) {
	const pages = 20
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	m := noiseMemory(3, pages)
	for n := range 3 {
		m.touch(0, pages)
		m.round(t, s, n, pages, 10)
	}
	wrong := bytes.Repeat([]byte{0xee}, page)
	if err := sink.PutPages(1, m.base+5*page, wrong); err != nil {
		t.Fatal(err)
	}
	m.touch(0, pages)
	r, err := s.Round(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.send(r, 0, pages, 10); err != nil {
		t.Fatal(err)
	}
	var remote *RemoteError
	if _, err := r.Close(); !errors.As(err, &remote) || remote.Code != CodeCorrupt {
		t.Fatalf("close: %v", err)
	}
	sink.mu.Lock()
	if got := sink.pages[1][m.base+5*page]; !bytes.Equal(got[:], wrong) {
		t.Error("something was stored in its place")
	}
	sink.mu.Unlock()
	if stats := m.round(t, s, 4, pages, 10); stats.Deltas != 0 {
		t.Errorf("the round after it: %+v", stats)
	}
	sink.equal(t, m)
}

// TestWhateverBreaksTheContentIsRight plays rounds with errors, holes, lost links
// and pages that change a little, much, not, or into copies of others: after each round that was
// acknowledged, the sink has the source's memory.
func TestWhateverBreaksTheContentIsRight(t *testing.T) {
	const pages = 120
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{Streams: 3})
	m := noiseMemory(9, pages)
	dirty := make([]bool, pages) // since they were last acknowledged
	for i := range dirty {
		dirty[i] = true
	}
	deltas, copies, brokenRounds := checkpoint.Pages(0), checkpoint.Pages(0), 0
	for n := range 120 {
		for i := range pages {
			switch k := m.rng.IntN(20); {
			case k < 6:
				m.touch(i, 1)
				dirty[i] = true
			case k == 6:
				fillNoise(m.procs[1][i*page:(i+1)*page], m.rng.Uint64())
				dirty[i] = true
			case k == 8:
				copy(m.procs[1][i*page:(i+1)*page], m.procs[1][m.rng.IntN(pages)*page:])
				dirty[i] = true
			case k == 7:
				clear(m.procs[1][i*page : (i+1)*page])
				dirty[i] = true
			}
		}
		failing := m.rng.IntN(4) == 0
		if failing {
			sink.fail([]*error{&sink.putErr, &sink.readErr, &sink.zeroErr}[m.rng.IntN(3)], errors.New("disk on fire"))
		}
		r, err := s.Round(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		if m.rng.IntN(3) > 0 {
			r.ReadAgain(m.readAgain)
		}
		for i := 0; i < pages && err == nil; i++ {
			content := m.procs[1][i*page : (i+1)*page]
			switch {
			case !dirty[i]:
			case m.rng.IntN(3) == 0 && bytes.Equal(content, make([]byte, page)):
				err = r.Zero(1, m.base+uint64(i*page), 1)
			default:
				err = r.Pages(1, m.base+uint64(i*page), content)
			}
		}
		stats, closeErr := r.Close()
		sink.fail(&sink.putErr, nil)
		sink.fail(&sink.readErr, nil)
		sink.fail(&sink.zeroErr, nil)
		if err := errors.Join(err, closeErr); err != nil {
			brokenRounds++
			var remote *RemoteError
			if !failing || !errors.As(err, &remote) || remote.Code != CodeSink {
				t.Fatalf("round %d: %v", n, err)
			}
			continue
		}
		deltas, copies = deltas+stats.Deltas, copies+stats.Copies
		clear(dirty)
		sink.equal(t, m)
		if m.rng.IntN(10) == 0 {
			if err := s.Redial(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if deltas < 500 || copies < 50 || brokenRounds < 5 {
		t.Errorf("%d deltas, %d copies and %d broken rounds: the test did not meet what it is about", deltas, copies, brokenRounds)
	}
}

func TestVersionsKeepWhatIsInUseAndLetTheRestGo(t *testing.T) {
	const room = minVersions / page
	var v versions
	p := make([]byte, page)
	hash := func(round, i int) xxh3.Uint128 { return xxh3.Uint128{Hi: uint64(round), Lo: uint64(i)} }
	round := func(n, from, to int) (won int) {
		v.nextRound()
		p[0] = byte(n)
		for i := from; i < to; i++ {
			if _, ok := v.delta(make([]byte, 0, page), 1, uint64(i)*page, hash(n-1, i), hash(n, i), p, 0); ok {
				won++
			}
		}
		return won
	}
	for n := 1; n <= 4; n++ {
		want := room
		if n == 1 {
			want = 0
		}
		if won := round(n, 0, 4*room); won != want {
			t.Errorf("round %d of four times as many pages as fit: %d deltas, want %d", n, won, want)
		}
	}
	if v.bytes() != minVersions {
		t.Errorf("%d bytes, want %d", v.bytes(), minVersions)
	}
	for n := 5; n <= 12; n++ {
		round(n, 8*room, 9*room)
	}
	if won := round(13, 8*room, 9*room); won != room {
		t.Errorf("pages that came in place of others: %d deltas of %d", won, room)
	}
	if v.bytes() != minVersions || len(v.pages) != len(v.keys) {
		t.Errorf("%d bytes, %d pages", v.bytes(), len(v.pages))
	}
}

func TestVersionsOfPagesThatChangeAsAWholeAreHardlyWatched(t *testing.T) {
	var v versions
	const pages, rounds = 1024, 8
	content := make([]byte, page)
	kept := 0
	for n := range rounds {
		v.nextRound()
		for i := range pages {
			fillNoise(content, uint64(n*pages+i))
			v.delta(make([]byte, 0, page), 1, uint64(i)*page, xxh3.Uint128{Hi: uint64(n), Lo: uint64(i)}, xxh3.Uint128{Hi: uint64(n + 1), Lo: uint64(i)}, content, 1<<20)
		}
		kept = 0
		for _, p := range v.pages {
			if p.round == v.round {
				kept++
			}
		}
	}
	if !v.dormant || kept != pages/dormantEvery {
		t.Errorf("%d of %d pages are still watched", kept, pages)
	}
}

// bytes is what the versions take.
func (v *versions) bytes() checkpoint.Bytes {
	v.mu.Lock()
	defer v.mu.Unlock()
	return checkpoint.Bytes(len(v.keys)) * checkpoint.PageSize
}
