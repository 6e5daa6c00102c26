package forecasts

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/tranship/tranship/daemon/history"
)

// store keeps states, and the cells that came after each: a state is large and
// written once an hour, cells are small and written every minute. Read together
// they are exactly what was in memory. A write is synced before it returns.
type store struct{ db *bbolt.DB }

var (
	statesBucket = []byte("states") // NAMESPACE/NAME -> appendShard
	cellsBucket  = []byte("cells")  // NAMESPACE/NAME 0 unix seconds (8, big endian) -> cells
)

const (
	// keepEnded: so long the host that a shard moved to may ask for its state.
	keepEnded = 24 * time.Hour
	// maxEnded bounds the disk at some 100 MB for them, and maxShort at 4 MB for
	// those that are samples only.
	maxEnded = 256
	maxShort = 4096
	cellSize = 8 + 1 + 4*signals
)

// openStore opens or makes the store. A file that is no store is put aside: a
// cold forecast is no reason for a daemon not to start.
func openStore(path string) (*store, error) {
	db, err := history.Open(path, statesBucket, cellsBucket)
	if err != nil {
		return nil, fmt.Errorf("store of forecasts: %w", err)
	}
	return &store{db}, nil
}

func (s *store) Close() error { return s.db.Close() }

func prefix(key string) []byte { return append([]byte(key), 0) }

// write files states, which make earlier cells superfluous, and cells.
func (s *store) write(states map[string][]byte, logs map[string][]cell) error {
	err := s.db.Update(func(tx *bbolt.Tx) error {
		for key, raw := range states {
			if err := tx.Bucket(statesBucket).Put([]byte(key), raw); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			if err := dropCells(tx, key); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
		}
		for key, cells := range logs {
			at := binary.BigEndian.AppendUint64(prefix(key), uint64(cells[0].start.Unix()))
			if err := tx.Bucket(cellsBucket).Put(at, appendCells(nil, cells)); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store of forecasts: %w", err)
	}
	return nil
}

func dropCells(tx *bbolt.Tx, key string) error {
	b := tx.Bucket(cellsBucket)
	var old [][]byte
	c := b.Cursor()
	for at, _ := c.Seek(prefix(key)); bytes.HasPrefix(at, prefix(key)); at, _ = c.Next() {
		old = append(old, slices.Clone(at))
	}
	for _, at := range old {
		if err := b.Delete(at); err != nil {
			return err
		}
	}
	return nil
}

// read returns a shard's state, nil without one, and the cells after it.
func (s *store) read(key string) (state []byte, cells []cell, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		state = slices.Clone(tx.Bucket(statesBucket).Get([]byte(key)))
		c := tx.Bucket(cellsBucket).Cursor()
		for at, raw := c.Seek(prefix(key)); bytes.HasPrefix(at, prefix(key)); at, raw = c.Next() {
			cells = parseCells(cells, raw)
		}
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("store of forecasts: %s: %w", key, err)
	}
	return state, cells, nil
}

// prune removes what ended long ago, and what ended first if that is too much.
func (s *store) prune(now time.Time, alive map[string]bool) error {
	newest, states := map[string]time.Time{}, map[string]bool{}
	err := s.db.Update(func(tx *bbolt.Tx) error {
		err := tx.Bucket(statesBucket).ForEach(func(key, raw []byte) error {
			newest[string(key)], states[string(key)] = untilOf(raw), true
			return nil
		})
		if err != nil {
			return err
		}
		err = tx.Bucket(cellsBucket).ForEach(func(at, raw []byte) error {
			if i := bytes.IndexByte(at, 0); i >= 0 && len(at) == i+9 {
				key, start := string(at[:i]), time.Unix(int64(binary.BigEndian.Uint64(at[i+1:])), 0)
				if start.After(newest[key]) {
					newest[key] = start
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		var ended []string
		for key := range newest {
			if !alive[key] {
				ended = append(ended, key)
			}
		}
		slices.SortFunc(ended, func(a, b string) int { return newest[b].Compare(newest[a]) })
		large, short := 0, 0
		for _, key := range ended {
			if states[key] {
				large++
			} else {
				short++
			}
			if large <= maxEnded && short <= maxShort && now.Sub(newest[key]) < keepEnded {
				continue
			}
			if err := errors.Join(tx.Bucket(statesBucket).Delete([]byte(key)), dropCells(tx, key)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("store of forecasts: prune: %w", err)
	}
	return nil
}

func appendCells(b []byte, cells []cell) []byte {
	for _, c := range cells {
		b = binary.LittleEndian.AppendUint64(b, uint64(c.start.UnixMilli()))
		b = append(b, c.has)
		for _, v := range c.mean {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
		}
	}
	return b
}

// parseCells leaves out a rest that is no cell.
func parseCells(out []cell, raw []byte) []cell {
	for ; len(raw) >= cellSize; raw = raw[cellSize:] {
		c := cell{start: time.UnixMilli(int64(binary.LittleEndian.Uint64(raw))), has: raw[8]}
		for i := range c.mean {
			c.mean[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[9+4*i:]))
		}
		out = append(out, c)
	}
	return out
}
