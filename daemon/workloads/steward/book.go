package steward

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/tranship/tranship/daemon/peers/pki"
	"github.com/tranship/tranship/daemon/workloads"
)

// Record is what every host keeps of a workload.
type Record struct {
	Name string `json:"name"`
	// Owner is the host that decides about it.
	Owner      string `json:"owner"`
	Generation uint64 `json:"generation"`
	// Confirmed: more than half of the hosts agreed on the owner.
	Confirmed bool `json:"confirmed,omitempty"`
	// Deleted is a tombstone; one that is not confirmed takes back an offer.
	Deleted bool            `json:"deleted,omitempty"`
	Spec    json.RawMessage `json:"spec,omitempty"`
	// Begun are the indexes of shards that may be somewhere.
	Begun []int     `json:"begun,omitempty"`
	At    time.Time `json:"at"` // by the owner's clock; nothing is decided by it
	// From is the host at which a person said it.
	From string `json:"from,omitempty"`

	// statement is the record as its owner wrote it, and seal the owner's seal of
	// that. Whoever passes it on passes these on.
	statement []byte
	seal      pki.Seal
}

// sealed is a record as it is kept and sent. One without a seal, of a host that
// is in no cluster, is the bare record.
type sealed struct {
	Statement []byte   `json:"statement"`
	Seal      pki.Seal `json:"seal"`
}

// Bounds of what other hosts say: far beyond use, far below harm.
const (
	// maxRecord: a workload file, a number for each of 10,000 shards, and all of
	// it in base64 with a certificate.
	maxRecord = (workloads.MaxFile+64<<10)*4/3 + 4<<10
	// maxNames of workloads that a host keeps, tombstones included.
	maxNames = 20_000
	// maxJump of a generation over the last that was heard of. The largest number
	// there is would leave none for whoever takes the workload over.
	maxJump = 1 << 20
)

// errRecord says that a record is not one to be kept, whoever it is from.
var errRecord = errors.New("record of a workload")

// unpack reads a record as it was kept or sent, and judges nothing.
func unpack(raw []byte) (*Record, error) {
	var s sealed
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, err
	}
	if s.Statement != nil {
		raw = s.Statement
	}
	r := new(Record)
	if err := json.Unmarshal(raw, r); err != nil {
		return nil, err
	}
	r.statement, r.seal = s.Statement, s.Seal
	return r, nil
}

func decodeRecord(raw []byte) (*Record, error) {
	if len(raw) > maxRecord {
		return nil, fmt.Errorf("a record of %d bytes", len(raw))
	}
	r, err := unpack(raw)
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if r.From != "" && pki.CheckName(r.From) != nil || pki.CheckName(r.Owner) != nil {
		return nil, fmt.Errorf("record of %.80q: owned by %.80q, said at %.80q, which are no hosts", r.Name, r.Owner, r.From)
	}
	if r.Name == "" || r.Owner == "" || r.Generation == 0 || len(r.Begun) > 2*workloads.MaxShards {
		return nil, fmt.Errorf("record of %.80q: its name, owner or generation is missing, or it begins too much", r.Name)
	}
	if r.Deleted {
		return r, nil
	}
	spec, err := workloads.Decode(r.Spec)
	if err != nil {
		return nil, fmt.Errorf("record: %w", err)
	}
	if spec.Name != r.Name {
		return nil, fmt.Errorf("record of %.80q has the spec of %.80q", r.Name, spec.Name)
	}
	return r, nil
}

func (r *Record) encode() []byte {
	if r.statement == nil {
		return r.bare()
	}
	return marshal(sealed{r.statement, r.seal})
}

// bare is what a seal is of.
func (r *Record) bare() []byte { return marshal(r) }

func marshal(v any) []byte {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // names, numbers and a spec that was decoded
	}
	return raw
}

// live says whether there is a workload.
func (r *Record) live() bool { return r != nil && !r.Deleted }

func (r *Record) spec() *workloads.Spec {
	if !r.live() {
		return nil
	}
	s, err := workloads.Decode(r.Spec)
	if err != nil {
		return nil // decodeRecord and Change let none in
	}
	return s
}

