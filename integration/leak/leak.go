// Package leak tells what a migration left behind on a host: it takes an
// inventory of the host before and after, from the kernel and from containerd,
// and says in words what is more and what is missing. It never asks transhipd,
// whose opinion is what it checks.
//
// Flow: Take runs Collect inside the host → Diff of two snapshots, less what
// Ignores explain → Await repeats that while clean-up is still under way.
package leak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// SchemaVersion of Snapshot.
const SchemaVersion = 1

// Category names a kind of thing.
type Category string

// The categories, in the order in which changes are told.
const (
	Process    Category = "process"
	Cgroup     Category = "cgroup"
	Mount      Category = "mount"
	Netns      Category = "network namespace"
	Link       Category = "link"
	Nft        Category = "nft object"
	Uffd       Category = "userfaultfd"
	Descriptor Category = "descriptor"
	BPF        Category = "BPF object"
	Container  Category = "container"
	Task       Category = "task"
	Snap       Category = "snapshot"
	Lease      Category = "lease"
	Image      Category = "image"
	Content    Category = "content"
	File       Category = "file"
	Tmpfs      Category = "tmpfs usage"
)

var categories = []Category{Process, Cgroup, Mount, Netns, Link, Nft, Uffd, Descriptor, BPF, Container, Task, Snap, Lease, Image, Content, File, Tmpfs}

// Item is one thing. Two things with one Key are the same to Diff, which counts
// them; so a key holds no pid, inode or random name. Detail is for people.
type Item struct {
	Key    string `json:"key"`
	Detail string `json:"detail,omitempty"`
}

// Snapshot is the inventory of a host.
type Snapshot struct {
	SchemaVersion int                 `json:"schema_version"`
	Host          string              `json:"host"`
	Items         map[Category][]Item `json:"items"`
	// TmpfsBytes is what each tmpfs holds, by its mount point.
	TmpfsBytes map[string]int64 `json:"tmpfs_bytes"`
}

// tmpfsTolerance is by how much a tmpfs may grow: sockets, pid files and
// directories come and go by pages, memory of a shard by megabytes.
const tmpfsTolerance = 1 << 20

// Change is a difference between two snapshots.
type Change struct {
	Host     string
	Category Category
	Key      string
	// N is how many there are more; negative: how many are missing.
	N      int
	Detail []string
}

func (c Change) String() string {
	n, what := c.N, "left behind"
	if n < 0 {
		n, what = -n, "missing"
	}
	name := string(c.Category)
	if n > 1 {
		name = fmt.Sprintf("%d × %s", n, name)
	}
	text := fmt.Sprintf("%s: %s %s: %s", c.Host, name, what, c.Key)
	if detail := slices.Compact(slices.Sorted(slices.Values(c.Detail))); len(detail) > 0 {
		text += " (" + strings.Join(detail, "; ") + ")"
	}
	return text
}

// Diff says what after has more or less than before, but for what ignores match.
func Diff(before, after Snapshot, ignores []Ignore) []Change {
	var changes []Change
	for _, cat := range categories {
		b, a := byKey(before.Items[cat]), byKey(after.Items[cat])
		keys := slices.Collect(maps.Keys(b))
		for k := range a {
			if _, both := b[k]; !both {
				keys = append(keys, k)
			}
		}
		slices.Sort(keys)
		for _, k := range keys {
			n := len(a[k]) - len(b[k])
			if n == 0 || ignored(ignores, cat, k) {
				continue
			}
			// Of the more numerous side: which of several equal ones is the extra
			// one, nobody can tell.
			details := a[k]
			if n < 0 {
				details = b[k]
			}
			changes = append(changes, Change{Host: after.Host, Category: cat, Key: k, N: n, Detail: details})
		}
	}
	for _, at := range slices.Sorted(maps.Keys(after.TmpfsBytes)) {
		grown := after.TmpfsBytes[at] - before.TmpfsBytes[at]
		if grown > tmpfsTolerance && !ignored(ignores, Tmpfs, at) {
			changes = append(changes, Change{
				Host: after.Host, Category: Tmpfs, Key: at, N: 1,
				Detail: []string{fmt.Sprintf("%d KiB more than before", grown>>10)},
			})
		}
	}
	return changes
}

func byKey(items []Item) map[string][]string {
	m := map[string][]string{}
	for _, i := range items {
		// The detail may be empty; the entry counts the item.
		m[i.Key] = append(m[i.Key], i.Detail)
	}
	return m
}

// Err joins changes into one error, or nil when there are none.
func Err(changes []Change) error {
	var errs []error
	for _, c := range changes {
		errs = append(errs, errors.New(c.String()))
	}
	return errors.Join(errs...)
}

// Host runs a program inside a host and returns its standard output, as
// `tranship lab exec` does.
type Host interface {
	Exec(ctx context.Context, args ...string) ([]byte, error)
}

// Take collects the inventory inside h. helper is a program on h's file system
// that calls Collect and prints the result: leakcheck, or a test binary that
// calls ServeHelper.
func Take(ctx context.Context, h Host, helper string) (Snapshot, error) {
	var s Snapshot
	out, err := h.Exec(ctx, helper, helperVerb)
	if err != nil {
		return s, fmt.Errorf("inventory: %w", err)
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return s, fmt.Errorf("inventory: %.200q: %w", out, err)
	}
	if s.SchemaVersion != SchemaVersion || len(s.Items[Process]) == 0 {
		return s, fmt.Errorf("inventory: version %d with %d processes is none", s.SchemaVersion, len(s.Items[Process]))
	}
	return s, nil
}

// Settled is Take for a state to compare with: a file that a daemon has open just
// for a moment is none that would be missing later. It takes snapshots until two
// in a row have the same descriptors.
func Settled(ctx context.Context, h Host, helper string) (Snapshot, error) {
	last, err := Take(ctx, h, helper)
	for err == nil {
		var s Snapshot
		if s, err = Take(ctx, h, helper); err != nil {
			break
		}
		if maps.EqualFunc(byKey(last.Items[Descriptor]), byKey(s.Items[Descriptor]), slices.Equal) {
			return s, nil
		}
		last = s
	}
	return last, err
}

// Await takes snapshots until one differs from before in nothing but ignores,
// or ctx ends: containerd and the kernel clean up after themselves in their own
// time. It returns the changes of the last snapshot.
func Await(ctx context.Context, h Host, helper string, before Snapshot, ignores []Ignore) ([]Change, error) {
	const interval = 250 * time.Millisecond
	var changes []Change
	for taken := false; ; {
		after, err := Take(ctx, h, helper)
		if err != nil {
			if taken && ctx.Err() != nil {
				return changes, nil // the time was up during one more try
			}
			return nil, err
		}
		if changes, taken = Diff(before, after, ignores), true; len(changes) == 0 {
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return changes, nil
		case <-time.After(interval):
		}
	}
}
