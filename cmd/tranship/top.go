package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// topSeconds is how much of the past a line of top shows: it fits beside the
// columns on a terminal of 120 characters.
const topSeconds = 30

type topOptions struct {
	local, once bool
	interval    time.Duration
	dirty       string
	window      time.Duration
}

func newTopCommand(g *globals) *cobra.Command {
	var o topOptions
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Show what hosts and shards use, live",
		Long: `Show what hosts and shards use, live: CPU, wait for a CPU, memory, network,
block I/O, connections, and the CPUs that a shard's peak of the next hour will
most likely (95 %) stay below. Without a terminal, or with --once, it prints one table.
--dirty measures how many bytes a shard writes to its memory, which is what a
migration of it costs; the shard is stopped for a fraction of a millisecond.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.interval < 100*time.Millisecond {
				return usagef("--interval %v is below 100ms", o.interval)
			}
			if o.dirty != "" {
				return g.dirtyRate(cmd, o)
			}
			client, err := g.client()
			if err != nil {
				return err
			}
			defer client.Close()
			load := func(ctx context.Context) (control.LoadDocument, error) {
				resp, err := client.Profiles.Load(ctx, connect.NewRequest(&v1.LoadRequest{AllNodes: !o.local, Recent: topSeconds}))
				if err != nil {
					return control.LoadDocument{}, profilesOff(err)
				}
				return control.LoadOf(resp.Msg), nil
			}
			if file, ok := cmd.OutOrStdout().(interface{ Fd() uintptr }); ok && g.output == outputTable && !o.once && term.IsTerminal(int(file.Fd())) {
				return topLive(cmd.Context(), cmd.OutOrStdout(), int(file.Fd()), o.interval, load)
			}
			doc, err := load(cmd.Context())
			if err != nil {
				return err
			}
			if g.output == outputJSON {
				return printJSON(cmd.OutOrStdout(), doc)
			}
			_, err = io.WriteString(cmd.OutOrStdout(), topTable(doc))
			return err
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&o.local, "local", false, "this host's only")
	flags.BoolVar(&o.once, "once", false, "print one table and end")
	flags.DurationVar(&o.interval, "interval", time.Second, "time between two pictures")
	flags.StringVar(&o.dirty, "dirty", "", "measure the dirty rate of a shard of this host")
	flags.DurationVar(&o.window, "window", time.Second, "how long --dirty measures")
	return cmd
}

// profilesOff: a daemon without profiles does not know the service.
func profilesOff(err error) error {
	if code := connect.CodeOf(err); code == connect.CodeUnimplemented || code == connect.CodeNotFound {
		return fmt.Errorf("the daemon has no profiles: see [profile] in its configuration, and its log")
	}
	return err
}

func (g *globals) dirtyRate(cmd *cobra.Command, o topOptions) error {
	client, err := g.acting()
	if err != nil {
		return err
	}
	defer client.Close()
	resp, err := client.Profiles.DirtyRate(cmd.Context(), connect.NewRequest(&v1.DirtyRateRequest{
		Namespace: g.namespace, Shard: o.dirty, WindowMs: o.window.Milliseconds(), ForceNamespace: g.forceNamespace,
	}))
	if err != nil {
		return err
	}
	if g.output == outputJSON {
		return printJSON(cmd.OutOrStdout(), struct {
			control.Document
			Shard          string  `json:"shard"`
			PagesPerSecond float64 `json:"pages_per_second"`
			BytesPerSecond float64 `json:"bytes_per_second"`
		}{control.NewDocument(), o.dirty, resp.Msg.GetPagesPerSecond(), resp.Msg.GetBytesPerSecond()})
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s writes %.0f pages a second, %s\n", o.dirty, resp.Msg.GetPagesPerSecond(), formatRate(resp.Msg.GetBytesPerSecond()))
	return err
}

// topLive redraws until ctx ends. A daemon that does not answer for a while is
// said and asked again: it may be restarting.
func topLive(ctx context.Context, w io.Writer, fd int, interval time.Duration, load func(context.Context) (control.LoadDocument, error)) error {
	// The alternative screen, so that what was there comes back.
	if _, err := io.WriteString(w, "\x1b[?1049h\x1b[?25l"); err != nil {
		return err
	}
	defer func() { _, _ = io.WriteString(w, "\x1b[?25h\x1b[?1049l") }()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		var text string
		doc, err := load(ctx)
		switch {
		case ctx.Err() != nil:
			return nil // the user has seen enough
		case err != nil:
			text = explain(err, "the daemon") + "\n"
		default:
			text = topTable(doc)
		}
		width, height, err := term.GetSize(fd)
		if err != nil {
			width, height = 120, 40
		}
		if _, err := io.WriteString(w, "\x1b[H"+clip(text, width, height)+"\x1b[J"); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// clip fits text to a screen and ends every line by clearing its rest.
func clip(text string, width, height int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	lines = lines[:min(len(lines), max(height-1, 1))]
	for i, line := range lines {
		if runes := []rune(line); len(runes) > width {
			line = string(runes[:width])
		}
		lines[i] = line + "\x1b[K"
	}
	return strings.Join(lines, "\r\n") + "\r\n"
}

// topTable is one picture: hosts, then shards, the busiest first.
func topTable(doc control.LoadDocument) string {
	var b strings.Builder
	var rows [][]string
	for _, h := range doc.Hosts {
		cpu := "-"
		if v, ok := h.Rates["cpu"]; ok {
			cpu = fmt.Sprintf("%.2f of %d", v, h.CPUs)
		}
		memory := rate(h.Rates, "working_set", func(v float64) string { return formatSize(int64(v)) })
		if h.MemoryTotalBytes > 0 {
			memory += " of " + formatSize(h.MemoryTotalBytes)
		}
		rows = append(rows, append([]string{h.Node, cpu, cores(h.Rates, "wait"), memory}, append(traffic(h.Rates), sparkline(h.CPURecent, float64(h.CPUs)))...))
	}
	// Both writes go to memory.
	_ = printTable(&b, []string{"HOST", "CPU", "WAIT", "MEMORY", "RECEIVE", "TRANSMIT", "READ", "WRITE", "CPU OF 30 S"}, rows)
	for _, node := range doc.UnreachableNodes {
		fmt.Fprintf(&b, "%s does not answer\n", node)
	}
	b.WriteString("\n")
	shards := slices.Clone(doc.Shards)
	slices.SortStableFunc(shards, func(a, b control.ShardLoad) int {
		switch x, y := a.Rates["cpu"], b.Rates["cpu"]; {
		case x > y:
			return -1
		case x < y:
			return 1
		}
		return 0
	})
	forecasts := slices.ContainsFunc(shards, func(s control.ShardLoad) bool { return s.CPUForecast != nil })
	header := []string{"SHARD", "HOST", "CPU", "WAIT", "MEMORY", "RECEIVE", "TRANSMIT", "READ", "WRITE", "CONNS", "RTT", "DIRTY"}
	if forecasts {
		header = append(header, "FORECAST")
	}
	rows = nil
	for _, s := range shards {
		rows = append(rows, topRow(s, forecasts))
	}
	_ = printTable(&b, append(header, "CPU OF 30 S"), rows)
	return b.String()
}

func topRow(s control.ShardLoad, forecasts bool) []string {
	name := s.Name
	if s.Namespace != control.DefaultNamespace {
		name = s.Namespace + "/" + s.Name
	}
	row := append([]string{
		name, s.Node, cores(s.Rates, "cpu"), cores(s.Rates, "wait"),
		rate(s.Rates, "working_set", func(v float64) string { return formatSize(int64(v)) }),
	}, traffic(s.Rates)...)
	row = append(row,
		rate(s.Rates, "connections", func(v float64) string { return strconv.FormatFloat(v, 'f', 0, 64) }),
		rate(s.Rates, "round_trip", func(v float64) string { return fmt.Sprintf("%.1fms", 1000*v) }))
	dirty := "-"
	if s.DirtyPagesPerSecond != nil {
		dirty = fmt.Sprintf("%.0fp/s", *s.DirtyPagesPerSecond)
	}
	row = append(row, dirty)
	if forecasts {
		forecast := "-"
		if s.CPUForecast != nil {
			forecast = fmt.Sprintf("%.2f", *s.CPUForecast)
		}
		row = append(row, forecast)
	}
	return append(row, sparkline(s.CPURecent, 0))
}

// rate shows a signal, or that it is not measured: never a zero for that.
func rate(rates map[string]float64, signal string, show func(float64) string) string {
	if v, ok := rates[signal]; ok {
		return show(v)
	}
	return "-"
}

func cores(rates map[string]float64, signal string) string {
	return rate(rates, signal, func(v float64) string { return fmt.Sprintf("%.2f", v) })
}

func traffic(rates map[string]float64) []string {
	var out []string
	for _, signal := range []string{"receive_bytes", "transmit_bytes", "read_bytes", "write_bytes"} {
		out = append(out, rate(rates, signal, formatRate))
	}
	return out
}

var sparks = []rune("▁▂▃▄▅▆▇█")

// sparkline draws values from 0 to top, or without one to their own highest; a
// gap is a blank.
func sparkline(values []*float64, top float64) string {
	if top <= 0 {
		for _, v := range values {
			if v != nil {
				top = max(top, *v)
			}
		}
	}
	var b strings.Builder
	for _, v := range values {
		switch {
		case v == nil:
			b.WriteRune(' ')
		case top <= 0:
			b.WriteRune(sparks[0])
		default:
			i := int(*v / top * float64(len(sparks)-1))
			b.WriteRune(sparks[min(max(i, 0), len(sparks)-1)])
		}
	}
	return b.String()
}
