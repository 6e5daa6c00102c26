package cluster

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/tranship/tranship/daemon/peers/pki"
)

const (
	joinVersion = 1
	joinPath    = "/v1/join"
	// proofHeader carries the proof of a body, in base64.
	proofHeader = "Tranship-Proof"
	// channelLabel names the key that both ends export from their connection.
	channelLabel = "EXPORTER-tranship-join"
	// maxJoinRequest and maxJoinAnswer bound what the ends read of each other.
	maxJoinRequest = 16 << 10
	maxJoinAnswer  = 4 * maxStatement
	joinTimeout    = 30 * time.Second
	// MaxSkew is how far clocks may differ before moves are refused (pre-flight).
	MaxSkew = 30 * time.Second
)

type joinRequest struct {
	Version int    `json:"version"`
	Token   string `json:"token"` // its ID, in hexadecimal
	Name    string `json:"name"`
	Request []byte `json:"request"` // PKCS #10
}

type joinAnswer struct {
	Version     int    `json:"version"`
	Certificate []byte `json:"certificate"` // PEM
	Authority   string `json:"authority"`
	Seeds       []Seed `json:"seeds"`
	Signed
	Key    []byte `json:"key"`
	UnixMs int64  `json:"unix_ms"`
}

type joinRefusal struct {
	Error string `json:"error"`
}

// RefusedError is the word of the host that was asked.
type RefusedError struct{ Text string }

func (e *RefusedError) Error() string { return e.Text }

// ErrWrongCA says that whoever answers is not of the token's cluster. Nothing
// was sent to it.
var ErrWrongCA = errors.New("not the cluster that the token is for")

// JoinResult is what Join brought.
type JoinResult struct {
	Authority string
	Seeds     []Seed
	// Skew is how far this host's clock is ahead of the authority's.
	Skew time.Duration
}

// Join makes this host, under a name, a member of the token's cluster:
//
//  1. connect, and check the other's CA by the token's hash
//  2. make a key, which never leaves this host
//  3. ask for a certificate, with the proof of the token for this connection
//  4. check the answer, by the same proof and by the CA's signatures
//  5. write the files into dir
//
// Before the last step nothing here has changed.
func Join(ctx context.Context, address, token, name, dir string) (JoinResult, error) {
	t, err := ParseToken(token)
	if err != nil {
		return JoinResult{}, err
	}
	if err := pki.CheckName(name); err != nil {
		return JoinResult{}, err
	}
	if have, err := Joined(dir); err != nil {
		return JoinResult{}, err
	} else if have {
		return JoinResult{}, fmt.Errorf("%s has the certificate of a cluster already: tranship cluster leave, or another --pki", dir)
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	conn, ca, err := dialJoin(ctx, address, t)
	if err != nil {
		return JoinResult{}, fmt.Errorf("join %s: %w", address, err)
	}
	defer conn.Close()
	request, keyPEM, err := pki.NewRequest()
	if err != nil {
		return JoinResult{}, err
	}
	sent := time.Now()
	ans, err := askToJoin(ctx, conn, t, joinRequest{Version: joinVersion, Token: hex.EncodeToString(t.ID[:]), Name: name, Request: request})
	if err != nil {
		return JoinResult{}, fmt.Errorf("join %s: %w", address, err)
	}
	skew := sent.Add(time.Since(sent) / 2).Sub(time.UnixMilli(ans.UnixMs))
	if err := ans.check(ca, name, keyPEM); err != nil {
		return JoinResult{}, fmt.Errorf("join %s: its answer: %w", address, err)
	}
	caPEM := encodePEM(ca)
	if err := pki.Write(dir, caPEM, ans.Certificate, keyPEM); err != nil {
		return JoinResult{}, err
	}
	if err := WriteMembership(dir, ans.Authority, ans.Seeds, ans.Signed, ans.Key); err != nil {
		return JoinResult{}, err
	}
	return JoinResult{Authority: ans.Authority, Seeds: bound(ans.Seeds), Skew: skew}, nil
}

// dialJoin connects to the authority. The certificate that the token's hash
// names must be among those that the other shows, and the first of them be one
// that it signed for a node.
func dialJoin(ctx context.Context, address string, t Token) (*tls.Conn, *x509.Certificate, error) {
	var ca *x509.Certificate
	conf := &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"http/1.1"},
		// There is no CA to check against yet, only its hash: VerifyConnection does it.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			for _, cert := range cs.PeerCertificates {
				if pki.Hash(cert) == t.CAHash {
					ca = cert
				}
			}
			if ca == nil {
				return ErrWrongCA
			}
			roots := x509.NewCertPool()
			roots.AddCert(ca)
			leaf := cs.PeerCertificates[0]
			if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots}); err != nil {
				var invalid x509.CertificateInvalidError
				if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
					return fmt.Errorf("its certificate is good from %s to %s, and it is %s here: are the clocks right? %w",
						leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339), time.Now().UTC().Format(time.RFC3339), err)
				}
				return fmt.Errorf("%w: %w", ErrWrongCA, err)
			}
			_, err := pki.IdentityOf(leaf)
			return err
		},
	}
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	conn := tls.Client(raw, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		if errors.Is(err, io.EOF) || isReset(err) {
			err = fmt.Errorf("it hung up: no join token is open there, or too many tried (tranship cluster token on that host makes one): %w", err)
		}
		return nil, nil, err
	}
	return conn, ca, nil
}

