package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// link is a way from one end to the other.
type link struct {
	group, about, bandwidth string
	receiver, bind          string // the host that receives, and its address there
}

var links = []link{
	{"throughput-loopback", "loopback of one host", "", "host-1", "127.0.0.1:0"},
	{"throughput-veth", "an unlimited veth between two hosts", "", "host-2", "10.88.0.12:0"},
	{"throughput-1gbit", "a veth of 1 Gbit/s between two hosts", "1gbit", "host-2", "10.88.0.12:0"},
}

// transferCase is one thing to send in one way.
type transferCase struct{ subject, way, source string }

const heapFile = "/run/tranship-bench-heap"

// The subjects' names say what is sent: a heap, or what does not compress.
const (
	tlsHeap, quicHeap, roadHeap   = "tls/tcp, heap", "quic-go, heap", "page road, heap"
	tlsNoise, quicNoise, rawNoise = "tls/tcp, noise", "quic-go, noise", "wire alone, noise"
	rateMetric, wireMetric        = "mb_per_s", "wire_mb_per_s"
	cpuMetric                     = "cpu_s_per_gb"  // of both ends
	transferLeast                 = 2 * time.Second // of one sample
	gigabitLinkMB                 = 1e9 / 8e6
)

var transferCases = []transferCase{
	{tlsHeap, wayTLS, heapFile},
	{quicHeap, wayQUIC, heapFile},
	{roadHeap, wayRoad, heapFile},
	{tlsNoise, wayTLS, "noise"},
	{quicNoise, wayQUIC, "noise"},
	{rawNoise, wayRaw, "noise"},
}

// measureThroughput sends the same memory in every way, one after the other,
// and begins with another one each time.
func measureThroughput(l link) func(context.Context, *bench, *group) error {
	return func(ctx context.Context, b *bench, g *group) error {
		if err := b.needHeap(ctx); err != nil {
			return err
		}
		dir := filepath.Join(b.scratch, "pki")
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			if err := issue(dir); err != nil {
				return err
			}
		}
		for i := range b.opt.runs {
			for j := range transferCases {
				c := transferCases[(i+j)%len(transferCases)]
				p, err := b.transfer(ctx, l, c, dir)
				if err != nil {
					return fmt.Errorf("%s: %w", c.subject, err)
				}
				v := map[string]float64{rateMetric: float64(p.Bytes) / p.Seconds / 1e6, cpuMetric: p.CPUSeconds / (float64(p.Bytes) / 1e9)}
				if p.OnWire > 0 {
					v[wireMetric] = float64(p.OnWire) / p.Seconds / 1e6
				}
				g.Samples = append(g.Samples, sample{Subject: c.subject, Values: v})
				b.say("  %-18s %6.0f MB/s", c.subject, v[rateMetric])
			}
		}
		return nil
	}
}

// transfer starts the receiver, and the sender on host-1, and waits for both.
func (b *bench) transfer(ctx context.Context, l link, c transferCase, dir string) (p pumped, err error) {
	cmd := b.tool.inHost(ctx, l.receiver, b.self, receiveVerb, dir, l.bind, c.way)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return p, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return p, err
	}
	if err := cmd.Start(); err != nil {
		return p, fmt.Errorf("start a receiver: %w", err)
	}
	lines := bufio.NewReader(out)
	defer func() {
		in.Close()
		last, _ := lines.ReadBytes('\n')
		if waitErr := cmd.Wait(); waitErr != nil {
			err = errors.Join(err, fmt.Errorf("the receiver: %w%s", waitErr, tail(stderr.String())))
		}
		if err == nil {
			var r received
			err = document(last, &r)
			p.CPUSeconds += r.CPUSeconds
		}
	}()
	line, err := lines.ReadBytes('\n')
	if err != nil {
		return p, fmt.Errorf("the receiver does not listen: %w", err)
	}
	var at listening
	if err := document(line, &at); err != nil {
		return p, err
	}
	answer, err := b.tool.on(ctx, "host-1", b.self, sendVerb, dir, at.Addr, c.way, c.source, transferLeast.String())
	if err != nil {
		return p, err
	}
	return p, document(answer, &p)
}

// needHeap leaves the memory of a running redis in a file on host-1's tmpfs.
func (b *bench) needHeap(ctx context.Context) (err error) {
	if _, err := b.tool.on(ctx, "host-1", "test", "-s", heapFile); err == nil {
		return nil
	}
	w := redisWorkload("", "redis with 256MiB of values", 256<<20)
	image, command, err := b.image(ctx, w)
	if err != nil {
		return err
	}
	s, err := startShard(ctx, b.tool, b.self, "bench-0", image, command...)
	if err != nil {
		return err
	}
	defer func() {
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, s.remove(after))
	}()
	if err := b.load(ctx, w, s); err != nil {
		return err
	}
	row, err := s.row(ctx)
	if err != nil {
		return err
	}
	// Whole or not at all: another group looks for it.
	if _, err := b.tool.on(ctx, "host-1", b.self, heapVerb, strconv.Itoa(row.PID), heapFile+".part"); err != nil {
		return err
	}
	_, err = b.tool.on(ctx, "host-1", "mv", heapFile+".part", heapFile)
	return err
}

// throughputRows are those of the targets.
func throughputRows(r *results) []row {
	of := func(name, subject string) float64 { return medianOf(r, name, subject, rateMetric) }
	ratio := func(name, group, own, other string, target float64) row {
		a, b := of(group, own), of(group, other)
		return atLeast(name, a/b, "×", target, spread("%.0f MB/s", a)+spread(" of %.0f MB/s", b))
	}
	const loopback, gigabit = "throughput-loopback", "throughput-1gbit"
	wire := of(gigabit, rawNoise)
	return []row{
		ratio("page road on loopback, of TLS 1.3 over TCP (same heap, raw)", loopback, roadHeap, tlsHeap, 1.0),
		ratio("wire alone on loopback, of stock quic-go", loopback, rawNoise, quicNoise, 1.6),
		atLeast("wire alone, payload of a 1 Gbit/s link", 100*wire/gigabitLinkMB, "%", 94,
			spread("%.1f MB/s of payload", wire)+spread(", %.1f MB/s with QUIC's own", medianOf(r, gigabit, rawNoise, wireMetric))+spread(", TLS over TCP: %.1f MB/s", of(gigabit, tlsNoise))),
	}
}
