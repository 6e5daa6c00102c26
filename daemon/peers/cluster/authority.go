package cluster

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/tranship/tranship/daemon/peers/pki"
)

const (
	// DefaultTokenTTL is long enough to log in on the other host.
	DefaultTokenTTL = 10 * time.Minute
	// MaxTokenTTL: a token that lives longer is a password.
	MaxTokenTTL = 24 * time.Hour
	// tokenMemory is how long a token that is over is told from one that never was.
	tokenMemory = 24 * time.Hour
	// maxTokens bounds those that are open at a time.
	maxTokens = 1000
	// registerTimeout bounds the wait for another process that has the register.
	registerTimeout = 5 * time.Second
)

// Errors of Admit that a person is told.
var (
	ErrTokenUnknown = errors.New("no such join token, or not all of it")
	ErrTokenUsed    = errors.New("the join token was used before")
	ErrTokenExpired = errors.New("the join token has expired")
	ErrNameTaken    = errors.New("name is taken")
	ErrUnknownHost  = errors.New("no such host in the cluster's register")
)

// Authority signs for the cluster, on the host that has the CA's key. The
// register is opened for each operation, so that daemon and command line can
// both use it. Safe for concurrent use.
type Authority struct {
	dir string
	ca  *pki.CA
	now func() time.Time
}

// Host is one line of the register.
type Host struct {
	Name     string    `json:"name"`
	ID       string    `json:"id"`
	Since    time.Time `json:"since"`
	NotAfter time.Time `json:"not_after"`
	// Gone is "revoked" or "left" for one that no longer belongs.
	Gone string    `json:"gone,omitempty"`
	Left time.Time `json:"left,omitzero"`
}

type tokenRecord struct {
	Secret  []byte    `json:"secret"`
	Expires time.Time `json:"expires"`
	UsedBy  string    `json:"used_by,omitempty"`
	Used    time.Time `json:"used,omitzero"`
}

var (
	bucketHosts  = []byte("hosts")  // ID → Host
	bucketTokens = []byte("tokens") // token ID → tokenRecord
	bucketState  = []byte("state")
	keyPapers    = []byte("papers")
)

// papers is the newest statement with its key.
type papers struct {
	Signed
	Key []byte `json:"key"`
}

// Found makes a new cluster in a host's pki directory, with that host as its
// first and as its authority. pki.ErrExists when there is a CA already.
func Found(dir, name string, seed Seed) (*Authority, error) {
	if err := pki.CheckName(name); err != nil {
		return nil, err
	}
	if _, err := pki.Init(dir); err != nil {
		return nil, err
	}
	a, err := OpenAuthority(dir)
	if err != nil {
		return nil, err
	}
	return a, a.Equip(dir, name, name, []Seed{seed})
}

// OpenAuthority opens the CA of a pki directory and its register, which it makes
// when the CA is older than that. Without the CA's key: os.ErrNotExist.
func OpenAuthority(dir string) (*Authority, error) {
	ca, err := pki.Load(dir)
	if err != nil {
		return nil, err
	}
	a := &Authority{dir: dir, ca: ca, now: time.Now}
	return a, a.update(func(tx *bolt.Tx) error {
		if tx.Bucket(bucketState).Get(keyPapers) != nil {
			return nil
		}
		return a.state(tx, func(*Statement) error { return nil })
	})
}

// update runs f on the register; what it wrote is on disk when update returns.
func (a *Authority) update(f func(tx *bolt.Tx) error) error {
	db, err := bolt.Open(filepath.Join(a.dir, RegisterFile), 0o600, &bolt.Options{Timeout: registerTimeout})
	if err != nil {
		return fmt.Errorf("cluster's register: %w", err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketHosts, bucketTokens, bucketState} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return f(tx)
	})
	return errors.Join(err, db.Close())
}

func put(b *bolt.Bucket, key []byte, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return b.Put(key, raw)
}

// statement is the newest; the zero value before the first.
func (a *Authority) statement(tx *bolt.Tx) (st Statement, err error) {
	raw := tx.Bucket(bucketState).Get(keyPapers)
	if raw == nil {
		return Statement{}, nil
	}
	var last papers
	if err = json.Unmarshal(raw, &last); err == nil {
		st, err = last.open(a.ca.Cert(), last.Key)
	}
	if err != nil {
		return Statement{}, fmt.Errorf("cluster's register: %w", err)
	}
	return st, nil
}

