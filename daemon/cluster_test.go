package daemon

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/tranship/tranship/daemon/peers"
	"github.com/tranship/tranship/daemon/peers/cluster"
	"github.com/tranship/tranship/daemon/peers/gossip"
	"github.com/tranship/tranship/daemon/peers/pki"
	"github.com/tranship/tranship/transfer"
)

// gossiper is a member on loopback that says to have an ID.
func gossiper(t *testing.T, name, id string, key []byte, gone func(pki.Identity) bool) (*gossip.Gossip, netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(l.Addr().String())
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	g, err := gossip.Start(gossip.Config{
		Name: name, Bind: at, Advertise: at, Key: key, Gone: gone, Log: slog.New(slog.DiscardHandler),
		Brief: func() gossip.Brief { return gossip.Brief{ID: id, Address: at.String()} },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g, at
}

func TestARevocationEndsConnectionsWhateverGossipSays(t *testing.T) {
	first := t.TempDir()
	authority, err := cluster.Found(first, "host-1", cluster.Seed{Name: "host-1", Address: "192.0.2.1:7443", Gossip: "192.0.2.1:7444"})
	if err != nil {
		t.Fatal(err)
	}
	third := t.TempDir()
	if err := authority.Equip(third, "host-3", "host-1", nil); err != nil {
		t.Fatal(err)
	}
	member, err := cluster.OpenMembership(first)
	if err != nil {
		t.Fatal(err)
	}
	in := func(dir, name string) string { return filepath.Join(dir, name) }
	b := &belonging{member: member, authority: authority, static: peers.Static{}, self: pki.Identity{Name: "host-1"}}
	server, client, err := pki.TLS(in(first, pki.CACertFile), in(first, pki.CertFile), in(first, pki.KeyFile), b.refuse)
	if err != nil {
		t.Fatal(err)
	}
	_, from3, err := pki.TLS(in(third, pki.CACertFile), in(third, pki.CertFile), in(third, pki.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	b.h = &host{log: slog.New(slog.DiscardHandler)}
	if b.h.peers, err = peers.New(b, client); err != nil {
		t.Fatal(err)
	}
	defer b.h.peers.Close()
	ended := make(chan struct{}, 1)
	api := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		select {
		case ended <- struct{}{}:
		default:
		}
	})
	if b.h.pages, err = transfer.Listen("127.0.0.1:0", server, api, nil, b.h.log); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- b.h.pages.Serve(context.Background()) }()
	defer func() {
		b.h.pages.Close()
		<-served
	}()
	theirs, err := transfer.HTTPClient(from3, func(context.Context, string) (string, error) { return b.h.pages.Addr().String(), nil })
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	ask := func() (*http.Response, error) { return (&http.Client{Transport: theirs}).Get("https://host-1/") }
	resp, err := ask()
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()

	// host-3 says in gossip that it is another host of its name.
	_, _, key := member.Papers()
	own, at := gossiper(t, "host-1", pki.NewID(), key, member.Gone)
	b.live.Store(own)
	liar, _ := gossiper(t, "host-3", pki.NewID(), key, nil)
	if _, err := liar.Join([]string{"host-1/" + at.String()}); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(20 * time.Second); ; <-tick.C {
		if _, ok := own.Member("host-3"); ok {
			break
		} else if time.Now().After(limit) {
			t.Fatal("host-1 has not heard of it")
		}
	}

	signed, newKey, err := authority.Revoke("host-3", true)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.install(signed, newKey); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("its connection goes on")
	}
	if again, err := ask(); err == nil {
		again.Body.Close()
		t.Error("it is let in again")
	}
}
