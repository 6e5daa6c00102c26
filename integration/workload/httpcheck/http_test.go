package httpcheck

import (
	"bufio"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
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

func startGo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- NewServer().Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the server's end: %v", err)
		}
	})
	return l.Addr().String()
}

func startPython(t *testing.T) string {
	t.Helper()
	python, err := exec.LookPath("python3")
	if err != nil {
		testenv.Missing(t, "python3")
	}
	script := filepath.Join(t.TempDir(), "httpd.py")
	if err := os.WriteFile(script, PythonServer, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(python, script, "127.0.0.1", "0")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	var ready struct {
		Listen string `json:"listen"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(line), &ready)
	}
	if err != nil {
		t.Fatalf("first line %q: %v", line, err)
	}
	return ready.Listen
}

func options(addr string) Options {
	return Options{Addr: addr, Timeout: 5 * time.Second, Keys: 8, ValueBytes: 5000}
}

// checkFor runs the check until it has made so many requests.
func checkFor(t *testing.T, o Options, requests int64) (check.Report, error) {
	t.Helper()
	rec := check.NewRecorder("http")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for ctx.Err() == nil {
			if rec.Report(false).Requests >= requests {
				cancel()
			}
			<-time.After(5 * time.Millisecond)
		}
	}()
	err := Check(ctx, o, rec)
	cancel()
	<-watched
	return rec.Report(true), err
}

func TestBothServersPassTheCheck(t *testing.T) {
	for name, start := range map[string]func(*testing.T) string{"Go": startGo, "Python": startPython} {
		t.Run(name, func(t *testing.T) {
			addr := start(t)
			for range 2 { // the second client finds what the first one left
				rep, err := checkFor(t, options(addr), 200)
				if err != nil || !rep.OK || rep.Facts["verified_keys"] != 8 {
					t.Fatalf("%+v, %v", rep, err)
				}
			}
			resp, err := http.Get("http://" + addr + "/stat")
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var s Stat
			if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
				t.Fatal(err)
			}
			if s.Connections != 3 || s.Keys != 16 || s.Bytes != 16*5000 || s.Requests < 400 || s.PID == 0 || s.UptimeMS <= 0 {
				t.Errorf("stat: %+v", s)
			}
			for _, path := range []string{"/", "/kv/none", "/kv/"} {
				resp, err := http.Get("http://" + addr + path)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if resp.StatusCode != http.StatusNotFound {
					t.Errorf("%s: %s", path, resp.Status)
				}
			}
		})
	}
}

// flipValues changes one bit of each value that passes: nothing else is that
// long. A bit at a fixed place would now and then meet a header that nobody
// reads, or a value that is written anew before it is read.
func flipValues(d faulty.Direction) faulty.Fault {
	return func(dir faulty.Direction, _ int64, piece []byte) error {
		if dir == d && len(piece) > 4000 {
			piece[len(piece)-1] ^= 0x20
		}
		return nil
	}
}

// once changes the first value, and nothing after it.
func once(fault faulty.Fault) faulty.Fault {
	var done atomic.Bool
	return func(dir faulty.Direction, offset int64, piece []byte) error {
		if dir != faulty.ToClient || len(piece) <= 4000 || !done.CompareAndSwap(false, true) {
			return nil
		}
		return fault(dir, offset, piece)
	}
}

func TestDamageOnTheWayIsFound(t *testing.T) {
	addr := startGo(t)
	for name, fault := range map[string]faulty.Fault{
		"the values of requests":    flipValues(faulty.ToServer),
		"one value of one answer":   once(flipValues(faulty.ToClient)),
		"a connection that is cut":  faulty.CutAfter(faulty.ToClient, 60_000),
		"a request that never ends": faulty.CutAfter(faulty.ToServer, 60_000),
	} {
		t.Run(name, func(t *testing.T) {
			if rep, err := checkFor(t, options(faulty.Proxy(t, addr, fault)), 1<<40); err == nil && rep.OK {
				t.Errorf("nothing was found: %+v", rep)
			}
		})
	}
}

// A server that was replaced by another one, or restored to an earlier state,
// behind the same connection: here a front that answers like one.
func TestAServerThatWentBackIsFound(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(n int64, h http.Header, body []byte) []byte
		want   string
	}{
		{"it counts the connection's requests anew", func(n int64, h http.Header, body []byte) []byte {
			if n > 50 {
				h.Set(RequestsHeader, "1")
			}
			return body
		}, "the server says"},
		{"it is another process", func(n int64, _ http.Header, body []byte) []byte {
			if n > 50 {
				return []byte(strings.Replace(string(body), `"pid":`, `"pid":1`, 1))
			}
			return body
		}, "now it is pid"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := NewServer()
			mux := http.NewServeMux()
			mux.HandleFunc("PUT /kv/{key}", s.put)
			mux.HandleFunc("GET /kv/{key}", s.get)
			mux.HandleFunc("GET /stat", s.stat)
			var n atomic.Int64
			inner := s.counted(mux)
			front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				rec := httptest.NewRecorder()
				inner.ServeHTTP(rec, r)
				for k, v := range rec.Header() {
					w.Header()[k] = v
				}
				body := c.change(n.Add(1), w.Header(), rec.Body.Bytes())
				w.Header().Del("Content-Length")
				w.WriteHeader(rec.Code)
				w.Write(body)
			}))
			front.Config.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
				return context.WithValue(ctx, connectionKey{}, new(atomic.Int64))
			}
			front.Start()
			defer front.Close()
			_, err := checkFor(t, options(front.Listener.Addr().String()), 1<<40)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}
