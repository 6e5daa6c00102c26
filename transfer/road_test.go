package transfer

import (
	"bytes"
	"testing"
	"time"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/transfer/encoding"
	"github.com/tranship/tranship/transfer/wire"
)

// fastCPU is a processor on which encoding a batch takes a third of a millisecond:
// the choice of an encoder must not depend on who else runs, or on the race detector.
func fastCPU(work func()) time.Duration { work(); return time.Second / 3000 }

func TestASlowLinkMakesTheEncoderSpendMore(t *testing.T) {
	const pages = 4000
	m := heapMemory(pages, 1)
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept, plain: true})
	s := h.dial(t, Options{Bandwidth: 100_000_000, encodeTime: fastCPU})
	slow := m.round(t, s, 0, pages, 64)
	sink.equal(t, m)
	if slow.Zstd < slow.Sent*3/4 || slow.Raw+slow.S2+slow.Zstd != slow.Sent {
		t.Errorf("at 100 Mbit/s: %+v", slow)
	}
	// What s2 alone makes of it, without QUIC.
	s2 := checkpoint.Bytes(0)
	var e encoding.Encoder
	for data := m.procs[1]; len(data) > 0; data = data[min(len(data), wire.MaxRaw):] {
		_, payload := e.Encode(data[:min(len(data), wire.MaxRaw)])
		s2 += checkpoint.Bytes(len(payload))
	}
	if slow.BytesSent >= s2*95/100 {
		t.Errorf("%d bytes were sent, s2 alone makes %d", slow.BytesSent, s2)
	}
}

func TestTheEncoderReactsInsideAMigration(t *testing.T) {
	const pages = 4000
	m := heapMemory(pages, 2)
	sink := newStore()
	h := newHost(t, hostOptions{accept: sink.accept, plain: true})
	s := h.dial(t, Options{Streams: 2, encodeTime: fastCPU})
	r, err := s.Round(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.send(r, 0, pages/2, 64); err != nil {
		t.Fatal(err)
	}
	before := r.stats().Zstd
	s.SetBandwidth(50_000_000)
	if err := m.send(r, pages/2, pages, 64); err != nil {
		t.Fatal(err)
	}
	stats, err := r.Close()
	if err != nil {
		t.Fatal(err)
	}
	if stats.Zstd-before < pages/2*3/4 {
		t.Errorf("%d of %d pages went as zstd after the link became slow: %+v", stats.Zstd-before, pages/2, stats)
	}
	sink.equal(t, m)
}

func TestAFastLinkIsNotKeptWaitingForZstd(t *testing.T) {
	const pages, fast = 2000, 200e6
	m := heapMemory(pages, 3)
	h := newHost(t, hostOptions{accept: newStore().accept, plain: true})
	for n := range 3 {
		s := h.dial(t, Options{Connections: 2})
		stats := m.round(t, s, n, pages, 64)
		rate := s.link.get()
		s.Close()
		if rate > fast {
			if stats.Zstd > stats.Sent/10 {
				t.Errorf("over a link of %.0f MB/s: %+v", rate/1e6, stats)
			}
			return
		}
	}
	t.Skipf("loopback carries less than %.0f MB/s: the machine is busy, or instrumented", fast/1e6)
}

func TestTheLinkIsMeasuredWhileSomethingIsWritten(t *testing.T) {
	at := time.Unix(1000, 0)
	ms := func(n int) time.Time { return at.Add(time.Duration(n) * time.Millisecond) }
	var m linkMeter
	if m.get() != 0 {
		t.Error("an unused link has a rate")
	}
	m.enter(ms(0))
	m.enter(ms(10)) // the second writes beside the first
	m.leave(ms(20), 1e6)
	m.leave(ms(40), 1e6)
	// A pause, in which all encode.
	m.enter(ms(500))
	m.leave(ms(540), 2e6)
	if rate := m.get(); rate < 49e6 || rate > 51e6 {
		t.Errorf("4 MB in 80 ms of writing are %.0f bytes a second", rate)
	}
	for n := range 20 { // becomes slower
		m.enter(ms(1000 + 100*n))
		m.leave(ms(1100+100*n), 1e6)
	}
	if rate := m.get(); rate < 9e6 || rate > 11e6 {
		t.Errorf("10 MB/s were measured as %.0f", rate)
	}
}

func TestThreadTimeCountsWorkAndNotWaiting(t *testing.T) {
	idle := threadTime(func() { time.Sleep(50 * time.Millisecond) }) //nolint:forbidigo // waiting is what is measured
	if idle > 20*time.Millisecond {
		t.Errorf("sleeping took %v of a processor", idle)
	}
	data := bytes.Repeat([]byte("x"), 1<<20)
	if busy := threadTime(func() {
		for range 100 {
			hash(data)
		}
	}); busy < 100*time.Microsecond {
		t.Errorf("hashing 100 MB took %v", busy)
	}
}
