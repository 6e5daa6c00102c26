package workcheck

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// serveFor runs a server for the test and returns its address.
func serveFor(t *testing.T, cost time.Duration) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, cost) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func short(addrs ...string) LoadOptions {
	now := time.Now()
	return LoadOptions{
		Addrs: addrs, Limit: time.Minute, Seed: 3,
		Pattern: Pattern{Start: now, Begin: now.Add(200 * time.Millisecond), Ramp: 200 * time.Millisecond, End: now.Add(600 * time.Millisecond), Night: 50, Day: 400},
	}
}

func TestEveryRequestIsAnsweredAndCounted(t *testing.T) {
	o := short(serveFor(t, 0), serveFor(t, 0))
	c, err := Load(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	// 50/s for 0.2 s, 225/s on the average for 0.2 s, 400/s for 0.2 s, twice.
	if c.Requests < 180 || c.Requests > 370 || c.Late != 0 || c.Unanswered != 0 || c.P50MS <= 0 || c.WorstMS < c.P99MS {
		t.Errorf("%+v", c)
	}
	o = short(o.Addrs...)
	if again, err := Load(t.Context(), o); err != nil || again.Requests != c.Requests {
		t.Errorf("the same seed: %d requests, then %d: %v", c.Requests, again.Requests, err)
	}
}

func TestALoadThatIsTooMuchIsLateAndSaysWhen(t *testing.T) {
	o := short(serveFor(t, 20*time.Millisecond)) // 50/s: as much as the night brings
	o.Limit = 100 * time.Millisecond
	c, err := Load(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	sum := 0
	for _, n := range c.BySecond {
		sum += n
	}
	if c.Late < c.Requests/3 || c.Unanswered == 0 || c.Unanswered > c.Late || sum != c.Late || c.ByServer[0] != c.Late {
		t.Errorf("%+v", c)
	}
}

func TestAServerThatForgetsIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() { // an echo
		defer close(done)
		conn, err := l.Accept()
		if err == nil {
			_, _ = io.Copy(conn, conn)
			conn.Close()
		}
	}()
	if _, err := Load(t.Context(), short(l.Addr().String())); !errors.Is(err, ErrAnswer) {
		t.Errorf("%v", err)
	}
}

func TestAConnectionThatBreaksIsAnError(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		if conn, err := l.Accept(); err == nil {
			_, _ = io.ReadFull(conn, make([]byte, frameSize))
			conn.Close()
		}
	}()
	if c, err := Load(t.Context(), short(l.Addr().String())); err == nil {
		t.Errorf("%+v", c)
	}
}

func TestTheRateRises(t *testing.T) {
	o := short()
	for _, c := range []struct {
		after time.Duration
		want  float64
	}{{0, 50}, {199 * time.Millisecond, 50}, {300 * time.Millisecond, 225}, {400 * time.Millisecond, 400}, {time.Hour, 400}} {
		if got := o.Rate(o.Start.Add(c.after)); got != c.want {
			t.Errorf("%v: %v, want %v", c.after, got, c.want)
		}
	}
}

func TestACancelledLoadIsNoResult(t *testing.T) {
	o := short(serveFor(t, 0))
	o.End = o.Start.Add(time.Hour)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Load(ctx, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}
