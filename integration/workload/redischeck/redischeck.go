package redischeck

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
)

// Options are common to load, run and verify.
type Options struct {
	Addr string
	// Timeout bounds one request, the blackout of a migration included.
	Timeout time.Duration
}

// batch is how many requests load and the reading of everything have in flight.
// run has one.
const batch = 64

// Load empties the database and fills it with about bytes of values.
func Load(ctx context.Context, o Options, bytes int64, seed uint64, rec *check.Recorder) error {
	c, err := dial(ctx, o.Addr, o.Timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	d := plan(bytes, seed)
	meta, err := json.Marshal(d)
	if err != nil {
		return err
	}
	if _, err := c.do([]byte("FLUSHDB")); err != nil {
		return fmt.Errorf("empty the database: %w", err)
	}
	rec.Begin()
	for from := 0; from < d.Keys; from += batch {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx) // half a data set is no success
		}
		to := min(from+batch, d.Keys)
		for key := from; key < to; key++ {
			c.queue([]byte("SET"), keyName(key), d.append(nil, key, 0))
		}
		if err := c.flush(); err != nil {
			return fmt.Errorf("load keys from %d: %w", from, err)
		}
		for key := from; key < to; key++ {
			if _, err := c.reply(); err != nil {
				return fmt.Errorf("load key %s: %w", keyName(key), err)
			}
			rec.Done(d.size(key))
		}
	}
	if _, err := c.do([]byte("SET"), []byte(counterKey), []byte("0")); err != nil {
		return fmt.Errorf("load the counter: %w", err)
	}
	// Last: only a complete data set is described.
	if _, err := c.do([]byte("SET"), []byte(metaKey), meta); err != nil {
		return fmt.Errorf("load the description: %w", err)
	}
	rec.Fact("keys", d.Keys)
	rec.Fact("value_bytes", d.Bytes)
	return nil
}

func describe(c *conn) (Dataset, error) {
	var d Dataset
	r, err := c.do([]byte("GET"), []byte(metaKey))
	if err != nil {
		return d, err
	}
	if r.Kind != '$' {
		return d, errNotOurs
	}
	if err := json.Unmarshal(r.Text, &d); err != nil || d.Keys <= 0 {
		return d, fmt.Errorf("%w: description %q", errNotOurs, r.Text)
	}
	return d, nil
}

// readAll reads every key and compares it: with gens, or, when gens is nil, with
// the generation that it says itself. It returns the generations. Every key that
// is wrong is an error of its own in rec, all of them are read.
func readAll(ctx context.Context, c *conn, d Dataset, gens []uint32, rec *check.Recorder) ([]uint32, error) {
	found := make([]uint32, d.Keys)
	scratch := make([]byte, 0, 16<<10)
	for from := 0; from < d.Keys; from += batch {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		to := min(from+batch, d.Keys)
		for key := from; key < to; key++ {
			c.queue([]byte("GET"), keyName(key))
		}
		if err := c.flush(); err != nil {
			return nil, fmt.Errorf("read keys from %d: %w", from, err)
		}
		for key := from; key < to; key++ {
			r, err := c.reply()
			if err != nil {
				return nil, fmt.Errorf("read key %s: %w", keyName(key), err)
			}
			if r.Kind != '$' {
				rec.Fail(fmt.Errorf("key %s is gone", keyName(key)))
				continue
			}
			gen, err := generation(key, r.Text)
			if err == nil && gens != nil {
				gen = gens[key]
			}
			if err == nil {
				err = d.compare(key, gen, r.Text, scratch)
			}
			if err != nil {
				rec.Fail(err)
				continue
			}
			found[key] = gen
			rec.Done(len(r.Text))
		}
	}
	return found, nil
}

// size checks that there are neither fewer nor more keys than expected: keys
// that came back from the dead are wrong as well.
func dbsize(c *conn, d Dataset) error {
	r, err := c.do([]byte("DBSIZE"))
	if err != nil {
		return fmt.Errorf("count the keys: %w", err)
	}
	if r.Int < int64(d.Keys)+extraKeys-1 || r.Int > int64(d.Keys)+extraKeys {
		return fmt.Errorf("there are %d keys instead of %d", r.Int, d.Keys+extraKeys)
	}
	return nil
}

