package runtime

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Labels that say what a shard is to the pool: what may be done with it, and
// what it counts on. They travel with it. Anybody may put them on a container
// (tranship run --label, ctr run --label), but for LabelIndex.
const (
	LabelWorkload = "tranship.io/workload"
	LabelTenant   = "tranship.io/tenant"
	// LabelIndex makes a container the shard of that number of its workload;
	// without it, one with LabelWorkload has merely joined.
	LabelIndex = "tranship.io/index"
	// LabelPriority is 0 to 9.
	LabelPriority = "tranship.io/priority"
	// Requests are what a shard counts on, limits what it may use at most, in
	// CPUs and bytes. A limit in force may be lower than its label: the
	// autopilot moves it between the two.
	LabelRequestCPUs   = "tranship.io/request-cpus"
	LabelRequestMemory = "tranship.io/request-memory"
	LabelLimitCPUs     = "tranship.io/limit-cpus"
	LabelLimitMemory   = "tranship.io/limit-memory"
	// LabelPinned is "true" on a shard that nothing but a person moves.
	LabelPinned = "tranship.io/pinned"
	// LabelWindows are times of day, UTC, in which it may be moved by itself:
	// HH:MM-HH:MM, separated by commas; none is always.
	LabelWindows = "tranship.io/windows"
	// LabelMaxBlackout is a Go duration.
	LabelMaxBlackout = "tranship.io/max-blackout"
	// LabelAutopilot is off, advise or on.
	LabelAutopilot = "tranship.io/autopilot"
	// LabelSpreadHost and LabelSpreadZone bound the shards of the workload on a
	// host and in a zone.
	LabelSpreadHost = "tranship.io/spread-host"
	LabelSpreadZone = "tranship.io/spread-zone"
	// LabelZones are the zones that it may run in, LabelHostLabels KEY=VALUE what
	// its host must have, LabelAvoid and LabelNear workloads that its host must
	// not, and must, run; all separated by commas.
	LabelZones      = "tranship.io/zones"
	LabelHostLabels = "tranship.io/host-labels"
	LabelAvoid      = "tranship.io/avoid"
	LabelNear       = "tranship.io/near"
	// LabelSpec is a digest of what a change of cannot be made in place.
	LabelSpec = "tranship.io/spec"
)

// policies are the labels that anybody may set, and what they must look like.
var policies = map[string]func(string) error{
	LabelWorkload: nil, LabelTenant: nil, LabelZones: nil, LabelHostLabels: nil, LabelAvoid: nil, LabelNear: nil,
	LabelPriority:    number(9),
	LabelRequestCPUs: decimal, LabelLimitCPUs: decimal,
	LabelRequestMemory: number(1 << 50), LabelLimitMemory: number(1 << 50),
	LabelPinned:     oneOf("true", "false"),
	LabelAutopilot:  oneOf("off", "advise", "on"),
	LabelSpreadHost: number(1 << 20), LabelSpreadZone: number(1 << 20),
	LabelWindows: func(s string) error { _, err := ParseWindows(s); return err },
	LabelMaxBlackout: func(s string) error {
		if d, err := time.ParseDuration(s); err != nil || d <= 0 {
			return fmt.Errorf("%q is not a duration like 300ms", s)
		}
		return nil
	},
}

func number(most int64) func(string) error {
	return func(s string) error {
		if n, err := strconv.ParseInt(s, 10, 64); err != nil || n < 0 || n > most {
			return fmt.Errorf("%q is not a number from 0 to %d", s, most)
		}
		return nil
	}
}

func decimal(s string) error {
	if f, err := strconv.ParseFloat(s, 64); err != nil || !(f >= 0 && f <= 1<<16) {
		return fmt.Errorf("%q is not a number of CPUs", s)
	}
	return nil
}

func oneOf(words ...string) func(string) error {
	return func(s string) error {
		for _, w := range words {
			if s == w {
				return nil
			}
		}
		return fmt.Errorf("%q is none of %s", s, strings.Join(words, ", "))
	}
}

// checkPolicy says why a label under tranship.io/ may not be set by whoever runs
// a container, or nil.
func checkPolicy(key, value string) error {
	check, known := policies[key]
	if !known {
		return fmt.Errorf("%w: label %q: its prefix is reserved", ErrInvalid, key)
	}
	if check == nil {
		return nil
	}
	if err := check(value); err != nil {
		return fmt.Errorf("%w: label %s: %w", ErrInvalid, key, err)
	}
	return nil
}

// Window is a time of day, from From up to To after midnight UTC. One that
// passes midnight has To before From.
type Window struct{ From, To time.Duration }

// Holds says whether now is in the window.
func (w Window) Holds(now time.Time) bool {
	now = now.UTC()
	at := now.Sub(time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, time.UTC))
	if w.From <= w.To {
		return at >= w.From && at < w.To
	}
	return at >= w.From || at < w.To
}

// ParseWindows reads HH:MM-HH:MM,… ; "" is none.
func ParseWindows(s string) ([]Window, error) {
	if s == "" {
		return nil, nil
	}
	var out []Window
	for _, part := range strings.Split(s, ",") {
		from, to, ok := strings.Cut(strings.TrimSpace(part), "-")
		a, errA := clock(from)
		b, errB := clock(to)
		if !ok || errA != nil || errB != nil || a == b {
			return nil, fmt.Errorf("%q is not a time of day like 02:00-05:00", part)
		}
		out = append(out, Window{a, b})
	}
	return out, nil
}

func clock(s string) (time.Duration, error) {
	if s == "24:00" {
		return 24 * time.Hour, nil
	}
	t, err := time.Parse("15:04", s)
	if err != nil {
		return 0, err
	}
	return time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute, nil
}

// IsPolicy says whether a label is one of those that anybody may set.
func IsPolicy(key string) bool { _, ok := policies[key]; return ok }
