package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/daemon/peers/pki"
	"github.com/tranship/tranship/transfer"
)

// receiveVerb and sendVerb make this program the ends of a transfer. What
// arrives is counted and dropped, in every way of carrying it.
const (
	receiveVerb = "receive" // DIR ADDRESS WAY
	sendVerb    = "send"    // DIR ADDRESS WAY FILE|noise SECONDS
)

// Ways of carrying bytes. All have mutually authenticated TLS 1.3.
const (
	wayTLS  = "tls"  // crypto/tls over one TCP connection
	wayQUIC = "quic" // quic-go as it comes, one connection, one stream
	wayRoad = "road" // package transfer, as a migration uses it
	wayRaw  = "raw"  // the same without compression
)

// chunk is how much is given at a time, as pre-copy reads.
const chunk = 1 << 20

// noiseBytes that do not compress.
const noiseBytes = 64 << 20

// listening is a receiver's first line.
type listening struct {
	Addr string `json:"addr"`
}

// pumped is what a sender prints.
type pumped struct {
	Bytes   int64   `json:"bytes"`
	Seconds float64 `json:"seconds"`
	// OnWire is what the transport says it sent, 0 where it does not say.
	OnWire int64 `json:"on_wire"`
	// CPUSeconds is the sender's processor time, the kernel's for it included:
	// what a busy machine does not distort.
	CPUSeconds float64 `json:"cpu_seconds"`
}

// received is a receiver's last line.
type received struct {
	CPUSeconds float64 `json:"cpu_seconds"`
}

// cpuSeconds is what this process has used.
func cpuSeconds() (float64, error) {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return 0, fmt.Errorf("processor time: %w", err)
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9, nil
}

// hostTLS reads the files that issue wrote for a host.
func hostTLS(dir, node string) (*tls.Config, func(string) *tls.Config, error) {
	at := func(name string) string { return filepath.Join(dir, node, name) }
	return pki.TLS(at(pki.CACertFile), at(pki.CertFile), at(pki.KeyFile))
}

// issue makes a CA and the certificates of both ends.
func issue(dir string) error {
	ca, err := pki.Init(filepath.Join(dir, "ca"))
	if err != nil {
		return err
	}
	for _, node := range []string{"source", "destination"} {
		cert, key, err := ca.Issue(node, 24*time.Hour)
		if err != nil {
			return err
		}
		if err := pki.Write(filepath.Join(dir, node), ca.CertPEM(), cert, key); err != nil {
			return err
		}
	}
	return nil
}

const alpnBench = "tranship-bench"

// receiveMain serves until its standard input ends.
func receiveMain(args []string) int {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	err := receive(ctx, args[0], args[1], args[2])
	if err == nil || ctx.Err() != nil {
		var r received
		if r.CPUSeconds, err = cpuSeconds(); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(r)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "receive:", err)
		return 1
	}
	return 0
}

func receive(ctx context.Context, dir, addr, way string) error {
	conf, _, err := hostTLS(dir, "destination")
	if err != nil {
		return err
	}
	ready := func(a net.Addr) error { return json.NewEncoder(os.Stdout).Encode(listening{a.String()}) }
	switch way {
	case wayTLS:
		l, err := tls.Listen("tcp", addr, conf)
		if err != nil {
			return err
		}
		defer context.AfterFunc(ctx, func() { l.Close() })()
		if err := ready(l.Addr()); err != nil {
			return err
		}
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		defer conn.Close()
		return count(conn)
	case wayQUIC:
		conf = conf.Clone()
		conf.NextProtos = []string{alpnBench}
		l, err := quic.ListenAddr(addr, conf, nil)
		if err != nil {
			return err
		}
		defer l.Close()
		if err := ready(l.Addr()); err != nil {
			return err
		}
		conn, err := l.Accept(ctx)
		if err != nil {
			return err
		}
		stream, err := conn.AcceptStream(ctx)
		if err != nil {
			return err
		}
		if err := count(stream); err != nil {
			return err
		}
		<-conn.Context().Done() // the sender closes once it has the answer
		return nil
	default:
		sink := &dropped{}
		s, err := transfer.Listen(addr, conf, nil, func(context.Context, string, string) (transfer.Sink, error) { return sink, nil }, slog.New(slog.DiscardHandler))
		if err != nil {
			return err
		}
		if err := ready(s.Addr()); err != nil {
			return errors.Join(err, s.Close())
		}
		return s.Serve(ctx)
	}
}

// count takes frames of a length and so many bytes, and answers each with the
// length: a pass is over when the other end has all of it, in every way.
func count(conn io.ReadWriter) error {
	var head [8]byte
	buf := make([]byte, chunk)
	for {
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return nil //nolint:nilerr // the sender is done
		}
		n := int64(binary.BigEndian.Uint64(head[:]))
		got, err := io.CopyBuffer(onlyWriter{io.Discard}, io.LimitReader(conn, n), buf)
		if err != nil || got != n {
			return fmt.Errorf("%d of %d bytes arrived: %w", got, n, err)
		}
		if _, err := conn.Write(head[:]); err != nil {
			return err
		}
	}
}

