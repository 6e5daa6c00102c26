package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
)

// discard is a Sink that costs nothing.
type discard struct{}

func (discard) PutPages(checkpoint.PID, uint64, []byte) error { return nil }
func (discard) ReadPages(checkpoint.PID, uint64, []byte) error {
	return errors.New("nothing is kept")
}
func (discard) ZeroPages(checkpoint.PID, uint64, checkpoint.Pages) error { return nil }
func (discard) Blob(_ context.Context, _, _ string, _ int64, r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

// BenchmarkRound moves memory over loopback, both ends in this process. MB/s
// is memory, CPU-s/GB is the processor time of both ends, kernel included,
// which a busy machine does not distort.
func BenchmarkRound(b *testing.B) {
	const size = 64 << 20
	noise := make([]byte, size)
	fillNoise(noise, 1)
	half := bytes.Clone(noise)
	text := bytes.Repeat([]byte("key:value;"), 410)
	for at := page; at < size; at += 2 * page {
		copy(half[at:at+page], text)
	}
	heap := heapMemory(size/page, 1).procs[1]
	gro := func(*net.UDPAddr) (net.PacketConn, error) { return listenUDP("udp4", nil) }
	tests := []struct {
		name string
		data []byte
		opt  Options
	}{
		{"noise", noise, Options{}},
		{"noise/streams=1", noise, Options{Streams: 1}},
		{"noise/connections=2", noise, Options{Connections: 2}},
		{"noise/uncompressed", noise, Options{Compression: CompressOff}},
		{"noise/sender with GRO", noise, Options{socket: gro}},
		{"half", half, Options{}},
		{"half/connections=2", half, Options{Connections: 2}},
		{"half/uncompressed", half, Options{Compression: CompressOff}},
		{"heap", heap, Options{}},
		{"heap/connections=2", heap, Options{Connections: 2}},
		{"heap/1gbit", heap, Options{Bandwidth: 1_000_000_000}},
		{"heap/200mbit", heap, Options{Bandwidth: 200_000_000}},
	}
	h := newHost(b, hostOptions{plain: true, accept: func(context.Context, string, string) (Sink, error) { return discard{}, nil }})
	for _, test := range tests {
		b.Run(test.name, func(b *testing.B) {
			s, err := Dial(b.Context(), h.addr, "destination", h.client, fmt.Sprintf("m-%s", b.Name()), test.opt)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			b.SetBytes(size)
			n, began := 0, cpuSeconds(b)
			for b.Loop() {
				s.Forget(1)
				r, err := s.Round(b.Context(), n)
				if err != nil {
					b.Fatal(err)
				}
				for at := 0; at < size; at += 1 << 20 {
					if err := r.Pages(1, uint64(at), test.data[at:at+1<<20]); err != nil {
						b.Fatal(err)
					}
				}
				if _, err := r.Close(); err != nil {
					b.Fatal(err)
				}
				n++
			}
			b.ReportMetric((cpuSeconds(b)-began)/(float64(n)*size/1e9), "CPU-s/GB")
			b.ReportMetric(float64(s.Stats().PacketsLost)/float64(n), "lost/op")
		})
	}
}

func cpuSeconds(b *testing.B) float64 {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}
