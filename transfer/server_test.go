package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestPagesBlobsAndTheAPIShareASocket(t *testing.T) {
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept, plain: true, api: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s", PeerFrom(r.Context()), body)
	})})
	peers, err := HTTPClient(h.client, func(_ context.Context, node string) (string, error) {
		if node == "nobody" {
			return "", errors.New("no such node")
		}
		return h.addr, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	client := &http.Client{Transport: peers}
	s := h.dial(t, Options{Connections: 2})
	m := newMemory(9, 2, 300)
	blobs := map[string][]byte{}
	for i := range 40 {
		b := make([]byte, i*i*700)
		if i%2 == 0 {
			fillNoise(b, uint64(i))
		}
		blobs[fmt.Sprintf("b-%d", i)] = b
	}
	var wg sync.WaitGroup
	for name, content := range blobs {
		wg.Go(func() {
			size := int64(len(content))
			if len(name)%2 == 0 {
				size = -1
			}
			if _, err := s.Blob(t.Context(), "content", name, size, strings.NewReader(string(content))); err != nil {
				t.Error(err)
			}
		})
	}
	for i := range 10 {
		wg.Go(func() {
			resp, err := client.Post("https://destination/x", "text/plain", strings.NewReader(fmt.Sprint(i)))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if want := fmt.Sprintf("source %d", i); err != nil || string(body) != want {
				t.Errorf("%q, %v, want %q", body, err, want)
			}
		})
	}
	for n := range 3 {
		m.write(1, 0, 100)
		m.round(t, s, n, 300, 16)
	}
	wg.Wait()
	sink.equal(t, m)
	sink.mu.Lock()
	for name, content := range blobs {
		if got := sink.blobs["content "+name]; hash(got) != hash(content) {
			t.Errorf("blob %s: %d bytes, want %d", name, len(got), len(content))
		}
	}
	sink.mu.Unlock()
	for _, wrong := range []struct {
		url string
		is  error
	}{{"https://host-9/x", ErrUntrusted}, {"https://nobody/x", nil}} {
		resp, err := client.Get(wrong.url)
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s answered", wrong.url)
		} else if wrong.is != nil && !errors.Is(err, wrong.is) {
			t.Errorf("%s: %v", wrong.url, err)
		}
	}
}

func TestTheAPIReconnectsAfterItsLinkWasLost(t *testing.T) {
	conf := quicConfig(time.Second, 200*time.Millisecond)
	h := newHost(t, hostOptions{conf: conf, accept: newStore().accept, api: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {})})
	peers, err := HTTPClient(h.client, func(context.Context, string) (string, error) { return h.addr, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	get := func() error {
		resp, err := (&http.Client{Transport: peers}).Get("https://destination/")
		if err == nil {
			err = resp.Body.Close()
		}
		return err
	}
	if err := get(); err != nil {
		t.Fatal(err)
	}
	h.socket.cut.Store(true)
	if err := get(); !errors.Is(err, ErrLinkLost) {
		t.Errorf("over a cut link: %v", err)
	}
	h.socket.cut.Store(false)
	if err := get(); err != nil {
		t.Errorf("after it came back: %v", err)
	}
}

// restart takes the process away as SIGKILL does, without a word, and another
// one listens in its place.
func (h *host) restart(t *testing.T, api http.Handler) {
	t.Helper()
	h.socket.cut.Store(true)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Listen(h.addr, h.server, api, newStore().accept, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- again.Serve(context.Background()) }()
	t.Cleanup(func() {
		if err := errors.Join(again.Close(), <-served); err != nil {
			t.Error(err)
		}
	})
}

func TestARequestToAPeerThatWasRestartedIsSentAgain(t *testing.T) {
	var asked atomic.Int32
	api := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		_, _ = io.Copy(w, r.Body)
	})
	h := newHost(t, hostOptions{accept: newStore().accept, api: api})
	peers, err := HTTPClient(h.client, func(context.Context, string) (string, error) { return h.addr, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	post := func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://destination/", strings.NewReader("all of it"))
		if err != nil {
			return err
		}
		resp, err := (&http.Client{Transport: peers}).Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if got, err := io.ReadAll(resp.Body); err != nil || string(got) != "all of it" {
			t.Errorf("%q, %v", got, err)
		}
		return nil
	}
	if err := post(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.restart(t, api)
	if err := post(t.Context()); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if n := asked.Load(); n != 2 {
		t.Errorf("%d requests arrived", n)
	}
}

func TestARequestThatMayNotRunTwiceIsNotSentAgain(t *testing.T) {
	api := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	h := newHost(t, hostOptions{accept: newStore().accept, api: api})
	peers, err := HTTPClient(h.client, func(context.Context, string) (string, error) { return h.addr, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	post := func() error {
		req, err := http.NewRequestWithContext(Once(t.Context()), http.MethodPost, "https://destination/", strings.NewReader("once"))
		if err != nil {
			return err
		}
		resp, err := (&http.Client{Transport: peers}).Do(req)
		if err == nil {
			err = resp.Body.Close()
		}
		return err
	}
	if err := post(); err != nil {
		t.Fatal(err)
	}
	h.restart(t, api)
	if err := post(); !errors.Is(err, ErrLinkLost) {
		t.Errorf("after a restart: %v", err)
	}
	if err := post(); err != nil {
		t.Errorf("the next: %v", err)
	}
}

func TestCloseOfTheServerWaitsForItsCalls(t *testing.T) {
	sink := newStore()
	sink.gate, sink.entered = make(chan struct{}), make(chan struct{}, 100)
	requested, release := make(chan struct{}), make(chan struct{})
	var handled atomic.Bool
	h := newHost(t, hostOptions{accept: sink.accept, api: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(requested)
		<-release
		handled.Store(true)
	})})
	s := h.dial(t, Options{})
	m := newMemory(14, 1, 10)
	r, err := s.Round(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.send(r, 0, 10, 10); err != nil {
		t.Fatal(err)
	}
	peers, err := HTTPClient(h.client, func(context.Context, string) (string, error) { return h.addr, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer peers.Close()
	asked := make(chan error, 1)
	go func() {
		_, err := (&http.Client{Transport: peers}).Get("https://destination/")
		asked <- err
	}()
	rounded := make(chan error, 1)
	go func() { _, err := r.Close(); rounded <- err }()
	<-requested
	<-sink.entered

	closed := make(chan error, 1)
	go func() { closed <- h.Close() }()
	if err := <-rounded; !errors.Is(err, ErrLinkLost) {
		t.Errorf("the round: %v", err)
	}
	if err := <-asked; err == nil {
		t.Error("the request succeeded")
	}
	for _, call := range []struct {
		name string
		end  func()
	}{
		{"an API request and a call of the sink", func() { close(release) }},
		{"a call of the sink", func() { close(sink.gate) }},
	} {
		select {
		case <-closed:
			t.Fatalf("the server closed with %s running", call.name)
		case <-time.After(neverWithin):
		}
		call.end()
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if !handled.Load() || sink.running.Load() != 0 {
		t.Error("Close did not wait")
	}
	select {
	case <-s.Lost():
	case <-time.After(10 * time.Second):
		t.Error("the session does not notice")
	}
}
