// Package pgcheck loads a PostgreSQL with bank transfers while its server is
// moved, and then proves that no acknowledged transaction is lost, none is half
// there, and every table, index and checksum is whole. Serve starts the server
// inside a shard.
//
// Money moves between accounts, so the sum never changes; every transfer is
// also a line in a ledger, so every balance can be computed from the lines; and
// every worker numbers its lines, so it knows which ones were acknowledged.
package pgcheck

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/integration/workload/check"
)

const opening = 1000 // of every account

// Options are common to Init, Run and Verify.
type Options struct {
	// URL as in postgres://postgres@10.89.1.5:5432/postgres.
	URL     string
	Timeout time.Duration // of one statement or transaction, a blackout included
}

func (o Options) connect(ctx context.Context) (*pgx.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	c, err := pgx.Connect(ctx, o.URL)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	return c, nil
}

// Init makes the tables anew, with accounts of about bytes in all.
func Init(ctx context.Context, o Options, bytes int64, rec *check.Recorder) error {
	c, err := o.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close(context.WithoutCancel(ctx))
	const filler = 400 // bytes of each row besides the numbers
	accounts := max(bytes/(filler+100), 10)
	rec.Begin()
	for _, sql := range []string{
		`DROP TABLE IF EXISTS transfers, accounts`,
		`CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL, filler text NOT NULL)`,
		`CREATE TABLE transfers (
			id bigserial PRIMARY KEY, run bigint NOT NULL, worker int NOT NULL, seq bigint NOT NULL,
			src int NOT NULL, dst int NOT NULL, amount bigint NOT NULL, UNIQUE (run, worker, seq))`,
		`CREATE INDEX ON transfers (src)`,
		`CREATE INDEX ON transfers (dst)`,
		`CREATE EXTENSION IF NOT EXISTS amcheck`,
	} {
		if _, err := c.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%.40s: %w", sql, err)
		}
		rec.Done(len(sql))
	}
	rows := pgx.CopyFromSlice(int(accounts), func(i int) ([]any, error) {
		text := make([]byte, filler)
		check.Fill(text, uint64(i))
		return []any{i, int64(opening), fmt.Sprintf("%x", text[:filler/2])}, nil
	})
	n, err := c.CopyFrom(ctx, pgx.Identifier{"accounts"}, []string{"id", "balance", "filler"}, rows)
	if err != nil {
		return fmt.Errorf("fill the accounts: %w", err)
	}
	rec.Done(int(n) * (filler + 100))
	rec.Fact("accounts", n)
	return nil
}

