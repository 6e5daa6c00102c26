package profiler

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"

	"github.com/tranship/tranship/daemon/history"
	"github.com/tranship/tranship/ebpf/profile"
)

// Store keeps the minutes of all subjects on disk: a bucket a subject, in it a
// block an hour. Every Put is synced before it returns, so a kill costs the
// minute that had not ended. It is bounded in time (retention) and in subjects.
// Safe for concurrent use.
type Store struct {
	db        *bbolt.DB
	retention time.Duration
}

var (
	blocksBucket = []byte("blocks")
	// pulledBucket remembers by migration whose history has come.
	pulledBucket = []byte("pulled")
)

const (
	// maxSubjects bounds the disk: shards that come and go by the hundred leave
	// a scrap each. Those with the oldest last minute go first.
	maxSubjects = 4096
)

// OpenStore opens or makes the store. A file that is no store is put aside, not
// deleted: old measurements are not worth a daemon that does not start.
func OpenStore(path string, retention time.Duration) (*Store, error) {
	db, err := history.Open(path, blocksBucket, pulledBucket)
	if err != nil {
		return nil, fmt.Errorf("store of profiles: %w", err)
	}
	return &Store{db: db, retention: retention}, nil
}

// Close releases the file.
func (s *Store) Close() error { return s.db.Close() }

