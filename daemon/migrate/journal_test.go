package migrate

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestTheJournalRemembersAcrossReopening(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "journal.db")
	j, err := OpenJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []*Entry{
		{ID: "m1", Role: Source, State: Yielded, Shard: "redis", Started: time.Unix(1, 0)},
		{ID: "m1", Role: Destination, State: Sealed, Shard: "redis", Started: time.Unix(1, 0)},
		{ID: "m2", Role: Source, State: Done, Started: time.Unix(2, 0)},
	} {
		if err := j.Put(e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OpenJournal(path); err == nil || !strings.Contains(err.Error(), "second transhipd") {
		t.Fatalf("a second opening: %v", err)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	j, err = OpenJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	e, err := j.Get(Source, "m1")
	if err != nil || e.State != Yielded || e.Shard != "redis" {
		t.Fatalf("%+v, %v", e, err)
	}
	if _, err := j.Get(Destination, "m2"); !errors.Is(err, ErrUnknownMigration) {
		t.Fatal(err)
	}
	all, err := j.List()
	if err != nil || len(all) != 3 || all[0].ID != "m2" {
		t.Fatalf("%v, %v", all, err)
	}
}

func TestPruneForgetsOnlyTheOldestEnded(t *testing.T) {
	j, err := OpenJournal(filepath.Join(t.TempDir(), "j"))
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	j.db.NoSync = true // the test writes a thousand entries
	for i := range journalKeep + 2 {
		e := &Entry{ID: time.Unix(int64(i), 0).Format("150405"), Role: Source, State: Aborted, Started: time.Unix(int64(i), 0)}
		if i == 0 {
			e.State = Yielded
		}
		if err := j.Put(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.Prune(); err != nil {
		t.Fatal(err)
	}
	all, err := j.List()
	if err != nil || len(all) != journalKeep+1 {
		t.Fatalf("%d entries, %v", len(all), err)
	}
	if last := all[len(all)-1]; last.State != Yielded {
		t.Fatalf("the oldest, unfinished entry is gone; last is %+v", last)
	}
}
