package pagestore

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

// extentsOf are what a store, opened anew, says it has of process 1.
func extentsOf(t *testing.T, dir string) []pageRun {
	t.Helper()
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var out []pageRun
	err = s.Extents(1, 0, AddressLimit, func(addr uint64, n checkpoint.Pages) error {
		out = append(out, pageRun{addr / checkpoint.PageSize, addr/checkpoint.PageSize + uint64(n)})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestWhatIsSealedIsWhatTheKernelFinds(t *testing.T) {
	s := newStore(t)
	rng := rand.New(rand.NewPCG(1, 2))
	base := uint64(0x7f0000000000)
	data := bytes.Repeat([]byte{1}, 700*checkpoint.PageSize)
	for range 300 {
		addr, n := base+uint64(rng.IntN(5000))*checkpoint.PageSize, 1+rng.IntN(700)
		if rng.IntN(3) == 0 {
			if err := s.ZeroPages(1, addr, checkpoint.Pages(n)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := s.PutPages(1, addr, data[:n*checkpoint.PageSize]); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.ZeroPages(1, base+2000*checkpoint.PageSize, AddressLimit/checkpoint.PageSize/4); err != nil {
		t.Fatal(err)
	}
	unsealed := extentsOf(t, s.dir)
	if err := s.Seal(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(s.dir, "1"+extentsSuffix)
	f, err := s.file(1, false)
	if err != nil {
		t.Fatal(err)
	}
	if runs, ok := s.sealed(f); !ok || !reflect.DeepEqual(runs, unsealed) || len(runs) < 2 {
		t.Fatalf("sealed %v %v, found %v", runs, ok, unsealed)
	}
	if got := extentsOf(t, s.dir); !reflect.DeepEqual(got, unsealed) {
		t.Errorf("%v, want %v", got, unsealed)
	}

	// A list that does not fit what is there is not believed.
	for name, damage := range map[string]func([]byte) []byte{
		"cut":            func(b []byte) []byte { return b[:len(b)-1] },
		"empty":          func([]byte) []byte { return nil },
		"another number": func([]byte) []byte { return encodeRuns([]pageRun{{1, 2}}) },
	} {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, damage(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := extentsOf(t, s.dir); !reflect.DeepEqual(got, unsealed) {
			t.Errorf("%s: %v, want %v", name, got, unsealed)
		}
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Release(1, unsealed[0].from*checkpoint.PageSize, 1); err != nil {
		t.Fatal(err)
	}
	if got := extentsOf(t, s.dir); reflect.DeepEqual(got, unsealed) {
		t.Error("a page that was released is still listed")
	}
}

func TestAListOfExtentsThatIsCutIsRefused(t *testing.T) {
	want := []pageRun{{1, 3}, {7, 8}, {1 << 40, 1<<40 + 1<<20}}
	raw := encodeRuns(want)
	if got, err := parseRuns(raw); err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%v, %v", got, err)
	}
	for cut := range len(raw) {
		if _, err := parseRuns(raw[:cut]); err == nil {
			t.Errorf("cut at %d is accepted", cut)
		}
	}
}

func FuzzParseRuns(f *testing.F) {
	f.Add(encodeRuns([]pageRun{{1, 3}, {7, 8}}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		runs, err := parseRuns(raw)
		if err != nil {
			return
		}
		if again, err := parseRuns(encodeRuns(runs)); err != nil || len(again) != len(runs) {
			t.Errorf("%v, %v", again, err)
		}
	})
}
