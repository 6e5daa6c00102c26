package balance

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/history"
)

// store keeps decisions and costs over restarts. A write is synced before it
// returns.
type store struct{ db *bbolt.DB }

var (
	decisionsBucket = []byte("decisions") // id (8, big endian) -> BalanceDecision
	costsBucket     = []byte("costs")
	costsKey        = []byte("costs") // -> JSON
)

const (
	// keepDecisions bounds the disk at some 10 MB; a busy host makes a few hundred
	// a day.
	keepDecisions = 10000
)

// openStore opens or makes the store. A file that is no store is put aside:
// history is no reason for a daemon not to start.
func openStore(path string) (*store, error) {
	db, err := history.Open(path, decisionsBucket, costsBucket)
	if err != nil {
		return nil, fmt.Errorf("store of decisions: %w", err)
	}
	return &store{db}, nil
}

func (s *store) Close() error { return s.db.Close() }

func key(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

// add gives a decision its number and keeps it; the oldest beyond keepDecisions go.
func (s *store) add(d *v1.BalanceDecision) error {
	return s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(decisionsBucket)
		id, err := b.NextSequence()
		if err != nil {
			return err
		}
		d.Id = id
		raw, err := proto.Marshal(d)
		if err != nil {
			return err
		}
		if err := b.Put(key(id), raw); err != nil {
			return err
		}
		c := b.Cursor()
		for k, _ := c.First(); k != nil && id-binary.BigEndian.Uint64(k) >= keepDecisions; k, _ = c.First() {
			if err := c.Delete(); err != nil {
				return err
			}
		}
		return nil
	})
}

// put writes a decision again.
func (s *store) put(d *v1.BalanceDecision) error {
	return s.update(func(tx *bbolt.Tx) error {
		raw, err := proto.Marshal(d)
		if err != nil {
			return err
		}
		return tx.Bucket(decisionsBucket).Put(key(d.GetId()), raw)
	})
}

func (s *store) update(f func(*bbolt.Tx) error) error {
	if err := s.db.Update(f); err != nil {
		return fmt.Errorf("store of decisions: %w", err)
	}
	return nil
}

// list returns those that rounds came to since then, newest first, at most so
// many; most 0 is all.
func (s *store) list(since time.Time, most int) (out []*v1.BalanceDecision, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		c := tx.Bucket(decisionsBucket).Cursor()
		for k, raw := c.Last(); k != nil && (most == 0 || len(out) < most); k, raw = c.Prev() {
			d := &v1.BalanceDecision{}
			if err := proto.Unmarshal(raw, d); err != nil {
				return fmt.Errorf("decision %d: %w", binary.BigEndian.Uint64(k), err)
			}
			if d.GetLastUnixMs() >= since.UnixMilli() {
				out = append(out, d)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("store of decisions: %w", err)
	}
	return out, nil
}

// interrupt ends what an earlier life of the daemon left under way.
func (s *store) interrupt() error {
	all, err := s.list(time.Time{}, 0)
	if err != nil {
		return err
	}
	for _, d := range all {
		if d.GetOutcome() != outcomeUnderWay {
			continue
		}
		d.Outcome, d.Detail = outcomeInterrupted, "the daemon ended before the migration had; tranship migrations says how it was settled"
		if err := s.put(d); err != nil {
			return err
		}
	}
	return nil
}

func (s *store) readCosts() (c costs, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		raw := tx.Bucket(costsBucket).Get(costsKey)
		if raw == nil || json.Unmarshal(raw, &c) == nil {
			return nil
		}
		c = costs{} // another version's: they are learnt again
		return nil
	})
	return c, err
}

func (s *store) writeCosts(c *costs) error {
	raw, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("store of decisions: %w", err)
	}
	return s.update(func(tx *bbolt.Tx) error { return tx.Bucket(costsBucket).Put(costsKey, raw) })
}
