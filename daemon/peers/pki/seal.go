package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
)

// Seal says which host a statement is from, whoever brought it. The zero value
// says nothing.
type Seal struct {
	Cert []byte `json:"cert,omitempty"` // DER
	Sig  []byte `json:"sig,omitempty"`  // ECDSA, ASN.1, over what Attest signs
}

// ErrNotSealed says that a statement is not from the host that it names.
var ErrNotSealed = errors.New("not sealed by the host that it is said to be from")

// MakeSeal seals a statement as the host whose pair it is. purpose keeps
// statements of one kind from being taken for those of another.
func MakeSeal(pair *tls.Certificate, purpose string, statement []byte) (Seal, error) {
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || len(pair.Certificate) == 0 {
		return Seal{}, fmt.Errorf("seal: a key of %T, want an ECDSA key with its certificate", pair.PrivateKey)
	}
	digest := attested(purpose, statement)
	sig, err := key.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return Seal{}, fmt.Errorf("seal: %w", err)
	}
	return Seal{Cert: pair.Certificate[0], Sig: sig}, nil
}

// Open returns who sealed a statement. It asks neither whether that certificate
// has ended, for what it sealed outlives it and clocks differ, nor whether the
// host was revoked since: what it said before still holds.
func (s Seal) Open(ca *x509.Certificate, purpose string, statement []byte) (Identity, error) {
	cert, err := x509.ParseCertificate(s.Cert)
	if err != nil {
		return Identity{}, fmt.Errorf("%w: its certificate: %w", ErrNotSealed, err)
	}
	if err := cert.CheckSignatureFrom(ca); err != nil {
		return Identity{}, fmt.Errorf("%w: its certificate is not of this cluster: %w", ErrNotSealed, err)
	}
	host, err := IdentityOf(cert)
	if err != nil {
		return Identity{}, fmt.Errorf("%w: %w", ErrNotSealed, err)
	}
	digest := attested(purpose, statement)
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || !ecdsa.VerifyASN1(key, digest[:], s.Sig) {
		return Identity{}, ErrNotSealed
	}
	return host, nil
}
