package workcheck

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// Pattern is a load's rate over time: Night until Begin, then rising evenly for
// Ramp to Day, which lasts until End.
type Pattern struct {
	Start time.Time     `json:"start"`
	Begin time.Time     `json:"begin"`
	Ramp  time.Duration `json:"ramp"`
	End   time.Time     `json:"end"`
	// Night and Day are requests a second to each server.
	Night float64 `json:"night"`
	Day   float64 `json:"day"`
}

// Rate of requests a second to each server at t.
func (p *Pattern) Rate(t time.Time) float64 {
	in := t.Sub(p.Begin)
	switch {
	case in < 0:
		return p.Night
	case in >= p.Ramp:
		return p.Day
	}
	return p.Night + (p.Day-p.Night)*float64(in)/float64(p.Ramp)
}

// LoadOptions are those of Load.
type LoadOptions struct {
	Pattern
	Addrs []string `json:"addrs"` // of the servers
	// Limit that a request is late beyond, from when it was due to its answer.
	Limit time.Duration `json:"limit"`
	// Seed of the times at which requests are due: equal seeds, equal times
	// after Start.
	Seed uint64 `json:"seed"`
}

// Counts is what Load has seen, of all servers together.
type Counts struct {
	Requests int `json:"requests"`
	// Late are those beyond the limit, and those without an answer at the end.
	Late       int     `json:"late"`
	Unanswered int     `json:"unanswered"`
	P50MS      float64 `json:"p50_ms"`
	P99MS      float64 `json:"p99_ms"`
	WorstMS    float64 `json:"worst_ms"` // of those that were answered
	// ByServer and BySecond (after Start, when it was due) divide Late.
	ByServer []int `json:"late_by_server"`
	BySecond []int `json:"late_by_second"`
}

// maxWaiting requests of one server are under way; more are an error, for the
// server then does not work at all.
const maxWaiting = 1 << 16

// Load sends requests to every server over one connection each, at random times
// (a Poisson process) that do not depend on the answers: a server that is slow
// is not spared. A wrong answer or a broken connection is an error.
func Load(ctx context.Context, o LoadOptions) (Counts, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	conns := make([]*connection, len(o.Addrs))
	for i, addr := range o.Addrs {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return Counts{}, fmt.Errorf("server %d: %w", i, err)
		}
		defer conn.Close()
		conns[i] = &connection{conn: conn, due: make(chan time.Time, maxWaiting), rng: rand.New(rand.NewPCG(o.Seed, uint64(i)))}
	}
	var all sync.WaitGroup
	for i, c := range conns {
		fail := func(err error) {
			if err != nil {
				cancel(fmt.Errorf("server %d: %w", i, err))
			}
		}
		all.Go(func() { fail(c.send(ctx, &o)) })
		all.Go(func() { fail(c.receive(&o)) })
		stop := context.AfterFunc(ctx, func() { c.conn.Close() })
		defer stop()
	}
	all.Wait()
	if ctx.Err() != nil {
		return Counts{}, context.Cause(ctx)
	}
	return count(&o, conns), nil
}

// connection to one server.
type connection struct {
	conn net.Conn
	rng  *rand.Rand
	due  chan time.Time // of requests that were sent, until the answer has come
	took []request      // answered
	left []time.Time    // not answered at the end
}

type request struct {
	due  time.Time
	took time.Duration
}

// send sends what is due until the end. Keys follow from numbers.
func (c *connection) send(ctx context.Context, o *LoadOptions) error {
	defer close(c.due)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var frame [frameSize]byte
	at := o.Start
	for n := uint64(0); ; n++ {
		// The rate changes little between two requests.
		at = at.Add(time.Duration(c.rng.ExpFloat64() / o.Rate(at) * float64(time.Second)))
		if !at.Before(o.End) {
			return nil
		}
		timer.Reset(time.Until(at))
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
		}
		select {
		case c.due <- at:
		default:
			return fmt.Errorf("%d requests wait", maxWaiting)
		}
		binary.LittleEndian.PutUint64(frame[:], n)
		binary.LittleEndian.PutUint64(frame[8:], keyOf(o.Seed, n))
		// A write that blocks so long is to a server that does not read.
		if err := c.conn.SetWriteDeadline(o.End.Add(o.Limit)); err != nil {
			return err
		}
		if _, err := c.conn.Write(frame[:]); err != nil {
			if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
				return nil
			}
			return fmt.Errorf("request %d: %w", n, err)
		}
	}
}

func keyOf(seed, n uint64) uint64 { return seed*0x9e3779b97f4a7c15 ^ n }

// receive takes answers until all have come, or the last may not be in time any
// more.
func (c *connection) receive(o *LoadOptions) error {
	if err := c.conn.SetReadDeadline(o.End.Add(o.Limit)); err != nil {
		return err
	}
	var frame [frameSize]byte
	n := uint64(0)
	for due := range c.due {
		if len(c.left) > 0 {
			c.left = append(c.left, due)
			continue
		}
		if _, err := io.ReadFull(c.conn, frame[:]); err != nil {
			if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
				c.left = append(c.left, due)
				continue
			}
			return fmt.Errorf("answer %d: %w", n, err)
		}
		id, got := binary.LittleEndian.Uint64(frame[:]), binary.LittleEndian.Uint64(frame[8:])
		if id != n || got != answer(keyOf(o.Seed, n), n) {
			return fmt.Errorf("answer %d: %w, of number %d", n, ErrAnswer, id)
		}
		c.took = append(c.took, request{due, time.Since(due)})
		n++
	}
	return nil
}