// Verify reads everything back. With a state it compares exactly, without one
// every value must be one that the data set can hold.
func Verify(ctx context.Context, o Options, state *State, rec *check.Recorder) error {
	c, err := dial(ctx, o.Addr, o.Timeout)
	if err != nil {
		return err
	}
	defer c.Close()
	d, err := describe(c)
	if err != nil {
		return err
	}
	var gens []uint32
	if state != nil {
		if state.Dataset != d {
			return fmt.Errorf("the data set is %+v, the state is of %+v", d, state.Dataset)
		}
		gens = state.Generations
		n, err := counter(c)
		if err != nil {
			return err
		}
		if n != state.Counter {
			rec.Fail(fmt.Errorf("the counter is %d, but %d was acknowledged", n, state.Counter))
		}
	}
	rec.Begin()
	if _, err := readAll(ctx, c, d, gens, rec); err != nil {
		return err
	}
	rec.Fact("verified_keys", d.Keys)
	return dbsize(c, d)
}

func counter(c *conn) (int64, error) {
	r, err := c.do([]byte("GET"), []byte(counterKey))
	if err != nil {
		return 0, fmt.Errorf("read the counter: %w", err)
	}
	n, err := strconv.ParseInt(string(r.Text), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("the counter is %q", r.Text)
	}
	return n, nil
}

// RunOptions are those of Run.
type RunOptions struct {
	Options
	// OverwriteRate is how many bytes of values are replaced a second; 0: none.
	OverwriteRate int64
	// RequestRate limits all requests together; 0: one after the other without pause.
	RequestRate float64
	// NoReconnect makes a broken connection the end. Otherwise it is an error
	// and a reconnect in the report, and the check goes on.
	NoReconnect bool
	// StatePath, if set, is where the last state goes.
	StatePath string
}

// Run writes and verifies over one connection, with one request in flight, until
// ctx is done; then it reads everything back and compares it.
func Run(ctx context.Context, o RunOptions, rec *check.Recorder) error {
	// The connection is not bound to ctx: the last request completes, and what is
	// read back at the end is read over the same connection.
	live := context.WithoutCancel(ctx)
	c, err := dial(ctx, o.Addr, o.Timeout)
	if err != nil {
		return err
	}
	r := &runner{o: o, rec: rec, conn: c}
	defer func() { r.conn.Close() }()
	if err := r.learn(ctx); err != nil {
		return err
	}
	rec.Begin()
	for pace := check.NewPacer(o.RequestRate); pace.Wait(ctx); {
		if err := r.step(); err != nil {
			rec.Fail(err)
			if answered := ServerError(""); errors.As(err, &answered) {
				continue // the connection is not what is wrong
			}
			if o.NoReconnect {
				return nil // it is in the report already
			}
			if err := r.reconnect(ctx); err != nil {
				return err
			}
		}
	}
	rec.Stop() // what follows is read in bulk and says nothing about gaps
	if _, err := r.readBack(live, r.gens); err != nil {
		return fmt.Errorf("read everything back: %w", err)
	}
	if err := dbsize(r.conn, r.d); err != nil {
		return err
	}
	rec.Fact("verified_keys", r.d.Keys)
	rec.Fact("overwritten_bytes", r.overwritten)
	rec.Fact("counter", r.counter)
	if o.StatePath != "" {
		return SaveState(o.StatePath, State{Dataset: r.d, Generations: r.gens, Counter: r.counter})
	}
	return nil
}

type runner struct {
	o           RunOptions
	rec         *check.Recorder
	conn        *conn
	d           Dataset
	gens        []uint32
	counter     int64
	probe       uint64
	turn        int
	overwritten int64
	owed        float64 // bytes of overwriting that the rate asks for
	owedAt      time.Time
	scratch     []byte
	buf         []byte
}

// learn reads the data set once, so that every later comparison is exact.
func (r *runner) learn(ctx context.Context) error {
	var err error
	if r.d, err = describe(r.conn); err != nil {
		return err
	}
	if r.gens, err = r.readBack(ctx, nil); err != nil {
		return fmt.Errorf("learn the data set: %w", err)
	}
	if r.counter, err = counter(r.conn); err != nil {
		return err
	}
	_, err = r.conn.do([]byte("SET"), []byte(probeKey), []byte("0"))
	return err
}

// readBack is readAll where one wrong key is enough.
func (r *runner) readBack(ctx context.Context, gens []uint32) ([]uint32, error) {
	rec := check.NewRecorder("redis")
	found, err := readAll(ctx, r.conn, r.d, gens, rec)
	if err != nil {
		return nil, err
	}
	if rep := rec.Report(true); !rep.OK {
		return nil, fmt.Errorf("%d keys are wrong, the first: %s", rep.ErrorCount, rep.Errors[0])
	}
	return found, nil
}

// step makes one request and checks its reply. Overwriting goes first when the
// rate asks for it, and every fourth request is one of the others even then: a
// rate beyond what the server can do must not stop the verification.
func (r *runner) step() error {
	r.turn++
	if r.turn%4 != 0 && r.overwriteDue(time.Now()) {
		return r.overwrite()
	}
	switch r.turn % 3 {
	case 0:
		return r.get()
	case 1:
		return r.incr()
	default:
		return r.probeStep()
	}
}

