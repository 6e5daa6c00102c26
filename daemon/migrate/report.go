package migrate

import (
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/transfer"
)

// Phase names, in the order in which a migration passes them.
const (
	PhaseWait        = "wait" // of one that could not begin at once
	PhaseReserve     = "reserve"
	PhasePrepare     = "prepare"
	PhasePreCopy     = "pre-copy"
	PhaseStopAndCopy = "stop-and-copy"
	PhaseCommit      = "commit"
	PhaseActivate    = "activate"
	PhasePostCopy    = "post-copy"
	PhaseDone        = "done"
	PhaseAborted     = "aborted"
)

// Outcomes.
const (
	OutcomeRunning = "running"
	OutcomeDone    = "done"
	OutcomeAborted = "aborted"
	OutcomeInDoubt = "in-doubt"
)

// Codes say why a migration did not end as asked; stable, for programs.
const (
	CodeCancelled = "cancelled"
	CodeDeadline  = "deadline"
	CodeRefused   = "refused"
	CodeLink      = "link"
	CodeRestore   = "restore"
	CodeFailed    = "failed"
	CodeRestarted = "daemon-restarted"
	CodeInDoubt   = "in-doubt"
	CodePagesLost = "pages-lost"
	CodeOverLimit = "max-blackout"
	// CodeReturning: the shard is to go on at its source, and cannot yet.
	CodeReturning = "returning"
)

// report collects what a migration did, and tells whoever follows it. Safe for
// concurrent use.
type report struct {
	mu       sync.Mutex
	m        *v1.Migration
	started  time.Time
	phaseAt  time.Time
	progress *v1.Progress
	waiters  map[chan struct{}]struct{}
	now      func() time.Time
}

func newReport(m *v1.Migration, now func() time.Time) *report {
	at := now()
	m.StartedAtUnixMs = at.UnixMilli()
	m.Outcome = OutcomeRunning
	return &report{
		m: m, started: at, phaseAt: at, now: now,
		progress: &v1.Progress{Id: m.GetId(), EtaMs: -1}, waiters: map[chan struct{}]struct{}{},
	}
}

// enter ends the running phase and begins the next.
func (r *report) enter(phase string) {
	r.update(func() {
		r.endPhase()
		r.m.Phase, r.progress.Phase = phase, phase
	})
}

func (r *report) endPhase() {
	at := r.now()
	if r.m.GetPhase() != "" {
		r.m.Phases = append(r.m.Phases, &v1.Phase{
			Name: r.m.GetPhase(), Ms: millis(at.Sub(r.phaseAt)), AtMs: millis(r.phaseAt.Sub(r.started)),
		})
	}
	r.phaseAt = at
}

// round adds a finished pre-copy round.
func (r *report) round(res RoundResult, remaining int64, dirtyPagesPerSecond float64) {
	r.update(func() {
		r.m.Rounds = append(r.m.Rounds, &v1.Round{
			N: uint32(res.N), Pages: int64(res.Pages),
			BytesRaw: int64(res.BytesRaw), BytesSent: int64(res.BytesSent), Ms: millis(res.Duration),
			ThrottledCpus: res.CPUs, AtMs: millis(r.now().Add(-res.Duration).Sub(r.started)), As: pagesAs(res.Sent),
		})
		r.m.Pages += int64(res.Pages)
		r.m.BytesRaw += int64(res.BytesRaw)
		r.m.BytesSent += int64(res.BytesSent)
		p := r.progress
		p.Round, p.BytesRaw, p.BytesSent, p.ThrottledCpus = uint32(res.N), r.m.GetBytesRaw(), r.m.GetBytesSent(), res.CPUs
		if s := res.Duration.Seconds(); s > 0 {
			p.BytesPerSecond = float64(res.BytesSent) / s
		}
		p.DirtyPagesPerSecond, p.RemainingBytes, p.EtaMs = dirtyPagesPerSecond, remaining, -1
		if raw := float64(res.BytesRaw); raw > 0 && res.Duration > 0 {
			p.EtaMs = int64(float64(remaining) / (raw / millis(res.Duration)))
		}
	})
}

func pagesAs(sent *transfer.RoundStats) *v1.PagesAs {
	if sent == nil {
		return nil
	}
	return &v1.PagesAs{Unchanged: int64(sent.Unchanged), Raw: int64(sent.Raw), S2: int64(sent.S2), Zstd: int64(sent.Zstd), Delta: int64(sent.Deltas), Copy: int64(sent.Copies), Twin: int64(sent.Twins)}
}

