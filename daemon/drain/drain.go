// Package drain empties a host: it chooses a target for each shard, moves one
// after another, and says what moved, what stayed, and why. It refuses to know
// how a shard moves, and to freeze two at once.
//
// Flow: list → choose (pure) → Move, the next best target when one refuses →
// list again, for what arrived meanwhile → Result.
package drain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Shard is one that is to go.
type Shard struct {
	Namespace, Name string
	// Memory is what it uses, in bytes; CPUs are what it used lately, 0 unknown.
	Memory int64
	CPUs   float64
	// Near: it may only run where shards of other workloads do.
	Near bool
	// Stays, when not "", is why it is not even tried; StaysCode is for programs.
	Stays, StaysCode string
}

func (s Shard) key() string { return s.Namespace + "/" + s.Name }

// Host is one that might take it.
type Host struct {
	Name     string
	Alive    bool
	Cordoned bool
	CPUs     int
	Shards   int
	// CPULoad is 0 to 1 of all CPUs.
	CPULoad                      float64
	MemoryTotal, MemoryAvailable int64
	// Unfit, when not "", is why the shard that was asked for may not run there:
	// "is in zone …".
	Unfit string
}

// Codes of a Move; they are those of migrations.
const (
	CodeRefused   = "refused"
	CodeCancelled = "cancelled"
	CodeDeadline  = "deadline"
	CodeInDoubt   = "in-doubt"
	CodeFailed    = "failed"
	CodeNoTarget  = "no-target"
)

// Moved is how one attempt ended.
type Moved struct {
	ID         string
	BlackoutMs float64
	// Code is "" when the shard runs at the target, and Reason why not.
	Code, Reason string
}

// Mover is the host that is drained. Its methods are called by one goroutine.
type Mover interface {
	// Shards lists what is on the host now; those that stay anyway say why.
	Shards(ctx context.Context) ([]Shard, error)
	// Hosts lists the other hosts as they are now, for a shard.
	Hosts(ctx context.Context, s Shard) []Host
	// Move moves one and returns when it has ended; when ctx ends it cancels, and
	// waits for the undo.
	Move(ctx context.Context, s Shard, to string) Moved
}

// Settled is the end of one shard.
type Settled struct {
	Shard
	To string
	Moved
}

// Outcomes of a drain.
const (
	OutcomeDone      = "done"
	OutcomeRefused   = "refused"   // something stays, pre-flight says why
	OutcomeFailed    = "failed"    // something stays that should have moved
	OutcomeCancelled = "cancelled" // stopped by a person
	OutcomeDeadline  = "deadline"
	OutcomeInDoubt   = "in-doubt" // an operator is needed
)

// Result is what a drain did.
type Result struct {
	Outcome       string
	Moved, Stayed []Settled
}

// Causes with which a drain's context is ended.
var (
	ErrStopped  = errors.New("the drain was stopped")
	ErrDeadline = errors.New("the drain's deadline passed")
)

// maxTargets bounds the attempts for one shard: what three hosts refuse has a
// reason of its own.
const maxTargets = 3

// reserve is what a target keeps free for itself (pre-flight asks the same).
const reserve = 128 << 20

// Progress is told before each move and after it.
type Progress struct {
	Shard     Shard
	To        string // "" when it is settled
	Note      string
	Done, All int
}

// Run drains a host. It ends early when ctx does, and says so in its Result; an
// error is only that the host's shards cannot be listed.
func Run(ctx context.Context, m Mover, tell func(Progress)) (Result, error) {
	var res Result
	settled := map[string]bool{}
	d := &drainer{m: m, tell: tell, placed: map[string]placement{}}
	for {
		shards, err := m.Shards(ctx)
		if err != nil && ctx.Err() == nil {
			return res, fmt.Errorf("list the shards: %w", err)
		}
		shards = slices.DeleteFunc(shards, func(s Shard) bool { return settled[s.key()] })
		// The largest first: it is the one that is hardest to place. Those that are
		// near others follow them.
		slices.SortFunc(shards, func(a, b Shard) int {
			return cmp.Or(cmp.Compare(toInt(a.Near), toInt(b.Near)), cmp.Compare(b.Memory, a.Memory), strings.Compare(a.key(), b.key()))
		})
		if len(shards) == 0 {
			break
		}
		d.all = len(settled) + len(shards)
		for _, s := range shards {
			end := d.settle(ctx, s)
			settled[s.key()] = true
			d.done = len(settled)
			if end.Code == "" {
				res.Moved = append(res.Moved, end)
			} else {
				res.Stayed = append(res.Stayed, end)
			}
			d.say(Progress{Shard: s, Note: end.describe()})
		}
	}
	res.Outcome = outcomeOf(ctx, res.Stayed)
	return res, nil
}

func toInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (s Settled) describe() string {
	if s.Code == "" {
		return fmt.Sprintf("%s moved to %s, frozen for %.0f ms", s.Name, s.To, s.BlackoutMs)
	}
	return fmt.Sprintf("%s stays: %s", s.Name, s.Reason)
}

