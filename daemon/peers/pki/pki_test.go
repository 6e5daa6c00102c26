package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// node writes the files of a node signed by ca and returns its two configurations.
func node(t *testing.T, ca *CA, name string) (*tls.Config, func(string) *tls.Config) {
	t.Helper()
	cert, key, err := ca.Issue(name, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return load(t, ca.CertPEM(), cert, key)
}

func load(t *testing.T, ca, cert, key []byte) (*tls.Config, func(string) *tls.Config) {
	t.Helper()
	dir := t.TempDir()
	if err := Write(dir, ca, cert, key); err != nil {
		t.Fatal(err)
	}
	server, client, err := TLS(filepath.Join(dir, CACertFile), filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	return server, client
}

func newCA(t *testing.T) *CA {
	t.Helper()
	ca, err := Init(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// handshake joins the two ends and reads one byte each way, because in TLS 1.3
// a client learns only then that the server refused its certificate.
func handshake(t *testing.T, server, client *tls.Config) (fromServer, fromClient string, serverErr, clientErr error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	end := func(conn *tls.Conn) (string, error) {
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return "", err
		}
		if _, err := conn.Write([]byte{1}); err != nil {
			return "", err
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			return "", err
		}
		return PeerName(conn.ConnectionState())
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := ln.Accept()
		if err != nil {
			serverErr = err
			return
		}
		fromServer, serverErr = end(tls.Server(conn, server))
	}()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fromClient, clientErr = end(tls.Client(conn, client))
	<-done
	return fromServer, fromClient, serverErr, clientErr
}

func TestTwoNodesOfOneClusterNameEachOther(t *testing.T) {
	ca := newCA(t)
	server, _ := node(t, ca, "host-1")
	_, client := node(t, ca, "host-2")
	fromServer, fromClient, serverErr, clientErr := handshake(t, server, client("host-1"))
	if serverErr != nil || clientErr != nil {
		t.Fatalf("server: %v, client: %v", serverErr, clientErr)
	}
	if fromServer != "host-2" || fromClient != "host-1" {
		t.Errorf("the server saw %q and the client %q", fromServer, fromClient)
	}
}

func TestStrangersAreRefused(t *testing.T) {
	ca, other := newCA(t), newCA(t)
	server, _ := node(t, ca, "host-1")
	_, member := node(t, ca, "host-2")
	strangerServer, stranger := node(t, other, "host-2")

	tests := []struct {
		name           string
		server, client *tls.Config
		serverRefuses  bool
	}{
		{"a client of another cluster that trusts this one's CA", server, func() *tls.Config {
			c := stranger("host-1")
			c.RootCAs = member("host-1").RootCAs
			return c
		}(), true},
		{"a client without a certificate", server, &tls.Config{ServerName: "host-1", RootCAs: member("host-1").RootCAs}, true},
		{"a server of another cluster", strangerServer, member("host-2"), false},
		{"a member that is not the node that was meant", server, member("host-3"), false},
		{"a client that offers only TLS 1.2", server, func() *tls.Config {
			c := member("host-1")
			c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			return c
		}(), true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, _, serverErr, clientErr := handshake(t, test.server, test.client)
			if test.serverRefuses && serverErr == nil {
				t.Error("the server let it in")
			}
			if !test.serverRefuses && clientErr == nil {
				t.Error("the client accepted the server")
			}
		})
	}
}

// forge signs a template with the cluster's own key: what a careless use of the
// CA could produce.
func forge(t *testing.T, ca *CA, change func(*x509.Certificate)) (certPEM, keyPEM []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:     []string{"host-2"},
		URIs:         []*url.URL{{Scheme: nameScheme, Host: "host-2"}},
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	keyPEM, err = encodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return encodeCert(der), keyPEM
}

func TestCertificatesOfTheClusterThatNameNoSingleNodeAreRefused(t *testing.T) {
	ca := newCA(t)
	server, _ := node(t, ca, "host-1")
	_, member := node(t, ca, "host-2")
	tests := []struct {
		name   string
		change func(*x509.Certificate)
	}{
		{"without the tranship URI", func(c *x509.Certificate) { c.URIs = nil }},
		{"with the URI of another node", func(c *x509.Certificate) { c.URIs[0].Host = "host-9" }},
		{"with the URI of another scheme", func(c *x509.Certificate) { c.URIs[0].Scheme = "spiffe" }},
		{"with two names", func(c *x509.Certificate) { c.DNSNames = append(c.DNSNames, "host-9") }},
		{"for servers alone", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }},
		{"that is over", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }},
		{"that has not begun", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			cert, key := forge(t, ca, test.change)
			pair, err := tls.X509KeyPair(cert, key)
			if err != nil {
				t.Fatal(err)
			}
			client := &tls.Config{Certificates: []tls.Certificate{pair}, ServerName: "host-1", RootCAs: member("host-1").RootCAs}
			if _, _, serverErr, _ := handshake(t, server, client); serverErr == nil {
				t.Error("the server let it in")
			}
		})
	}
}

