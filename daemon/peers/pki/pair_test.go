package pki

import (
	"bytes"
	"crypto/tls"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A renewal that is cut anywhere leaves a pair that is whole when it is read
// again: the old one until the new key is in its place, and the new one from
// then on.
func TestARenewalThatIsCutLeavesAWholePair(t *testing.T) {
	ca := newCA(t)
	pair := func() (cert, key []byte) {
		cert, key, err := ca.Issue("host-1", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	oldCert, oldKey := pair()
	newCert, newKey := pair()
	for _, c := range []struct {
		name string
		cut  func(certFile, keyFile string) error
		want []byte
	}{
		{"before the key", func(certFile, _ string) error { return Replace(certFile+nextSuffix, newCert, 0o644) }, oldCert},
		{"before the certificate", func(certFile, keyFile string) error {
			if err := Replace(certFile+nextSuffix, newCert, 0o644); err != nil {
				return err
			}
			return Replace(keyFile, newKey, 0o600)
		}, newCert},
		{"nowhere", func(certFile, keyFile string) error { return ReplacePair(certFile, keyFile, newCert, newKey) }, newCert},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			certFile, keyFile := filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile)
			if err := Write(dir, ca.CertPEM(), oldCert, oldKey); err != nil {
				t.Fatal(err)
			}
			if err := c.cut(certFile, keyFile); err != nil {
				t.Fatal(err)
			}
			for range 2 { // and again after another restart
				if _, err := LoadPair(certFile, keyFile); err != nil {
					t.Fatal(err)
				}
				if got, err := os.ReadFile(certFile); err != nil || !bytes.Equal(got, c.want) {
					t.Errorf("another certificate: %v", err)
				}
				if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