// Put files minutes by subject, all or none.
func (s *Store) Put(minutes map[string][]profile.Point) error {
	err := s.db.Update(func(tx *bbolt.Tx) error {
		for subject, points := range minutes {
			b, err := tx.Bucket(blocksBucket).CreateBucketIfNotExists([]byte(subject))
			if err != nil {
				return fmt.Errorf("%s: %w", subject, err)
			}
			// Hours come in order; nearly full pages need no room for more.
			b.FillPercent = 0.9
			var blk *profile.Block
			for i, p := range points {
				if blk == nil || !blk.Put(p) {
					blk = &profile.Block{Hour: p.Start.UTC().Truncate(time.Hour)}
					blk.Put(p)
				}
				if i+1 < len(points) && points[i+1].Start.UTC().Truncate(time.Hour).Equal(blk.Hour) {
					continue
				}
				if err := merge(b, blk); err != nil {
					return fmt.Errorf("%s: %w", subject, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store of profiles: %w", err)
	}
	return nil
}

// merge adds a block to what is there of its hour. What is there and cannot be
// read is replaced.
func merge(b *bbolt.Bucket, blk *profile.Block) error {
	key := hourKey(blk.Hour)
	if raw := b.Get(key); raw != nil {
		if have, err := profile.ParseBlock(raw); err == nil {
			have.Merge(blk)
			blk = have
		}
	}
	return b.Put(key, blk.Append(nil))
}

func hourKey(t time.Time) []byte { return binary.BigEndian.AppendUint64(nil, uint64(t.Unix())) }

// Minutes returns a subject's points from a time on, oldest first; nil for a
// subject that nobody knows.
func (s *Store) Minutes(subject string, from time.Time) ([]profile.Point, error) {
	var out []profile.Point
	err := s.each(subject, from, func(raw []byte) error {
		blk, err := profile.ParseBlock(raw)
		if err != nil {
			return err
		}
		for _, p := range blk.Minutes() {
			if !p.Start.Before(from) {
				out = append(out, p)
			}
		}
		return nil
	})
	return out, err
}

// Blocks returns a subject's history as it is stored, to travel.
func (s *Store) Blocks(subject string) ([][]byte, error) {
	var out [][]byte
	err := s.each(subject, time.Time{}, func(raw []byte) error {
		out = append(out, slices.Clone(raw))
		return nil
	})
	return out, err
}

func (s *Store) each(subject string, from time.Time, visit func(raw []byte) error) error {
	err := s.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(blocksBucket).Bucket([]byte(subject))
		if b == nil {
			return nil
		}
		c := b.Cursor()
		first, raw := c.First()
		if !from.IsZero() {
			first, raw = c.Seek(hourKey(from.UTC().Truncate(time.Hour)))
		}
		for ; first != nil; first, raw = c.Next() {
			if err := visit(raw); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store of profiles: %s: %w", subject, err)
	}
	return nil
}

// maxHistory bounds how many blocks a history from another host may have, a
// little above the longest retention.
const maxHistory = 24 * 32

// Import adds a history from another host, once for each migration. Blocks that
// do not parse, and hours of the future or beyond the retention, are errors or
// are left out: a peer is authenticated, not infallible.
func (s *Store) Import(subject, migration string, blocks [][]byte, now time.Time) error {
	if len(blocks) > maxHistory {
		return fmt.Errorf("history of %s: %d blocks", subject, len(blocks))
	}
	var parsed []*profile.Block
	for _, raw := range blocks {
		blk, err := profile.ParseBlock(raw)
		if err != nil {
			return fmt.Errorf("history of %s: %w", subject, err)
		}
		if blk.Hour.After(now.Add(time.Hour)) || blk.Hour.Before(now.Add(-s.retention)) {
			continue
		}
		parsed = append(parsed, blk)
	}
	err := s.db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.Bucket(blocksBucket).CreateBucketIfNotExists([]byte(subject))
		if err != nil {
			return err
		}
		for _, blk := range parsed {
			if err := merge(b, blk); err != nil {
				return err
			}
		}
		return tx.Bucket(pulledBucket).Put([]byte(migration), binary.BigEndian.AppendUint64(nil, uint64(now.Unix())))
	})
	if err != nil {
		return fmt.Errorf("store of profiles: history of %s: %w", subject, err)
	}
	return nil
}

// Imported says whether the history that belongs to a migration has come.
func (s *Store) Imported(migration string) (bool, error) {
	have := false
	err := s.db.View(func(tx *bbolt.Tx) error {
		have = tx.Bucket(pulledBucket).Get([]byte(migration)) != nil
		return nil
	})
	return have, err
}

// Prune removes what is older than the retention, and the subjects that ended
// first when there are too many.
func (s *Store) Prune(now time.Time) error {
	oldest := hourKey(now.Add(-s.retention).UTC().Truncate(time.Hour))
	type subject struct{ name, last string }
	err := s.db.Update(func(tx *bbolt.Tx) error {
		var left []subject
		var gone [][]byte
		blocks := tx.Bucket(blocksBucket)
		err := blocks.ForEachBucket(func(name []byte) error {
			b := blocks.Bucket(name)
			var old [][]byte
			c := b.Cursor()
			for k, _ := c.First(); k != nil && string(k) < string(oldest); k, _ = c.Next() {
				old = append(old, slices.Clone(k))
			}
			for _, k := range old {
				if err := b.Delete(k); err != nil {
					return err
				}
			}
			last, _ := b.Cursor().Last()
			if last == nil {
				gone = append(gone, slices.Clone(name))
			} else {
				left = append(left, subject{string(name), string(last)})
			}
			return nil
		})
		if err != nil {
			return err
		}
		slices.SortFunc(left, func(a, b subject) int { return strings.Compare(a.last, b.last) })
		for len(left) > maxSubjects {
			gone = append(gone, []byte(left[0].name))
			left = left[1:]
		}
		for _, name := range gone {
			if err := blocks.DeleteBucket(name); err != nil {
				return err
			}
		}
		return prunePulled(tx.Bucket(pulledBucket), now.Add(-s.retention))
	})
	if err != nil {
		return fmt.Errorf("store of profiles: prune: %w", err)
	}
	return nil
}

func prunePulled(b *bbolt.Bucket, oldest time.Time) error {
	var old [][]byte
	err := b.ForEach(func(k, v []byte) error {
		if len(v) != 8 || int64(binary.BigEndian.Uint64(v)) < oldest.Unix() {
			old = append(old, slices.Clone(k))
		}
		return nil
	})
	for _, k := range old {
		err = errors.Join(err, b.Delete(k))
	}
	return err
}
