package balance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

const (
	// vetoPause of a shard that no target took, with jitter up to twice that: the
	// planner was chosen with rounds of a minute.
	vetoPause = time.Minute
	// refusedPause of a shard that pre-flight keeps here.
	refusedPause = 5 * time.Minute
	// resizePause between two resizes of a shard.
	resizePause = 30 * time.Second
	// leastResize, CPUs, that is worth one.
	leastResize = 0.02
	// checkTimeout bounds a pre-flight, which looks at every descriptor of a shard.
	checkTimeout = 10 * time.Second
	// unbookTimeout bounds the last word to a target; a promise also ends by itself.
	unbookTimeout = 5 * time.Second
)

// carry does what the round came to, or tells it.
func (b *Balancer) carry(ctx context.Context, t turn) {
	for i := range t.acting.Resizes {
		b.resize(ctx, &t, &t.acting, &t.acting.Resizes[i], On)
	}
	for i := range t.acting.Moves {
		b.move(ctx, &t, &t.acting.Moves[i])
	}
	if t.acts || !t.tells && b.cfg.Autopilot != Off {
		for _, n := range t.acting.Not {
			b.stay(&t, &t.acting, b.acting, n)
		}
	}
	for i := range t.advice.Resizes {
		b.resize(ctx, &t, &t.advice, &t.advice.Resizes[i], Advise)
	}
	for i := range t.advice.Moves {
		if m := &t.advice.Moves[i]; t.modes[m.Shard] == Advise {
			b.advise(ctx, &t, m)
		}
	}
	for _, n := range t.advice.Not {
		// What concerns the host as a whole the acting planner has said.
		if n.Shard == "" && !t.acts || t.modes[n.Shard] == Advise {
			b.stay(&t, &t.advice, b.advisor, n)
		}
	}
	if ctx.Err() == nil {
		b.leave()
	}
}

func (b *Balancer) stay(t *turn, p *allocate.Plan, planner *allocate.Planner, n allocate.Decision) {
	if n.Reason == allocate.NoTarget || n.Reason == allocate.NotWorth && n.Shard != "" {
		b.mu.Lock()
		b.peers.again = true
		b.mu.Unlock()
	}
	key := fmt.Sprintf("stay %s %s", n.Shard, n.Reason)
	words := b.stayWords(t, p, planner, n)
	if d := b.same(t, key); d != nil {
		b.mu.Lock()
		d.Words, d.Overload = words, p.Overload[0]
		b.mu.Unlock()
		return
	}
	d := b.decision(t, p, kindStay, n.Shard, n.Reason)
	d.Words, d.Outcome = words, outcomeStayed
	b.note(key, d)
}

