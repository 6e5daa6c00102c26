package balance

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/tranship/tranship/allocate"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// Kinds of a decision.
const (
	kindMove   = "move"
	kindResize = "resize"
	kindStay   = "stay" // not to act
)

// Outcomes of a decision.
const (
	outcomeAdvised     = "advised"
	outcomeUnderWay    = "under-way"
	outcomeDone        = "done"
	outcomeFailed      = "failed"
	outcomeVetoed      = "vetoed"  // by all targets that were asked
	outcomeRefused     = "refused" // by pre-flight
	outcomeStayed      = "stayed"
	outcomeInterrupted = "interrupted" // the daemon ended before it had
)

// Decision is one decision, taken or not. It is written when it is made, when it
// ends, and when the rounds that came to the same have ended.
type Decision struct {
	*v1.BalanceDecision
	key     string
	renewed uint64 // the round that came to it last
}

// decision begins one.
func (b *Balancer) decision(t *turn, plan *allocate.Plan, kind string, id allocate.ShardID, why allocate.Reason) *v1.BalanceDecision {
	namespace, name, _ := strings.Cut(string(id), "/")
	return &v1.BalanceDecision{
		AtUnixMs: t.at.UnixMilli(), LastUnixMs: t.at.UnixMilli(), Rounds: 1, Kind: kind, Namespace: namespace, Name: name,
		Reason: string(why), From: string(plan.Host), Overload: plan.Overload[0],
	}
}

// same finds the decision that the round before came to as well, and renews it.
func (b *Balancer) same(t *turn, key string) *Decision {
	b.mu.Lock()
	defer b.mu.Unlock()
	d := b.current[key]
	if d == nil || d.GetOutcome() == outcomeUnderWay {
		return nil
	}
	d.LastUnixMs = t.at.UnixMilli()
	d.Rounds++
	d.renewed = b.counts.rounds
	return d
}

// note keeps a new decision. A disk that takes nothing costs history, not the loop.
func (b *Balancer) note(key string, m *v1.BalanceDecision) *Decision {
	d := &Decision{BalanceDecision: m, key: key}
	b.mu.Lock()
	defer b.mu.Unlock()
	d.renewed = b.counts.rounds
	b.current[key] = d
	b.counts.decided(m)
	if err := b.store.add(m); err != nil {
		b.log.Warn("balance: a decision is not kept", "err", err)
	}
	b.log.Info("balance: "+m.GetWords(), "outcome", m.GetOutcome(), "err", m.GetDetail())
	return d
}

// end writes how a decision ended.
func (b *Balancer) end(d *Decision, outcome, detail string, change func(*v1.BalanceDecision)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	d.Outcome, d.Detail = outcome, detail
	d.LastUnixMs = b.now().UnixMilli()
	if change != nil {
		change(d.BalanceDecision)
	}
	b.counts.decided(d.BalanceDecision)
	b.save(d)
	b.log.Info("balance: "+d.GetWords(), "outcome", outcome, "err", detail)
}

// save is called with b.mu held.
func (b *Balancer) save(d *Decision) {
	if err := b.store.put(d.BalanceDecision); err != nil {
		b.log.Warn("balance: a decision is not kept", "err", err)
	}
}

// leave ends decisions to which this round did not come any more.
func (b *Balancer) leave() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for key, d := range b.current {
		if d.renewed == b.counts.rounds || d.GetOutcome() == outcomeUnderWay {
			continue
		}
		if d.GetRounds() > 1 {
			b.save(d)
		}
		delete(b.current, key)
	}
}

func (b *Balancer) saveAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.current {
		b.save(d)
	}
}

// decisionsNow are copies of those of the last round and those under way.
func (b *Balancer) decisionsNow() []*v1.BalanceDecision {
	var out []*v1.BalanceDecision
	for _, d := range b.current {
		out = append(out, proto.CloneOf(d.BalanceDecision))
	}
	return out
}

// shown is a shard as people call it.
func shown(id allocate.ShardID) string { return strings.TrimPrefix(string(id), "default/") }

