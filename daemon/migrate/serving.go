package migrate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/s2"
	"github.com/zeebo/xxh3"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/lazypages"
	"github.com/tranship/tranship/checkpoint/pagestore"
	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/internal/failpoint"
	"github.com/tranship/tranship/transfer"
)

// Post-copy at the source. The shard runs at the destination and lacks pages
// there, which are in the frozen processes here and nowhere else:
//
//  1. sendOwed: what pages those are is sent instead of them, and kept
//  2. Fetch: the destination reads them, while this host has yielded or serves
//  3. Release: it has them all; an operator's word counts as much
//  4. only then the frozen shard is discarded

// owedFile is the list of owed pages in a migration's directory.
const owedFile = "owed"

// serving is a frozen shard whose pages the destination may read.
type serving struct {
	m      *Manager
	entry  *Entry
	owed   extentSet
	total  checkpoint.Bytes
	hosts  map[checkpoint.PID]int
	cgroup runtime.Cgroup
	pace   pace
	report *report // nil after a restart

	// reading is held while pages are read, and taken for good before the shard
	// is touched.
	reading sync.RWMutex
	closed  bool

	mu     sync.Mutex
	heard  time.Time
	pages  checkpoint.Pages
	sent   checkpoint.Bytes
	begins time.Time

	verdicts chan verdict
	over     chan struct{} // closed when a verdict was carried out
}

// verdict ends a serving: keep is where the shard stays, as in Resolve.
type verdict struct {
	keep, reason string
	done         chan error // has room for the one answer
}

const (
	keepHere  = "here"
	keepThere = "there"
)

// pagesLostError says that the destination has lost a shard whose pages it had
// not all fetched. What is here is what it was when it was frozen: whether that
// is to go on, without what it has done since, is an operator's choice.
type pagesLostError struct{ reason string }

func (e *pagesLostError) Error() string { return e.reason }

// openServing makes a frozen shard's owed pages readable for the destination.
func (m *Manager) openServing(ctx context.Context, e *Entry, r *report) (*serving, error) {
	m.mu.Lock()
	s := m.serving[e.ID]
	m.mu.Unlock()
	if s != nil {
		return s, nil
	}
	raw, err := os.ReadFile(filepath.Join(m.dir(e.ID, Source), owedFile))
	if err != nil {
		return nil, fmt.Errorf("owed pages: %w", err)
	}
	owed, err := pagestore.ParseOwed(raw)
	if err != nil {
		return nil, err
	}
	s = &serving{
		m: m, entry: e, owed: extentSet{}, hosts: map[checkpoint.PID]int{}, report: r,
		pace: pace{rate: float64(e.Bandwidth) / 8}, heard: time.Now(), begins: time.Now(), verdicts: make(chan verdict), over: make(chan struct{}),
	}
	for _, extents := range owed {
		for _, x := range extents {
			s.owed.add(x)
			s.total += x.Bytes()
		}
	}
	if s.cgroup, err = m.rt.Cgroup(ctx, e.Namespace, e.Shard); err != nil {
		return nil, err
	}
	pids, err := s.cgroup.Processes()
	if err != nil {
		return nil, err
	}
	procs, err := track.ProcessesOf(pids, e.InitPID)
	if err != nil {
		return nil, err
	}
	for _, p := range procs {
		s.hosts[p.PID] = p.HostPID
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.serving[e.ID] = s
	return s, nil
}

// endServing lets nobody read a shard's pages any more: what follows may let it
// run, or kill it. May run twice, and for a migration that serves nothing.
func (m *Manager) endServing(id string) {
	m.mu.Lock()
	s := m.serving[id]
	delete(m.serving, id)
	m.mu.Unlock()
	if s == nil {
		return
	}
	s.reading.Lock()
	defer s.reading.Unlock()
	s.closed = true
}

// postCopy serves the shard's last pages. It has begun to run at the destination.
func (o *outgoing) postCopy(s *serving) error {
	o.undo.forget()
	o.m.turns.leave(o) // its blackout is over, and others may stand still
	o.left()           // a broken link may make the rest last
	o.report.enter(PhasePostCopy)
	o.entry.State = Serving
	var err error
	if o.entry.Report, err = o.report.encode(); err == nil {
		err = o.m.journal.Put(o.entry)
	}
	if err != nil {
		o.entry.State = Yielded
		return errors.Join(err, errInDoubt)
	}
	o.letGo(o.m.log)
	if err := failpoint.Hit(o.m.life, "source.serving"); err != nil {
		o.m.log.Error("failpoint", "err", err)
	}
	keep, err := o.m.serve(o.m.life, s)
	if err == nil && keep == keepHere {
		return errTakenBack
	}
	if err == nil {
		s.conclude()
	}
	return err
}

// errTakenBack says that the shard goes on here because an operator said so.
var errTakenBack = errors.New("an operator kept it here")

// forget drops every step: nothing of them may be undone any more.
func (u *undoList) forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.steps = nil
}