func (b *Balancer) moveDecision(t *turn, p *allocate.Plan, m *allocate.Move) *v1.BalanceDecision {
	d := b.decision(t, p, kindMove, m.Shard, m.Reason)
	d.Benefit, d.Price = m.Benefit, m.Price
	d.Expected = &v1.BalanceCost{Bytes: m.Bytes, TookMs: ms(m.Takes), BlackoutMs: ms(m.Blackout), DirtyBytesPerSecond: t.shard(m.Shard).Dirty}
	return d
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (t *turn) shard(id allocate.ShardID) *allocate.Shard {
	i := slices.IndexFunc(t.view.Shards, func(s allocate.Shard) bool { return s.ID == id })
	return &t.view.Shards[i]
}

// advise tells what would be moved where. Pre-flight is asked once: advice that
// cannot be followed is none.
func (b *Balancer) advise(ctx context.Context, t *turn, m *allocate.Move) {
	key := fmt.Sprintf("advise %s %s", m.Shard, m.Reason)
	if d := b.same(t, key); d != nil {
		b.mu.Lock()
		d.Words, d.Benefit, d.Price, d.Overload = moveWords(&t.advice, m, d.GetTo()), m.Benefit, m.Price, t.advice.Overload[0]
		b.mu.Unlock()
		return
	}
	d := b.moveDecision(t, &t.advice, m)
	for _, c := range m.Targets {
		asked := b.check(ctx, d, string(c.Host))
		d.Asked = append(d.Asked, asked)
		if asked.GetCode() == "" {
			d.To = string(c.Host)
			break
		}
	}
	if ctx.Err() != nil {
		return
	}
	d.Words, d.Outcome = moveWords(&t.advice, m, d.GetTo()), outcomeAdvised
	if d.GetTo() == "" {
		d.Outcome, d.Detail = outcomeRefused, askedWords(d.GetAsked())
		b.bar(m.Shard, "pre-flight: "+d.GetDetail(), refusedPause)
	}
	b.note(key, d)
}

// bar keeps a shard from being moved for a while.
func (b *Balancer) bar(id allocate.ShardID, why string, pause time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bars[id] = bar{why, b.now().Add(pause + time.Duration(b.rng.Int64N(int64(pause))))}
	b.peers.again = true
}

// check asks pre-flight. Its code is "" if the shard could move there.
func (b *Balancer) check(ctx context.Context, d *v1.BalanceDecision, node string) *v1.AskedTarget {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	why, err := b.cfg.Host.Check(ctx, d.GetNamespace(), d.GetName(), node)
	switch {
	case err != nil:
		return &v1.AskedTarget{Node: node, Code: "unreachable", Words: err.Error()}
	case why != "":
		return &v1.AskedTarget{Node: node, Code: "pre-flight", Words: why}
	}
	return &v1.AskedTarget{Node: node}
}

func askedWords(asked []*v1.AskedTarget) string {
	var out []string
	for _, a := range asked {
		if a.GetCode() != "" && !slices.Contains(out, a.GetWords()) {
			out = append(out, a.GetWords())
		}
	}
	return some(out)
}

// move asks the targets in turn for room, and moves the shard to the first that
// grants it.
func (b *Balancer) move(ctx context.Context, t *turn, m *allocate.Move) {
	d := b.moveDecision(t, &t.acting, m)
	req := allocate.Request{Shard: *t.shard(m.Shard), From: m.From, Reason: m.Reason, Takes: m.Takes}
	vetoed := false
	for _, c := range m.Targets {
		asked := b.check(ctx, d, string(c.Host))
		if asked.GetCode() == "" {
			asked = b.book(ctx, d, string(c.Host), &req)
			vetoed = vetoed || asked.GetCode() != ""
		}
		d.Asked = append(d.Asked, asked)
		if asked.GetCode() == "" {
			d.To = string(c.Host)
			break
		}
	}
	d.Words = moveWords(&t.acting, m, d.GetTo())
	key := fmt.Sprintf("move %s", m.Shard)
	switch {
	case d.GetTo() == "" && ctx.Err() != nil:
		return
	case d.GetTo() == "":
		d.Detail, d.Outcome = askedWords(d.GetAsked()), outcomeVetoed
		if pause := vetoPause; vetoed {
			b.bar(m.Shard, "no target took it lately: "+d.GetDetail(), pause)
		} else {
			d.Outcome = outcomeRefused
			b.bar(m.Shard, "pre-flight: "+d.GetDetail(), refusedPause)
		}
		b.note(key, d)
		return
	}
	d.Outcome = outcomeUnderWay
	b.mu.Lock()
	b.acting.Started(t.at, m.Shard, allocate.HostID(d.GetTo()))
	b.advisor.Started(t.at, m.Shard, allocate.HostID(d.GetTo()))
	b.mu.Unlock()
	kept := b.note(key, d)
	used := req.Shard.Usage[allocate.Memory]
	b.work.Go(func() { b.follow(ctx, kept, used) })
}

// book asks a target for room.
func (b *Balancer) book(ctx context.Context, d *v1.BalanceDecision, node string, req *allocate.Request) *v1.AskedTarget {
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	resp, err := b.cfg.Peers.Book(ctx, node, bookMessage(d.GetNamespace(), d.GetName(), req))
	switch {
	case err != nil:
		return &v1.AskedTarget{Node: node, Code: "unreachable", Words: node + ": " + plain(err)}
	case resp.GetVeto() == "":
		return &v1.AskedTarget{Node: node}
	}
	code, words := resp.GetVeto(), resp.GetWords()
	if errors.Join(checkText("veto", code), checkText("veto", words)) != nil {
		code, words = "garbage", node+" refuses in words that nobody can read"
	}
	return &v1.AskedTarget{Node: node, Code: code, Words: words}
}

// plain drops connect's code from a peer's error: the text is what counts, as far
// as it can be shown.
func plain(err error) string {
	var ce *connect.Error
	if !errors.As(err, &ce) || !connect.IsWireError(err) {
		return err.Error()
	}
	words := ce.Message()
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != unicode.ReplacementChar {
			return r
		}
		return -1
	}, words[:min(len(words), 4*maxText)])
}

