package redischeck

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
	"github.com/tranship/tranship/integration/workload/check/faulty"
	"github.com/tranship/tranship/internal/testenv"
)

// startRedis runs a real redis-server for the test.
func startRedis(t *testing.T) string {
	t.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		testenv.Missing(t, "redis-server")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr)
	l.Close() // redis takes the port; nobody else is given it so soon
	cmd := exec.Command(path, "--bind", "127.0.0.1", "--port", fmt.Sprint(addr.Port), "--save", "", "--dir", t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for deadline := time.Now().Add(20 * time.Second); ; {
		c, err := dial(t.Context(), addr.String(), time.Second)
		if err == nil {
			_, err = c.do([]byte("PING"))
			c.Close()
		}
		if err == nil {
			return addr.String()
		}
		if time.Now().After(deadline) {
			t.Fatalf("redis-server does not answer: %v", err)
		}
		<-time.After(20 * time.Millisecond) // a poll: redis says nothing when it is ready
	}
}

func options(addr string) Options { return Options{Addr: addr, Timeout: 5 * time.Second} }

func fill(t *testing.T, addr string) {
	t.Helper()
	rec := check.NewRecorder("load")
	if err := Load(t.Context(), options(addr), 1<<20, 1, rec); err != nil {
		t.Fatal(err)
	}
}

func send(t *testing.T, addr string, args ...string) {
	t.Helper()
	c, err := dial(t.Context(), addr, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	raw := make([][]byte, len(args))
	for i, a := range args {
		raw[i] = []byte(a)
	}
	if _, err := c.do(raw...); err != nil {
		t.Fatal(err)
	}
}

// run runs for so many requests, and then for as long as the end takes.
func run(t *testing.T, o RunOptions, requests int64) (check.Report, error) {
	t.Helper()
	return runUntil(t, o, func(r check.Report) bool { return r.Requests >= requests })
}

// runUntil is run until a report says enough.
func runUntil(t *testing.T, o RunOptions, enough func(check.Report) bool) (check.Report, error) {
	t.Helper()
	rec := check.NewRecorder("run")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for ctx.Err() == nil {
			if enough(rec.Report(false)) {
				cancel()
			}
			<-time.After(5 * time.Millisecond)
		}
	}()
	err := Run(ctx, o, rec)
	cancel()
	<-watched
	return rec.Report(true), err
}

func TestALoadedRedisIsVerified(t *testing.T) {
	addr := startRedis(t)
	fill(t, addr)
	state := filepath.Join(t.TempDir(), "state")
	rep, err := run(t, RunOptions{Options: options(addr), OverwriteRate: 20 << 20, NoReconnect: true, StatePath: state}, 300)
	if err != nil || !rep.OK || rep.Reconnects != 0 {
		t.Fatalf("%+v, %v", rep, err)
	}
	if rep.Facts["overwritten_bytes"].(int64) == 0 || rep.Facts["counter"].(int64) == 0 {
		t.Errorf("facts: %v", rep.Facts)
	}
	s, err := LoadState(state)
	if err != nil {
		t.Fatal(err)
	}
	rec := check.NewRecorder("verify")
	if err := Verify(t.Context(), options(addr), &s, rec); err != nil || rec.Failed() {
		t.Fatalf("%v, %+v", err, rec.Report(true))
	}

	// The redis goes on; the state is of before.
	if rep, err := run(t, RunOptions{Options: options(addr), OverwriteRate: 20 << 20}, 200); err != nil || !rep.OK {
		t.Fatalf("second run: %+v, %v", rep, err)
	}
	rec = check.NewRecorder("verify")
	if err := Verify(t.Context(), options(addr), &s, rec); err != nil || !rec.Failed() {
		t.Errorf("a redis with other generations passes for the one of the state: %v", err)
	}
}

