package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
)

// printTable prints what was measured, group by group, and then the targets.
func printTable(w io.Writer, r *results) error {
	fmt.Fprintf(w, "%s · %d × %s · %d MiB · Linux %s · CRIU %s · %s\n\n",
		r.Machine.Tranship, r.Machine.CPUs, r.Machine.CPU, r.Machine.MemMiB, r.Machine.Kernel, strings.TrimPrefix(r.Machine.CRIU, "Version: "), r.Machine.Runc)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "GROUP\tMOVED BY\tN\tBLACKOUT ms\t± %\tOF RUNC\tTOTAL ms\tMOVED MiB\tCLIENT'S GAP ms")
	for _, g := range r.Groups {
		for _, s := range g.subjects() {
			if len(g.of(s, blackoutMetric)) > 0 {
				fmt.Fprintln(t, moveLine(g, s))
			}
		}
		for _, a := range g.Absent {
			fmt.Fprintf(t, "%s\t%s\tabsent: %s\n", g.Name, a.Subject, firstOf(a.Why))
		}
	}
	printSteps(t, r)
	printRates(t, r)
	fmt.Fprintln(t)
	fmt.Fprintln(t, "TARGET\t\tMEASURED\t\t")
	for _, row := range r.Rows {
		relation := "≤"
		if row.AtLeast {
			relation = "≥"
		}
		value := "-"
		if row.Value != nil {
			value = number(*row.Value) + " " + row.Unit
		}
		fmt.Fprintf(t, "%s\t%s %s %s\t%s\t%s\t%s\n", row.Name, relation, number(row.Target), row.Unit, value, row.verdict(), row.Note)
	}
	fmt.Fprintln(t)
	if err := t.Flush(); err != nil {
		return err
	}
	if err := printLoad(w, r); err != nil {
		return err
	}
	for _, line := range r.Method {
		if _, err := fmt.Fprintln(w, "·", line); err != nil {
			return err
		}
	}
	return nil
}

// printLoad says how busy the machine was: the benchmark alone makes a load of
// about its number of processors.
func printLoad(w io.Writer, r *results) error {
	var parts []string
	for _, g := range r.Groups {
		parts = append(parts, fmt.Sprintf("%s %.1f → %.1f", g.Name, g.Load, g.LoadEnd))
	}
	_, err := fmt.Fprintf(w, "· Load average when each group began and ended, on %d processors: %s.\n", r.Machine.CPUs, strings.Join(parts, ", "))
	return err
}

// leastStep is what a step must take to be told, in milliseconds.
const leastStep = 5

// printSteps says where tranship's blackouts went. Some steps run beside each
// other, and those of the destination are parts of one of the source's.
func printSteps(w io.Writer, r *results) {
	headed := false
	for _, g := range r.Groups {
		steps := map[string][]float64{}
		for _, s := range g.Samples {
			for name, took := range s.Steps {
				if s.Subject == tranship {
					steps[name] = append(steps[name], took)
				}
			}
		}
		var parts []string
		for _, name := range slices.SortedFunc(maps.Keys(steps), func(a, b string) int {
			return cmp.Or(cmp.Compare(median(steps[b]), median(steps[a])), cmp.Compare(a, b))
		}) {
			if took := median(steps[name]); took >= leastStep {
				parts = append(parts, fmt.Sprintf("%s %.0f", name, took))
			}
		}
		if len(parts) == 0 {
			continue
		}
		if !headed {
			fmt.Fprintln(w, "\nGROUP\tWHERE TRANSHIP'S BLACKOUT WENT, ms")
			headed = true
		}
		fmt.Fprintf(w, "%s\t%s\n", g.Name, strings.Join(parts, ", "))
	}
}

// printRates prints the groups in which bytes were sent.
func printRates(w io.Writer, r *results) {
	headed := false
	for _, g := range r.Groups {
		for _, subject := range g.subjects() {
			rate := summarize(g.of(subject, rateMetric))
			if rate.N == 0 {
				continue
			}
			if !headed {
				fmt.Fprintln(w, "\nGROUP\tSENT BY\tN\tMB/s\t± %\tCPU-s/GB")
				headed = true
			}
			fmt.Fprintf(w, "%s\t%s\t%d\t%.0f\t%.0f\t%s\n", g.Name, subject, rate.N, rate.Median, 100*rate.Spread, spread("%.2f", median(g.of(subject, cpuMetric))))
		}
	}
}

func moveLine(g group, subject string) string {
	blackout := summarize(g.of(subject, blackoutMetric))
	ratio := "-"
	if other := g.of(stock, blackoutMetric); len(other) > 0 && subject != stock {
		ratio = number(blackout.Median / median(other))
	}
	field := func(metric string, scale float64) string {
		v := g.of(subject, metric)
		if len(v) == 0 {
			return "-"
		}
		return fmt.Sprintf("%.0f", median(v)/scale)
	}
	return strings.Join([]string{
		g.Name, subject, fmt.Sprint(blackout.N), fmt.Sprintf("%.0f", blackout.Median), fmt.Sprintf("%.0f", 100*blackout.Spread),
		ratio, field(totalMetric, 1), field(bytesMetric, 1<<20), field(gapMetric, 1),
	}, "\t")
}

// number prints with three digits, without an exponent.
func number(v float64) string {
	switch {
	case v == float64(int64(v)) || v >= 100 || v <= -100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10 || v <= -10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// firstOf is the first line of an explanation.
func firstOf(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