// state makes the next statement: f changes it, a new gossip key goes with it.
func (a *Authority) state(tx *bolt.Tx, f func(*Statement) error) error {
	st, err := a.statement(tx)
	if err != nil {
		return err
	}
	if err := f(&st); err != nil {
		return err
	}
	now := a.now()
	// Certificates of a host that went longer ago are over by themselves.
	st.Revoked = slices.DeleteFunc(st.Revoked, func(r Revoked) bool { return now.Sub(r.At) > pki.Lifetime+24*time.Hour })
	if len(st.Revoked) > maxRevoked {
		return fmt.Errorf("%d hosts were revoked within %v; no more can be", len(st.Revoked), pki.Lifetime)
	}
	key := make([]byte, gossipKeyLen)
	rand.Read(key) // never fails
	hash := sha256.Sum256(key)
	st.Number, st.At, st.KeyHash = st.Number+1, now.UTC(), hash[:]
	raw, err := json.Marshal(st)
	if err != nil {
		return err
	}
	sig, err := a.ca.Attest(purposeStatement, raw)
	if err != nil {
		return err
	}
	return put(tx.Bucket(bucketState), keyPapers, papers{Signed: Signed{raw, sig}, Key: key})
}

// Papers are the newest statement and its gossip key.
func (a *Authority) Papers() (signed Signed, key []byte, err error) {
	err = a.update(func(tx *bolt.Tx) error {
		var p papers
		if err := json.Unmarshal(tx.Bucket(bucketState).Get(keyPapers), &p); err != nil {
			return fmt.Errorf("cluster's register: %w", err)
		}
		signed, key = p.Signed, p.Key
		return nil
	})
	return signed, key, err
}

// CertPEM returns the CA's certificate.
func (a *Authority) CertPEM() []byte { return a.ca.CertPEM() }

// Hosts lists the register by name, hosts that went included.
func (a *Authority) Hosts() ([]Host, error) {
	var out []Host
	err := a.update(func(tx *bolt.Tx) error {
		var err error
		out, err = hosts(tx)
		return err
	})
	slices.SortFunc(out, func(x, y Host) int { return strings.Compare(x.Name, y.Name) })
	return out, err
}

func hosts(tx *bolt.Tx) ([]Host, error) {
	var out []Host
	err := tx.Bucket(bucketHosts).ForEach(func(_, raw []byte) error {
		var h Host
		if err := json.Unmarshal(raw, &h); err != nil {
			return fmt.Errorf("cluster's register: %w", err)
		}
		out = append(out, h)
		return nil
	})
	return out, err
}

// present finds the host of a name that belongs now; nil when there is none.
func present(tx *bolt.Tx, name string) (*Host, error) {
	all, err := hosts(tx)
	if err != nil {
		return nil, err
	}
	for i := range all {
		if all[i].Name == name && all[i].Gone == "" {
			return &all[i], nil
		}
	}
	return nil, nil
}

// enter adds a host to the register; with an ID of its own where it has none.
func (a *Authority) enter(tx *bolt.Tx, name, id string) (Host, error) {
	if err := pki.CheckName(name); err != nil {
		return Host{}, err
	}
	have, err := present(tx, name)
	if err != nil {
		return Host{}, err
	}
	if have != nil {
		return Host{}, fmt.Errorf("%w: a host %s belongs since %s; if it is gone: tranship cluster revoke %s",
			ErrNameTaken, name, have.Since.UTC().Format(time.RFC3339), name)
	}
	if id == "" {
		id = pki.NewID()
	}
	now := a.now()
	h := Host{Name: name, ID: id, Since: now, NotAfter: now.Add(pki.Lifetime)}
	return h, put(tx.Bucket(bucketHosts), []byte(h.ID), h)
}

// Equip enters a host and lays its files out in dir, for whoever can write on
// that host: the first host itself, and the lab.
func (a *Authority) Equip(dir, name, authority string, seeds []Seed) error {
	request, keyPEM, err := pki.NewRequest()
	if err != nil {
		return err
	}
	var h Host
	if err := a.update(func(tx *bolt.Tx) (err error) { h, err = a.enter(tx, name, ""); return err }); err != nil {
		return err
	}
	cert, err := a.ca.Sign(a.now(), request, pki.Identity{Name: h.Name, ID: h.ID}, pki.Lifetime)
	if err != nil {
		return err
	}
	signed, key, err := a.Papers()
	if err != nil {
		return err
	}
	if err := pki.Write(dir, a.ca.CertPEM(), cert, keyPEM); err != nil {
		return err
	}
	return WriteMembership(dir, authority, seeds, signed, key)
}

