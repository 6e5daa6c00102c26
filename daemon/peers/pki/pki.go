// Package pki owns the cluster's certificate authority and the TLS that every
// connection between two hosts uses. A host is who its certificate says: one
// DNS name, equal to the node name, and the URI tranship://NODE/ID that no
// certificate of another purpose carries. It refuses any TLS below 1.3, any
// peer without a certificate of the cluster's CA, and a peer that is a member
// but not the node that was meant.
//
// Flow: Init makes the CA once, Issue (or Sign, for a key that stays with its
// host) signs a node, Write lays the three files out on the node, TLS reads
// them there and IdentityOf names the other end.
package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// File names inside a pki directory. The CA's key stays where Init wrote it;
// a node has only the other three.
const (
	CACertFile = "ca.crt"
	CAKeyFile  = "ca.key"
	CertFile   = "node.crt"
	KeyFile    = "node.key"
)

const (
	// caLifetime outlives the hosts; replacing a CA means visiting all of them.
	caLifetime = 10 * 365 * 24 * time.Hour
	// clockSkew is how far the clocks of two hosts may differ right after a
	// certificate was issued.
	clockSkew = time.Hour
	// nameScheme marks a certificate as that of a node of a pool.
	nameScheme = "tranship"
)

// ErrExists says that a CA is already there. Overwriting it would lock every
// host out that trusts it.
var ErrExists = errors.New("a cluster CA already exists")

// CA is the cluster's certificate authority. Its methods may be called by
// several goroutines.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// Init makes a new CA in dir (created with mode 0700 when missing): ca.crt, and
// ca.key with mode 0600. It answers ErrExists when either file is there.
func Init(dir string) (*CA, error) {
	for _, name := range []string{CACertFile, CAKeyFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), ErrExists)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("cluster CA: %w", err)
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("cluster CA: key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "tranship cluster CA"},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(caLifetime),
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true, // the CA signs nodes, never another CA
		KeyUsage:              x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("cluster CA: sign: %w", err)
	}
	keyPEM, err := encodeKey(key)
	if err != nil {
		return nil, fmt.Errorf("cluster CA: key: %w", err)
	}
	certPEM := encodeCert(der)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	// The key first: a directory with a key and no certificate is refused by
	// Load, one with a certificate and no key would look like a node's.
	if err := writeNew(filepath.Join(dir, CAKeyFile), keyPEM, 0o600); err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	if err := writeNew(filepath.Join(dir, CACertFile), certPEM, 0o644); err != nil {
		return nil, errors.Join(fmt.Errorf("cluster CA: %w", err), os.Remove(filepath.Join(dir, CAKeyFile)))
	}
	return Load(dir)
}

// Load reads a CA that Init made. A key that is not the certificate's is an
// error.
func Load(dir string) (*CA, error) {
	certPEM, err := os.ReadFile(filepath.Join(dir, CACertFile))
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	cert, err := decodeCert(certPEM)
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %s: %w", filepath.Join(dir, CACertFile), err)
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, CAKeyFile))
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	key, err := decodeKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %s: %w", filepath.Join(dir, CAKeyFile), err)
	}
	if !cert.IsCA {
		return nil, fmt.Errorf("cluster CA: %s is not a CA's certificate", filepath.Join(dir, CACertFile))
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("cluster CA: %s and %s in %s do not belong together", CACertFile, CAKeyFile, dir)
	}
	return &CA{cert: cert, key: key, pem: certPEM}, nil
}

// CertPEM returns the CA's certificate: what a node needs besides its own pair.
func (ca *CA) CertPEM() []byte { return append([]byte(nil), ca.pem...) }

