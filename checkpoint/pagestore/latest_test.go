package pagestore

import (
	"bytes"
	"os"
	"slices"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

// latestOf is what a store, opened anew, says came last of a process.
func latestOf(t *testing.T, dir string, pid checkpoint.PID) ([]pageRun, error) {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var out []pageRun
	err = s.Latest(pid, func(addr uint64, n checkpoint.Pages) error {
		out = append(out, pageRun{addr / checkpoint.PageSize, addr/checkpoint.PageSize + uint64(n)})
		return nil
	})
	return out, err
}

func TestTheLatestPagesOfAllProcessesAreKnown(t *testing.T) {
	s := newStore(t)
	data := bytes.Repeat([]byte{1}, 2*latestPages*checkpoint.PageSize)
	at := func(pid checkpoint.PID, first, n uint64) {
		t.Helper()
		if err := s.PutPages(pid, first*checkpoint.PageSize, data[:n*checkpoint.PageSize]); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := latestOf(t, s.dir, 1); got != nil || err != nil {
		t.Errorf("of a store that is not sealed: %v, %v", got, err)
	}
	at(1, 10_000, 2*latestPages)
	at(1, 100, 500) // pushes the first out
	at(2, 7, 300)
	at(1, 550, 100)
	at(1, 90, 20)
	if err := s.Seal(); err != nil {
		t.Fatal(err)
	}
	for pid, want := range map[checkpoint.PID][]pageRun{1: {{90, 650}}, 2: {{7, 307}}, 3: nil} {
		if got, err := latestOf(t, s.dir, pid); err != nil || !slices.Equal(got, want) {
			t.Errorf("of %d: %v, %v, want %v", pid, got, err, want)
		}
	}
	// A later put pushes all of it out; no more than the limit is of one.
	at(1, 10_000, 2*latestPages)
	if err := s.Seal(); err != nil {
		t.Fatal(err)
	}
	if got, err := latestOf(t, s.dir, 1); err != nil || !slices.Equal(got, []pageRun{{10_000 + latestPages, 10_000 + 2*latestPages}}) {
		t.Errorf("%v, %v", got, err)
	}
	raw, err := os.ReadFile(s.latestPath(1))
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)/2] ^= 1
	if err := os.WriteFile(s.latestPath(1), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := latestOf(t, s.dir, 1); err == nil {
		t.Errorf("of a damaged list: %v", got)
	}
}
