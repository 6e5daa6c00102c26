package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
)

const (
	image = "demo.tranship.io/redis:latest"
	shard = "redis-0"
)

// demo is one performance.
type demo struct {
	cli  cli
	self string // this program, which is also the client
	out  io.Writer
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, format+"\n", args...) }

// run is the demo in the order of what the audience sees. The lab is taken down
// by the caller.
func (d *demo) run(ctx context.Context) error {
	d.say("tranship moves a running Redis between two hosts and back, under the eyes of its client.\n")

	d.say("1. Two hosts, host-1 and host-2, and a client: namespaces of this machine, each with its own containerd and transhipd.")
	// What an interrupted demo left is not what this one begins with.
	if _, err := d.cli.Run(ctx, "lab", "down"); err != nil {
		return fmt.Errorf("remains of an earlier demo: %w", err)
	}
	if _, err := d.cli.Run(ctx, "lab", "up", "--hosts", "2"); err != nil {
		return fmt.Errorf("bring up the lab: %w", err)
	}

	d.say("2. This machine's redis-server becomes an image, and runs on host-1 as the shard %s.", shard)
	if _, err := d.cli.Run(ctx, "lab", "image", "--name", image, "--bin", "/usr/bin/redis-server"); err != nil {
		return fmt.Errorf("make the image: %w", err)
	}
	ip, err := d.startRedis(ctx)
	if err != nil {
		return err
	}
	addr := ip + ":6379"

	d.say("3. The client fills it with %d MiB of keys, over the network, at %s.", dataset>>20, addr)
	if err := d.load(ctx, addr); err != nil {
		return err
	}

	d.say("4. The client opens one connection, and from now on reads, writes and compares over it: %d requests a second, %d MiB/s of new values.",
		requestRate, overwriteRate>>20)
	client, err := d.cli.Start(ctx, "lab", "exec", "client", "--", d.self, clientVerb, "run", addr)
	if err != nil {
		return err
	}
	moves, moveErr := d.moves(ctx, client)
	// In every case: the client's report is worth most when a move went wrong.
	seen, clientErr := d.endClient(client)
	if err := errors.Join(moveErr, clientErr); err != nil {
		return err
	}
	d.say("")
	if err := printTable(d.out, moves, seen); err != nil {
		return err
	}
	return judge(moves, seen)
}

// startRedis starts the shard and returns its address, which moves with it.
func (d *demo) startRedis(ctx context.Context) (string, error) {
	out, err := d.cli.Run(ctx, "lab", "exec", "host-1", "--", "tranship", "run", "-o", "json", "--name", shard, image,
		"redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--appendonly", "no")
	if err != nil {
		return "", fmt.Errorf("start the shard: %w", err)
	}
	var doc struct {
		IP string `json:"ip"`
	}
	if err := json.Unmarshal(out, &doc); err != nil || doc.IP == "" {
		return "", fmt.Errorf("start the shard: no address in %q: %w", out, errors.Join(err, errDocument))
	}
	return doc.IP, nil
}

var errDocument = errors.New("not the document that the contract promises")

// load fills Redis, which may take a moment to listen.
func (d *demo) load(ctx context.Context, addr string) error {
	const patience = 30 * time.Second
	for deadline := time.Now().Add(patience); ; {
		out, err := d.cli.Run(ctx, "lab", "exec", "client", "--", d.self, clientVerb, "load", addr)
		if err == nil {
			return nil
		}
		rep, repErr := lastReport(out)
		if ctx.Err() != nil || repErr != nil || rep.Requests > 0 || time.Now().After(deadline) {
			return fmt.Errorf("fill Redis: %w %v", err, rep.Errors)
		}
		select { // nobody says when Redis listens
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// move is one migration as the demo saw it.
type move struct {
	doc        migration
	began, end time.Time
}

// migration is the contract's document, as far as the demo shows it.
type migration struct {
	SchemaVersion int     `json:"schema_version"`
	From          string  `json:"from"`
	To            string  `json:"to"`
	Outcome       string  `json:"outcome"`
	Reason        string  `json:"reason"`
	TotalMS       float64 `json:"total_ms"`
	BlackoutMS    float64 `json:"blackout_ms"`
	Rounds        []struct {
		Pages int64 `json:"pages"`
	} `json:"rounds"`
	BytesRaw  int64 `json:"bytes_raw"`
	BytesSent int64 `json:"bytes_sent"`
}

// settle is how long the client runs before, between and after the moves: a gap
// is one only beside a time without. The client first reads everything once.
const settle = 3 * time.Second

func (d *demo) moves(ctx context.Context, client process) ([]move, error) {
	var done []move
	for i, way := range [][2]string{{"host-1", "host-2"}, {"host-2", "host-1"}} {
		if err := d.watch(ctx, client, settle); err != nil {
			return done, err
		}
		d.say("%d. %s moves from %s to %s …", 5+i, shard, way[0], way[1])
		m, err := d.move(ctx, way[0], way[1])
		if err != nil {
			return done, err
		}
		done = append(done, m)
		d.say("   … done: frozen for %.0f ms, after %d rounds of copying while it ran.", m.doc.BlackoutMS, len(m.doc.Rounds))
	}
	return done, d.watch(ctx, client, settle)
}

// watch lets the client work for a while.
func (d *demo) watch(ctx context.Context, client process, while time.Duration) error {
	timer := time.NewTimer(while)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-client.Ended():
		return errors.New("the client gave up")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *demo) move(ctx context.Context, from, to string) (move, error) {
	m := move{began: time.Now()}
	out, err := d.cli.Run(ctx, "lab", "exec", from, "--", "tranship", "migrate", "-o", "json", shard, to)
	m.end = time.Now()
	if err != nil {
		return m, fmt.Errorf("move %s from %s to %s: %w", shard, from, to, err)
	}
	if err := json.Unmarshal(out, &m.doc); err != nil {
		return m, fmt.Errorf("move %s from %s to %s: it printed %q: %w", shard, from, to, out, err)
	}
	return m, nil
}

// endClient ends the client and reads what it saw. A client that found
// something wrong exits with an error, and still reports: judge has the word.
func (d *demo) endClient(client process) (check.Report, error) {
	if err := client.Interrupt(); err != nil {
		return check.Report{}, err
	}
	out, err := client.Wait()
	rep, repErr := lastReport(out)
	if repErr != nil {
		return rep, errors.Join(fmt.Errorf("the client's report: %w", repErr), err)
	}
	if !rep.OK {
		return rep, fmt.Errorf("the client saw %d errors: %v", rep.ErrorCount, rep.Errors)
	}
	return rep, nil
}

// lastReport reads the final report from what a client printed.
func lastReport(out []byte) (check.Report, error) {
	var rep check.Report
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	if err := json.Unmarshal(lines[len(lines)-1], &rep); err != nil {
		return rep, fmt.Errorf("%q: %w", out, err)
	}
	if !rep.Final || rep.SchemaVersion != check.SchemaVersion {
		return rep, fmt.Errorf("%q: %w", out, errDocument)
	}
	return rep, nil
}
