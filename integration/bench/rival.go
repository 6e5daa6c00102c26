package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"
)

// subject is a container that can be moved, seen from the machine.
type subject interface {
	name() string
	// address is where its service is reached, without a port.
	address() string
	// move moves it once and says what that took. It returns when the container
	// runs; settle waits for what goes on behind it.
	move(ctx context.Context) (sample, error)
	settle(ctx context.Context) error
	// remove ends it and removes it; it may be called after a failed move.
	remove(ctx context.Context) error
}

// Subjects by name.
const (
	tranship = "tranship"
	stock    = "runc"
	lazy     = "criu lazy-pages"
	preDump  = "criu pre-dump"
)

// Metrics by name.
const (
	blackoutMetric = "blackout_ms"
	totalMetric    = "total_ms"
	bytesMetric    = "bytes"
	gapMetric      = "client_gap_ms"
	criuMetric     = "criu_alone_ms"
)

// rivalAddress is among the shards', outside of what any host of the lab hands out.
const rivalAddress = "10.89.200.1"

// rival is a container that runc moves without tranship.
type rival struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	replies *bufio.Scanner
	stderr  strings.Builder
	way     string // how it is moved: a subject's name
}

// startRival runs, beside a shard, a container of the same image and spec.
func startRival(ctx context.Context, t *tool, self, way string, o stockOptions) (*rival, error) {
	r := &rival{way: way}
	r.cmd = t.inHost(context.WithoutCancel(ctx), "host-1", self, stockVerb)
	r.cmd.Stderr = &r.stderr
	var err error
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the rival: %w", err)
	}
	r.replies = bufio.NewScanner(out)
	if _, err := r.ask(ctx, o); err != nil {
		return nil, errors.Join(fmt.Errorf("start a container with runc: %w", err), r.remove(context.WithoutCancel(ctx)))
	}
	return r, nil
}

// ask sends one line and reads one.
func (r *rival) ask(ctx context.Context, request any) (stockReply, error) {
	raw, err := json.Marshal(request)
	if err != nil {
		return stockReply{}, err
	}
	if _, err := r.in.Write(append(raw, '\n')); err != nil {
		return stockReply{}, fmt.Errorf("it is gone%s: %w", tail(r.stderr.String()), err)
	}
	type line struct {
		reply stockReply
		err   error
	}
	answered := make(chan line, 1)
	go func() {
		var l line
		switch {
		case !r.replies.Scan():
			l.err = errors.Join(io.ErrUnexpectedEOF, r.replies.Err())
		default:
			l.err = json.Unmarshal(r.replies.Bytes(), &l.reply)
		}
		answered <- l
	}()
	select {
	case l := <-answered:
		if l.err == nil && l.reply.Error != "" {
			l.err = errors.New(l.reply.Error)
		}
		return l.reply, l.err
	case <-ctx.Done():
		// It answers, or ends, once it sees the end of its input.
		r.in.Close()
		<-answered
		return stockReply{}, context.Cause(ctx)
	}
}

func (r *rival) name() string { return r.way }

func (r *rival) address() string { return rivalAddress }

func (r *rival) move(ctx context.Context) (sample, error) {
	began := time.Now()
	reply, err := r.ask(ctx, stockRequest{Way: r.way})
	if err != nil {
		return sample{}, fmt.Errorf("move with %s: %w", r.name(), err)
	}
	if reply.CheckpointMs == 0 || reply.RestoreMs == 0 {
		return sample{}, fmt.Errorf("move with %s: it answers %+v", r.name(), reply)
	}
	s := sample{
		Subject: r.name(),
		Values: map[string]float64{
			blackoutMetric: reply.blackoutMs(),
			totalMetric:    reply.PreDumpMs + reply.CheckpointMs + reply.CopyMs + reply.RestoreMs + reply.FillMs,
			bytesMetric:    float64(reply.Bytes),
			criuMetric:     reply.DumpMs + reply.CRIURestoreMs,
		},
		Steps: map[string]float64{
			"runc checkpoint": reply.CheckpointMs, "copy": reply.CopyMs, "runc restore": reply.RestoreMs,
			"less two starts of runc": -reply.RuncStartMs, "criu dump": reply.DumpMs, "criu restore": reply.CRIURestoreMs,
		},
	}
	if took := ms(time.Since(began)); s.Values[totalMetric] > took {
		return s, fmt.Errorf("move with %s: its steps take %.0f ms, all of it took %.0f", r.name(), s.Values[totalMetric], took)
	}
	return s, nil
}

func (r *rival) settle(context.Context) error { return nil }

// remove ends its input, upon which it removes everything, and waits.
func (r *rival) remove(ctx context.Context) error {
	r.in.Close()
	var last string
	for r.replies.Scan() {
		last = r.replies.Text()
	}
	if err := r.cmd.Wait(); err != nil {
		return fmt.Errorf("remove the container of runc: %w: %s%s", err, last, tail(r.stderr.String()))
	}
	return ctx.Err()
}
