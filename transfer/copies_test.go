package transfer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/wire"
)

// readAgain reads a page of a source's memory.
func (m *memory) readAgain(pid checkpoint.PID, addr uint64, dst []byte) (bool, error) {
	copy(dst, m.procs[pid][addr-m.base:])
	return true, nil
}

// referring sends a whole round, of the first pages, that may name pages by others.
func (m *memory) referring(t testing.TB, s *Session, n, to int) RoundStats {
	t.Helper()
	r, err := s.Round(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	r.ReadAgain(m.readAgain)
	sendErr := m.send(r, 0, to, 20)
	stats, err := r.Close()
	if err := errors.Join(sendErr, err); err != nil {
		t.Fatal(err)
	}
	return stats
}

// forked makes processes with the same memory.
func forked(procs, pages int) *memory {
	m := noiseMemory(30, pages)
	for pid := 2; pid <= procs; pid++ {
		m.procs[checkpoint.PID(pid)] = bytes.Clone(m.procs[1])
	}
	return m
}

func TestForkedProcessesAreSentOnce(t *testing.T) {
	const procs, pages = 4, 300
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	m := forked(procs, pages)
	stats := m.referring(t, s, 0, pages)
	sink.equal(t, m)
	// Pages that want the same place in the index are sent: a few.
	if all := checkpoint.Pages((procs - 1) * pages); stats.Copies < all*8/10 || stats.Copies > all {
		t.Errorf("%d of %d pages went as copies: %+v", stats.Copies, all, stats)
	}
	if stats.Sent != procs*pages || stats.Sent != stats.Copies+stats.Raw+stats.S2+stats.Zstd+stats.Deltas {
		t.Errorf("the counts do not add up: %+v", stats)
	}
	if limit := checkpoint.Bytes((procs*pages - int(stats.Copies)) * (page + 100)); stats.BytesSent > limit+checkpoint.Bytes(stats.Copies)*64 {
		t.Errorf("%d bytes for %d pages and %d copies", stats.BytesSent, procs*pages-int(stats.Copies), stats.Copies)
	}
	if again := m.referring(t, s, 1, pages); again.Unchanged != procs*pages {
		t.Errorf("what went as copies is not remembered: %+v", again)
	}
}

func TestWithoutReadAgainNothingIsLeftOut(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	m := forked(2, 50)
	if stats := m.round(t, s, 0, 50, 10); stats.Copies != 0 || stats.Sent != 100 {
		t.Errorf("%+v", stats)
	}
}

func TestAPageWhoseOtherIsNoMoreIsReadAgain(t *testing.T) {
	const pages = 8
	x := bytes.Repeat([]byte("x"), page)
	y := bytes.Repeat([]byte("y"), page)
	late := bytes.Repeat([]byte("l"), page)
	tests := []struct {
		name string
		// what becomes of page 0, which had x, in the round in which page 1 gets it
		before, after func(t *testing.T, r *Round, m *memory, sink *store)
	}{
		{"it is overwritten later in the round", nil, func(t *testing.T, r *Round, m *memory, _ *store) {
			copy(m.procs[1], y)
			if err := r.Pages(1, m.base, y); err != nil {
				t.Fatal(err)
			}
		}},
		{"it was overwritten earlier in the round", func(t *testing.T, r *Round, m *memory, _ *store) {
			copy(m.procs[1], y)
			if err := r.Pages(1, m.base, y); err != nil {
				t.Fatal(err)
			}
		}, nil},
		{"it becomes a hole", nil, func(t *testing.T, r *Round, m *memory, _ *store) {
			clear(m.procs[1][:page])
			if err := r.Zero(1, m.base, 1); err != nil {
				t.Fatal(err)
			}
		}},
		{"the receiver has it otherwise", nil, func(t *testing.T, _ *Round, m *memory, sink *store) {
			if err := sink.PutPages(1, m.base, y); err != nil {
				t.Fatal(err)
			}
			copy(m.procs[1], y)
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sink := newStore()
			h := newHost(t, hostOptions{accept: sink.accept})
			s := h.dial(t, Options{})
			m := noiseMemory(31, pages)
			copy(m.procs[1], x)
			m.referring(t, s, 0, pages)
			r, err := s.Round(t.Context(), 1)
			if err != nil {
				t.Fatal(err)
			}
			read := 0
			r.ReadAgain(func(pid checkpoint.PID, addr uint64, dst []byte) (bool, error) {
				read++
				return m.readAgain(pid, addr, dst)
			})
			if test.before != nil {
				test.before(t, r, m, sink)
			}
			copy(m.procs[1][page:], x)
			if err := r.Pages(1, m.base+page, x); err != nil {
				t.Fatal(err)
			}
			if test.after != nil {
				test.after(t, r, m, sink)
			}
			copy(m.procs[1][page:], late) // it goes on being written to
			stats, err := r.Close()
			if err != nil {
				t.Fatal(err)
			}
			if test.before != nil {
				if read != 0 || stats.Copies != 0 {
					t.Errorf("%d pages were read again: %+v", read, stats)
				}
				return
			}
			if read != 1 || stats.Copies != 0 {
				t.Errorf("%d pages were read again: %+v", read, stats)
			}
			sink.equal(t, m)
		})
	}
}

func TestAPageThatIsGoneWhenItIsReadAgainIsNotHeldForSent(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	m := noiseMemory(32, 2)
	m.referring(t, s, 0, 1)
	x := bytes.Clone(m.procs[1][:page])
	send := func(n int, read func(checkpoint.PID, uint64, []byte) (bool, error)) error {
		r, err := s.Round(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		r.ReadAgain(read)
		if err := r.Pages(1, m.base+page, x); err != nil {
			t.Fatal(err)
		}
		if err := r.Zero(1, m.base, 1); err != nil {
			t.Fatal(err)
		}
		_, err = r.Close()
		return err
	}
	if err := send(1, func(checkpoint.PID, uint64, []byte) (bool, error) { return false, nil }); err != nil {
		t.Fatal(err)
	}
	if got := s.Stats().Remembered; got != 0 {
		t.Errorf("%d pages are held for sent", got)
	}
	copy(m.procs[1][page:], x)
	clear(m.procs[1][:page])
	m.referring(t, s, 2, 2)
	sink.equal(t, m)

	torn := errors.New("no such process")
	x[0]++
	m.referring(t, s, 3, 2) // page 1 has x's old content
	x[0]--
	copy(m.procs[1], x)
	r, err := s.Round(t.Context(), 4)
	if err != nil {
		t.Fatal(err)
	}
	r.ReadAgain(func(checkpoint.PID, uint64, []byte) (bool, error) { return false, torn })
	if err := r.Pages(1, m.base, x); err != nil {
		t.Fatal(err)
	}
	if err := r.Zero(1, m.base+page, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Close(); !errors.Is(err, torn) {
		t.Errorf("close: %v", err)
	}
}

func TestARoundThatEndsAmongItsCopiesIsNoSuccess(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	s := h.dial(t, Options{})
	m := forked(3, 40)
	r, err := s.Round(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	r.ReadAgain(m.readAgain)
	if err := m.send(r, 0, 40, 10); err != nil {
		t.Fatal(err)
	}
	sink.fail(&sink.readErr, errors.New("disk on fire"))
	var remote *RemoteError
	if _, err := r.Close(); !errors.As(err, &remote) || remote.Code != CodeSink {
		t.Errorf("close: %v", err)
	}
	if got := s.Stats().Remembered; got != 0 {
		t.Errorf("%d pages are held for sent", got)
	}
	sink.fail(&sink.readErr, nil)
	m.referring(t, s, 1, 40)
	sink.equal(t, m)
}

func TestTheReceiverCopiesOnlyWhatHasTheHash(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept})
	p := h.raw(t, alpnPages)
	p.hello()
	one := bytes.Repeat([]byte{1}, page)
	if err := sink.PutPages(1, 0, one); err != nil {
		t.Fatal(err)
	}
	sum := xxh3.Hash128Seed(one, 42)
	good := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, sum.Hi), sum.Lo)
	bad := slices.Clone(good)
	bad[15]++
	copies := wire.Copies{Seed: 42, Sums: append(slices.Clone(good), bad...), Runs: []wire.Copy{
		{PID: 2, Addr: 4 * page, FromPID: 1, Pages: 1}, {PID: 2, Addr: 5 * page, FromPID: 1, Pages: 1},
	}}
	answer, err := readAnswer(t.Context(), p.say(join(wire.OpenRound{Epoch: 1}, copies, wire.EndRound{Tally: wire.Tally{Copies: 2}})))
	if err != nil || answer.Copies != 1 || answer.Missed != 1 {
		t.Fatalf("%+v, %v", answer, err)
	}
	sink.mu.Lock()
	defer sink.mu.Unlock()
	if got := sink.pages[2][4*page]; !bytes.Equal(got[:], one) {
		t.Error("what has the hash was not copied")
	}
	if _, stored := sink.pages[2][5*page]; stored {
		t.Error("what has another hash was copied")
	}
}

func TestTheIndexStaysSmall(t *testing.T) {
	var x index
	for i := range uint64(3 << 20) {
		hash := xxh3.HashString128(string(binary.LittleEndian.AppendUint64(nil, i)))
		x.enter(x.at(hash), hash, 1, i)
	}
	if len(x.places) != maxPlaces || x.used > maxPlaces {
		t.Errorf("%d places, %d used", len(x.places), x.used)
	}
	found := 0
	for i := uint64(3<<20 - 1000); i < 3<<20; i++ { // the newest are there, less what wants the same place
		hash := xxh3.HashString128(string(binary.LittleEndian.AppendUint64(nil, i)))
		if p := x.at(hash); p.page == i && p.tag == uint32(hash.Lo) {
			found++
		}
	}
	if found < 990 {
		t.Errorf("%d of 1000 pages are found", found)
	}
}
