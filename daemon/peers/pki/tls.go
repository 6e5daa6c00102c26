package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// TLS reads a node's files and returns the configuration of its listener and a
// function that makes the configuration for dialling one named node. The node's
// pair is read again when its files change, so that a renewed certificate needs
// no restart; the CA is not. Each check is asked about the certificate of every
// peer, at both ends, after everything else was found in order.
//
// The caller sets NextProtos on a clone.
func TLS(caFile, certFile, keyFile string, checks ...func(*x509.Certificate) error) (server *tls.Config, client func(node string) *tls.Config, err error) {
	caPEM, err := os.ReadFile(caFile)
	if err != nil {
		return nil, nil, fmt.Errorf("cluster CA: %w", err)
	}
	ca, err := decodeCert(caPEM)
	if err != nil {
		return nil, nil, fmt.Errorf("cluster CA: %s: %w", caFile, err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)

	pair := &keyPair{certFile: certFile, keyFile: keyFile}
	own, err := pair.load()
	if err != nil {
		return nil, nil, fmt.Errorf("certificate of this host: %w", err)
	}
	// Found now, with the file's name, and not at the first migration by a peer.
	if _, err := own.Leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, nil, fmt.Errorf("certificate of this host %s is not one of the CA in %s: %w", certFile, caFile, err)
	}
	if _, err := IdentityOf(own.Leaf); err != nil {
		return nil, nil, fmt.Errorf("certificate of this host %s: %w", certFile, err)
	}

	server = &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.get() },
		ClientAuth:     tls.RequireAndVerifyClientCert,
		ClientCAs:      pool,
		// A ticket would let a peer in whose certificate has been replaced since.
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := verifyPeer(cs, checks)
			return err
		},
	}
	client = func(node string) *tls.Config {
		return &tls.Config{
			MinVersion:           tls.VersionTLS13,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair.get() },
			RootCAs:              pool,
			ServerName:           node,
			VerifyConnection: func(cs tls.ConnectionState) error {
				name, err := verifyPeer(cs, checks)
				if err != nil {
					return err
				}
				if name != node {
					return fmt.Errorf("the peer is node %s, not %s", name, node)
				}
				return nil
			},
		}
	}
	return server, client, nil
}

func verifyPeer(cs tls.ConnectionState, checks []func(*x509.Certificate) error) (string, error) {
	name, err := PeerName(cs)
	if err != nil {
		return "", err
	}
	for _, check := range checks {
		if err := check(cs.PeerCertificates[0]); err != nil {
			return "", err
		}
	}
	return name, nil
}

// PeerName returns the node name of the other end of a verified connection.
func PeerName(cs tls.ConnectionState) (string, error) {
	if len(cs.PeerCertificates) == 0 || len(cs.VerifiedChains) == 0 {
		return "", errors.New("the peer showed no certificate of this cluster")
	}
	host, err := IdentityOf(cs.PeerCertificates[0])
	return host.Name, err
}

// LoadPair reads a node's pair as its files are now.
func LoadPair(certFile, keyFile string) (*tls.Certificate, error) {
	pair := &keyPair{certFile: certFile, keyFile: keyFile}
	return pair.load()
}

// nextSuffix is of a certificate whose key may not be in its place yet.
const nextSuffix = ".next"

// ReplacePair puts a new pair in place of a node's. A daemon that is killed
// between the two files finds the certificate for the new key beside the old one
// (LoadPair takes it up).
func ReplacePair(certFile, keyFile string, certPEM, keyPEM []byte) error {
	if err := Replace(certFile+nextSuffix, certPEM, 0o644); err != nil {
		return err
	}
	if err := Replace(keyFile, keyPEM, 0o600); err != nil {
		return err
	}
	return os.Rename(certFile+nextSuffix, certFile)
}

// takeUp ends a ReplacePair that was cut short; false when there was none.
func takeUp(certFile, keyFile string) bool {
	_, err := tls.LoadX509KeyPair(certFile+nextSuffix, keyFile)
	return err == nil && os.Rename(certFile+nextSuffix, certFile) == nil
}

// keyPair keeps a node's pair in memory and follows its files.
type keyPair struct {
	certFile, keyFile string

	mu        sync.Mutex
	cert      *tls.Certificate
	certMtime time.Time
	keyMtime  time.Time
}

func (p *keyPair) load() (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.loadLocked()
}

func (p *keyPair) loadLocked() (*tls.Certificate, error) {
	certInfo, err := os.Stat(p.certFile)
	if err != nil {
		return nil, err
	}
	keyInfo, err := os.Stat(p.keyFile)
	if err != nil {
		return nil, err
	}
	if p.cert != nil && certInfo.ModTime().Equal(p.certMtime) && keyInfo.ModTime().Equal(p.keyMtime) {
		return p.cert, nil
	}
	cert, err := tls.LoadX509KeyPair(p.certFile, p.keyFile)
	if err != nil && p.cert == nil && takeUp(p.certFile, p.keyFile) {
		cert, err = tls.LoadX509KeyPair(p.certFile, p.keyFile)
	}
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", p.certFile, p.keyFile, err)
	}
	p.cert, p.certMtime, p.keyMtime = &cert, certInfo.ModTime(), keyInfo.ModTime()
	return p.cert, nil
}

// get answers the newest pair that was whole. Between the two renames of a
// renewal the files do not belong together; the pair from before is still good.
func (p *keyPair) get() (*tls.Certificate, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	cert, err := p.loadLocked()
	if err != nil && p.cert != nil {
		return p.cert, nil
	}
	return cert, err
}
