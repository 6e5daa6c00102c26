package pagestore

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

const somewhere = uint64(0x7f0000000000)

func owedOf(t *testing.T, s *Store, pid checkpoint.PID) map[uint64]bool {
	t.Helper()
	out := map[uint64]bool{}
	if err := s.Owed(pid, func(addr uint64, n checkpoint.Pages) error {
		for i := range n {
			out[addr+uint64(i)*checkpoint.PageSize] = true
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestAnOwedPageIsReadOnlyAfterItArrived(t *testing.T) {
	s := newStore(t)
	stale := pattern(1, somewhere, 1, 4)
	if err := s.PutPages(1, somewhere, stale); err != nil {
		t.Fatal(err)
	}
	at := somewhere + checkpoint.PageSize
	if err := s.Owe(map[checkpoint.PID][]checkpoint.Extent{1: {{PID: 1, Addr: at, Pages: 2}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Seal(); err != nil {
		t.Fatal(err)
	}
	other, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	buf := make([]byte, 4*checkpoint.PageSize)
	for _, s := range []*Store{s, other} {
		for name, read := range map[string]func(checkpoint.PID, uint64, []byte) error{"ReadPages": s.ReadPages, "ReadData": s.ReadData} {
			if err := read(1, somewhere, buf); !errors.Is(err, ErrOwed) {
				t.Errorf("%s over an owed page: %v", name, err)
			}
			if err := read(1, at+checkpoint.PageSize, buf[:checkpoint.PageSize]); !errors.Is(err, ErrOwed) {
				t.Errorf("%s of an owed page: %v", name, err)
			}
			if err := read(1, somewhere, buf[:checkpoint.PageSize]); err != nil {
				t.Errorf("%s beside an owed page: %v", name, err)
			}
		}
	}
	fresh := pattern(1, at, 2, 2)
	for _, tt := range []struct {
		name string
		pid  checkpoint.PID
		addr uint64
		data []byte
	}{
		{"of which one is not owed", 1, somewhere, pattern(1, somewhere, 2, 2)},
		{"behind the last owed one", 1, at + 2*checkpoint.PageSize, fresh},
		{"of another process", 2, at, fresh},
	} {
		if err := other.Arrive(tt.pid, tt.addr, tt.data); !errors.Is(err, ErrNotOwed) {
			t.Errorf("pages %s arrive: %v", tt.name, err)
		}
	}
	if err := other.Arrive(1, at, fresh[:checkpoint.PageSize]); err != nil {
		t.Fatal(err)
	}
	if err := other.Arrive(1, at, fresh[:checkpoint.PageSize]); !errors.Is(err, ErrNotOwed) {
		t.Errorf("a page arrives twice: %v", err)
	}
	third, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	for _, s := range []*Store{other, third} {
		if err := s.ReadData(1, at, buf[:checkpoint.PageSize]); err != nil || !bytes.Equal(buf[:checkpoint.PageSize], fresh[:checkpoint.PageSize]) {
			t.Errorf("what has arrived is not what was sent: %v", err)
		}
		if got, want := owedOf(t, s, 1), map[uint64]bool{at + checkpoint.PageSize: true}; !reflect.DeepEqual(got, want) {
			t.Errorf("owed are %v, want %v", got, want)
		}
	}
	// Given up before it came.
	if err := third.Release(1, at+checkpoint.PageSize, 1); err != nil {
		t.Fatal(err)
	}
	if got := owedOf(t, third, 1); len(got) > 0 {
		t.Errorf("given up, and still owed: %v", got)
	}
	if err := third.Arrive(1, at+checkpoint.PageSize, fresh[checkpoint.PageSize:]); !errors.Is(err, ErrNotOwed) {
		t.Errorf("a page that was given up arrives: %v", err)
	}
	if err := s.Owe(map[checkpoint.PID][]checkpoint.Extent{1: {{PID: 1, Addr: at, Pages: 1}}}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("owed twice: %v", err)
	}
}

func TestAnOwedPageOfZerosIsContent(t *testing.T) {
	s := newStore(t)
	if err := s.Owe(map[checkpoint.PID][]checkpoint.Extent{7: {{PID: 7, Addr: somewhere, Pages: 1}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Arrive(7, somewhere, make([]byte, checkpoint.PageSize)); err != nil {
		t.Fatal(err)
	}
	if err := s.ReadData(7, somewhere, make([]byte, checkpoint.PageSize)); err != nil {
		t.Error(err)
	}
}

// TestWhatIsOwedIsKnownToWhoeverOpens compares stores that are opened in between
// with a model.
func TestWhatIsOwedIsKnownToWhoeverOpens(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	first := newStore(t)
	const pages = 3000
	model := map[uint64]bool{}
	var extents []checkpoint.Extent
	for at := uint64(rng.IntN(9)); at < pages; {
		n := 1 + rng.Uint64N(40)
		extents = append(extents, checkpoint.Extent{PID: 1, Addr: somewhere + at*checkpoint.PageSize, Pages: checkpoint.Pages(n)})
		for i := range n {
			model[somewhere+(at+i)*checkpoint.PageSize] = true
		}
		at += n + 1 + rng.Uint64N(20)
	}
	if err := first.Owe(map[checkpoint.PID][]checkpoint.Extent{1: extents}); err != nil {
		t.Fatal(err)
	}
	s := first
	for step := range 400 {
		if step%40 == 0 {
			opened, err := Open(first.dir)
			if err != nil {
				t.Fatal(err)
			}
			defer opened.Close()
			s = opened
			if got := owedOf(t, s, 1); !reflect.DeepEqual(got, model) {
				t.Fatalf("step %d: %d pages are owed, want %d", step, len(got), len(model))
			}
		}
		addr, n := somewhere+rng.Uint64N(pages)*checkpoint.PageSize, 1+rng.IntN(12)
		owed := true
		for i := range n {
			owed = owed && model[addr+uint64(i)*checkpoint.PageSize]
		}
		if rng.IntN(3) == 0 {
			if err := s.Release(1, addr, checkpoint.Pages(n)); err != nil {
				t.Fatal(err)
			}
		} else if err := s.Arrive(1, addr, pattern(1, addr, 2, n)); (err == nil) != owed {
			t.Fatalf("step %d: %v, owed %v", step, err, owed)
		} else if err != nil {
			continue
		}
		for i := range n {
			delete(model, addr+uint64(i)*checkpoint.PageSize)
		}
	}
}

func TestAMalformedOwedFileIsRefusedByWhoeverOpens(t *testing.T) {
	s := newStore(t)
	if err := s.Owe(map[checkpoint.PID][]checkpoint.Extent{1: {{PID: 1, Addr: somewhere, Pages: 3}}}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.dir, "1"+owedSuffix)
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, raw[:len(raw)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	other, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.ReadPages(1, somewhere, make([]byte, checkpoint.PageSize)); !errors.Is(err, ErrOwedList) {
		t.Error(err)
	}
}

func TestImpossibleDebtsAreRefused(t *testing.T) {
	for name, extents := range map[string][]checkpoint.Extent{
		"a hole":               {{PID: 1, Addr: somewhere, Pages: 1, Hole: true}},
		"no page":              {{PID: 1, Addr: somewhere}},
		"half a page":          {{PID: 1, Addr: somewhere + 2048, Pages: 1}},
		"overlapping":          {{PID: 1, Addr: somewhere, Pages: 2}, {PID: 1, Addr: somewhere + checkpoint.PageSize, Pages: 1}},
		"out of order":         {{PID: 1, Addr: somewhere, Pages: 1}, {PID: 1, Addr: 0x1000, Pages: 1}},
		"outside of any space": {{PID: 1, Addr: AddressLimit - checkpoint.PageSize, Pages: 2}},
	} {
		if err := newStore(t).Owe(map[checkpoint.PID][]checkpoint.Extent{1: extents}); !errors.Is(err, ErrExtent) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

var someOwed = map[checkpoint.PID][]checkpoint.Extent{
	1:    {{PID: 1, Addr: 0x1000, Pages: 2}, {PID: 1, Addr: 0x7000, Pages: 1}},
	4711: {{PID: 4711, Addr: 1 << 40, Pages: 1 << 20}},
	5000: {},
}

func TestAListOfOwedPagesThatIsCutIsRefused(t *testing.T) {
	raw := AppendOwed(nil, someOwed)
	if got, err := ParseOwed(raw); err != nil || !reflect.DeepEqual(got, someOwed) {
		t.Fatalf("%v, %v", got, err)
	}
	for cut := range len(raw) {
		if _, err := ParseOwed(raw[:cut]); !errors.Is(err, ErrOwedList) {
			t.Errorf("cut at %d: %v", cut, err)
		}
	}
	for i := range raw {
		damaged := bytes.Clone(raw)
		damaged[i] ^= 1
		if _, err := ParseOwed(damaged); !errors.Is(err, ErrOwedList) {
			t.Errorf("changed at %d: %v", i, err)
		}
	}
	if _, err := ParseOwed(make([]byte, maxOwed+1)); !errors.Is(err, ErrOwedList) {
		t.Errorf("too long: %v", err)
	}
}

func FuzzParseOwed(f *testing.F) {
	f.Add(AppendOwed(nil, someOwed))
	f.Add(AppendOwed(nil, nil))
	f.Fuzz(func(t *testing.T, raw []byte) {
		owed, err := ParseOwed(raw)
		if err != nil {
			return
		}
		if again, err := ParseOwed(AppendOwed(nil, owed)); err != nil || !reflect.DeepEqual(again, owed) {
			t.Errorf("%v, %v", again, err)
		}
	})
}