// onlyWriter hides io.Discard's ReadFrom, which would read in small pieces.
type onlyWriter struct{ io.Writer }

// dropped is a Sink that costs nothing.
type dropped struct{}

func (*dropped) PutPages(checkpoint.PID, uint64, []byte) error { return nil }
func (*dropped) ReadPages(checkpoint.PID, uint64, []byte) error {
	return errors.New("nothing is kept")
}
func (*dropped) ZeroPages(checkpoint.PID, uint64, checkpoint.Pages) error { return nil }
func (*dropped) Blob(_ context.Context, _, _ string, _ int64, r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

// sendMain sends the same memory again and again for some seconds.
func sendMain(args []string) int {
	data, err := memoryOf(args[3])
	if err != nil {
		fmt.Fprintln(os.Stderr, "send:", err)
		return 1
	}
	while, err := time.ParseDuration(args[4])
	if err != nil {
		fmt.Fprintln(os.Stderr, "send:", err)
		return 2
	}
	p, err := send(context.Background(), args[0], args[1], args[2], transfer.Options{}, data, while)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(p)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "send:", err)
		return 1
	}
	return 0
}

// memoryOf maps a file, or makes noise.
func memoryOf(source string) ([]byte, error) {
	if source == "noise" {
		data := make([]byte, noiseBytes)
		rand.NewChaCha8([32]byte{1}).Read(data)
		return data, nil
	}
	f, err := os.Open(source)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
}

// send connects, and then measures whole passes until the time is over. opt is for
// the ways of package transfer.
func send(ctx context.Context, dir, addr, way string, opt transfer.Options, data []byte, while time.Duration) (pumped, error) {
	_, conf, err := hostTLS(dir, "source")
	if err != nil {
		return pumped{}, err
	}
	var pass func() error
	onWire := func() int64 { return 0 }
	switch way {
	case wayTLS:
		conn, err := tls.Dial("tcp", addr, conf("destination"))
		if err != nil {
			return pumped{}, err
		}
		defer conn.Close()
		pass = func() error { return framed(conn, data) }
	case wayQUIC:
		c := conf("destination").Clone()
		c.NextProtos = []string{alpnBench}
		conn, err := quic.DialAddr(ctx, addr, c, nil)
		if err != nil {
			return pumped{}, err
		}
		defer conn.CloseWithError(0, "done")
		stream, err := conn.OpenStreamSync(ctx)
		if err != nil {
			return pumped{}, err
		}
		pass = func() error { return framed(stream, data) }
	default:
		if way == wayRaw {
			opt.Compression = transfer.CompressOff
		}
		s, err := transfer.Dial(ctx, addr, "destination", conf, "bench", opt)
		if err != nil {
			return pumped{}, err
		}
		defer s.Close()
		n := 0
		pass = func() error { n++; return roadPass(ctx, s, n, data) }
		onWire = func() int64 { return int64(s.Stats().BytesWire) }
	}
	before := onWire()
	cpu, err := cpuSeconds()
	if err != nil {
		return pumped{}, err
	}
	p := pumped{}
	began := time.Now()
	for p.Bytes == 0 || time.Since(began) < while {
		if err := pass(); err != nil {
			return p, fmt.Errorf("over %s: %w", way, err)
		}
		p.Bytes += int64(len(data))
	}
	p.Seconds, p.OnWire = time.Since(began).Seconds(), onWire()-before
	used, err := cpuSeconds()
	p.CPUSeconds = used - cpu
	return p, err
}

// framed sends one pass and waits for its answer.
func framed(conn io.ReadWriter, data []byte) error {
	var head [8]byte
	binary.BigEndian.PutUint64(head[:], uint64(len(data)))
	if _, err := conn.Write(head[:]); err != nil {
		return err
	}
	for at := 0; at < len(data); at += chunk {
		if _, err := conn.Write(data[at:min(at+chunk, len(data))]); err != nil {
			return err
		}
	}
	var answer [8]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return err
	}
	if answer != head {
		return fmt.Errorf("%x bytes sent, %x arrived", head, answer)
	}
	return nil
}

// roadPass is a round of all pages, as the first round of a migration: the
// receiver is known to have none of them.
func roadPass(ctx context.Context, s *transfer.Session, n int, data []byte) error {
	s.Forget(1)
	r, err := s.Round(ctx, n)
	if err != nil {
		return err
	}
	for at := 0; at < len(data) && err == nil; at += chunk {
		err = r.Pages(1, uint64(at), data[at:min(at+chunk, len(data))])
	}
	_, closeErr := r.Close()
	return errors.Join(err, closeErr)
}