// serve returns when the destination has every page, or an operator has decided,
// and what is here has been discarded or taken back accordingly; with a
// pagesLostError when it hears that the destination has lost the shard, and is
// called again to wait for the operator; else with ctx.
func (m *Manager) serve(ctx context.Context, s *serving) (keep string, err error) {
	log := m.log.With("migration", s.entry.ID, "shard", s.entry.Shard, "peer", s.entry.Peer)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		v := verdict{done: make(chan error, 1)}
		select {
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case v = <-s.verdicts:
		case <-tick.C:
			whole, lost := s.ask(ctx)
			if lost != nil && s.entry.Code != CodePagesLost {
				if err := m.noteLost(s.entry, lost); err != nil {
					log.Error("note that the destination has lost a shard", "err", err)
					continue
				}
				return "", lost
			}
			if !whole {
				continue
			}
			v.keep = keepThere
		}
		err = m.carryOut(ctx, s.entry, v)
		v.done <- err
		if err == nil || s.entry.State.Final() || s.entry.State == Returning {
			close(s.over)
			return v.keep, nil
		}
		log.Error("end of post-copy", "err", err)
	}
}

// carryOut does what a verdict says.
func (m *Manager) carryOut(ctx context.Context, e *Entry, v verdict) error {
	word := m.lastWord(e.ID)
	if err := word.Acquire(ctx, 1); err != nil {
		return err
	}
	defer word.Release(1)
	if v.keep == keepHere {
		return m.takeBack(ctx, e, v.reason)
	}
	return m.discard(ctx, e)
}

// noteLost journals that the destination has lost a shard.
func (m *Manager) noteLost(e *Entry, lost *pagesLostError) error {
	code, reason := e.Code, e.Reason
	e.Code, e.Reason = CodePagesLost, lost.reason
	if err := m.journal.Put(e); err != nil {
		e.Code, e.Reason = code, reason
		return err
	}
	return nil
}

// ask asks a destination that has been silent whether it has every page, as its
// Release may not have come, or has lost the shard.
func (s *serving) ask(ctx context.Context) (whole bool, lost *pagesLostError) {
	s.mu.Lock()
	quiet := time.Since(s.heard)
	s.mu.Unlock()
	if quiet < silence {
		return false, nil
	}
	peer, err := s.m.peers.Client(s.entry.Peer)
	if err != nil {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, tellTimeout)
	defer cancel()
	resp, err := peer.Commit(ctx, connect.NewRequest(&v1.CommitRequest{Id: s.entry.ID}))
	if err != nil {
		s.m.log.Warn("the destination, which lacks pages, does not answer", "migration", s.entry.ID, "shard", s.entry.Shard, "peer", s.entry.Peer, "err", peerError(err))
		return false, nil
	}
	if reason := resp.Msg.GetLost(); reason != "" {
		return false, &pagesLostError{reason}
	}
	return resp.Msg.GetRunning() && resp.Msg.GetWhole(), nil
}

// decide brings a verdict and returns when it has been carried out.
func (s *serving) decide(ctx context.Context, keep, reason string) error {
	v := verdict{keep: keep, reason: reason, done: make(chan error, 1)}
	select {
	case s.verdicts <- v:
	case <-s.over:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-s.m.life.Done():
		return context.Cause(s.m.life)
	}
	return <-v.done
}

// Fetch reads owed pages for the destination.
func (h *PeerHandler) Fetch(ctx context.Context, r *connect.Request[v1.FetchRequest]) (*connect.Response[v1.FetchResponse], error) {
	s, _, err := h.m.servingOf(ctx, r.Msg.GetId())
	if err != nil {
		return nil, err
	}
	resp, err := s.fetch(ctx, r.Msg)
	if err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(resp), nil
}

// Release is the destination's word that it has every page.
func (h *PeerHandler) Release(ctx context.Context, r *connect.Request[v1.ReleaseRequest]) (*connect.Response[v1.ReleaseResponse], error) {
	s, e, err := h.m.servingOf(ctx, r.Msg.GetId())
	if e != nil && e.State == Done {
		return connect.NewResponse(&v1.ReleaseResponse{}), nil
	}
	if err != nil {
		return nil, err
	}
	if err := s.decide(ctx, keepThere, ""); err != nil {
		return nil, apiError(err)
	}
	return connect.NewResponse(&v1.ReleaseResponse{}), nil
}

// servingOf finds what a destination may read. Unavailable says that it should
// ask again.
func (m *Manager) servingOf(ctx context.Context, id string) (*serving, *Entry, error) {
	e, err := m.journal.Get(Source, id)
	if errors.Is(err, ErrUnknownMigration) {
		return nil, nil, connect.NewError(connect.CodeNotFound, err)
	}
	if err != nil {
		return nil, nil, connect.NewError(connect.CodeInternal, err)
	}
	if e.Peer != transfer.PeerFrom(ctx) {
		return nil, nil, connect.NewError(connect.CodePermissionDenied, fmt.Errorf("migration %s goes to another host", id))
	}
	m.mu.Lock()
	s := m.serving[id]
	m.mu.Unlock()
	switch {
	case e.State.Final(), e.State == Returning:
		return nil, e, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("migration %s is %s", id, e.State))
	case s == nil:
		return nil, e, connect.NewError(connect.CodeUnavailable, fmt.Errorf("migration %s is %s", id, e.State))
	}
	return s, e, nil
}