// Issue makes a key and a certificate for node, for both ends of a connection,
// with an ID of its own. The certificate ends after ttl, or with the CA if that
// is earlier.
func (ca *CA) Issue(node string, ttl time.Duration) (certPEM, keyPEM []byte, err error) {
	request, keyPEM, err := NewRequest()
	if err != nil {
		return nil, nil, fmt.Errorf("certificate of %s: %w", node, err)
	}
	certPEM, err = ca.Sign(time.Now(), request, Identity{Name: node, ID: NewID()}, ttl)
	if err != nil {
		return nil, nil, err
	}
	return certPEM, keyPEM, nil
}

// Sign makes a certificate at now for the key of a request (DER, PKCS #10), whose
// holder's signature it checks. Nothing else of the request counts: who the host
// is, is the caller's word.
func (ca *CA) Sign(now time.Time, request []byte, host Identity, ttl time.Duration) (certPEM []byte, err error) {
	if err := host.check(); err != nil {
		return nil, err
	}
	if ttl <= 0 {
		return nil, fmt.Errorf("certificate of %s: a lifetime of %v is over before it begins", host.Name, ttl)
	}
	key, err := requestKey(request)
	if err != nil {
		return nil, fmt.Errorf("certificate of %s: %w", host.Name, err)
	}
	end := now.Add(ttl)
	if end.After(ca.cert.NotAfter) {
		end = ca.cert.NotAfter
	}
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: host.Name},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              end,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:              []string{host.Name},
		URIs:                  []*url.URL{host.uri()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, key, ca.key)
	if err != nil {
		return nil, fmt.Errorf("certificate of %s: sign: %w", host.Name, err)
	}
	return encodeCert(der), nil
}

// Write lays out a node's files in dir: ca.crt, node.crt, and node.key with
// mode 0600. Each file is replaced whole, so that a daemon that is reading
// meets the old one or the new one.
func Write(dir string, ca, cert, key []byte) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("pki of this host: %w", err)
	}
	for _, file := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{{CACertFile, ca, 0o644}, {KeyFile, key, 0o600}, {CertFile, cert, 0o644}} {
		if err := Replace(filepath.Join(dir, file.name), file.data, file.mode); err != nil {
			return fmt.Errorf("pki of this host: %w", err)
		}
	}
	return nil
}

// Replace puts a file in another's place, on disk when it returns; a crash leaves
// the one or the other.
func Replace(path string, data []byte, mode os.FileMode) error {
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeNew(temp, data, mode); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// nodeName is RFC 1123's host name in lower case: it is a DNS name in a
// certificate and the host of a URL, where upper case would be a second
// spelling of the same node.
var nodeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)

// CheckName says why name cannot be a node's name, or nil.
func CheckName(name string) error {
	if len(name) > 253 || !nodeName.MatchString(name) {
		return fmt.Errorf("node name %q: want lower-case letters, digits, hyphens and dots, as in host-1", name)
	}
	if _, err := netip.ParseAddr(name); err == nil {
		return fmt.Errorf("node name %q is an address; TLS would look for it among addresses, not names", name)
	}
	return nil
}

// serial is 127 random bits (RFC 5280: positive, at most 20 octets).
func serial() *big.Int {
	raw := make([]byte, 16)
	rand.Read(raw) // never fails, crypto/rand aborts the program instead
	raw[0] &= 0x7f
	raw[15] |= 1
	return new(big.Int).SetBytes(raw)
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func decodeCert(raw []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(raw)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no PEM certificate")
	}
	if next, _ := pem.Decode(rest); next != nil {
		return nil, errors.New("more than one PEM block, want one certificate")
	}
	return x509.ParseCertificate(block.Bytes)
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func decodeKey(raw []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(raw)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New("no PEM private key")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("a %T, want an ECDSA key", key)
	}
	return ec, nil
}

// writeNew writes a file that must not exist yet, and has it on disk when it
// returns: a CA key lost by a crash right after Init takes the pool with it.
func writeNew(path string, data []byte, mode os.FileMode) (err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := file.Close(); err == nil {
			err = cerr
		}
	}()
	if _, err := file.Write(data); err != nil {
		return err
	}
	return file.Sync()
}