// follow moves the shard and takes down how it went.
func (b *Balancer) follow(ctx context.Context, d *Decision, used float64) {
	id := shardID(d.GetNamespace(), d.GetName())
	m, err := b.cfg.Host.Migrate(ctx, d.GetNamespace(), d.GetName(), d.GetTo())
	if err != nil && ctx.Err() != nil {
		return // it stays under way; the next start finds it so, and the promise runs out
	}
	moved := err == nil && m.GetOutcome() == "done"
	outcome, detail := outcomeDone, ""
	switch {
	case err != nil:
		outcome, detail = outcomeFailed, plain(err)
	case !moved && m.GetCode() == "refused":
		outcome, detail = outcomeRefused, m.GetReason()
	case !moved:
		outcome, detail = outcomeFailed, m.GetReason()
	}
	un := &v1.UnbookRequest{Namespace: d.GetNamespace(), Name: d.GetName()}
	b.mu.Lock()
	now := b.now()
	b.acting.Ended(now, id, moved)
	b.advisor.Ended(now, id, moved)
	if moved {
		b.left[id] = now
		un.Cost = b.costs.learn(now, id, used, m)
		if err := b.store.writeCosts(&b.costs); err != nil {
			b.log.Warn("balance: costs", "err", err)
		}
	}
	b.mu.Unlock()
	b.end(d, outcome, detail, func(d *v1.BalanceDecision) { d.MigrationId, d.Real = m.GetId(), un.GetCost() })
	uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unbookTimeout)
	defer cancel()
	if err := b.cfg.Peers.Unbook(uctx, d.GetTo(), un); err != nil {
		b.log.Info("balance: the promise runs out by itself", "peer", d.GetTo(), "shard", id, "err", err)
	}
}

// resize changes a limit in place, or tells that it would.
func (b *Balancer) resize(ctx context.Context, t *turn, p *allocate.Plan, r *allocate.Resize, mode Mode) {
	if t.modes[r.Shard] != mode {
		return
	}
	key := fmt.Sprintf("resize %s %s", mode, r.Shard)
	s := t.shard(r.Shard)
	b.mu.Lock()
	x := b.bars["resize "+r.Shard]
	to := max(r.To, s.Request[allocate.CPU])
	if most := b.most[r.Shard]; most > 0 {
		to = min(to, most)
	}
	b.mu.Unlock()
	if change := to - r.From; r.From > 0 && change < leastResize && change > -leastResize || mode == On && t.at.Before(x.until) {
		return
	}
	words := resizeWords(r.Shard, r.From, to, r.Reason)
	if mode == Advise {
		if d := b.same(t, key); d != nil {
			b.mu.Lock()
			d.Words, d.CpusTo = words, to
			b.mu.Unlock()
			return
		}
	}
	d := b.decision(t, p, kindResize, r.Shard, r.Reason)
	d.Words, d.CpusFrom, d.CpusTo, d.Outcome = words, r.From, to, outcomeAdvised
	if mode == Advise {
		b.note(key, d)
		return
	}
	pause := resizePause
	d.Outcome = outcomeDone
	if err := b.cfg.Host.Resize(ctx, d.GetNamespace(), d.GetName(), to); err != nil {
		d.Outcome, d.Detail, pause = outcomeFailed, err.Error(), refusedPause
		if errors.Is(err, runtime.ErrNotRunning) || errors.Is(err, runtime.ErrNotFound) {
			d.Detail = "it has ended meanwhile"
		}
	}
	b.mu.Lock()
	b.bars["resize "+r.Shard] = bar{until: t.at.Add(pause)}
	b.mu.Unlock()
	b.note(key, d)
}