// Token makes a join token that is good for ttl, by this host's clock alone.
func (a *Authority) Token(ttl time.Duration) (Token, time.Time, error) {
	if ttl <= 0 || ttl > MaxTokenTTL {
		return Token{}, time.Time{}, fmt.Errorf("a token's life of %v is not between 0 and %v", ttl, MaxTokenTTL)
	}
	t := newToken(pki.Hash(a.ca.Cert()))
	expires := a.now().Add(ttl)
	err := a.update(func(tx *bolt.Tx) error {
		open, err := a.sweep(tx)
		if err != nil {
			return err
		}
		if open >= maxTokens {
			return fmt.Errorf("%d join tokens are open; wait until some expire", open)
		}
		return put(tx.Bucket(bucketTokens), t.ID[:], tokenRecord{Secret: t.Secret[:], Expires: expires})
	})
	return t, expires, err
}

// sweep forgets tokens that were over long ago and counts those that are open.
func (a *Authority) sweep(tx *bolt.Tx) (open int, err error) {
	b := tx.Bucket(bucketTokens)
	var old [][]byte
	now := a.now()
	err = b.ForEach(func(id, raw []byte) error {
		var r tokenRecord
		if err := json.Unmarshal(raw, &r); err != nil {
			return fmt.Errorf("cluster's register: %w", err)
		}
		switch {
		case now.Sub(r.Expires) > tokenMemory:
			old = append(old, slices.Clone(id))
		case r.UsedBy == "" && now.Before(r.Expires):
			open++
		}
		return nil
	})
	for _, id := range old {
		err = errors.Join(err, b.Delete(id))
	}
	return open, err
}

// OpenUntil is when the last token that is open ends; the zero time without one.
func (a *Authority) OpenUntil() (until time.Time, err error) {
	err = a.update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketTokens).ForEach(func(_, raw []byte) error {
			var r tokenRecord
			if err := json.Unmarshal(raw, &r); err != nil {
				return fmt.Errorf("cluster's register: %w", err)
			}
			if r.UsedBy == "" && r.Expires.After(until) && r.Expires.After(a.now()) {
				until = r.Expires
			}
			return nil
		})
	})
	return until, err
}

// admit uses a token up for a host and signs its key. proven tells, from the
// token's secret, whether the caller has it; taken whether a host of that name is
// known besides the register. The certificate exists only after the register
// says, on disk, that the token is used.
func (a *Authority) admit(id []byte, proven func(secret []byte) bool, name string, request []byte, taken func(string) bool) (certPEM, secret []byte, h Host, err error) {
	err = a.update(func(tx *bolt.Tx) error {
		raw := tx.Bucket(bucketTokens).Get(id)
		var r tokenRecord
		if raw == nil {
			r.Secret = make([]byte, secretLen) // as much work as for a known one
		} else if err := json.Unmarshal(raw, &r); err != nil {
			return fmt.Errorf("cluster's register: %w", err)
		}
		if !proven(r.Secret) || raw == nil {
			return ErrTokenUnknown
		}
		secret = slices.Clone(r.Secret)
		now := a.now()
		switch {
		case r.UsedBy != "":
			return fmt.Errorf("%w, by %s at %s", ErrTokenUsed, r.UsedBy, r.Used.UTC().Format(time.RFC3339))
		case !now.Before(r.Expires):
			return fmt.Errorf("%w, %v ago", ErrTokenExpired, now.Sub(r.Expires).Round(time.Second))
		}
		if err := pki.CheckRequest(request); err != nil {
			return err
		}
		if taken != nil && taken(name) {
			return fmt.Errorf("%w: a host %s is in the pool", ErrNameTaken, name)
		}
		var err error
		if h, err = a.enter(tx, name, ""); err != nil {
			return err
		}
		r.UsedBy, r.Used = name, now
		return put(tx.Bucket(bucketTokens), id, r)
	})
	if err != nil {
		return nil, secret, Host{}, err
	}
	certPEM, err = a.ca.Sign(a.now(), request, pki.Identity{Name: h.Name, ID: h.ID}, pki.Lifetime)
	return certPEM, secret, h, err
}

