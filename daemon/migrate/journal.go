package migrate

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// Role says which end of a migration this host is.
type Role string

// Roles.
const (
	Source      Role = "source"
	Destination Role = "destination"
)

// State is what the journal says of a migration; see the table in
// ARCHITECTURE.md. A state is written before the host acts on it.
type State string

// States of the source.
const (
	// Preparing: nothing of the shard was touched; undo is removing files.
	Preparing State = "preparing"
	// Stopping: the shard may be frozen and its link down; undo thaws it.
	Stopping State = "stopping"
	// Yielded: the destination may run the shard; only its answer, or an
	// operator's, ends this state.
	Yielded State = "yielded"
	// Serving, in post-copy: the shard runs at the destination and its last pages
	// are here; the destination's word that it has them all, or an operator's,
	// ends this state.
	Serving State = "serving"
	// Returning: the shard runs here and nowhere else, but what the migration did to
	// it could not be undone yet. Only that it could ends this state.
	Returning State = "returning"
)

// States of the destination.
const (
	// Receiving: nothing runs; undo removes everything.
	Receiving State = "receiving"
	// Sealed: everything has arrived; the source decides.
	Sealed State = "sealed"
	// Starting: the source has yielded; the restore may be under way.
	Starting State = "starting"
	// Running: the shard runs here and nowhere else.
	Running State = "running"
)

// Final states of both.
const (
	Done    State = "done"
	Aborted State = "aborted"
)

// Final says that nothing remains to be done.
func (s State) Final() bool { return s == Done || s == Aborted }

// Entry is one migration as one host knows it.
type Entry struct {
	ID        string    `json:"id"`
	Role      Role      `json:"role"`
	State     State     `json:"state"`
	Namespace string    `json:"namespace"`
	Shard     string    `json:"shard"`
	Peer      string    `json:"peer"`
	Mode      string    `json:"mode"`
	Started   time.Time `json:"started"`
	Updated   time.Time `json:"updated"`

	// Source: what undo needs.
	InitPID      int      `json:"init_pid,omitempty"`
	CRIUPID      int      `json:"criu_pid,omitempty"`
	CRIUStart    uint64   `json:"criu_start,omitempty"` // start time in clock ticks, against pid reuse
	CopiedMounts []string `json:"copied_mounts,omitempty"`
	MarkedStop   bool     `json:"marked_stopped,omitempty"`
	FrozenBefore bool     `json:"frozen_before,omitempty"` // the operator had paused it
	// Runs says that only traces are left to be undone; Left is what could not be.
	Runs bool   `json:"runs,omitempty"`
	Left string `json:"left,omitempty"`
	// Throttle is set before the shard is slowed for the first time.
	Throttle *Throttling `json:"throttle,omitempty"`
	// RunsThere is the destination's word, or an operator's, as long as what is left
	// here could not be removed.
	RunsThere bool `json:"runs_there,omitempty"`
	// Bandwidth is what may be sent, in bits a second, 0 for unlimited.
	Bandwidth int64 `json:"bandwidth,omitempty"`

	// Destination: what undo and completion need.
	PageServerPID   int    `json:"page_server_pid,omitempty"`
	PageServerStart uint64 `json:"page_server_start,omitempty"`
	// Placed is set before the page server is ended: all memory is in place.
	Placed        bool     `json:"placed,omitempty"`
	StartedUnixNS int64    `json:"started_unix_ns,omitempty"`
	MadeMounts    []string `json:"made_mounts,omitempty"`
	MemoryBytes   int64    `json:"memory_bytes,omitempty"` // reserved

	// ImageDigest is the xxh3 of the CRIU images, as sent or as received.
	ImageDigest uint64 `json:"image_digest,omitempty"`

	Reason string `json:"reason,omitempty"`
	Code   string `json:"code,omitempty"`
	// Record is the destination's copy of the container's description.
	Record json.RawMessage `json:"record,omitempty"`
	// Report is the migration's result, kept for `tranship migrations`.
	Report json.RawMessage `json:"report,omitempty"`

	// home is nil once the daemon that began the migration has ended.
	home *home
}

// Journal is the host's durable memory of migrations. Every write is synced
// before it returns. Safe for concurrent use.
type Journal struct{ db *bbolt.DB }

var entriesBucket = []byte("migrations")

// journalKeep bounds how many ended migrations are remembered.
const journalKeep = 1000

// openTimeout is how long another process may hold the journal: two daemons on
// one state directory are an error, not a wait.
const openTimeout = 2 * time.Second

// ErrUnknownMigration says that the journal has no such id.
var ErrUnknownMigration = errors.New("no such migration")

// OpenJournal opens or creates the journal file.
func OpenJournal(path string) (*Journal, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: openTimeout})
	if errors.Is(err, bbolterrors.ErrTimeout) {
		return nil, fmt.Errorf("journal %s is held by another process: is a second transhipd running?", path)
	}
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w", path, err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(entriesBucket)
		return err
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("journal %s: %w", path, err), db.Close())
	}
	return &Journal{db: db}, nil
}

// Close closes the file.
func (j *Journal) Close() error { return j.db.Close() }

// Put writes an entry, durable when it returns.
func (j *Journal) Put(e *Entry) error {
	e.Updated = time.Now()
	raw, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal %s: %w", e.ID, err)
	}
	err = j.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(entriesBucket).Put(journalKey(e.Role, e.ID), raw)
	})
	if err != nil {
		return fmt.Errorf("journal %s: %w", e.ID, err)
	}
	return nil
}

// Get returns one entry.
func (j *Journal) Get(role Role, id string) (*Entry, error) {
	var e *Entry
	err := j.db.View(func(tx *bbolt.Tx) error {
		raw := tx.Bucket(entriesBucket).Get(journalKey(role, id))
		if raw == nil {
			return fmt.Errorf("%s: %w", id, ErrUnknownMigration)
		}
		e = &Entry{}
		return json.Unmarshal(raw, e)
	})
	return e, err
}

// List returns every entry, newest first.
func (j *Journal) List() ([]*Entry, error) {
	var out []*Entry
	err := j.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(entriesBucket).ForEach(func(k, raw []byte) error {
			e := &Entry{}
			if err := json.Unmarshal(raw, e); err != nil {
				return fmt.Errorf("journal entry %s: %w", k, err)
			}
			out = append(out, e)
			return nil
		})
	})
	slices.SortFunc(out, func(a, b *Entry) int {
		if c := b.Started.Compare(a.Started); c != 0 {
			return c
		}
		return strings.Compare(string(a.Role), string(b.Role))
	})
	return out, err
}

// Prune forgets the oldest ended migrations beyond journalKeep.
func (j *Journal) Prune() error {
	all, err := j.List()
	if err != nil {
		return err
	}
	ended := 0
	return j.db.Update(func(tx *bbolt.Tx) error {
		for _, e := range all {
			if !e.State.Final() {
				continue
			}
			if ended++; ended <= journalKeep {
				continue
			}
			if err := tx.Bucket(entriesBucket).Delete(journalKey(e.Role, e.ID)); err != nil {
				return err
			}
		}
		return nil
	})
}

func journalKey(role Role, id string) []byte { return []byte(id + "/" + string(role)) }
