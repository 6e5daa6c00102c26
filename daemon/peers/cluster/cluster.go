// Package cluster owns who belongs to the pool: the CA's register, join tokens,
// certificates and their renewal, and the statement by which the CA says who no
// longer belongs. It refuses to hand out a certificate before the token that
// paid for it is durably used up, and to believe any statement without the CA's
// signature.
//
// Flow: Found makes the first host, which is the authority → Authority.Token →
// Join proves the token over TLS whose CA it checked by the token's hash →
// Server answers with certificate and membership → Membership is what a host
// keeps, and its Refuse is what both ends of every TLS connection ask.
package cluster

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/tranship/tranship/daemon/peers/pki"
)

// Files in a host's pki directory, beside those of package pki.
const (
	// MembershipFile is what a host knows of its cluster, the gossip key included.
	MembershipFile = "cluster.json"
	// RegisterFile is beside the CA's key: hosts, tokens, the newest statement.
	RegisterFile = "register.db"
)

const (
	// maxStatement bounds a statement: 4,096 revoked hosts need half of it.
	maxStatement = 1 << 20
	maxRevoked   = 4096
	maxSeeds     = 16
	gossipKeyLen = 32 // AES-256

	purposeStatement = "cluster statement v1"
)

// Revoked names a host that no longer belongs. It hits the certificate with
// this ID, and those without any ID that were issued by At.
type Revoked struct {
	Name string    `json:"name"`
	ID   string    `json:"id,omitempty"`
	At   time.Time `json:"at"`
}

func (r Revoked) hits(host pki.Identity, issued time.Time) bool {
	if host.Name != r.Name {
		return false
	}
	if host.ID != "" && r.ID != "" {
		return host.ID == r.ID
	}
	return !issued.After(r.At)
}

// Statement is the CA's word on the pool. The higher number holds.
type Statement struct {
	Number  uint64    `json:"number"`
	At      time.Time `json:"at"`
	Revoked []Revoked `json:"revoked"`
	// KeyHash is the SHA-256 of the gossip key, which changes with every
	// revocation: who was revoked still has the old one.
	KeyHash []byte `json:"key_hash"`
}

// Signed is a statement as it travels.
type Signed struct {
	Statement []byte `json:"statement"`
	Signature []byte `json:"signature"`
}

// RevokedError says that a certificate, good otherwise, is of a host that was
// revoked or has left.
type RevokedError struct {
	Host pki.Identity
	At   time.Time
}

func (e *RevokedError) Error() string {
	return fmt.Sprintf("host %s left the cluster, or was revoked, at %s", e.Host.Name, e.At.UTC().Format(time.RFC3339))
}

// ErrForged says that a statement or key is not the CA's.
var ErrForged = errors.New("not the word of the cluster's CA")

// open checks a signed statement and the key that goes with it.
func (s Signed) open(ca *x509.Certificate, key []byte) (Statement, error) {
	if len(s.Statement) > maxStatement {
		return Statement{}, fmt.Errorf("%w: a statement of %d bytes", ErrForged, len(s.Statement))
	}
	if err := pki.VerifyAttested(ca, purposeStatement, s.Statement, s.Signature); err != nil {
		return Statement{}, fmt.Errorf("%w: %w", ErrForged, err)
	}
	var st Statement
	if err := json.Unmarshal(s.Statement, &st); err != nil {
		return Statement{}, fmt.Errorf("%w: %w", ErrForged, err)
	}
	if hash := sha256.Sum256(key); len(key) != gossipKeyLen || !bytes.Equal(hash[:], st.KeyHash) {
		return Statement{}, fmt.Errorf("%w: the gossip key is not the one that statement %d names", ErrForged, st.Number)
	}
	return st, nil
}

// Seed is a host to ask first.
type Seed struct {
	Name string `json:"name"`
	// Address is that of its peer API, Gossip that of membership.
	Address string `json:"address"`
	Gossip  string `json:"gossip"`
}

// document is MembershipFile.
type document struct {
	SchemaVersion int    `json:"schema_version"`
	Authority     string `json:"authority"`
	Seeds         []Seed `json:"seeds"`
	Signed
	Key []byte `json:"key"`
}

