package forecasts

import (
	"time"

	"github.com/tranship/tranship/predict"
)

// scope is a set of shards that lend to each other.
type scope struct{ kind, tenant, workload string }

// The kinds, nearest first.
const (
	scopeWorkload = "workload"
	scopeTenant   = "tenant"
	scopePool     = "pool"
)

// lent is what a scope lends, made anew every lendFor.
type lent struct {
	made  time.Time
	prior [signals]predict.Prior
	have  [signals]bool
}

const (
	// lendFor: a shard's habits of ten minutes ago are good enough to begin with,
	// and five hundred shards in a minute do not ask all others each time.
	lendFor = 10 * time.Minute
	// maxLenders bounds that work; more shards than these agree on little more.
	maxLenders = 32
	// lendsFrom so many cells (an hour) a shard knows enough to lend.
	lendsFrom = 360
)

// scopes of a shard, nearest first. The pool is what runs on this host.
func scopes(l Labels) []scope {
	var out []scope
	if l.Workload != "" {
		out = append(out, scope{scopeWorkload, l.Tenant, l.Workload})
	}
	if l.Tenant != "" {
		out = append(out, scope{scopeTenant, l.Tenant, ""})
	}
	return append(out, scope{kind: scopePool})
}

func (s scope) holds(l Labels) bool {
	return s.kind == scopePool || s.tenant == l.Tenant && (s.kind == scopeTenant || s.workload == l.Workload)
}

// borrow gives a new forecaster what others of its scopes know of its signal.
// k.mu is held.
func (k *Keeper) borrow(sh *shard, signal int, f *predict.Forecaster) {
	var nearest []predict.Prior
	for _, s := range scopes(sh.labels) {
		l := k.lend(s)
		if !l.have[signal] {
			continue
		}
		if len(nearest) == 0 && sh.borrowed == "" {
			sh.borrowed = s.kind
			k.counts.borrowed[s.kind]++
		}
		nearest = append(nearest, l.prior[signal])
	}
	if len(nearest) > 0 {
		f.Borrow(nearest...)
	}
}

// lend pools what a scope's shards know. k.mu is held.
func (k *Keeper) lend(s scope) lent {
	if l, ok := k.lenders[s]; ok && time.Since(l.made) < lendFor {
		return l
	}
	l := lent{made: time.Now()}
	var priors [signals][]predict.Prior
	n := 0
	for _, sh := range k.shards {
		if sh.ended || !s.holds(sh.labels) || sh.samples() < lendsFrom {
			continue
		}
		for i, f := range sh.series {
			if f != nil && f.Samples() >= lendsFrom {
				priors[i] = append(priors[i], f.Prior())
			}
		}
		if n++; n == maxLenders {
			break
		}
	}
	for i := range priors {
		if l.have[i] = len(priors[i]) > 0; l.have[i] {
			l.prior[i] = predict.Pool(priors[i]...)
		}
	}
	if n == 0 {
		// Nothing to keep: the first that learns enough is asked at once, and
		// scopes that nobody is in any more do not add up.
		delete(k.lenders, s)
		return l
	}
	k.lenders[s] = l
	return l
}

// forgetLenders drops what is too old to be lent. k.mu is held.
func (k *Keeper) forgetLenders() {
	for s, l := range k.lenders {
		if time.Since(l.made) >= lendFor {
			delete(k.lenders, s)
		}
	}
}
