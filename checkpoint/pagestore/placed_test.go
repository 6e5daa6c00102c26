package pagestore

import (
	"errors"
	"reflect"
	"testing"

	"github.com/tranship/tranship/checkpoint"
)

// A server that was killed leaves a record, holes, and in between pages that are
// recorded and still there. Whoever opens the store sees neither.
func TestWhoeverOpensAStoreSeesWhatIsLeftToPlace(t *testing.T) {
	s := newStore(t)
	const page = checkpoint.PageSize
	if err := s.PutPages(1, somewhere, pattern(1, somewhere, 1, 20)); err != nil {
		t.Fatal(err)
	}
	// Three pages are owed where the store has nothing, and arrive; three others are
	// given back. Its size is then what was sealed, and its content is not.
	late := somewhere + 40*page
	if err := s.Owe(map[checkpoint.PID][]checkpoint.Extent{1: {{PID: 1, Addr: late, Pages: 3}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Seal(); err != nil {
		t.Fatal(err)
	}
	server, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := errors.Join(server.Arrive(1, late, pattern(1, late, 2, 3)), server.Release(1, somewhere+page, 3)); err != nil {
		t.Fatal(err)
	}
	// Killed before it punched these.
	f, err := server.file(1, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.placed.add(somewhere+10*page, 2), f.placed.add(late+page, 1)); err != nil {
		t.Fatal(err)
	}
	before, err := server.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if before != 20*page {
		t.Fatalf("it takes %d bytes: the test proves nothing", before)
	}
	want := []run{{somewhere, 1}, {somewhere + 4*page, 6}, {somewhere + 12*page, 8}, {late, 1}, {late + 2*page, 1}}
	next, err := Open(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	for range 2 {
		if got := extents(t, next, 1, 0, AddressLimit); !reflect.DeepEqual(got, want) {
			t.Errorf("extents %x, want %x", got, want)
		}
		if err := next.Finish(1); err != nil {
			t.Fatal(err)
		}
		if size, err := next.Bytes(); err != nil || size != before-3*page {
			t.Errorf("it takes %d bytes, before %d, %v", size, before, err)
		}
	}
	if err := errors.Join(next.Finish(2), next.Finish(1)); err != nil {
		t.Errorf("nothing to finish: %v", err)
	}
}
