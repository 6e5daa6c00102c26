package migrate

import (
	"errors"
	"io/fs"
	"os"
	"time"

	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/image"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// A blackout is told as parts, each with the host that it was measured on and its
// begin after the first frozen task. Steps may overlap. The destination's clock
// is translated by the offset that was measured before the freeze.

const (
	stepDump    = "criu dump"
	stepRestore = "criu restore"
)

// step adds one part of the blackout that was measured here.
func (o *outgoing) step(name string, since time.Time) { o.part("", name, since, time.Now()) }

func (o *outgoing) part(of, name string, from, to time.Time) {
	p := &v1.Phase{Name: name, Of: of, Node: o.m.cfg.Node, AtMs: millis(from.Sub(o.frozenAt)), Ms: millis(to.Sub(from))}
	o.report.set(func(m *v1.Migration) { m.Blackout = append(m.Blackout, p) })
}

// dumpParts has CRIU's notifications split the dump; the function that it returns
// reports the parts. CRIU's own statistics are of no use here: it writes them
// after post-dump, where it is held.
func (o *outgoing) dumpParts(cfg *criu.DumpConfig) (report func()) {
	began := time.Now()
	var locked, dumped time.Time
	cfg.Reached = func(script string) {
		switch script {
		case "query-ext-files":
			locked = time.Now()
		case "post-dump":
			dumped = time.Now()
		}
	}
	return func() {
		if locked.IsZero() || dumped.IsZero() {
			return
		}
		o.part(stepDump, "seize tasks", began, locked)
		o.part(stepDump, "write images", locked, dumped)
	}
}

// theirs translates a part of the destination's.
func (o *outgoing) theirs(p *v1.Phase) *v1.Phase {
	out := &v1.Phase{Name: p.GetName(), Of: p.GetOf(), Node: o.entry.Peer, Ms: p.GetMs(), AtMs: -1}
	if ns := p.GetStartedUnixNs(); ns != 0 {
		out.AtMs = millis(time.Unix(0, ns).Add(-o.offset.offset).Sub(o.frozenAt))
	}
	return out
}

// step adds one part of the blackout that was measured here, at the destination.
func (in *incoming) step(name string, since time.Time) { in.part(name, since, time.Now()) }

func (in *incoming) part(name string, from, to time.Time) {
	in.steps = append(in.steps, &v1.Phase{Name: name, Ms: millis(to.Sub(from)), StartedUnixNs: from.UnixNano()})
}

// restoreParts adds CRIU's own statistics of the restore, which know how long,
// but not when.
func (in *incoming) restoreParts() {
	f, err := os.Open(in.dir("work/stats-restore"))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			in.m.log.Debug("statistics of the restore", "migration", in.entry.ID, "err", err)
		}
		return
	}
	defer f.Close()
	parts, err := image.ReadStats(f)
	if err != nil {
		in.m.log.Debug("statistics of the restore", "migration", in.entry.ID, "err", err)
		return
	}
	for _, p := range parts {
		in.steps = append(in.steps, &v1.Phase{Name: p.Name, Of: stepRestore, Ms: millis(p.Took)})
	}
}
