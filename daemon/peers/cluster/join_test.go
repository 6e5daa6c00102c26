package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tranship/tranship/daemon/peers/pki"
)

// rig is an authority, host-1, that listens on loopback.
type rig struct {
	*Authority
	server *Server
	dir    string
	addr   string
	skew   time.Duration // of the authority's clock
	mu     sync.Mutex
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{dir: t.TempDir()}
	var err error
	if r.Authority, err = Found(r.dir, "host-1", Seed{Name: "host-1", Address: "192.0.2.1:7443", Gossip: "192.0.2.1:7444"}); err != nil {
		t.Fatal(err)
	}
	r.now = func() time.Time {
		r.mu.Lock()
		defer r.mu.Unlock()
		return time.Now().Add(r.skew)
	}
	r.server = &Server{
		Authority: r.Authority, Name: "host-1", Log: slog.New(slog.DiscardHandler),
		Seeds: func() []Seed { return []Seed{{Name: "host-1", Address: "192.0.2.1:7443", Gossip: "192.0.2.1:7444"}} },
		Certificate: func() (*tls.Certificate, error) {
			c, err := tls.LoadX509KeyPair(filepath.Join(r.dir, pki.CertFile), filepath.Join(r.dir, pki.KeyFile))
			return &c, err
		},
	}
	r.addr = serve(t, r.server)
	return r
}

func serve(t *testing.T, s *Server) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	ended := errors.New("the test is over")
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel(ended)
		if err := <-done; !errors.Is(err, ended) {
			t.Errorf("serve: %v", err)
		}
	})
	return l.Addr().String()
}

func (r *rig) setClock(ahead time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.skew = ahead
}

func (r *rig) token(t *testing.T) string {
	t.Helper()
	tok, until, err := r.Token(DefaultTokenTTL)
	if err != nil {
		t.Fatal(err)
	}
	r.server.Expect(until)
	return tok.String()
}

func (r *rig) names(t *testing.T) string {
	t.Helper()
	hosts, err := r.Hosts()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, h := range hosts {
		out = append(out, strings.TrimSpace(h.Name+" "+h.Gone))
	}
	return strings.Join(out, ",")
}

// untouched fails the test when anything was written.
func untouched(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("%s was written", e.Name())
	}
}

func TestAHostJoinsWithAToken(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	got, err := Join(t.Context(), r.addr, r.token(t), "host-2", dir)
	if err != nil {
		t.Fatal(err)
	}
	if got.Authority != "host-1" || len(got.Seeds) != 1 || got.Skew.Abs() > 5*time.Second {
		t.Errorf("%+v", got)
	}
	cert, err := pki.ReadCert(filepath.Join(dir, pki.CertFile))
	if err != nil {
		t.Fatal(err)
	}
	id, err := pki.IdentityOf(cert)
	if err != nil || id.Name != "host-2" || pki.CheckID(id.ID) != nil {
		t.Errorf("certificate of %v: %v", id, err)
	}
	if len(cert.IPAddresses) > 0 {
		t.Errorf("the identity is bound to %v", cert.IPAddresses)
	}
	ours, err := OpenMembership(dir)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := OpenMembership(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	_, n, key := ours.Papers()
	if _, m, other := theirs.Papers(); n != m || string(key) != string(other) {
		t.Error("the two hosts have different papers")
	}
	for _, name := range []string{pki.KeyFile, MembershipFile} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if names := r.names(t); names != "host-1,host-2" {
		t.Errorf("register: %s", names)
	}
}

func TestATokenThatIsNotGoodDoesNothing(t *testing.T) {
	r, other := newRig(t), newRig(t)
	good := r.token(t)
	used := r.token(t)
	if _, err := Join(t.Context(), r.addr, used, "host-2", t.TempDir()); err != nil {
		t.Fatal(err)
	}
	forged, err := ParseToken(good)
	if err != nil {
		t.Fatal(err)
	}
	forged.Secret[7] ^= 1
	unknown := newToken(pki.Hash(r.ca.Cert()))
	short, until, err := r.Token(time.Nanosecond)
	if err != nil {
		t.Fatal(err)
	}
	r.server.Expect(until)
	tests := []struct {
		name, token, host string
		want              error
		text              string
	}{
		{"a forged secret", forged.String(), "host-3", nil, ErrTokenUnknown.Error()},
		{"a token that nobody made", unknown.String(), "host-3", nil, ErrTokenUnknown.Error()},
		{"a token of another cluster", other.token(t), "host-3", ErrWrongCA, ""},
		{"one that was used", used, "host-3", nil, ErrTokenUsed.Error() + ", by host-2"},
		{"one that is over", short.String(), "host-3", nil, ErrTokenExpired.Error()},
		{"half of one", good[:len(good)/2], "host-3", ErrToken, ""},
		{"a name that is taken", good, "host-2", nil, ErrNameTaken.Error()},
		{"the authority's own name", good, "host-1", nil, ErrNameTaken.Error()},
		{"an impossible name", good, "Host 3", nil, "node name"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			before := r.names(t)
			dir := t.TempDir()
			_, err := Join(t.Context(), r.addr, test.token, test.host, dir)
			if err == nil {
				t.Fatal("it joined")
			}
			if test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("err = %v", err)
			}
			untouched(t, dir)
			if after := r.names(t); after != before {
				t.Errorf("register: %s, was %s", after, before)
			}
		})
	}
	// None of it has used the good one up.
	if _, err := Join(t.Context(), r.addr, good, "host-3", t.TempDir()); err != nil {
		t.Error(err)
	}
}