// takes says whether a host that has the record have takes another instead.
// inPool says whether the owner of have still belongs to the pool. A name is
// won by the offer that more than half of the hosts take; since each takes one,
// two cannot both win.
func takes(have, offer *Record, inPool bool) bool {
	switch withdraws := offer.Deleted && !offer.Confirmed; {
	case withdraws:
		return have != nil && have.Owner == offer.Owner && !have.Confirmed && have.Generation <= offer.Generation
	case have == nil:
		return true
	case have.Owner == offer.Owner:
		return offer.Generation > have.Generation ||
			offer.Generation == have.Generation && (offer.Confirmed || !have.Confirmed)
	case offer.Confirmed && !have.Confirmed:
		return true // it was decided elsewhere
	case offer.Generation < have.Generation:
		return false
	case offer.Generation == have.Generation:
		// Only a pool whose halves knew of different hosts comes here: all of it
		// has to choose the same.
		return offer.Confirmed && offer.Owner > have.Owner
	case have.Deleted, !inPool:
		return true
	}
	return offer.Confirmed
}

// Book keeps records, and what was begun here, on disk.
type Book struct{ db *bolt.DB }

var (
	recordBucket = []byte("records")
	begunBucket  = []byte("starting")
	rosterBucket = []byte("hosts")
)

// OpenBook opens or makes the book at path. Close it.
func OpenBook(path string) (*Book, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: 5 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("workloads %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, bucket := range [][]byte{recordBucket, begunBucket, rosterBucket} {
			if _, err := tx.CreateBucketIfNotExists(bucket); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("workloads %s: %w", path, err), db.Close())
	}
	return &Book{db}, nil
}

// Close releases the file.
func (b *Book) Close() error { return b.db.Close() }

// Get finds a record, tombstones included; nil when there is none.
func (b *Book) Get(name string) (r *Record, err error) {
	err = b.db.View(func(tx *bolt.Tx) error {
		if raw := tx.Bucket(recordBucket).Get([]byte(name)); raw != nil {
			r, err = unpack(raw)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("workload %s: %w", name, err)
	}
	return r, nil
}

// All lists the records by name, tombstones included.
func (b *Book) All() (out []*Record, err error) {
	err = b.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(recordBucket).ForEach(func(_, raw []byte) error {
			r, err := unpack(raw)
			out = append(out, r)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("workloads: %w", err)
	}
	return out, nil
}

// Offer takes a record if nothing stands against it, and returns what does. pool
// are the hosts that belong to it.
func (b *Book) Offer(r *Record, pool []string) (taken bool, have *Record, err error) {
	err = b.db.Update(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(recordBucket)
		if raw := bucket.Get([]byte(r.Name)); raw != nil {
			if have, err = unpack(raw); err != nil {
				return err
			}
		} else if n := bucket.Stats().KeyN; n >= maxNames {
			return fmt.Errorf("%w: %d are kept here, and that is the most", errRecord, n)
		}
		last := uint64(0)
		if have != nil {
			last = have.Generation
		}
		if r.Generation > last && r.Generation-last > maxJump {
			return fmt.Errorf("%w: generation %d after %d", errRecord, r.Generation, last)
		}
		if taken = takes(have, r, have == nil || slices.Contains(pool, have.Owner)); !taken {
			return nil
		}
		if r.Deleted && !r.Confirmed {
			return bucket.Delete([]byte(r.Name))
		}
		return bucket.Put([]byte(r.Name), r.encode())
	})
	if err != nil {
		return false, nil, fmt.Errorf("workload %s: %w", r.Name, err)
	}
	return taken, have, nil
}

// begin notes that a shard is being started here, and end that it was; a
// daemon that dies between the two finds it in begun.
func (b *Book) begin(namespace, name string) error {
	return b.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(begunBucket).Put([]byte(namespace+"/"+name), []byte{1})
	})
}

func (b *Book) end(namespace, name string) error {
	return b.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(begunBucket).Delete([]byte(namespace + "/" + name)) })
}

func (b *Book) begun() (out [][2]string, err error) {
	err = b.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(begunBucket).ForEach(func(k, _ []byte) error {
			namespace, name, _ := strings.Cut(string(k), "/")
			out = append(out, [2]string{namespace, name})
			return nil
		})
	})
	return out, err
}

// Meet remembers a host of the pool and its ID. Membership forgets a host that
// is down for long; what it runs is not gone by that.
func (b *Book) Meet(name, id string) error {
	return b.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(rosterBucket).Put([]byte(name), []byte(id)) })
}

// Part forgets a host that belongs no longer.
func (b *Book) Part(name string) error {
	return b.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(rosterBucket).Delete([]byte(name)) })
}

// Met lists the hosts that were met, IDs by name.
func (b *Book) Met() (map[string]string, error) {
	out := map[string]string{}
	err := b.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(rosterBucket).ForEach(func(k, v []byte) error { out[string(k)] = string(v); return nil })
	})
	return out, err
}

// with adds indexes to a sorted list, without doubles.
func with(list []int, more ...int) []int {
	out := append(slices.Clone(list), more...)
	slices.Sort(out)
	return slices.Compact(out)
}