func TestAFreshCertificateIsGoodOnAHostWhoseClockIsBehind(t *testing.T) {
	ca := newCA(t)
	certPEM, _, err := ca.Issue("host-1", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := decodeCert(certPEM)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: time.Now().Add(-50 * time.Minute)}); err != nil {
		t.Errorf("50 minutes behind: %v", err)
	}
}

func TestARenewedCertificateNeedsNoRestart(t *testing.T) {
	ca := newCA(t)
	dir := t.TempDir()
	write := func(name string) {
		cert, key, err := ca.Issue(name, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if err := Write(dir, ca.CertPEM(), cert, key); err != nil {
			t.Fatal(err)
		}
	}
	write("host-1")
	// An older date, so that the files' times differ even on a coarse clock.
	past := time.Now().Add(-time.Minute)
	for _, name := range []string{CertFile, KeyFile} {
		if err := os.Chtimes(filepath.Join(dir, name), past, past); err != nil {
			t.Fatal(err)
		}
	}
	server, _, err := TLS(filepath.Join(dir, CACertFile), filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	first, err := server.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	write("host-1")
	second, err := server.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first.Certificate[0], second.Certificate[0]) {
		t.Error("the old certificate is still served")
	}
	if err := os.WriteFile(filepath.Join(dir, KeyFile), []byte("half a renewal"), 0o600); err != nil {
		t.Fatal(err)
	}
	third, err := server.GetCertificate(nil)
	if err != nil || !bytes.Equal(second.Certificate[0], third.Certificate[0]) {
		t.Errorf("in the middle of a renewal: %v", err)
	}
}

func TestInitRefusesToOverwrite(t *testing.T) {
	for _, name := range []string{CACertFile, CAKeyFile} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, name), []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Init(dir); !errors.Is(err, ErrExists) {
				t.Fatalf("err = %v", err)
			}
			got, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil || string(got) != "precious" {
				t.Errorf("the file is now %q (%v)", got, err)
			}
		})
	}
}

func TestKeysAreForTheirOwnerAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	ca, err := Init(dir)
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Issue("host-1", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := Write(dir, ca.CertPEM(), cert, key); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{CAKeyFile: 0o600, KeyFile: 0o600, ".": 0o700 | os.ModeDir} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != want {
			t.Errorf("%s has mode %v, want %v", name, info.Mode(), want)
		}
	}
}

func TestLoadRefusesPartsThatDoNotBelongTogether(t *testing.T) {
	one, two := t.TempDir(), t.TempDir()
	for _, dir := range []string{one, two} {
		if _, err := Init(dir); err != nil {
			t.Fatal(err)
		}
	}
	raw, err := os.ReadFile(filepath.Join(two, CAKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(one, CAKeyFile), raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(one); err == nil || !strings.Contains(err.Error(), "do not belong together") {
		t.Errorf("err = %v", err)
	}
}

func TestTLSRefusesAHostCertificateOfAnotherCluster(t *testing.T) {
	cert, key, err := newCA(t).Issue("host-1", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := Write(dir, newCA(t).CertPEM(), cert, key); err != nil {
		t.Fatal(err)
	}
	if _, _, err := TLS(filepath.Join(dir, CACertFile), filepath.Join(dir, CertFile), filepath.Join(dir, KeyFile)); err == nil {
		t.Error("accepted")
	}
}

func TestNodeNames(t *testing.T) {
	tests := []struct {
		name string
		good bool
	}{
		{"host-1", true},
		{"a", true},
		{"db.rack3.example", true},
		{"0host", true},
		{"", false},
		{"Host-1", false},
		{"host_1", false},
		{"-host", false},
		{"host-", false},
		{"a..b", false},
		{"10.0.0.1", false},
		{"host 1", false},
		{"host\n", false},
		{"host/1", false},
		{"*.example", false},
		{strings.Repeat("a", 64), false},
		{strings.Repeat("a.", 127) + "aa", false},
	}
	ca := newCA(t)
	for _, test := range tests {
		if _, _, err := ca.Issue(test.name, time.Hour); (err == nil) != test.good {
			t.Errorf("%q: %v", test.name, err)
		}
	}
}