func TestOneTokenLetsOneHostInHoweverManyTryAtOnce(t *testing.T) {
	r := newRig(t)
	token := r.token(t)
	var wg sync.WaitGroup
	errs := make([]error, perHostBurst)
	for i := range errs {
		dir := t.TempDir()
		wg.Go(func() { _, errs[i] = Join(t.Context(), r.addr, token, "host-"+string(rune('a'+i)), dir) })
	}
	wg.Wait()
	in := 0
	for _, err := range errs {
		if err == nil {
			in++
		}
	}
	if in != 1 {
		t.Errorf("%d hosts joined: %v", in, errs)
	}
}

func TestClocksThatAreMinutesApart(t *testing.T) {
	for _, ahead := range []time.Duration{-7 * time.Minute, 7 * time.Minute} {
		t.Run(ahead.String(), func(t *testing.T) {
			r := newRig(t)
			r.setClock(ahead) // all that follows is signed and judged by that clock
			dir := t.TempDir()
			got, err := Join(t.Context(), r.addr, r.token(t), "host-2", dir)
			if err != nil {
				t.Fatal(err)
			}
			if (got.Skew + ahead).Abs() > 5*time.Second {
				t.Errorf("this host is said to be ahead by %v", got.Skew)
			}
			cert := certificate(t, dir)
			if at := pki.IssuedAt(cert); (time.Until(at) - ahead).Abs() > 5*time.Second {
				t.Errorf("signed at %v", at)
			}
			late, until, err := r.Token(time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			r.server.Expect(until)
			r.setClock(ahead + 2*time.Minute)
			if _, err := Join(t.Context(), r.addr, late.String(), "host-3", t.TempDir()); err == nil || !strings.Contains(err.Error(), ErrTokenExpired.Error()) {
				t.Errorf("with a token that is over there: %v", err)
			}

			// Two members whose clocks are right reach each other by such certificates,
			// and refuse who was revoked since, but not who came after that.
			m4, server4, client4 := r.host(t, "host-4")
			_, server5, client5 := r.host(t, "host-5")
			if s, c := shake(t, server4, client5("host-4")); s != nil || c != nil {
				t.Errorf("%v, %v", s, c)
			}
			signed, key, err := r.Revoke("host-5", false)
			if err != nil {
				t.Fatal(err)
			}
			if newer, err := m4.Install(signed, key); err != nil || !newer {
				t.Fatal(newer, err)
			}
			var gone *RevokedError
			if s, _ := shake(t, server4, client5("host-4")); !errors.As(s, &gone) {
				t.Errorf("to the host that was revoked host-4 says %v", s)
			}
			if _, c := shake(t, server5, client4("host-5")); !errors.As(c, &gone) {
				t.Errorf("of the host that was revoked host-4 says %v", c)
			}
			_, _, client5 = r.host(t, "host-5")
			if s, c := shake(t, server4, client5("host-4")); s != nil || c != nil {
				t.Errorf("its successor: %v, %v", s, c)
			}
		})
	}
}

// member is a host of the cluster that answers joins in the authority's place.
func member(t *testing.T, r *rig, answer http.HandlerFunc) string {
	t.Helper()
	dir := t.TempDir()
	if err := r.Equip(dir, "mallory", "host-1", nil); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, pki.CertFile), filepath.Join(dir, pki.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	pair.Certificate = append(pair.Certificate, r.ca.Cert().Raw)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: answer}
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(l) })
	t.Cleanup(func() { srv.Close(); wg.Wait() })
	return l.Addr().String()
}

