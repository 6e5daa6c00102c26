package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/tranship/tranship/integration/bench/profile"
	"github.com/tranship/tranship/integration/lab"
)

// profileGroup is what profiling costs, measured by a package of its own.
const profileGroup = "profile"

func measureProfile(ctx context.Context, b *bench, g *group) error {
	l, err := lab.Open()
	if err != nil {
		return err
	}
	rows, err := profile.Run(ctx, l)
	g.Found = rows
	for _, r := range rows {
		b.say("  %-60s %8.3f %s", r.Name, r.Value, r.Unit)
	}
	return err
}

// profileRows are the lines of the table; what has no target is a note of those
// that it is to be compared with.
func profileRows(r *results) []row {
	g, ok := r.group(profileGroup)
	if !ok {
		return nil
	}
	var rows []row
	var beside []string
	for _, f := range g.Found {
		var relation string
		var target float64
		if n, err := fmt.Sscan(f.Target, &relation, &target); n != 2 || err != nil {
			beside = append(beside, fmt.Sprintf("%s: %s %s", strings.TrimPrefix(f.Name, "for comparison: "), number(f.Value), f.Unit))
			continue
		}
		v := f.Value
		// Met is stricter than the value alone: it knows how sure the value is.
		rows = append(rows, row{Name: f.Name, Value: &v, Unit: f.Unit, Target: target, AtLeast: strings.HasPrefix(relation, ">"), Pass: f.Met, Note: f.Detail})
	}
	if len(rows) > 0 && len(beside) > 0 {
		rows[0].Note = strings.Join(append([]string{rows[0].Note}, beside...), "; ")
	}
	return rows
}