// within says until when a span of the horizon reaches.
func within(i int) string {
	d := allocate.SpanEnd(i)
	if d%time.Hour == 0 {
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dm", d/time.Minute)
}

func overloadWords(p *allocate.Plan) string {
	worst := 0
	for i, v := range p.Overload {
		if v > p.Overload[worst] {
			worst = i
		}
	}
	return fmt.Sprintf("%s is overloaded within %s with probability %.2f", p.Host, within(worst), p.Overload[worst])
}

func thresholdWords(p *allocate.Plan) string {
	return fmt.Sprintf("%s used more than %.0f %% of its CPU in the last sample", p.Host, 100*allocate.ReactiveThreshold)
}

func moveWords(p *allocate.Plan, m *allocate.Move, to string) string {
	head := "move " + shown(m.Shard)
	if to != "" {
		head += " to " + to
	}
	cost := fmt.Sprintf("%.0f MiB to send in %v, blackout %v", m.Bytes/(1<<20), roughly(m.Takes), roughly(m.Blackout))
	switch m.Reason {
	case allocate.Threshold:
		return fmt.Sprintf("%s: %s; %s", head, thresholdWords(p), cost)
	case allocate.Consolidate:
		return fmt.Sprintf("%s: %s can be spared; costs %.0f s: %s", head, m.From, m.Price, cost)
	}
	return fmt.Sprintf("%s: %s; saves %.0f s of overload weighted by priority, costs %.0f s: %s", head, overloadWords(p), m.Benefit, m.Price, cost)
}

func roughly(d time.Duration) time.Duration {
	if d > time.Minute {
		return d.Round(time.Second)
	}
	return d.Round(10 * time.Millisecond)
}

func resizeWords(id allocate.ShardID, from, to float64, why allocate.Reason) string {
	old := "none"
	if from > 0 {
		old = fmt.Sprintf("%.2f CPUs", from)
	}
	because := "its demand will exceed it, and there is room"
	if why == allocate.Yield {
		because = "shards of higher priority need the room, and nothing can move"
	}
	return fmt.Sprintf("limit of %s from %s to %.2f CPUs: %s", shown(id), old, to, because)
}

// stayWords says why nothing is done.
func (b *Balancer) stayWords(t *turn, p *allocate.Plan, planner *allocate.Planner, n allocate.Decision) string {
	cfg := planner.Config()
	over := overloadWords(p)
	if cfg.Threshold > 0 {
		over = thresholdWords(p)
	}
	switch n.Reason {
	case allocate.NotSustained:
		return fmt.Sprintf("%s; moving %s would be worth it, but not yet: %d of the last %d rounds must say so", over, shown(n.Shard), cfg.SustainK, cfg.SustainN)
	case allocate.NotWorth:
		if n.Shard != "" {
			return fmt.Sprintf("%s, but where %s may go it would add as much overload as it saves here", over, shown(n.Shard))
		}
		words := fmt.Sprintf("%s, but no move saves %.0f times what it costs", over, cfg.Margin)
		if held := b.heldBack(t); held != "" {
			words += "; " + held
		}
		return words
	case allocate.InFlight:
		return fmt.Sprintf("%s, and more than %d moves at a time are not allowed", over, cfg.OutMax)
	case allocate.NoTarget:
		return fmt.Sprintf("%s; no host may take %s: %s", over, shown(n.Shard), b.whyNoTarget(t, planner, n.Shard))
	}
	return fmt.Sprintf("%s: %s", over, n.Reason)
}

// maxNamed shards or hosts are named in a sentence.
const maxNamed = 4

// heldBack names the shards that rules keep here.
func (b *Balancer) heldBack(t *turn) string {
	var out []string
	for i := range t.view.Shards {
		if s := &t.view.Shards[i]; s.Pinned != "" {
			out = append(out, shown(s.ID)+" stays: "+s.Pinned)
		} else if left := b.acting.Config().CoolDown - t.at.Sub(s.MovedAt); !s.MovedAt.IsZero() && left > 0 {
			out = append(out, fmt.Sprintf("%s stays: it was moved %v ago", shown(s.ID), t.at.Sub(s.MovedAt).Round(time.Second)))
		}
	}
	return some(out)
}

func (b *Balancer) whyNoTarget(t *turn, planner *allocate.Planner, id allocate.ShardID) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []string
	for i := range t.view.Shards {
		if t.view.Shards[i].ID != id {
			continue
		}
		for _, r := range planner.Refusals(t.at, &t.view.Shards[i], allocate.Overload) {
			out = append(out, fmt.Sprintf("%s %s", r.Host, r.Why))
		}
	}
	for _, name := range b.peers.names {
		if why := b.peers.faults[name]; why != "" {
			out = append(out, name+" "+why)
		}
	}
	if len(out) == 0 {
		return "there is no other"
	}
	return some(out)
}

func some(list []string) string {
	if len(list) > maxNamed {
		list = append(list[:maxNamed:maxNamed], fmt.Sprintf("and %d more", len(list)-maxNamed))
	}
	return strings.Join(list, "; ")
}
