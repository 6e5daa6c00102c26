package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// progress shows a migration on stderr: one line that is written over on a
// terminal, a line for each change elsewhere.
type progress interface {
	show(p *v1.Progress)
	say(line string)
	end()
}

func newProgress(f *os.File) progress {
	if term.IsTerminal(int(f.Fd())) {
		return &bar{w: f, width: func() int {
			if w, _, err := term.GetSize(int(f.Fd())); err == nil {
				return w
			}
			return 80
		}}
	}
	return &lines{w: f, now: time.Now}
}

// bar overwrites its own line.
type bar struct {
	w     io.Writer
	width func() int
	drawn bool
	total int64 // the most that was ever left: what a full bar means
}

func (b *bar) show(p *v1.Progress) {
	if p == nil {
		return
	}
	b.total = max(b.total, p.GetRemainingBytes())
	line := gauge(p, b.total) + " " + describe(p)
	if w := b.width(); len([]rune(line)) >= w && w > 1 {
		line = string([]rune(line)[:w-1]) // a wrapped line could not be written over
	}
	fmt.Fprintf(b.w, "\r\x1b[K%s", line)
	b.drawn = true
}

func (b *bar) say(line string) {
	b.end()
	fmt.Fprintln(b.w, line)
}

func (b *bar) end() {
	if b.drawn {
		fmt.Fprintln(b.w)
		b.drawn = false
	}
}

// gaugeWidth is the bar's inside, in characters.
const gaugeWidth = 20

func gauge(p *v1.Progress, total int64) string {
	done := 0
	if total > 0 {
		done = int(gaugeWidth * (total - p.GetRemainingBytes()) / total)
	}
	done = min(max(done, 0), gaugeWidth)
	return "[" + strings.Repeat("=", done) + strings.Repeat(" ", gaugeWidth-done) + "]"
}

// describe is one state of a migration in words.
func describe(p *v1.Progress) string {
	parts := []string{p.GetPhase()}
	if p.GetRound() > 0 {
		parts[0] += fmt.Sprintf(" round %d", p.GetRound())
	}
	if p.GetBytesSent() > 0 {
		parts = append(parts, formatSize(p.GetBytesSent())+" sent")
	}
	if p.GetBytesPerSecond() > 0 {
		parts = append(parts, formatRate(p.GetBytesPerSecond()))
	}
	if p.GetDirtyPagesPerSecond() > 0 {
		parts = append(parts, fmt.Sprintf("%.0f pages/s dirtied", p.GetDirtyPagesPerSecond()))
	}
	if c := p.GetThrottledCpus(); c > 0 {
		parts = append(parts, fmt.Sprintf("slowed to %.2g CPU", c))
	}
	if p.GetRemainingBytes() > 0 {
		parts = append(parts, formatSize(p.GetRemainingBytes())+" left")
	}
	if eta := p.GetEtaMs(); eta > 0 {
		parts = append(parts, (time.Duration(eta)*time.Millisecond).Round(100*time.Millisecond).String()+" to go")
	}
	return strings.Join(parts, ", ")
}

// lineEvery keeps logs short: within a round, one line a second.
const lineEvery = time.Second

type lines struct {
	w     io.Writer
	now   func() time.Time
	last  time.Time
	phase string
	round uint32
}

func (l *lines) show(p *v1.Progress) {
	if p == nil || p.GetPhase() == l.phase && p.GetRound() == l.round && l.now().Sub(l.last) < lineEvery {
		return
	}
	l.phase, l.round, l.last = p.GetPhase(), p.GetRound(), l.now()
	fmt.Fprintf(l.w, "%s: %s\n", p.GetId(), describe(p))
}

func (l *lines) say(line string) { fmt.Fprintln(l.w, line) }

func (l *lines) end() {}

// shared lets several goroutines show what they do.
type shared struct {
	mu sync.Mutex
	p  progress
}

func (s *shared) show(p *v1.Progress) { s.mu.Lock(); defer s.mu.Unlock(); s.p.show(p) }
func (s *shared) say(line string)     { s.mu.Lock(); defer s.mu.Unlock(); s.p.say(line) }
func (s *shared) end()                { s.mu.Lock(); defer s.mu.Unlock(); s.p.end() }
