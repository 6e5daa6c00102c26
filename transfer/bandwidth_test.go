package transfer

import (
	"context"
	"testing"
	"time"
)

// onWire is what a session has put onto the link: UDP's payload, and UDP's and
// IPv4's headers of every packet.
func (s *Session) onWire(t *testing.T) float64 {
	t.Helper()
	links, err := s.usable()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, l := range links {
		stats := l.conn.ConnectionStats()
		sum += float64(stats.BytesSent) + 28*float64(stats.PacketsSent)
	}
	return sum
}

// sendFor sends rounds of noise, which nothing makes smaller, for a while, and
// returns how many bits a second went onto the link.
func sendFor(t *testing.T, s *Session, while time.Duration) float64 {
	t.Helper()
	data := make([]byte, 1<<20)
	fillNoise(data, 1)
	before, began := s.onWire(t), time.Now()
	r, err := s.Round(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	for at := uint64(0); time.Since(began) < while; at += uint64(len(data)) {
		data[at/uint64(len(data))%page]++ // no page is what it was elsewhere
		if err := r.Pages(1, at, data); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return 8 * (s.onWire(t) - before) / time.Since(began).Seconds()
}

// TestABandwidthIsKeptOnTheWire holds the session to its limit by what its sockets
// sent. It may never be faster. Slower it may be only where the machine is: one
// that carries hardly more without a limit is too busy to say anything.
func TestABandwidthIsKeptOnTheWire(t *testing.T) {
	h := newHost(t, hostOptions{plain: true, accept: func(context.Context, string, string) (Sink, error) { return discard{}, nil }})
	for _, test := range []struct {
		name string
		rate int64
		opt  Options
	}{
		{"80 Mbit/s", 80_000_000, Options{}},
		{"400 Mbit/s", 400_000_000, Options{}},
		{"400 Mbit/s over two connections", 400_000_000, Options{Connections: 2}},
	} {
		t.Run(test.name, func(t *testing.T) {
		tries:
			for range 3 {
				test.opt.Bandwidth = test.rate
				s := h.dial(t, test.opt)
				ratio := sendFor(t, s, 1500*time.Millisecond) / float64(test.rate)
				s.SetBandwidth(0)
				able := sendFor(t, s, 300*time.Millisecond) / float64(test.rate)
				s.Close()
				switch {
				case ratio > 1.05:
					t.Fatalf("%.3f of the rate was sent", ratio)
				case ratio >= 0.95:
					t.Logf("%.3f of the rate was sent", ratio)
					return
				case able > 4:
					t.Fatalf("%.3f of the rate was sent, and without a limit %.1f times the rate", ratio, able)
				}
				t.Logf("%.3f of the rate was sent, and without a limit %.1f times the rate: the machine is busy", ratio, able)
				if able < 1 {
					break tries
				}
			}
			t.Skip("this machine carries too little beside what else it does")
		})
	}
}
