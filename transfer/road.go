package transfer

import (
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/transfer/encoding"
)

const (
	// sendCost is the processor time, in seconds, that this end needs to encrypt
	// and send a byte with GSO: half of the 4 to 6 s/GB that both take.
	sendCost = 2.5e-9
	// A look at the link is long enough for what queues and windows take without
	// waiting to be a small part of it, and short against a round.
	lookTime  = 20 * time.Millisecond
	lookBytes = 512 << 10
)

// linkMeter measures what the link takes: the bytes that were written by the
// time in which at least one stream was writing or waited for its pace. Time in
// which all encode says nothing about the link. Where the processors are what
// keeps the streams waiting, that is too little; the encodings' own processor
// time is then what decides.
type linkMeter struct {
	mu      sync.Mutex
	writers int
	since   time.Time // when the first of them began
	busy    time.Duration
	bytes   int64
	rate    float64 // bytes a second, 0 before the first look
}

func (m *linkMeter) enter(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.writers++; m.writers == 1 {
		m.since = now
	}
}

func (m *linkMeter) leave(now time.Time, bytes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy += now.Sub(m.since)
	m.since = now
	m.writers--
	m.bytes += int64(bytes)
	if m.busy < lookTime || m.bytes < lookBytes && m.busy < 10*lookTime {
		return
	}
	rate := float64(m.bytes) / m.busy.Seconds()
	if m.rate > 0 {
		rate = m.rate + (rate-m.rate)/4
	}
	m.rate, m.busy, m.bytes = rate, 0, 0
}

func (m *linkMeter) get() float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rate
}

// road is what a batch has before it. Half of the cores may work on it: the
// shard itself, and its neighbours, go on running.
func (s *Session) road() encoding.Road {
	link := s.link.get()
	if rate := s.pace.bytes(); rate > 0 && (link == 0 || rate < link) {
		link = rate
	}
	return encoding.Road{Link: link, Send: sendCost, Cores: max(1, float64(runtime.GOMAXPROCS(0))/2)}
}

// threadTime returns the processor time that work takes. Without its own thread
// it could end on another one than it began on.
func threadTime(work func()) time.Duration {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var from, to unix.Timespec
	began := time.Now()
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &from)
	work()
	if err != nil || unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &to) != nil {
		return time.Since(began)
	}
	return time.Duration(to.Nano() - from.Nano())
}
