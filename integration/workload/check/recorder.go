// Package check is what the programs that check a shard from outside have in
// common: content that can be recomputed, a recorder of errors and gaps, and the
// report they print. A recorder never forgets an error, and a report says ok only
// if there was none.
package check

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// SchemaVersion is in every report.
const SchemaVersion = 1

const (
	maxErrors = 10 // the first ones tell the most; the count goes on
	maxGaps   = 8
)

// Report is what a checker knows. Times are the checker's own clock.
type Report struct {
	SchemaVersion int    `json:"schema_version"`
	Program       string `json:"program"`
	OK            bool   `json:"ok"`
	// Final says that nothing follows; a report in between has false.
	Final bool `json:"final"`

	Requests   int64    `json:"requests"`
	Bytes      int64    `json:"bytes"` // payload in both directions
	ErrorCount int64    `json:"error_count"`
	Errors     []string `json:"errors"` // the first ten
	Reconnects int64    `json:"reconnects"`

	// A gap is the time from one completed request to the next one.
	LongestGapMS float64 `json:"longest_gap_ms"`
	LongestGapAt string  `json:"longest_gap_at"`
	Gaps         []Gap   `json:"gaps"` // the longest ones, in the order of time

	StartedAt         string  `json:"started_at"`
	DurationMS        float64 `json:"duration_ms"`
	RequestsPerSecond float64 `json:"requests_per_second"`
	BytesPerSecond    float64 `json:"bytes_per_second"`

	// Facts are numbers of one program, for example verified keys.
	Facts map[string]any `json:"facts,omitempty"`
}

// Gap is a time without a completed request.
type Gap struct {
	At string  `json:"at"` // when the last request before it completed
	MS float64 `json:"ms"`

	at     time.Time
	length time.Duration
}

// Recorder collects what a checker sees. It is safe for concurrent use, and its
// zero value is not ready: use NewRecorder.
type Recorder struct {
	program string
	now     func() time.Time

	mu         sync.Mutex
	started    time.Time
	last       time.Time
	stopped    time.Time // zero while it runs
	requests   int64
	bytes      int64
	errorCount int64
	errors     []string
	reconnects int64
	gaps       []Gap
	facts      map[string]any

	begun     chan struct{} // closed by the first Begin
	beginOnce sync.Once
}

// NewRecorder begins a record for the named program.
func NewRecorder(program string) *Recorder { return newRecorder(program, time.Now) }

func newRecorder(program string, now func() time.Time) *Recorder {
	t := now()
	return &Recorder{program: program, now: now, started: t, last: t, facts: map[string]any{}, begun: make(chan struct{})}
}

// Begin forgets the time until now: loading and learning are not what is measured.
func (r *Recorder) Begin() {
	defer r.beginOnce.Do(func() { close(r.begun) })
	r.mu.Lock()
	defer r.mu.Unlock()
	r.started = r.now()
	r.last = r.started
	r.requests, r.bytes, r.gaps = 0, 0, nil
}

// Stop ends what is measured: requests after it count for nothing, errors do.
func (r *Recorder) Stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = r.now()
}

// Done notes a request that completed and was right, with n bytes of payload.
func (r *Recorder) Done(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stopped.IsZero() {
		return
	}
	t := r.now()
	r.requests++
	r.bytes += int64(n)
	r.gap(t)
}

// gap keeps the longest ones. The list is short, so a scan is enough.
func (r *Recorder) gap(t time.Time) {
	g := Gap{at: r.last, length: t.Sub(r.last)}
	r.last = t
	if len(r.gaps) < maxGaps {
		r.gaps = append(r.gaps, g)
		return
	}
	shortest := 0
	for i := range r.gaps {
		if r.gaps[i].length < r.gaps[shortest].length {
			shortest = i
		}
	}
	if g.length > r.gaps[shortest].length {
		r.gaps = append(slices.Delete(r.gaps, shortest, shortest+1), g)
	}
}

// Fail notes an error. Nothing takes it back.
func (r *Recorder) Fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.errorCount++
	if len(r.errors) < maxErrors {
		r.errors = append(r.errors, fmt.Sprintf("%s: %v", r.now().UTC().Format(time.RFC3339Nano), err))
	}
}

// Reconnected notes that a connection had to be made again.
func (r *Recorder) Reconnected() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reconnects++
}

// Fact sets a number of this program for the report.
func (r *Recorder) Fact(name string, value any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.facts[name] = value
}

// Failed says whether there was an error.
func (r *Recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.errorCount > 0
}

// Report returns what is known now. The time since the last completed request
// counts as a gap: a connection that hangs at the end has no later request to
// show it.
func (r *Recorder) Report(final bool) Report {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := r.now()
	if !r.stopped.IsZero() {
		t = r.stopped
	}
	gaps := slices.Clone(r.gaps)
	gaps = append(gaps, Gap{at: r.last, length: t.Sub(r.last)})
	longest := gaps[0]
	for i := range gaps {
		gaps[i].At = gaps[i].at.UTC().Format(time.RFC3339Nano)
		gaps[i].MS = milliseconds(gaps[i].length)
		if gaps[i].length >= longest.length {
			longest = gaps[i]
		}
	}
	facts := make(map[string]any, len(r.facts))
	for k, v := range r.facts {
		facts[k] = v
	}
	elapsed := t.Sub(r.started)
	rep := Report{
		SchemaVersion: SchemaVersion,
		Program:       r.program,
		OK:            r.errorCount == 0 && r.requests > 0,
		Final:         final,
		Requests:      r.requests,
		Bytes:         r.bytes,
		ErrorCount:    r.errorCount,
		Errors:        append([]string{}, r.errors...),
		Reconnects:    r.reconnects,
		LongestGapMS:  longest.MS,
		LongestGapAt:  longest.At,
		Gaps:          gaps,
		StartedAt:     r.started.UTC().Format(time.RFC3339Nano),
		DurationMS:    milliseconds(elapsed),
		Facts:         facts,
	}
	if s := elapsed.Seconds(); s > 0 {
		rep.RequestsPerSecond = float64(r.requests) / s
		rep.BytesPerSecond = float64(r.bytes) / s
	}
	return rep
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
