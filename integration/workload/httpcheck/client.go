package httpcheck

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
)

// Options are those of Check.
type Options struct {
	Addr    string
	Timeout time.Duration // of one request, a blackout included
	// Keys values of ValueBytes are kept in the server and compared in turn.
	Keys       int
	ValueBytes int
	Rate       float64 // requests a second; 0: without pause
}

// Check writes and compares values over one keep-alive connection until ctx is
// done, and then compares all of them. It never reconnects: a connection that
// breaks, or that the server does not recognize, ends it with an error.
func Check(ctx context.Context, o Options, rec *check.Recorder) error {
	var d net.Dialer
	d.Timeout = o.Timeout
	conn, err := d.DialContext(ctx, "tcp", o.Addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	c := &client{o: o, conn: conn, in: bufio.NewReader(conn), gens: make([]uint32, o.Keys), seed: rand.Uint64()}
	for key := range o.Keys {
		if err := c.write(key); err != nil {
			return err
		}
	}
	rec.Begin()
	for pace := check.NewPacer(o.Rate); pace.Wait(ctx); {
		key := rand.IntN(o.Keys)
		n, err := o.ValueBytes, error(nil)
		switch c.sent % 8 {
		case 0:
			n = 0
			err = c.stat()
		case 1, 2, 3:
			err = c.write(key)
		default:
			err = c.read(key)
		}
		if err != nil {
			return err
		}
		rec.Done(n)
	}
	rec.Stop()
	for key := range o.Keys {
		if err := c.read(key); err != nil {
			return err
		}
	}
	rec.Fact("verified_keys", o.Keys)
	rec.Fact("requests_on_connection", c.sent)
	return nil
}

type client struct {
	o        Options
	conn     net.Conn
	in       *bufio.Reader
	sent     int64
	gens     []uint32
	seed     uint64
	requests int64 // of all clients, as the server counts them
	pid      int
}

// do makes one request and returns the body of its answer.
func (c *client) do(method, path string, body []byte, want int) ([]byte, error) {
	if err := c.conn.SetDeadline(time.Now().Add(c.o.Timeout)); err != nil {
		return nil, err
	}
	req, err := http.NewRequest(method, "http://"+c.o.Addr+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	what := method + " " + path
	c.sent++
	if err := req.Write(c.conn); err != nil {
		return nil, fmt.Errorf("%s, request %d: %w", what, c.sent, err)
	}
	resp, err := http.ReadResponse(c.in, req)
	if err != nil {
		return nil, fmt.Errorf("%s, request %d: %w", what, c.sent, err)
	}
	got, err := io.ReadAll(io.LimitReader(resp.Body, maxValue+1))
	resp.Body.Close()
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s, request %d: %w", what, c.sent, err)
	case resp.StatusCode != want:
		return nil, fmt.Errorf("%s, request %d: status %s", what, c.sent, resp.Status)
	case resp.Header.Get(RequestsHeader) != strconv.FormatInt(c.sent, 10):
		return nil, fmt.Errorf("%s: this is request %d of the connection, the server says %q", what, c.sent, resp.Header.Get(RequestsHeader))
	case resp.Close:
		return nil, fmt.Errorf("%s, request %d: the server is about to close the connection", what, c.sent)
	}
	return got, nil
}

func (c *client) value(key int) []byte {
	v := make([]byte, c.o.ValueBytes)
	check.Fill(v, c.seed^check.Mix(uint64(key)<<32|uint64(c.gens[key])))
	return v
}

// path is this client's own: several may check one server.
func (c *client) path(key int) string { return fmt.Sprintf("/kv/%x-%d", c.seed, key) }

func (c *client) write(key int) error {
	c.gens[key]++
	_, err := c.do("PUT", c.path(key), c.value(key), http.StatusNoContent)
	return err
}

func (c *client) read(key int) error {
	got, err := c.do("GET", c.path(key), nil, http.StatusOK)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, c.value(key)) {
		return fmt.Errorf("%s: not what was written in generation %d", c.path(key), c.gens[key])
	}
	return nil
}

// stat checks that the server is the same one and has not gone back.
func (c *client) stat() error {
	raw, err := c.do("GET", "/stat", nil, http.StatusOK)
	if err != nil {
		return err
	}
	var s Stat
	if err := json.Unmarshal(raw, &s); err != nil {
		return fmt.Errorf("GET /stat: %q: %w", raw, err)
	}
	if s.Requests < c.requests || c.pid != 0 && s.PID != c.pid {
		return fmt.Errorf("the server was pid %d with %d requests, now it is pid %d with %d", c.pid, c.requests, s.PID, s.Requests)
	}
	c.requests, c.pid = s.Requests, s.PID
	return nil
}