func TestWhatAMemberOverhearsIsOfNoUseToIt(t *testing.T) {
	r := newRig(t)
	token := r.token(t)
	var body []byte
	var shown string
	addr := member(t, r, func(w http.ResponseWriter, req *http.Request) {
		body, _ = io.ReadAll(req.Body)
		shown = req.Header.Get(proofHeader)
		w.Write([]byte(`{"version":1}`))
	})
	dir := t.TempDir()
	if _, err := Join(t.Context(), addr, token, "host-2", dir); err == nil || !strings.Contains(err.Error(), "did not make the token") {
		t.Errorf("err = %v", err)
	}
	untouched(t, dir)
	secret, err := ParseToken(token)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(body), hex.EncodeToString(secret.Secret[:])) || strings.Contains(string(body), base64.StdEncoding.EncodeToString(secret.Secret[:])) {
		t.Error("the secret was sent")
	}
	// Replayed to the authority, over a connection of its own.
	status, text := post(t, r.addr, shown, body)
	if status != http.StatusForbidden || !strings.Contains(text, ErrTokenUnknown.Error()) {
		t.Errorf("the authority answered %d %s", status, text)
	}
	if names := r.names(t); names != "host-1,mallory" {
		t.Errorf("register: %s", names)
	}
}

// post sends a body to the authority with a proof.
func post(t *testing.T, addr, shown string, body []byte) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+addr+joinPath, strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(proofHeader, shown)
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(raw)
}

func TestGarbageGetsAClearErrorAndNothingElse(t *testing.T) {
	r := newRig(t)
	token := r.token(t)
	for _, body := range []string{
		"", "{", "null", `{"version":1}`, `{"version":2,"token":"00"}`, `{"version":1,"token":"zz"}`,
		`{"version":1,"token":"0011223344556677","name":"x","request":"AAAA"}`, strings.Repeat("a", 2*maxJoinRequest),
	} {
		status, text := post(t, r.addr, base64.StdEncoding.EncodeToString([]byte("proof")), []byte(body))
		var no joinRefusal
		if status < 400 || status >= 500 || json.Unmarshal([]byte(text), &no) != nil || no.Error == "" {
			t.Errorf("%.40q: %d %s", body, status, text)
		}
	}
	if names := r.names(t); names != "host-1" {
		t.Errorf("register: %s", names)
	}
	r.server.mu.Lock()
	r.server.from = nil // the limit on one address is another test's
	r.server.mu.Unlock()
	if _, err := Join(t.Context(), r.addr, token, "host-2", t.TempDir()); err != nil {
		t.Error(err)
	}
}

func TestTheDoorIsShutWithoutAToken(t *testing.T) {
	r := newRig(t)
	token := newToken(pki.Hash(r.ca.Cert()))
	if _, err := Join(t.Context(), r.addr, token.String(), "host-2", t.TempDir()); err == nil || !strings.Contains(err.Error(), "no join token is open there") {
		t.Errorf("err = %v", err)
	}
	// A token of an earlier life of the daemon opens it again.
	tok, _, err := r.Token(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	again := &Server{Authority: r.Authority, Name: "host-1", Seeds: r.server.Seeds, Certificate: r.server.Certificate, Log: r.server.Log}
	addr := serve(t, again)
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err = Join(t.Context(), addr, tok.String(), "host-2", t.TempDir()); err == nil || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		t.Error(err)
	}
}

func TestOneAddressCannotTryForEver(t *testing.T) {
	r := newRig(t)
	r.token(t)
	bad := newToken(pki.Hash(r.ca.Cert())).String()
	answered := 0
	var last error
	for range 3 * perHostBurst {
		_, last = Join(t.Context(), r.addr, bad, "host-2", t.TempDir())
		var no *RefusedError
		if errors.As(last, &no) {
			answered++
		}
	}
	// The time that the attempts took has earned some more.
	if answered > 2*perHostBurst || !strings.Contains(last.Error(), "hung up") {
		t.Errorf("%d of %d were answered; last: %v", answered, 3*perHostBurst, last)
	}
}