// overwriteDue works as check.Pacer, for bytes: a pause is not caught up.
func (r *runner) overwriteDue(now time.Time) bool {
	if r.o.OverwriteRate <= 0 {
		return false
	}
	if !r.owedAt.IsZero() {
		gap := min(now.Sub(r.owedAt), 50*time.Millisecond)
		r.owed = min(r.owed+gap.Seconds()*float64(r.o.OverwriteRate), float64(r.o.OverwriteRate)/20)
	}
	r.owedAt = now
	return r.owed > 0
}

// overwrite gives up to 16 keys their next generation in one MSET, which redis
// does in one step: then all of it is acknowledged, or nothing.
func (r *runner) overwrite() error {
	keys := make([]int, 0, 16)
	bytes := 0
	r.buf = r.buf[:0]
	args := [][]byte{[]byte("MSET")}
	for len(keys) < cap(keys) && (bytes == 0 || float64(bytes) < r.owed) {
		key := rand.IntN(r.d.Keys)
		value := r.d.append(nil, key, r.gens[key]+1)
		r.gens[key]++ // so that a key drawn twice has two generations; undone below
		args = append(args, keyName(key), value)
		keys = append(keys, key)
		bytes += len(value)
	}
	if _, err := r.conn.do(args...); err != nil {
		for _, key := range keys {
			r.gens[key]--
		}
		return fmt.Errorf("overwrite %d keys: %w", len(keys), err)
	}
	r.owed -= float64(bytes)
	r.overwritten += int64(bytes)
	r.rec.Done(bytes)
	return nil
}

func (r *runner) get() error {
	key := rand.IntN(r.d.Keys)
	reply, err := r.conn.do([]byte("GET"), keyName(key))
	if err != nil {
		return fmt.Errorf("read key %s: %w", keyName(key), err)
	}
	if reply.Kind != '$' {
		r.rec.Fail(fmt.Errorf("key %s is gone", keyName(key)))
		return nil
	}
	if r.scratch == nil {
		r.scratch = make([]byte, 0, 16<<10)
	}
	if err := r.d.compare(key, r.gens[key], reply.Text, r.scratch); err != nil {
		r.rec.Fail(err)
		return nil // the connection is fine, the content is not
	}
	r.rec.Done(len(reply.Text))
	return nil
}

func (r *runner) incr() error {
	reply, err := r.conn.do([]byte("INCR"), []byte(counterKey))
	if err != nil {
		return fmt.Errorf("count up from %d: %w", r.counter, err)
	}
	if reply.Kind != ':' || reply.Int != r.counter+1 {
		r.rec.Fail(fmt.Errorf("the counter went from %d to %d", r.counter, reply.Int))
		r.counter = reply.Int
		return nil
	}
	r.counter++
	r.rec.Done(8)
	return nil
}

// probeStep writes a number and reads it back, in two requests.
func (r *runner) probeStep() error {
	r.probe++
	want := strconv.FormatUint(r.probe, 10)
	if _, err := r.conn.do([]byte("SET"), []byte(probeKey), []byte(want)); err != nil {
		return fmt.Errorf("write the probe: %w", err)
	}
	r.rec.Done(len(want))
	reply, err := r.conn.do([]byte("GET"), []byte(probeKey))
	if err != nil {
		return fmt.Errorf("read the probe: %w", err)
	}
	if string(reply.Text) != want {
		r.rec.Fail(fmt.Errorf("the probe holds %q instead of %q", reply.Text, want))
		return nil
	}
	r.rec.Done(len(want))
	return nil
}

// reconnect makes the connection anew and learns again: whether the request that
// failed was carried out cannot be known. Only growth is believed.
func (r *runner) reconnect(ctx context.Context) error {
	r.conn.Close()
	for {
		c, err := dial(ctx, r.o.Addr, time.Second)
		if err == nil {
			c.timeout = r.o.Timeout
			r.conn = c
			break
		}
		timer := time.NewTimer(100 * time.Millisecond)
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("reconnect: %w", err)
		case <-timer.C:
		}
	}
	r.rec.Reconnected()
	gens, count := r.gens, r.counter
	if err := r.learn(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("after a reconnect: %w", err)
	}
	for key := range gens {
		if r.gens[key] < gens[key] {
			r.rec.Fail(fmt.Errorf("after a reconnect key %s is back at generation %d from %d", keyName(key), r.gens[key], gens[key]))
		}
	}
	if r.counter < count {
		r.rec.Fail(fmt.Errorf("after a reconnect the counter is back at %d from %d", r.counter, count))
	}
	return nil
}