// Membership is what a host keeps of its cluster. Safe for concurrent use.
type Membership struct {
	path string
	ca   *x509.Certificate

	mu  sync.RWMutex
	doc document
	st  Statement
}

// OpenMembership reads a host's membership from its pki directory. A host whose
// certificate came another way has none: os.ErrNotExist.
func OpenMembership(dir string) (*Membership, error) {
	ca, err := pki.ReadCert(filepath.Join(dir, pki.CACertFile))
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	m := &Membership{path: filepath.Join(dir, MembershipFile), ca: ca}
	raw, err := readBounded(m.path, 4*maxStatement)
	if err != nil {
		return nil, fmt.Errorf("membership: %w", err)
	}
	if err := json.Unmarshal(raw, &m.doc); err != nil {
		return nil, fmt.Errorf("membership %s: %w", m.path, err)
	}
	if m.st, err = m.doc.open(ca, m.doc.Key); err != nil {
		return nil, fmt.Errorf("membership %s: %w", m.path, err)
	}
	return m, nil
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(raw)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return raw, err
}

// WriteMembership lays a host's membership out in its pki directory.
func WriteMembership(dir, authority string, seeds []Seed, signed Signed, key []byte) error {
	doc := document{SchemaVersion: 1, Authority: authority, Seeds: bound(seeds), Signed: signed, Key: key}
	return doc.save(filepath.Join(dir, MembershipFile))
}

func bound(seeds []Seed) []Seed { return seeds[:min(len(seeds), maxSeeds)] }

func (d document) save(path string) error {
	raw, err := json.MarshalIndent(d, "", "  ")
	if err != nil {
		return fmt.Errorf("membership: %w", err)
	}
	if err := pki.Replace(path, append(raw, '\n'), 0o600); err != nil {
		return fmt.Errorf("membership: %w", err)
	}
	return nil
}

// Authority names the host that holds the CA's key.
func (m *Membership) Authority() string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.doc.Authority
}

// Seeds are the hosts to ask first.
func (m *Membership) Seeds() []Seed {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]Seed(nil), m.doc.Seeds...)
}

// KeepSeeds remembers hosts for the next start.
func (m *Membership) KeepSeeds(seeds []Seed) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.doc
	next.Seeds = bound(seeds)
	if err := next.save(m.path); err != nil {
		return err
	}
	m.doc = next
	return nil
}

// Papers are the newest statement and the gossip key, for a peer or a keyring.
func (m *Membership) Papers() (signed Signed, number uint64, key []byte) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.doc.Signed, m.st.Number, append([]byte(nil), m.doc.Key...)
}

// Install takes a newer statement, on disk before it answers true. One that is
// not newer changes nothing; one that is not the CA's is ErrForged.
func (m *Membership) Install(signed Signed, key []byte) (newer bool, err error) {
	st, err := signed.open(m.ca, key)
	if err != nil {
		return false, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if st.Number <= m.st.Number {
		return false, nil
	}
	next := m.doc
	next.Signed, next.Key = signed, append([]byte(nil), key...)
	if err := next.save(m.path); err != nil {
		return false, err
	}
	m.doc, m.st = next, st
	return true, nil
}

// Refuse says why a certificate of the cluster is good no longer, or nil. It is
// a check for pki.TLS.
func (m *Membership) Refuse(cert *x509.Certificate) error {
	host, err := pki.IdentityOf(cert)
	if err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, r := range m.st.Revoked {
		if r.hits(host, pki.IssuedAt(cert)) {
			return &RevokedError{Host: host, At: r.At}
		}
	}
	return nil
}

// Gone says whether a host of this name and ID was revoked; id may be "".
func (m *Membership) Gone(host pki.Identity) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, r := range m.st.Revoked {
		if r.Name == host.Name && r.ID == host.ID {
			return true
		}
	}
	return false
}

// Revoked lists who no longer belongs.
func (m *Membership) Revoked() []Revoked {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]Revoked(nil), m.st.Revoked...)
}
