package transfer

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"testing"
)

func TestConnectionsEndByTheCertificateThatTheyBeganWith(t *testing.T) {
	gone := make(chan struct{}, 1)
	h := newHost(t, hostOptions{accept: newStore().accept, api: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
			gone <- struct{}{}
		}
		io.WriteString(w, CertificateFrom(r.Context()).DNSNames[0])
	})})
	peers, err := HTTPClient(h.client, func(context.Context, string) (string, error) { return h.addr, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	client := &http.Client{Transport: peers}
	wait := func() *http.Response {
		t.Helper()
		resp, err := client.Get("https://destination/wait")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	of := func(name string) func(*x509.Certificate) bool {
		return func(cert *x509.Certificate) bool { return cert.DNSNames[0] == name }
	}
	s := h.dial(t, Options{Connections: 2})
	waiting := wait()

	h.Drop(of("host-9"))
	peers.Drop(of("host-9"))
	if resp, err := client.Get("https://destination/"); err != nil {
		t.Errorf("after another host was dropped: %v", err)
	} else if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "source" {
		t.Errorf("%q, %v", body, err)
	}
	select {
	case <-s.Lost():
		t.Error("the session was lost as another host was dropped")
	case <-gone:
		t.Error("the request ended as another host was dropped")
	default:
	}
	if s.Shows(of("host-9")) || !s.Shows(of("destination")) {
		t.Error("the session shows another certificate than the destination's")
	}

	h.Drop(of("source")) // both what carries pages and what carries requests
	<-s.Lost()
	<-gone
	if _, err := io.ReadAll(waiting.Body); err == nil {
		t.Error("the request ended in good order")
	}
	waiting = wait() // the TLS configuration lets it back in
	peers.Drop(of("destination"))
	<-gone
	if _, err := io.ReadAll(waiting.Body); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("the request that this end dropped: %v", err)
	}
}