type placement struct {
	memory int64
	cpus   float64
}

type drainer struct {
	m         Mover
	tell      func(Progress)
	done, all int
	placed    map[string]placement // what this drain has sent where
}

func (d *drainer) say(p Progress) {
	p.Done, p.All = d.done, d.all
	d.tell(p)
}

// settle moves one shard, or finds out why it stays.
func (d *drainer) settle(ctx context.Context, s Shard) Settled {
	end := Settled{Shard: s}
	if s.Stays != "" {
		end.Moved = Moved{Code: s.StaysCode, Reason: s.Stays}
		return end
	}
	var tried []string
	var reasons []string
	for len(tried) < maxTargets {
		if ctx.Err() != nil {
			end.Moved = ended(ctx)
			return end
		}
		to, why := Choose(s, d.hosts(ctx, s), tried)
		if to == "" {
			if len(tried) == 0 {
				end.Moved = Moved{Code: CodeNoTarget, Reason: why}
			}
			break
		}
		tried = append(tried, to)
		d.say(Progress{Shard: s, To: to})
		end.To, end.Moved = to, d.m.Move(ctx, s, to)
		switch end.Code {
		case "":
			p := d.placed[to]
			d.placed[to] = placement{memory: p.memory + s.Memory, cpus: p.cpus + s.CPUs}
			return end
		case CodeInDoubt:
			return end
		}
		if ctx.Err() != nil {
			reason := end.Reason
			end.Moved = ended(ctx)
			if reason != "" && len(reasons) > 0 {
				end.Reason += " (" + strings.Join(reasons, "; ") + ")"
			}
			return end
		}
		reasons = append(reasons, to+": "+end.Reason)
	}
	if len(reasons) > 0 {
		end.Reason = strings.Join(reasons, "; ")
	}
	return end
}

func ended(ctx context.Context) Moved {
	if errors.Is(context.Cause(ctx), ErrDeadline) {
		return Moved{Code: CodeDeadline, Reason: "the deadline passed"}
	}
	return Moved{Code: CodeCancelled, Reason: "the drain was stopped"}
}

// hosts are the others, with what this drain has already sent them: what they
// say of their load is older than that.
func (d *drainer) hosts(ctx context.Context, s Shard) []Host {
	hosts := d.m.Hosts(ctx, s)
	for i := range hosts {
		p := d.placed[hosts[i].Name]
		if hosts[i].CPUs > 0 {
			hosts[i].CPULoad += p.cpus / float64(hosts[i].CPUs)
		}
	}
	return hosts
}

// Choose finds the best target that is not among those tried: alive, not
// cordoned, allowed, with room, and after the move the least full in what it has
// least of. Without one it says why.
func Choose(s Shard, hosts []Host, tried []string) (name, why string) {
	var reasons []string
	best, bestFull := "", 0.0
	for _, h := range hosts {
		switch {
		case slices.Contains(tried, h.Name):
		case !h.Alive:
			reasons = append(reasons, h.Name+" does not answer")
		case h.Cordoned:
			reasons = append(reasons, h.Name+" is cordoned")
		case h.Unfit != "":
			reasons = append(reasons, h.Name+" "+h.Unfit)
		case h.MemoryTotal <= 0 || h.MemoryAvailable < s.Memory+reserve:
			reasons = append(reasons, fmt.Sprintf("%s has %d MiB of memory available, and %d are needed", h.Name, h.MemoryAvailable>>20, (s.Memory+reserve)>>20))
		default:
			if f := full(s, h); best == "" || f < bestFull || f == bestFull && h.Name < best {
				best, bestFull = h.Name, f
			}
		}
	}
	if best == "" && len(reasons) == 0 {
		reasons = []string{"there is no other host"}
	}
	return best, strings.Join(reasons, "; ")
}

// perShard spreads shards that use nothing now: each is taken for two hundredths
// of a host.
const perShard = 0.02

// full is how much of a host would be in use, 1 being all.
func full(s Shard, h Host) float64 {
	cpu := h.CPULoad
	if h.CPUs > 0 {
		cpu += s.CPUs / float64(h.CPUs)
	}
	memory := 1 - float64(h.MemoryAvailable-s.Memory)/float64(h.MemoryTotal)
	return max(cpu, memory) + perShard*float64(h.Shards)
}

// outcomeOf is the gravest of what happened.
func outcomeOf(ctx context.Context, stayed []Settled) string {
	has := func(code string) bool {
		return slices.ContainsFunc(stayed, func(s Settled) bool { return s.Code == code })
	}
	switch {
	case has(CodeInDoubt):
		return OutcomeInDoubt
	case has(CodeDeadline):
		return OutcomeDeadline
	case has(CodeCancelled), ctx.Err() != nil:
		return OutcomeCancelled
	case len(stayed) == 0:
		return OutcomeDone
	case slices.ContainsFunc(stayed, func(s Settled) bool { return s.Code != CodeRefused && s.Code != CodeNoTarget && s.Stays == "" }):
		return OutcomeFailed
	}
	return OutcomeRefused
}
