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
// no restart; the CA is not.
//
// The caller sets NextProtos on a clone.
func TLS(caFile, certFile, keyFile string) (server *tls.Config, client func(node string) *tls.Config, err error) {
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
	if _, err := certName(own.Leaf); err != nil {
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
			_, err := PeerName(cs)
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
				name, err := PeerName(cs)
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

// PeerName returns the node name of the other end of a verified connection.
func PeerName(cs tls.ConnectionState) (string, error) {
	if len(cs.PeerCertificates) == 0 || len(cs.VerifiedChains) == 0 {
		return "", errors.New("the peer showed no certificate of this cluster")
	}
	return certName(cs.PeerCertificates[0])
}

// certName wants exactly one name, said twice: a certificate that the CA's key
// signed for another purpose carries no tranship URI, and one with two names
// could act as either node.
func certName(cert *x509.Certificate) (string, error) {
	if len(cert.DNSNames) != 1 || len(cert.URIs) != 1 {
		return "", fmt.Errorf("certificate %q has %d DNS names and %d URIs, want one of each", cert.Subject.CommonName, len(cert.DNSNames), len(cert.URIs))
	}
	name, uri := cert.DNSNames[0], cert.URIs[0]
	if err := CheckName(name); err != nil {
		return "", err
	}
	if uri.String() != nameScheme+"://"+name {
		return "", fmt.Errorf("certificate of %q is for %s, not for a node of that name", name, uri)
	}
	return name, nil
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
