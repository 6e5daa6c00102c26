package transfer

import (
	"context"
	"sync"
	"time"
)

const (
	// wireOverhead is what stands around 1,000 bytes of a stream on the wire: in
	// a full packet of 1,452 bytes QUIC's header, frame and tag take 32 to 36,
	// UDP and IPv4 28 in front of it.
	wireOverhead = 45
	// paceCredit is how much time unused may be made up for: longer than a
	// goroutine of a busy host oversleeps, shorter than any window in which
	// someone would measure the link. QUIC's own pacing spreads what is made up.
	paceCredit = 25 * time.Millisecond
	// A piece is what goes out between two looks at the clock.
	minPiece = 8 << 10
	maxPiece = 256 << 10
)

// pacer holds all streams of a session together below a bandwidth. It counts
// what they send with its surroundings, but not what is sent again after loss.
type pacer struct {
	mu   sync.Mutex
	rate float64   // bytes a second, 0 is unlimited
	next time.Time // when the bytes so far are through
}

func (p *pacer) set(bitsPerSecond int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rate = max(0, float64(bitsPerSecond)/8)
	p.next = time.Time{}
}

// bytes returns the rate in bytes a second, 0 when there is none.
func (p *pacer) bytes() float64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rate
}

// piece returns how many bytes of a stream to send at once, 0 for all of them:
// two milliseconds' worth, so that a shallow queue on the way does not overflow.
func (p *pacer) piece() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rate == 0 {
		return 0
	}
	return min(max(int(p.rate*0.002), minPiece), maxPiece)
}

// wait returns when n bytes of a stream may be sent.
func (p *pacer) wait(ctx context.Context, n int) error {
	delay := p.reserve(time.Now(), n)
	if delay <= 0 {
		return nil
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// reserve books n bytes and returns how long after now their turn comes.
func (p *pacer) reserve(now time.Time, n int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rate == 0 {
		return 0
	}
	if earliest := now.Add(-paceCredit); p.next.Before(earliest) {
		p.next = earliest
	}
	delay := p.next.Sub(now)
	onWire := float64(n) * (1000 + wireOverhead) / 1000
	p.next = p.next.Add(time.Duration(onWire / p.rate * float64(time.Second)))
	return delay
}
