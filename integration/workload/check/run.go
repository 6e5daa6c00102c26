package check

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// ErrNotOK is what a program returns after it printed a report that is not ok.
var ErrNotOK = errors.New("the check found errors")

// Run drives one checker: until work returns, or duration is over, counted from
// the record's Begin (0: without end), or SIGINT or SIGTERM asks for the end. SIGUSR1 prints a report in
// between. The last report goes to stdout as one line of JSON, in every case.
//
// Being told to end is how a load without an end ends, so work returns nil when
// its context is done; whatever else it returns is an error of the check.
func Run(ctx context.Context, stdout io.Writer, rec *Recorder, duration time.Duration, work func(context.Context) error) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	begun := rec.begun
	if duration <= 0 {
		begun = nil
	}
	var over <-chan time.Time
	usr1 := make(chan os.Signal, 1)
	signal.Notify(usr1, syscall.SIGUSR1)
	defer signal.Stop(usr1)

	done := make(chan error, 1)
	go func() { done <- work(ctx) }()
	for {
		select {
		case <-begun:
			begun = nil
			over = time.After(duration)
		case <-over:
			over = nil
			cancel()
		case <-usr1:
			if err := Print(stdout, rec.Report(false)); err != nil {
				rec.Fail(err)
			}
		case err := <-done:
			if err != nil {
				rec.Fail(err)
			}
			rep := rec.Report(true)
			if err := Print(stdout, rep); err != nil {
				return err
			}
			if !rep.OK {
				return ErrNotOK
			}
			return nil
		}
	}
}

// Print writes v as one line of JSON.
func Print(w io.Writer, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if _, err := w.Write(append(raw, '\n')); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}

// Pacer spreads n events a second evenly; without a rate it never waits. After
// a pause it goes on at its rate and does not catch up.
type Pacer struct {
	interval time.Duration
	next     time.Time
}

// NewPacer makes a pacer; 0 is without limit.
func NewPacer(perSecond float64) *Pacer {
	p := &Pacer{}
	if perSecond > 0 {
		p.interval = time.Duration(float64(time.Second) / perSecond)
	}
	return p
}

// Due says, without waiting, whether the next event may happen, and counts it.
func (p *Pacer) Due(now time.Time) bool {
	if p.interval == 0 {
		return true
	}
	if now.Before(p.next) {
		return false
	}
	if now.Sub(p.next) > 50*time.Millisecond {
		p.next = now
	}
	p.next = p.next.Add(p.interval)
	return true
}

// Wait waits for the next event; false means that ctx is done.
func (p *Pacer) Wait(ctx context.Context) bool {
	for !p.Due(time.Now()) {
		timer := time.NewTimer(time.Until(p.next))
		select {
		case <-ctx.Done():
			timer.Stop()
			return false
		case <-timer.C:
		}
	}
	return ctx.Err() == nil
}
