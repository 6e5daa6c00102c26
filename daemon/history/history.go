// Package history opens the stores of what a host remembers for its own good:
// measurements, forecasts, decisions. It refuses to let them keep a daemon from
// starting: a file that is no store is put aside, not deleted, and a new one made.
// What must not be lost (the migrations' journal) is no history.
package history

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// openTimeout is how long another process may hold the store: two daemons on one
// state directory are an error, not a wait.
const openTimeout = 2 * time.Second

// Open opens or makes the store at path, with these buckets. What was there and
// is no store is left at path.broken.
func Open(path string, buckets ...[]byte) (*bbolt.DB, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	db, err := open(path, buckets)
	if errors.Is(err, berrors.ErrInvalid) || errors.Is(err, berrors.ErrChecksum) || errors.Is(err, berrors.ErrVersionMismatch) {
		if rerr := os.Rename(path, path+".broken"); rerr != nil {
			return nil, errors.Join(err, rerr)
		}
		db, err = open(path, buckets)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return db, nil
}

func open(path string, buckets [][]byte) (*bbolt.DB, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: openTimeout, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}
