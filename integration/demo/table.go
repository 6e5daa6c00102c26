package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"text/tabwriter"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
)

// judge says what was wrong, in the words of who watched; nil if nothing was.
func judge(moves []move, seen check.Report) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(moves) != 2 {
		bad("%d of 2 moves were made", len(moves))
	}
	for _, m := range moves {
		d := m.doc
		switch {
		case d.SchemaVersion == 0 || d.From == "" || d.To == "":
			bad("a move printed %+v: %w", d, errDocument)
		case d.Outcome != "done":
			bad("%s → %s was %s: %s", d.From, d.To, d.Outcome, d.Reason)
		case d.BlackoutMS <= 0 || d.TotalMS < d.BlackoutMS:
			bad("%s → %s claims a blackout of %.1f ms within %.1f ms", d.From, d.To, d.BlackoutMS, d.TotalMS)
		case d.BytesRaw < dataset:
			bad("%s → %s moved %d bytes, less than Redis holds", d.From, d.To, d.BytesRaw)
		}
	}
	if seen.ErrorCount != 0 || !seen.OK {
		bad("the client saw %d errors in %d requests: %v", seen.ErrorCount, seen.Requests, seen.Errors)
	}
	if seen.Reconnects != 0 {
		bad("the client had to connect again %d times", seen.Reconnects)
	}
	return errors.Join(errs...)
}

// printTable shows each move beside what the client felt of it.
func printTable(w io.Writer, moves []move, seen check.Report) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "move\trounds\tcopied\ton the wire\ttook\tfrozen\tclient's longest wait\t")
	for _, m := range moves {
		d := m.doc
		fmt.Fprintf(t, "%s → %s\t%d\t%s\t%s\t%.1f s\t%.0f ms\t%s\t\n", d.From, d.To, len(d.Rounds),
			mebibytes(d.BytesRaw), mebibytes(d.BytesSent), d.TotalMS/1000, d.BlackoutMS, waitDuring(m, seen))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nThe client made %d requests over one connection: %d errors, %d reconnects, longest wait %.0f ms;\nafterwards it read every key back, and all were right.\n",
		seen.Requests, seen.ErrorCount, seen.Reconnects, seen.LongestGapMS)
	return err
}

func mebibytes(n int64) string { return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20)) }

// waitDuring finds the longest of the client's gaps that overlaps a move. The
// client keeps its longest ones only: when none of them overlaps, the wait was
// shorter than the shortest of these.
func waitDuring(m move, seen check.Report) string {
	longest, shortest := -1.0, -1.0
	for i, g := range seen.Gaps {
		at, err := time.Parse(time.RFC3339Nano, g.At)
		if err != nil {
			return "?"
		}
		end := at.Add(time.Duration(g.MS * float64(time.Millisecond)))
		if at.Before(m.end) && end.After(m.began) && g.MS > longest {
			longest = g.MS
		}
		if i == len(seen.Gaps)-1 {
			break // the time from the last request to the end, however short
		}
		if shortest < 0 || g.MS < shortest {
			shortest = g.MS
		}
	}
	switch {
	case longest >= 0:
		return fmt.Sprintf("%.0f ms", longest)
	case shortest >= 0:
		return fmt.Sprintf("< %.0f ms", max(math.Ceil(shortest), 1))
	}
	return "?"
}