// holder is the register's line of the host that shows a certificate; nil when
// the certificate is older than the register. A connection outlives the
// certificate's word, so one that was revoked meanwhile is a RevokedError.
func (a *Authority) holder(tx *bolt.Tx, cert *x509.Certificate) (host pki.Identity, have *Host, err error) {
	if host, err = pki.IdentityOf(cert); err != nil {
		return host, nil, err
	}
	st, err := a.statement(tx)
	if err != nil {
		return host, nil, err
	}
	for _, r := range st.Revoked {
		if r.hits(host, pki.IssuedAt(cert)) {
			return host, nil, &RevokedError{Host: host, At: r.At}
		}
	}
	if have, err = present(tx, host.Name); err == nil && have != nil && host.ID != "" && have.ID != host.ID {
		return host, nil, fmt.Errorf("%w: another host %s belongs since %s", ErrNameTaken, host.Name, have.Since.UTC().Format(time.RFC3339))
	}
	return host, have, err
}

// Renew signs a new key for a host that is known by its certificate. One whose
// certificate is older than the register is entered now.
func (a *Authority) Renew(cert *x509.Certificate, request []byte) (certPEM []byte, err error) {
	if err := pki.CheckRequest(request); err != nil {
		return nil, err
	}
	var h Host
	err = a.update(func(tx *bolt.Tx) error {
		host, have, err := a.holder(tx, cert)
		if err != nil {
			return err
		}
		if have == nil {
			h, err = a.enter(tx, host.Name, host.ID)
			return err
		}
		h = *have
		h.NotAfter = a.now().Add(pki.Lifetime)
		return put(tx.Bucket(bucketHosts), []byte(h.ID), h)
	})
	if err != nil {
		return nil, fmt.Errorf("renewal: %w", err)
	}
	return a.ca.Sign(a.now(), request, pki.Identity{Name: h.Name, ID: h.ID}, pki.Lifetime)
}

// How a host ceased to belong.
const (
	GoneRevoked = "revoked"
	GoneLeft    = "left"
)

// Revoke makes a host belong no longer: the next statement says so, and a new
// gossip key goes with it. known says that the pool has such a host even if the
// register, made later than its certificate, does not.
func (a *Authority) Revoke(name string, known bool) (Signed, []byte, error) {
	err := a.update(func(tx *bolt.Tx) error {
		have, err := present(tx, name)
		if err != nil {
			return err
		}
		if have == nil && !known {
			return fmt.Errorf("%s: %w; tranship nodes lists the pool", name, ErrUnknownHost)
		}
		return a.remove(tx, name, have, GoneRevoked)
	})
	if err != nil {
		return Signed{}, nil, fmt.Errorf("revoke: %w", err)
	}
	return a.Papers()
}

// Depart is Revoke by the host itself, which is known by its certificate.
func (a *Authority) Depart(cert *x509.Certificate) (Signed, []byte, error) {
	err := a.update(func(tx *bolt.Tx) error {
		host, have, err := a.holder(tx, cert)
		if err != nil {
			return err
		}
		return a.remove(tx, host.Name, have, GoneLeft)
	})
	if err != nil {
		return Signed{}, nil, fmt.Errorf("depart: %w", err)
	}
	return a.Papers()
}

func (a *Authority) remove(tx *bolt.Tx, name string, have *Host, how string) error {
	gone := Revoked{Name: name, At: a.now().UTC()}
	if have != nil {
		gone.ID = have.ID
		have.Gone, have.Left = how, gone.At
		if err := put(tx.Bucket(bucketHosts), []byte(have.ID), have); err != nil {
			return err
		}
	}
	return a.state(tx, func(st *Statement) error {
		st.Revoked = append(st.Revoked, gone)
		return nil
	})
}

// Joined says whether a directory has a host's certificate already.
func Joined(dir string) (bool, error) {
	for _, name := range []string{pki.CertFile, pki.KeyFile, MembershipFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return true, nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
	}
	return false, nil
}

// Forget removes what makes this host a member. The CA's certificate stays.
func Forget(dir string) error {
	var errs []error
	for _, name := range []string{MembershipFile, pki.KeyFile, pki.CertFile} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