// transferring updates the byte counts within a round. sent counts the whole
// session, the others the round.
func (r *report) transferring(n int, raw, sent, remaining int64) {
	r.update(func() {
		p := r.progress
		p.Round = uint32(n)
		p.BytesRaw, p.BytesSent = r.m.GetBytesRaw()+raw, sent
		p.RemainingBytes = remaining
		took := r.now().Sub(r.phaseAt)
		if s := took.Seconds(); s > 0 && raw > 0 {
			p.BytesPerSecond = float64(p.GetBytesSent()) / s
			p.EtaMs = int64(float64(remaining) / float64(p.GetBytesRaw()) * millis(took))
		}
	})
}

// pulled updates the byte counts of post-copy.
func (r *report) pulled(raw, sent, remaining int64) {
	r.update(func() {
		p := r.progress
		p.Round, p.RemainingBytes = 0, remaining
		p.BytesRaw, p.BytesSent = r.m.GetBytesRaw()+raw, r.m.GetBytesSent()+sent
		if took := r.now().Sub(r.phaseAt); took > 0 && raw > 0 {
			p.BytesPerSecond = float64(sent) / took.Seconds()
			p.EtaMs = int64(float64(remaining) / float64(raw) * millis(took))
		}
	})
}

// count adds bytes that went over the wire outside of rounds.
func (r *report) count(sent int64) {
	r.update(func() {
		r.m.BytesSent += sent
		r.progress.BytesSent = r.m.GetBytesSent()
	})
}

func (r *report) set(f func(m *v1.Migration)) { r.update(func() { f(r.m) }) }

// finish closes the report.
func (r *report) finish(outcome, code, reason string) {
	r.update(func() {
		r.endPhase()
		r.m.Outcome, r.m.Code, r.m.Reason = outcome, code, reason
		r.m.TotalMs = millis(r.now().Sub(r.started))
		switch outcome {
		case OutcomeDone:
			r.m.Phase = PhaseDone
		case OutcomeAborted:
			r.m.Phase = PhaseAborted
		}
		r.progress.Phase = r.m.GetPhase()
	})
}

func (r *report) update(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	for w := range r.waiters {
		select {
		case w <- struct{}{}:
		default: // the follower has a wake-up waiting already
		}
	}
}

// follow returns a channel that wakes after every change.
func (r *report) follow() (wake <-chan struct{}, stop func()) {
	w := make(chan struct{}, 1)
	r.mu.Lock()
	r.waiters[w] = struct{}{}
	r.mu.Unlock()
	return w, func() {
		r.mu.Lock()
		delete(r.waiters, w)
		r.mu.Unlock()
	}
}

func (r *report) snapshot() (*v1.Migration, *v1.Progress) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return proto.CloneOf(r.m), proto.CloneOf(r.progress)
}

// encode is the report as the journal keeps it.
func (r *report) encode() (json.RawMessage, error) {
	m, _ := r.snapshot()
	raw, err := protojson.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode report of %s: %w", m.GetId(), err)
	}
	return raw, nil
}

// migrationOf is what an API client sees of a journal entry.
func migrationOf(e *Entry, node string) *v1.Migration {
	m := &v1.Migration{}
	if len(e.Report) > 0 {
		// A report that a newer version wrote may have more fields.
		_ = protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(e.Report, m)
	}
	m.Id, m.Shard, m.Namespace, m.Mode, m.Role = e.ID, e.Shard, e.Namespace, e.Mode, string(e.Role)
	m.From, m.To = node, e.Peer
	if e.Role == Destination {
		m.From, m.To = e.Peer, node
	}
	m.StartedAtUnixMs = e.Started.UnixMilli()
	// What the report said may have been settled since.
	m.Reason, m.Code = e.Reason, e.Code
	switch e.State {
	case Done:
		m.Outcome, m.Phase = OutcomeDone, PhaseDone
	case Aborted:
		m.Outcome, m.Phase = OutcomeAborted, PhaseAborted
	case Returning:
		m.Outcome, m.Phase = OutcomeAborted, PhaseAborted
		if !e.Runs {
			m.Outcome, m.Code = OutcomeInDoubt, CodeReturning
		}
	case Yielded:
		m.Outcome = OutcomeInDoubt
	case Serving:
		m.Outcome, m.Phase = OutcomeRunning, PhasePostCopy
		if e.Code == CodePagesLost {
			m.Outcome = OutcomeInDoubt
		}
	default:
		m.Outcome = OutcomeRunning
		if m.GetPhase() == "" {
			m.Phase = string(e.State)
		}
	}
	return m
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