func isReset(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && !op.Timeout()
}

// askToJoin sends the one request of a connection.
func askToJoin(ctx context.Context, conn *tls.Conn, t Token, req joinRequest) (joinAnswer, error) {
	state := conn.ConnectionState()
	channel, err := state.ExportKeyingMaterial(channelLabel, nil, 32)
	if err != nil {
		return joinAnswer{}, err
	}
	body, err := json.Marshal(req)
	if err != nil {
		return joinAnswer{}, err
	}
	used := false
	client := &http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
			if used { // a retry would go over a connection that nobody checked
				return nil, errors.New("the connection broke")
			}
			used = true
			return conn, nil
		}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	// The connection is TLS already; the URL's scheme keeps the client from more.
	hr, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://authority"+joinPath, bytes.NewReader(body))
	if err != nil {
		return joinAnswer{}, err
	}
	hr.Header.Set(proofHeader, base64.StdEncoding.EncodeToString(proof(t.Secret[:], proofOfRequest, channel, body)))
	resp, err := client.Do(hr)
	if err != nil {
		return joinAnswer{}, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxJoinAnswer+1))
	if err != nil {
		return joinAnswer{}, err
	}
	if len(raw) > maxJoinAnswer {
		return joinAnswer{}, fmt.Errorf("its answer is longer than %d bytes", maxJoinAnswer)
	}
	if resp.StatusCode != http.StatusOK {
		var no joinRefusal
		if err := json.Unmarshal(raw, &no); err != nil || no.Error == "" {
			return joinAnswer{}, fmt.Errorf("it answers %s", resp.Status)
		}
		return joinAnswer{}, &RefusedError{no.Error}
	}
	shown, err := base64.StdEncoding.DecodeString(resp.Header.Get(proofHeader))
	if err != nil || !hmac.Equal(shown, proof(t.Secret[:], proofOfAnswer, channel, raw)) {
		return joinAnswer{}, errors.New("whoever answers did not make the token")
	}
	var ans joinAnswer
	if err := json.Unmarshal(raw, &ans); err != nil {
		return joinAnswer{}, fmt.Errorf("its answer: %w", err)
	}
	return ans, nil
}

// check holds an answer against what was asked for.
func (a joinAnswer) check(ca *x509.Certificate, name string, keyPEM []byte) error {
	if a.Version != joinVersion {
		return fmt.Errorf("version %d of joining, this is %d: install the same tranship on both hosts", a.Version, joinVersion)
	}
	cert, err := pki.ParseCert(a.Certificate)
	if err != nil {
		return err
	}
	if _, err := tls.X509KeyPair(a.Certificate, keyPEM); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return fmt.Errorf("are the clocks right? %w", err)
	}
	host, err := pki.IdentityOf(cert)
	if err != nil {
		return err
	}
	if host.Name != name {
		return fmt.Errorf("a certificate for %s, asked for %s", host.Name, name)
	}
	_, err = a.open(ca, a.Key)
	return err
}