func TestAHostThatBelongsSomewhereDoesNotJoin(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	if _, err := Join(t.Context(), r.addr, r.token(t), "host-2", dir); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(dir, pki.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Join(t.Context(), r.addr, r.token(t), "host-3", dir); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("err = %v", err)
	}
	if after, err := os.ReadFile(filepath.Join(dir, pki.KeyFile)); err != nil || string(after) != string(before) {
		t.Errorf("the key was replaced (%v)", err)
	}
}

func TestParseTokenTakesOnlyWhatStringWrote(t *testing.T) {
	tok := newToken([32]byte{1, 2, 3})
	text := tok.String()
	if got, err := ParseToken(" " + text + "\n"); err != nil || got != tok {
		t.Errorf("round trip: %v", err)
	}
	for i := range len(text) {
		if _, err := ParseToken(text[:i]); err == nil {
			t.Errorf("cut at %d: accepted", i)
		}
		other := []byte(text)
		other[i] ^= 1
		if got, err := ParseToken(string(other)); err == nil {
			t.Errorf("changed at %d: accepted as %v", i, got == tok)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	f.Add(newToken([32]byte{9}).String())
	f.Add(tokenPrefix)
	f.Fuzz(func(t *testing.T, s string) {
		if tok, err := ParseToken(s); err == nil && tok.String() != strings.TrimSpace(s) {
			t.Errorf("%q is another spelling of %q", s, tok)
		}
	})
}

// host makes a host's TLS with its membership as the check.
func (r *rig) host(t *testing.T, name string) (m *Membership, server *tls.Config, client func(string) *tls.Config) {
	t.Helper()
	dir := t.TempDir()
	if err := r.Equip(dir, name, "host-1", nil); err != nil {
		t.Fatal(err)
	}
	m, err := OpenMembership(dir)
	if err != nil {
		t.Fatal(err)
	}
	server, client, err = pki.TLS(filepath.Join(dir, pki.CACertFile), filepath.Join(dir, pki.CertFile), filepath.Join(dir, pki.KeyFile), m.Refuse)
	if err != nil {
		t.Fatal(err)
	}
	return m, server, client
}

// shake returns what each end said to the other's certificate.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	done := make(chan error, 1)
	go func() {
		s := tls.Server(a, server)
		err := s.HandshakeContext(t.Context())
		if err != nil {
			a.Close()
		} else {
			_, err = s.Write([]byte{1})
		}
		done <- err
	}()
	c := tls.Client(b, client)
	clientErr = c.HandshakeContext(t.Context())
	if clientErr == nil {
		_, clientErr = io.ReadFull(c, make([]byte, 1))
	} else {
		b.Close()
	}
	return <-done, clientErr
}

func TestARevokedHostIsRefusedAtBothEnds(t *testing.T) {
	r := newRig(t)
	m2, server2, client2 := r.host(t, "host-2")
	_, server3, client3 := r.host(t, "host-3")
	if s, c := shake(t, server2, client3("host-2")); s != nil || c != nil {
		t.Fatalf("before: %v, %v", s, c)
	}
	_, _, oldKey := m2.Papers()
	signed, key, err := r.Revoke("host-3", false)
	if err != nil {
		t.Fatal(err)
	}
	if string(key) == string(oldKey) {
		t.Error("the revoked host still has the gossip key")
	}
	if newer, err := m2.Install(signed, key); err != nil || !newer {
		t.Fatalf("install: %v, %v", newer, err)
	}
	var gone *RevokedError
	if s, _ := shake(t, server2, client3("host-2")); !errors.As(s, &gone) {
		t.Errorf("as a server host-2 says %v", s)
	}
	if _, c := shake(t, server3, client2("host-3")); !errors.As(c, &gone) {
		t.Errorf("as a client host-2 says %v", c)
	}
	// A new host of the name is another host.
	_, server3, client3 = r.host(t, "host-3")
	if s, c := shake(t, server2, client3("host-2")); s != nil || c != nil {
		t.Errorf("its successor: %v, %v", s, c)
	}
	if _, c := shake(t, server3, client2("host-3")); c != nil {
		t.Errorf("its successor as a server: %v", c)
	}
	if names := r.names(t); names != "host-1,host-2,host-3 revoked,host-3" && names != "host-1,host-2,host-3,host-3 revoked" {
		t.Errorf("register: %s", names)
	}
	if _, _, err := r.Revoke("host-9", false); !errors.Is(err, ErrUnknownHost) {
		t.Errorf("revoking nobody: %v", err)
	}
}

func TestARevocationHitsCertificatesFromBeforeHostsHadIDs(t *testing.T) {
	at := time.Now()
	r := Revoked{Name: "host-2", At: at}
	tests := []struct {
		name   string
		host   pki.Identity
		issued time.Time
		want   bool
	}{
		{"issued before", pki.Identity{Name: "host-2"}, at.Add(-time.Hour), true},
		{"issued after", pki.Identity{Name: "host-2", ID: pki.NewID()}, at.Add(time.Second), false},
		{"another host", pki.Identity{Name: "host-3"}, at.Add(-time.Hour), false},
	}
	for _, test := range tests {
		if got := r.hits(test.host, test.issued); got != test.want {
			t.Errorf("%s: %v", test.name, got)
		}
	}
}

func TestOnlyTheCAsNewerWordIsBelieved(t *testing.T) {
	r, stranger := newRig(t), newRig(t)
	m, _, _ := r.host(t, "host-2")
	old, oldKey, err := r.Papers()
	if err != nil {
		t.Fatal(err)
	}
	next, nextKey, err := r.Revoke("host-2", false)
	if err != nil {
		t.Fatal(err)
	}
	foreign, foreignKey, err := stranger.Revoke("host-1", false)
	if err != nil {
		t.Fatal(err)
	}
	changed := Signed{Statement: []byte(strings.Replace(string(next.Statement), "host-2", "host-1", 1)), Signature: next.Signature}
	for name, forged := range map[string]struct {
		Signed
		key []byte
	}{
		"a changed statement":       {changed, nextKey},
		"no signature":              {Signed{Statement: next.Statement}, nextKey},
		"another cluster's":         {foreign, foreignKey},
		"the key of the last":       {next, oldKey},
		"no key":                    {next, nil},
		"nothing":                   {Signed{}, nil},
		"a statement without end":   {Signed{Statement: make([]byte, maxStatement+1)}, nextKey},
		"a certificate's signature": {Signed{Statement: r.ca.Cert().RawTBSCertificate, Signature: r.ca.Cert().Signature}, nextKey},
	} {
		if newer, err := m.Install(forged.Signed, forged.key); !errors.Is(err, ErrForged) || newer {
			t.Errorf("%s: %v, %v", name, newer, err)
		}
	}
	if len(m.Revoked()) > 0 {
		t.Error("a forged statement was believed")
	}
	if newer, err := m.Install(next, nextKey); err != nil || !newer {
		t.Errorf("the next: %v, %v", newer, err)
	}
	if newer, err := m.Install(old, oldKey); err != nil || newer {
		t.Errorf("the last again: %v, %v", newer, err)
	}
	again, err := OpenMembership(filepath.Dir(m.path))
	if err != nil || len(again.Revoked()) != 1 {
		t.Errorf("after a restart: %v, %v", again, err)
	}
}

func TestARenewalKeepsTheIdentity(t *testing.T) {
	r := newRig(t)
	dir := t.TempDir()
	if err := r.Equip(dir, "host-2", "host-1", nil); err != nil {
		t.Fatal(err)
	}
	shown := certificate(t, dir)
	before, err := pki.IdentityOf(shown)
	if err != nil {
		t.Fatal(err)
	}
	request, _, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	certPEM, err := r.Renew(shown, request)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.ParseCert(certPEM)
	if err != nil {
		t.Fatal(err)
	}
	if after, err := pki.IdentityOf(cert); err != nil || after != before {
		t.Errorf("%v became %v (%v)", before, after, err)
	}
	if _, err := r.Renew(shown, []byte("garbage")); err == nil {
		t.Error("garbage was signed")
	}
	if at := pki.RenewAt(cert); at.Sub(pki.IssuedAt(cert)) > pki.Lifetime*7/10 || at.Before(time.Now().Add(pki.Lifetime/2)) {
		t.Errorf("to be renewed at %v", at)
	}
}

func certificate(t *testing.T, dir string) *x509.Certificate {
	t.Helper()
	cert, err := pki.ReadCert(filepath.Join(dir, pki.CertFile))
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestAConnectionThatOutlivesARevocationIsOfNoUse(t *testing.T) {
	r := newRig(t)
	m, _, _ := r.host(t, "host-2")
	old := certificate(t, filepath.Dir(m.path))
	request, _, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Revoke("host-2", true); err != nil {
		t.Fatal(err)
	}
	refused := func(names string) {
		t.Helper()
		signed, _, err := r.Papers()
		if err != nil {
			t.Fatal(err)
		}
		var gone *RevokedError
		if _, err := r.Renew(old, request); !errors.As(err, &gone) {
			t.Errorf("it renews its certificate: %v", err)
		}
		if _, _, err := r.Depart(old); !errors.As(err, &gone) {
			t.Errorf("it leaves once more: %v", err)
		}
		if again, _, err := r.Papers(); err != nil || string(again.Statement) != string(signed.Statement) {
			t.Errorf("the statement became %s (%v)", again.Statement, err)
		}
		if got := r.names(t); got != names {
			t.Errorf("register: %s", got)
		}
	}
	refused("host-1,host-2 revoked")
	// Nor does it speak for the next host of its name.
	next, _, _ := r.host(t, "host-2")
	names := r.names(t)
	refused(names)
	if _, err := r.Renew(certificate(t, filepath.Dir(next.path)), request); err != nil {
		t.Errorf("its successor: %v", err)
	}
	if _, _, err := r.Depart(certificate(t, filepath.Dir(next.path))); err != nil {
		t.Errorf("its successor leaves: %v", err)
	}
}

func TestACertificateThatIsOlderThanTheRegisterIsRenewedAndMayLeave(t *testing.T) {
	r := newRig(t)
	certPEM, _, err := r.ca.Issue("host-2", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.ParseCert(certPEM)
	if err != nil {
		t.Fatal(err)
	}
	want, err := pki.IdentityOf(cert)
	if err != nil {
		t.Fatal(err)
	}
	request, _, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the first answer may have been lost
		renewed, err := r.Renew(cert, request)
		if err != nil {
			t.Fatal(err)
		}
		next, err := pki.ParseCert(renewed)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := pki.IdentityOf(next); err != nil || got != want {
			t.Errorf("%v became %v (%v)", want, got, err)
		}
	}
	if _, _, err := r.Depart(cert); err != nil {
		t.Error(err)
	}
	if names := r.names(t); names != "host-1,host-2 left" {
		t.Errorf("register: %s", names)
	}
}

func TestACertificateThatNeverArrivedIsRevokedAndTheHostJoinsAgain(t *testing.T) {
	r := newRig(t)
	// The register has it on disk, and the answer is lost on the way.
	r.server.Seeds = func() []Seed { panic(http.ErrAbortHandler) }
	token, dir := r.token(t), t.TempDir()
	if _, err := Join(t.Context(), r.addr, token, "host-2", dir); err == nil {
		t.Fatal("it joined")
	}
	untouched(t, dir)
	r.server.Seeds = func() []Seed { return nil }
	_, err := Join(t.Context(), r.addr, token, "host-2", dir)
	if err == nil || !strings.Contains(err.Error(), ErrTokenUsed.Error()+", by host-2") {
		t.Errorf("with the same token: %v", err)
	}
	_, err = Join(t.Context(), r.addr, r.token(t), "host-2", dir)
	if err == nil || !strings.Contains(err.Error(), "if it is gone: tranship cluster revoke host-2") {
		t.Errorf("with another: %v", err)
	}
	untouched(t, dir)
	if _, _, err := r.Revoke("host-2", false); err != nil {
		t.Fatal(err)
	}
	if _, err := Join(t.Context(), r.addr, r.token(t), "host-2", dir); err != nil {
		t.Errorf("as it was told: %v", err)
	}
}

func TestAnOlderCAGetsARegister(t *testing.T) {
	dir := t.TempDir()
	if _, err := pki.Init(dir); err != nil {
		t.Fatal(err)
	}
	a, err := OpenAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	signed, key, err := a.Papers()
	if err != nil {
		t.Fatal(err)
	}
	if st, err := signed.open(a.ca.Cert(), key); err != nil || st.Number != 1 {
		t.Errorf("%+v, %v", st, err)
	}
	if _, err := OpenAuthority(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a CA: %v", err)
	}
}
