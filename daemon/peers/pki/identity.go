package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"
)

// Lifetime is how long a host's certificate is good. Renewal begins at two
// thirds of it, so the host with the CA's key may be away for a month.
const Lifetime = 90 * 24 * time.Hour

// Identity is who a host is, wherever its address is: the name that people use,
// and an ID that no later host of that name has. ID is "" in certificates from
// before hosts had one.
type Identity struct{ Name, ID string }

func (i Identity) String() string {
	if i.ID == "" {
		return i.Name
	}
	return i.Name + "/" + i.ID
}

var hostID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// NewID makes the ID of a new host: 128 random bits, in hexadecimal.
func NewID() string {
	raw := make([]byte, 16)
	rand.Read(raw) // never fails, crypto/rand aborts the program instead
	return hex.EncodeToString(raw)
}

// CheckID says why id cannot be a host's ID, or nil.
func CheckID(id string) error {
	if !hostID.MatchString(id) {
		return fmt.Errorf("host ID %q: want 32 hexadecimal digits", id)
	}
	return nil
}

func (i Identity) check() error {
	if err := CheckName(i.Name); err != nil {
		return err
	}
	if i.ID == "" {
		return nil
	}
	return CheckID(i.ID)
}

func (i Identity) uri() *url.URL {
	u := &url.URL{Scheme: nameScheme, Host: i.Name}
	if i.ID != "" {
		u.Path = "/" + i.ID
	}
	return u
}

// IdentityOf reads who a certificate is for. It wants exactly one name, said
// twice: a certificate that the CA's key signed for another purpose carries no
// tranship URI, and one with two names could act as either node.
func IdentityOf(cert *x509.Certificate) (Identity, error) {
	if len(cert.DNSNames) != 1 || len(cert.URIs) != 1 {
		return Identity{}, fmt.Errorf("certificate %q has %d DNS names and %d URIs, want one of each", cert.Subject.CommonName, len(cert.DNSNames), len(cert.URIs))
	}
	host := Identity{Name: cert.DNSNames[0], ID: strings.TrimPrefix(cert.URIs[0].Path, "/")}
	if err := host.check(); err != nil {
		return Identity{}, err
	}
	if cert.URIs[0].String() != host.uri().String() {
		return Identity{}, fmt.Errorf("certificate of %q is for %s, not for a node of that name", host.Name, cert.URIs[0])
	}
	return host, nil
}

// IssuedAt is when the CA's host signed a certificate, by that host's clock.
func IssuedAt(cert *x509.Certificate) time.Time { return cert.NotBefore.Add(clockSkew) }

// RenewAt is when a certificate is to be replaced: at two thirds of its life.
func RenewAt(cert *x509.Certificate) time.Time {
	issued := IssuedAt(cert)
	return issued.Add(cert.NotAfter.Sub(issued) * 2 / 3)
}

// NewRequest makes a key, which stays with its host, and a request (DER, PKCS
// #10) that proves that its sender has it.
func NewRequest() (request, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("key: %w", err)
	}
	if request, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key); err != nil {
		return nil, nil, fmt.Errorf("certificate request: %w", err)
	}
	if keyPEM, err = encodeKey(key); err != nil {
		return nil, nil, fmt.Errorf("key: %w", err)
	}
	return request, keyPEM, nil
}

func requestKey(request []byte) (*ecdsa.PublicKey, error) {
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("certificate request for a %T, want an ECDSA key on P-256", csr.PublicKey)
	}
	return key, nil
}

// CheckRequest says why Sign would refuse a request, or nil.
func CheckRequest(request []byte) error {
	_, err := requestKey(request)
	return err
}

// ReadCert reads one certificate from a PEM file.
func ReadCert(path string) (*x509.Certificate, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	cert, err := decodeCert(raw)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, nil
}

// ParseCert reads one certificate from PEM.
func ParseCert(raw []byte) (*x509.Certificate, error) { return decodeCert(raw) }

// Hash identifies a CA: the SHA-256 of its certificate.
func Hash(ca *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(ca.Raw) }

// Cert returns the CA's certificate.
func (ca *CA) Cert() *x509.Certificate { return ca.cert }

// Attest signs a statement of the CA that is not a certificate. purpose keeps
// statements of one kind from being taken for those of another.
func (ca *CA) Attest(purpose string, statement []byte) ([]byte, error) {
	digest := attested(purpose, statement)
	sig, err := ecdsa.SignASN1(rand.Reader, ca.key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("cluster CA: %w", err)
	}
	return sig, nil
}

// ErrNotAttested says that a statement does not carry the CA's signature.
var ErrNotAttested = errors.New("not signed by the cluster's CA")

// VerifyAttested checks what Attest signed.
func VerifyAttested(ca *x509.Certificate, purpose string, statement, sig []byte) error {
	key, ok := ca.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("cluster CA: a %T, want an ECDSA key", ca.PublicKey)
	}
	digest := attested(purpose, statement)
	if !ecdsa.VerifyASN1(key, digest[:], sig) {
		return ErrNotAttested
	}
	return nil
}

// attested cannot be the digest of a certificate, which begins with a DER
// sequence and not with a letter.
func attested(purpose string, statement []byte) [sha256.Size]byte {
	return sha256.Sum256(append([]byte("tranship "+purpose+"\x00"), statement...))
}