func TestWhatIsWrongInARedisIsFound(t *testing.T) {
	key := string(keyName(17))
	for _, c := range []struct {
		name   string
		damage []string
		want   string
	}{
		{"a changed byte", []string{"SETRANGE", key, "100", "x\x00y"}, "different from byte"},
		{"a key that is gone", []string{"DEL", key}, "is gone"},
		{"a key that nobody wrote", []string{"SET", "tranship:99999999", "x"}, ""},
		{"a value under another key", []string{"COPY", string(keyName(16)), key, "REPLACE"}, "not its own value"},
		{"an empty redis", []string{"FLUSHALL"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			addr := startRedis(t)
			fill(t, addr)
			send(t, addr, "SET", probeKey, "0")
			send(t, addr, c.damage...)
			rec := check.NewRecorder("verify")
			err := Verify(t.Context(), options(addr), nil, rec)
			if err == nil && !rec.Failed() {
				t.Fatal("nothing was found")
			}
			if rep := rec.Report(true); c.want != "" && (len(rep.Errors) != 1 || !strings.Contains(rep.Errors[0], c.want)) {
				t.Errorf("errors %q, want %q", rep.Errors, c.want)
			}
		})
	}
}

func TestAnOlderValueDuringARunIsFound(t *testing.T) {
	addr := startRedis(t)
	fill(t, addr)
	d := plan(1<<20, 1)
	rec := check.NewRecorder("run")
	r := &runner{o: RunOptions{Options: options(addr)}, rec: rec}
	var err error
	if r.conn, err = dial(t.Context(), addr, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	defer r.conn.Close()
	if err := r.learn(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.owed = 1
	if err := r.overwrite(); err != nil {
		t.Fatal(err)
	}
	for key, gen := range r.gens {
		if gen > 0 {
			send(t, addr, "SET", string(keyName(key)), string(d.append(nil, key, 0)))
		}
	}
	if _, err := r.readBack(t.Context(), r.gens); err == nil || !strings.Contains(err.Error(), "holds generation 0, but 1 was acknowledged") {
		t.Errorf("read back: %v", err)
	}
	send(t, addr, "SET", counterKey, "41")
	if err := r.incr(); err != nil || !rec.Failed() {
		t.Errorf("a counter that jumped: %v", err)
	}
}

func TestADamagedByteOnTheWayIsFound(t *testing.T) {
	addr := startRedis(t)
	fill(t, addr)
	// behind the learning of 1 MiB, within the run's own replies
	proxy := faulty.Proxy(t, addr, faulty.FlipAt(faulty.ToClient, 1<<20+100<<10))
	rep, err := runUntil(t, RunOptions{Options: options(proxy), NoReconnect: true}, func(r check.Report) bool { return r.ErrorCount > 0 })
	if rep.ErrorCount == 0 {
		t.Errorf("nothing was found: %+v, %v", rep, err)
	}
}

func TestABrokenConnectionIsAnErrorAndAReconnect(t *testing.T) {
	for _, noReconnect := range []bool{true, false} {
		t.Run(fmt.Sprintf("no-reconnect=%v", noReconnect), func(t *testing.T) {
			addr := startRedis(t)
			fill(t, addr)
			var cut atomic.Bool
			proxy := faulty.Proxy(t, addr, func(d faulty.Direction, offset int64, p []byte) error {
				if d == faulty.ToClient && offset > 1<<20+100<<10 && cut.CompareAndSwap(false, true) {
					return faulty.ErrCut
				}
				return nil
			})
			requests := int64(2000)
			if noReconnect {
				requests = 1 << 40 // it has to end by itself
			}
			rep, err := run(t, RunOptions{Options: options(proxy), NoReconnect: noReconnect}, requests)
			if err != nil || rep.OK || rep.ErrorCount != 1 {
				t.Fatalf("%+v, %v", rep, err)
			}
			if want := int64(1); noReconnect && rep.Reconnects != 0 || !noReconnect && rep.Reconnects != want {
				t.Errorf("%d reconnects", rep.Reconnects)
			}
		})
	}
}
