//go:build integration

package e2e

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// node is a row of `tranship nodes -o json`.
type node struct {
	Name       string `json:"name"`
	ID         string `json:"id"`
	State      string `json:"state"`
	Membership string `json:"membership"`
	Error      string `json:"error"`
	Cordoned   bool   `json:"cordoned"`
	// Ends is the certificate's.
	Ends time.Time `json:"certificate_ends"`
}

// nodesOf is the pool as a host sees it, by name.
func nodesOf(t *testing.T, host string) map[string]node {
	t.Helper()
	var doc struct {
		SchemaVersion int `json:"schema_version"`
		Nodes         []node
	}
	if err := json.Unmarshal([]byte(must(t, host, "tranship", "nodes", "-o", "json")), &doc); err != nil {
		t.Fatal(err)
	}
	out := map[string]node{}
	for _, n := range doc.Nodes {
		out[n.Name] = n
	}
	return out
}

func awaitAlive(t *testing.T, at, name string) {
	t.Helper()
	await(t, name+" is alive to "+at, func() bool { return nodesOf(t, at)[name].Membership == "alive" })
}

func TestAKilledDaemonIsSuspectedByTheOthers(t *testing.T) {
	guard(t)
	h := hostOf(t, "host-3")
	for _, at := range []string{"host-1", "host-2"} {
		awaitAlive(t, at, "host-3")
	}
	if err := h.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	t.Cleanup(func() {
		if err := h.StartDaemon(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	// At the same time: a host that is down makes each look at the pool take 2 s.
	var looks sync.WaitGroup
	for _, at := range []string{"host-1", "host-2"} {
		looks.Go(func() {
			for time.Since(killed) < limit {
				out, err := on(t, at, "tranship", "nodes", "-o", "json")
				if err != nil {
					t.Error(err)
					return
				}
				if strings.Contains(out, `"membership": "suspected"`) {
					break
				}
			}
			took := time.Since(killed)
			t.Logf("%s suspects it %v after the kill", at, took.Round(10*time.Millisecond))
			if took > 15*time.Second {
				t.Errorf("%s suspects it after %v", at, took)
			}
		})
	}
	looks.Wait()
	for _, at := range []string{"host-1", "host-2"} {
		if n := nodesOf(t, at)["host-3"]; n.State != "unreachable" || n.ID == "" || n.Membership != "suspected" {
			t.Errorf("%s shows %+v", at, n)
		}
	}
	if err := h.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, at := range []string{"host-1", "host-2"} {
		awaitAlive(t, at, "host-3")
	}
}

// drained is what `tranship drain -o json` prints.
type drained struct {
	SchemaVersion int    `json:"schema_version"`
	Outcome       string `json:"outcome"`
	Moved         []struct{ Name, To string }
	Stayed        []struct{ Name, Code, Reason string }
}

func TestADrainMovesEverythingUnderItsClients(t *testing.T) {
	needChecks(t)
	guard(t)
	t.Cleanup(func() { must(t, "host-1", "tranship", "uncordon", "host-3") })
	var clients []*client
	names := []string{"drain-a", "drain-b", "drain-c", "drain-d"}
	for _, name := range names {
		t.Cleanup(func() { _, _ = on(t, "host-3", "tranship", "rm", "-f", name) })
		must(t, "host-1", "tranship", "run", "--node", "host-3", "--name", name, checksImage, "redis-server", "--save", "", "--protected-mode", "no")
		ip := ""
		for _, s := range shardsOn(t, "host-3") {
			if s.Name == name {
				ip, _, _ = strings.Cut(s.IP, "/")
			}
		}
		t.Cleanup(func() {
			for _, h := range []string{"host-1", "host-2"} {
				_, _ = on(t, h, "tranship", "rm", "-f", name)
			}
		})
		awaitListening(t, ip, 6379)
		must(t, "client", checker(t), "redis", "load", "--addr", ip+":6379", "--bytes", "8MiB")
		c := startClient(t, name, "redis", "run", "--addr", ip+":6379", "--no-reconnect", "--request-rate", "100", "--overwrite-rate", "1MB/s")
		awaitConnections(t, ip, 1)
		clients = append(clients, c)
	}
	out, err := onWithin(t, moveLimit, "host-1", "tranship", "drain", "-o", "json", "host-3")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var doc drained
	if err := json.Unmarshal([]byte(out), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.SchemaVersion != 1 || doc.Outcome != "done" || len(doc.Moved) != len(names) || len(doc.Stayed) != 0 {
		t.Fatalf("%s", out)
	}
	to := map[string]int{}
	for _, s := range doc.Moved {
		to[s.To]++
	}
	if to["host-1"] == 0 || to["host-2"] == 0 {
		t.Errorf("all went one way: %v", to)
	}
	for _, s := range shardsOn(t, "host-3") {
		if s.Node == "host-3" {
			t.Errorf("on host-3 there is still %+v", s)
		}
	}
	for _, c := range clients {
		c.mustGoOn(t, 50)
		c.end(t) // fails on any error
	}
	if !nodesOf(t, "host-2")["host-3"].Cordoned {
		t.Error("host-3 is not cordoned")
	}
	// The cordon is the host's own, and outlives its daemon.
	h := hostOf(t, "host-3")
	if err := h.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	at := doc.Moved[0].To
	await(t, "host-3 answers", func() bool { return nodesOf(t, at)["host-3"].State == "alive" })
	for _, verb := range []string{"check", "migrate"} {
		out, err := on(t, at, "tranship", verb, "-o", "json", doc.Moved[0].Name, "host-3")
		if exitCodeOf(err) != 3 || !strings.Contains(out, `"cordoned"`) {
			t.Errorf("%s to a cordoned host: exit code %d: %s", verb, exitCodeOf(err), out)
		}
	}
	must(t, "host-2", "tranship", "uncordon", "host-3")
	mustMigrate(t, doc.Moved[0].Name, at, "host-3")
	// Nothing is left for the other end of the test to find.
	must(t, "host-3", "tranship", "rm", "-f", doc.Moved[0].Name)
}

// inHost is a path of a host, on the machine.
func inHost(t *testing.T, host, path string) string {
	t.Helper()
	return filepath.Join(hostOf(t, host).Root(), path)
}

func TestAHostLeavesJoinsByTokenAndIsRevoked(t *testing.T) {
	needImage(t)
	guard(t)
	h := hostOf(t, "host-3")
	config := inHost(t, "host-3", "/etc/tranship/config.toml")
	before, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	token := func() string { return strings.TrimSpace(must(t, "host-1", "tranship", "cluster", "token")) }
	restart := func() {
		t.Helper()
		ctx := context.WithoutCancel(t.Context())
		if err := h.KillDaemon(ctx); err != nil {
			t.Fatal(err)
		}
		if err := h.StartDaemon(ctx); err != nil {
			t.Fatal(err)
		}
	}
	forget := func() {
		for _, name := range []string{"node.crt", "node.key", "cluster.json", "ca.crt"} {
			_ = os.Remove(inHost(t, "host-3", "/etc/tranship/pki/"+name))
		}
	}
	t.Cleanup(func() { // host-3 is what it was, for the tests that follow
		forget()
		if err := os.WriteFile(config, before, 0o600); err != nil {
			t.Fatal(err)
		}
		must(t, "host-3", "tranship", "cluster", "join", hostOf(t, "host-1").Addr().String(), "--token", token())
		restart()
		for _, at := range []string{"host-1", "host-2"} {
			awaitAlive(t, at, "host-3")
		}
	})

	must(t, "host-3", "tranship", "cluster", "leave")
	for _, at := range []string{"host-1", "host-2"} {
		await(t, "host-3 is gone for "+at, func() bool { _, there := nodesOf(t, at)["host-3"]; return !there })
	}
	if len(nodesOf(t, "host-3")) != 1 {
		t.Error("host-3 still knows the others")
	}

	// It comes back under another name, with no peer in its configuration.
	text, _, _ := strings.Cut(strings.Replace(string(before), `node = "host-3"`, `node = "host-9"`, 1), "[[peers]]")
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	good := token()
	first := hostOf(t, "host-1").Addr().String()
	if out, err := on(t, "host-3", "tranship", "cluster", "join", first, "--token", good[:len(good)-4]+"AAAA"); exitCodeOf(err) != 2 {
		t.Errorf("a damaged token: %v, %s", err, out)
	}
	must(t, "host-3", "tranship", "cluster", "join", first, "--token", good)
	if _, err := on(t, "client", "tranship", "cluster", "join", first, "--token", good, "--name", "host-8", "--listen", "10.88.0.100:7443",
		"--pki", "/run/replay/pki", "--config", "/run/replay/config.toml"); exitCodeOf(err) != 3 && exitCodeOf(err) != 6 && exitCodeOf(err) != 1 {
		t.Errorf("a token that was used: %v", err)
	} else if _, err := os.Stat(inHost(t, "client", "/run/replay")); err == nil {
		t.Error("the replay left files")
	}
	restart()
	for _, at := range []string{"host-1", "host-2"} {
		awaitAlive(t, at, "host-9")
		await(t, at+" reaches host-9", func() bool { return nodesOf(t, at)["host-9"].State == "alive" })
	}
	runShard(t, "guest", testImage, "sleep", "1000")
	t.Cleanup(func() { _, _ = on(t, "host-3", "tranship", "rm", "-f", "guest") })
	mustMigrate(t, "guest", "host-1", "host-9")
	if out, err := on(t, "host-3", "tranship", "migrate", "-o", "json", "guest", "host-2"); err != nil {
		t.Fatalf("from the host that joined: %v %s", err, out)
	}

	must(t, "host-1", "tranship", "cluster", "revoke", "host-9")
	revoked := time.Now()
	for _, at := range []string{"host-1", "host-2"} {
		if n, there := nodesOf(t, at)["host-9"]; there {
			t.Errorf("%s still shows %+v", at, n)
		}
	}
	for name, n := range nodesOf(t, "host-3") {
		if name != "host-9" && n.State == "alive" {
			t.Errorf("%v after its revocation host-9 still reaches %+v", time.Since(revoked), n)
		}
	}
}

// aged gives a host a certificate that the CA signed long ago: of the same name,
// ID and key, and near its end.
func aged(t *testing.T, host string) {
	t.Helper()
	pemOf := func(at, name string) []byte {
		t.Helper()
		raw, err := os.ReadFile(inHost(t, at, "/etc/tranship/pki/"+name))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(raw)
		return block.Bytes
	}
	parse := func(der []byte) *x509.Certificate {
		t.Helper()
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	key, err := x509.ParsePKCS8PrivateKey(pemOf("host-1", "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	old := parse(pemOf(host, "node.crt"))
	old.NotBefore, old.NotAfter = time.Now().Add(-80*24*time.Hour), time.Now().Add(10*24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, old, parse(pemOf("host-1", "ca.crt")), old.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(inHost(t, host, "/etc/tranship/pki/node.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ends is when the certificate of a host does, as nodes shows it.
func ends(t *testing.T, host string) (id string, at time.Time) {
	t.Helper()
	n := nodesOf(t, host)[host]
	return n.ID, n.Ends
}

func TestACertificateIsRenewedLongBeforeItEnds(t *testing.T) {
	guard(t)
	h := hostOf(t, "host-3")
	id, _ := ends(t, "host-3")
	aged(t, "host-3")
	if err := h.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	await(t, "a new certificate", func() bool { _, at := ends(t, "host-3"); return time.Until(at) > 80*24*time.Hour })
	if _, err := os.Stat(inHost(t, "host-3", "/etc/tranship/pki/node.crt.next")); err == nil {
		t.Error("the new certificate is there twice")
	}
	if now, _ := ends(t, "host-3"); now != id {
		t.Errorf("host-3 was %s and is %s", id, now)
	}
	for _, at := range []string{"host-1", "host-2"} {
		await(t, at+" and host-3 reach each other", func() bool {
			return nodesOf(t, at)["host-3"].State == "alive" && nodesOf(t, "host-3")[at].State == "alive"
		})
	}
}