func (s *serving) fetch(ctx context.Context, req *v1.FetchRequest) (*v1.FetchResponse, error) {
	pid := checkpoint.PID(req.GetPid())
	var runs []checkpoint.Extent
	total := checkpoint.Pages(0)
	for _, r := range req.GetRuns() {
		e := checkpoint.Extent{PID: pid, Addr: r.GetAddress(), Pages: checkpoint.Pages(r.GetPages())}
		if e.Pages <= 0 || e.Pages > lazypages.MaxPull || e.Addr%checkpoint.PageSize != 0 || e.Addr >= pagestore.AddressLimit {
			return nil, fmt.Errorf("%v: %w", e, runtime.ErrInvalid)
		}
		if len(s.owed.missing(e)) > 0 {
			return nil, fmt.Errorf("%v is not owed: %w", e, runtime.ErrInvalid)
		}
		if total += e.Pages; total > lazypages.MaxPull {
			return nil, fmt.Errorf("more than %d pages: %w", lazypages.MaxPull, runtime.ErrInvalid)
		}
		runs = append(runs, e)
	}
	if total == 0 || s.hosts[pid] == 0 {
		return nil, fmt.Errorf("%d pages of process %d: %w", total, pid, runtime.ErrInvalid)
	}
	point := "source.fetch"
	if req.GetUrgent() {
		point = "source.fetch-urgent"
	}
	if err := failpoint.Hit(ctx, point); err != nil {
		return nil, err
	}
	data, err := s.read(s.hosts[pid], runs, total)
	if err != nil {
		return nil, err
	}
	resp := &v1.FetchResponse{Content: data, Digest: xxh3.Hash(data)}
	if packed := s2.Encode(nil, data); len(packed) < len(data)*7/8 {
		resp.Content, resp.S2 = packed, true
	}
	delay := s.pace.reserve(time.Now(), len(resp.Content))
	// What a thread waits for is booked, and does not wait.
	if delay > 0 && !req.GetUrgent() {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	s.count(total, checkpoint.Bytes(len(resp.Content)))
	return resp, nil
}

// read reads pages of a process that stands still for sure.
func (s *serving) read(hostPID int, runs []checkpoint.Extent, total checkpoint.Pages) ([]byte, error) {
	s.reading.RLock()
	defer s.reading.RUnlock()
	if s.closed {
		return nil, errors.New("the shard is not frozen any more")
	}
	data := make([]byte, total.Bytes())
	rest := data
	lost := false
	for _, e := range runs {
		part := rest[:e.Bytes()]
		if err := track.ReadMemory(hostPID, e.Addr, part, func(uint64, checkpoint.Pages) { lost = true }); err != nil {
			return nil, err
		}
		rest = rest[len(part):]
	}
	if lost {
		return nil, fmt.Errorf("pages of %s are lost: its frozen process %d has died", s.entry.Shard, hostPID)
	}
	// Asked afterwards: whoever thawed it by hand did so before this or after the
	// pages were read.
	if state, err := s.cgroup.Freezer().State(); err != nil || state != runtime.Frozen {
		return nil, fmt.Errorf("%s was thawed by somebody: %w", s.entry.Shard, errors.Join(err, runtime.ErrInvalid))
	}
	return data, nil
}

func (s *serving) count(pages checkpoint.Pages, sent checkpoint.Bytes) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heard = time.Now()
	s.pages += pages
	s.sent += sent
	if s.report != nil {
		s.report.pulled(int64(s.pages.Bytes()), int64(s.sent), max(0, int64(s.total-s.pages.Bytes())))
	}
}

// conclude adds what was fetched to the report, as its last round.
func (s *serving) conclude() {
	s.mu.Lock()
	defer s.mu.Unlock()
	result, _ := s.report.snapshot()
	s.report.round(RoundResult{
		N: len(result.GetRounds()) + 1, Pages: s.pages, BytesRaw: s.pages.Bytes(), BytesSent: s.sent, Duration: time.Since(s.begins),
	}, 0, 0)
}

// pace keeps what is fetched below the bandwidth that the operator allows.
type pace struct {
	mu   sync.Mutex
	rate float64 // bytes a second, 0 is unlimited
	next time.Time
}

// paceCredit is how much time unused may be made up for.
const paceCredit = 25 * time.Millisecond

// reserve books n bytes and returns how long after now their turn comes.
func (p *pace) reserve(now time.Time, n int) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rate <= 0 {
		return 0
	}
	if earliest := now.Add(-paceCredit); p.next.Before(earliest) {
		p.next = earliest
	}
	delay := p.next.Sub(now)
	p.next = p.next.Add(time.Duration(float64(n) / p.rate * float64(time.Second)))
	return delay
}