// Run makes transfers over one connection for each worker until ctx is done,
// and verifies everything at the end. It never reconnects: what happened to a
// transaction whose answer was lost cannot be known, and no answer may be lost.
func Run(ctx context.Context, o Options, workers int, rate float64, rec *check.Recorder) error {
	live := context.WithoutCancel(ctx)
	run := rand.Int64()
	conns := make([]*pgx.Conn, workers)
	for i := range conns {
		c, err := o.connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close(live)
		conns[i] = c
	}
	var accounts int
	if err := conns[0].QueryRow(ctx, `SELECT count(*) FROM accounts`).Scan(&accounts); err != nil {
		return fmt.Errorf("count the accounts: %w", err)
	}
	if accounts < 2 {
		return errors.New("there are no accounts: init makes them")
	}
	rec.Begin()
	committed := make([]int64, workers)
	// Not errgroup.WithContext alone: ctx ends the load, group ends it early.
	group, groupCtx := errgroup.WithContext(ctx)
	for i, c := range conns {
		group.Go(func() error {
			w := worker{o: o, conn: c, run: run, id: i, accounts: accounts, rec: rec}
			defer func() { committed[i] = w.seq }()
			for pace := check.NewPacer(rate / float64(workers)); pace.Wait(groupCtx); {
				if err := w.step(live); err != nil {
					return fmt.Errorf("worker %d: %w", i, err)
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	rec.Stop()
	var total int64
	for i, want := range committed {
		total += want
		var got, last int64
		err := conns[0].QueryRow(live, `SELECT count(*), coalesce(max(seq), 0) FROM transfers WHERE run = $1 AND worker = $2`, run, i).Scan(&got, &last)
		if err != nil {
			return fmt.Errorf("count the transfers of worker %d: %w", i, err)
		}
		if got != want || last != want {
			rec.Fail(fmt.Errorf("worker %d: %d transfers were acknowledged, %d are there, the last is %d", i, want, got, last))
		}
	}
	rec.Fact("committed", total)
	return verify(live, conns[0], rec)
}

type worker struct {
	o        Options
	conn     *pgx.Conn
	run      int64
	id       int
	accounts int
	seq      int64 // acknowledged
	turn     int
	rec      *check.Recorder
}

// step is one transaction. A snapshot of the sum now and then sees a torn commit
// at once, not only at the end.
func (w *worker) step(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, w.o.Timeout)
	defer cancel()
	w.turn++
	if w.turn%200 == 0 {
		return w.sum(ctx)
	}
	src, dst := rand.IntN(w.accounts), rand.IntN(w.accounts-1)
	if dst >= src {
		dst++
	}
	amount := 1 + rand.Int64N(10)
	// The lower id first: two workers never wait for each other in a circle.
	changes := [2]struct {
		id     int
		amount int64
	}{{src, -amount}, {dst, amount}}
	if dst < src {
		changes[0], changes[1] = changes[1], changes[0]
	}
	err := pgx.BeginFunc(ctx, w.conn, func(tx pgx.Tx) error {
		for _, c := range changes {
			tag, err := tx.Exec(ctx, `UPDATE accounts SET balance = balance + $1 WHERE id = $2`, c.amount, c.id)
			if err != nil {
				return err
			}
			if tag.RowsAffected() != 1 {
				return fmt.Errorf("account %d: %d rows", c.id, tag.RowsAffected())
			}
		}
		_, err := tx.Exec(ctx, `INSERT INTO transfers (run, worker, seq, src, dst, amount) VALUES ($1, $2, $3, $4, $5, $6)`,
			w.run, w.id, w.seq+1, src, dst, amount)
		return err
	})
	if err != nil {
		return fmt.Errorf("transfer %d: %w", w.seq+1, err)
	}
	w.seq++
	w.rec.Done(64)
	return nil
}

func (w *worker) sum(ctx context.Context) error {
	var sum int64
	if err := w.conn.QueryRow(ctx, `SELECT sum(balance)::bigint FROM accounts`).Scan(&sum); err != nil {
		return fmt.Errorf("sum: %w", err)
	}
	if want := int64(w.accounts) * opening; sum != want {
		w.rec.Fail(fmt.Errorf("the accounts sum to %d instead of %d", sum, want))
	}
	w.rec.Done(8)
	return nil
}

// Verify proves that the database is whole.
func Verify(ctx context.Context, o Options, rec *check.Recorder) error {
	c, err := o.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close(context.WithoutCancel(ctx))
	rec.Begin()
	return verify(ctx, c, rec)
}

// proofs are queries that return one row for each thing that is wrong, as text.
var proofs = []struct{ name, sql string }{
	{"checksums are on", `SELECT 'data_checksums is ' || current_setting('data_checksums') WHERE current_setting('data_checksums') <> 'on'`},
	{"the sum of all accounts", fmt.Sprintf(`SELECT format('%%s accounts sum to %%s', count(*), sum(balance)) FROM accounts HAVING sum(balance) <> count(*) * %d`, opening)},
	{"every balance follows from the ledger", fmt.Sprintf(`
		SELECT format('account %%s has %%s instead of %%s', a.id, a.balance, %d + coalesce(i.amount, 0) - coalesce(o.amount, 0))
		FROM accounts a
		LEFT JOIN (SELECT dst, sum(amount) amount FROM transfers GROUP BY dst) i ON i.dst = a.id
		LEFT JOIN (SELECT src, sum(amount) amount FROM transfers GROUP BY src) o ON o.src = a.id
		WHERE a.balance <> %d + coalesce(i.amount, 0) - coalesce(o.amount, 0)`, opening, opening)},
	{"no line of the ledger is missing", `
		SELECT format('worker %s of run %s: %s lines, the last is %s', worker, run, count(*), max(seq))
		FROM transfers GROUP BY run, worker HAVING count(*) <> max(seq) OR min(seq) <> 1`},
	// amcheck: every tuple of every table.
	{"tables are whole", `
		SELECT format('table %s, block %s, offset %s: %s', c.relname, v.blkno, v.offnum, v.msg)
		FROM pg_class c JOIN pg_am a ON a.oid = c.relam, LATERAL verify_heapam(c.oid, check_toast => true) v
		WHERE c.relkind IN ('r', 't', 'm') AND a.amname = 'heap' AND c.relpersistence = 'p'`},
	// After everything was read: what the server itself noticed.
	{"no checksum failed", `SELECT format('%s checksum failures in %s', checksum_failures, coalesce(datname, 'shared objects')) FROM pg_stat_database WHERE checksum_failures > 0`},
}

func verify(ctx context.Context, c *pgx.Conn, rec *check.Recorder) error {
	if _, err := c.Exec(ctx, `CHECKPOINT`); err != nil {
		return fmt.Errorf("write everything out: %w", err)
	}
	if err := verifyIndexes(ctx, c, rec); err != nil {
		return err
	}
	for _, p := range proofs {
		rows, err := c.Query(ctx, p.sql)
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		wrong, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		for _, w := range wrong {
			rec.Fail(fmt.Errorf("%s: %s", p.name, w))
		}
		rec.Done(len(p.sql))
	}
	rec.Fact("proofs", len(proofs))
	return nil
}

// verifyIndexes compares every index with its table: that every tuple is in it.
func verifyIndexes(ctx context.Context, c *pgx.Conn, rec *check.Recorder) error {
	rows, err := c.Query(ctx, `
		SELECT c.oid, c.relname FROM pg_class c JOIN pg_am a ON a.oid = c.relam JOIN pg_index i ON i.indexrelid = c.oid
		WHERE a.amname = 'btree' AND c.relkind = 'i' AND c.relpersistence = 'p' AND i.indisready AND i.indisvalid`)
	if err != nil {
		return fmt.Errorf("list the indexes: %w", err)
	}
	type index struct {
		OID  uint32
		Name string
	}
	indexes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[index])
	if err != nil {
		return fmt.Errorf("list the indexes: %w", err)
	}
	if len(indexes) == 0 {
		return errors.New("there is not one index, not even of the catalogue")
	}
	for _, i := range indexes {
		if _, err := c.Exec(ctx, `SELECT bt_index_check($1::oid::regclass, true)`, i.OID); err != nil {
			rec.Fail(fmt.Errorf("index %s: %w", i.Name, err))
			continue
		}
		rec.Done(0)
	}
	rec.Fact("verified_indexes", len(indexes))
	return nil
}
