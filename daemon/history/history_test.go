package history

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

var bucket = []byte("b")

func put(t *testing.T, path string) {
	t.Helper()
	db, err := Open(path, bucket)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucket).Put([]byte("k"), []byte("v")) })
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestAStoreKeepsWhatItHas(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "history.db")
	put(t, path)
	db, err := Open(path, bucket, []byte("later"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.View(func(tx *bbolt.Tx) error {
		if got := tx.Bucket(bucket).Get([]byte("k")); string(got) != "v" || tx.Bucket([]byte("later")) == nil {
			t.Errorf("%q", got)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

func TestWhatIsNoStoreIsPutAside(t *testing.T) {
	junk := bytes.Repeat([]byte("this is no store "), 1<<10)
	path := filepath.Join(t.TempDir(), "history.db")
	if err := os.WriteFile(path, junk, 0o600); err != nil {
		t.Fatal(err)
	}
	put(t, path)
	if kept, err := os.ReadFile(path + ".broken"); err != nil || !bytes.Equal(kept, junk) {
		t.Errorf("%d bytes put aside, %v", len(kept), err)
	}
}

func TestAStoreInUseIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "history.db")
	first, err := Open(path, bucket)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if db, err := Open(path, bucket); !errors.Is(err, berrors.ErrTimeout) {
		t.Errorf("opened twice: %v, %v", db, err)
	}
	if _, err := os.Stat(path + ".broken"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was put aside: %v", err)
	}
}
