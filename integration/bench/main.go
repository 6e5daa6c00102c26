// Command bench is `make bench`: it moves containers with tranship and with
// stock tools, in turn, in a lab of its own, and prints one table of medians,
// ratios and targets. It also leaves bench/results.json with every sample and
// bench/blackout.svg.
//
// A group is what is measured together; --only picks groups, and what an
// earlier run measured of the others stays in the table. No number is compared
// with one of another group, but for the growth of the blackout with memory.
// It refuses to hide what could not be measured: that is a line too.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/integration/leak"
)

const (
	exitDone        = 0
	exitWrong       = 1
	exitUsage       = 2
	exitInterrupted = 130 // 128 + SIGINT, as shells have it

	// downLimit is for the clean-up, which Ctrl-C does not shorten.
	downLimit = 2 * time.Minute
)

// options are the flags.
type options struct {
	quick bool
	only  *regexp.Regexp
	runs  int // of each subject in a group
	moves int // in a row
	out   string
	bin   string
	list  bool
	fresh bool
	add   bool          // to what an earlier run measured of the same group
	limit time.Duration // nothing is begun after it; 0: none
}

// task is a group that can be measured.
type task struct {
	name, about string
	// bandwidth of the hosts' links, as `lab up` takes it; "" is without limit.
	bandwidth string
	hosts     int // 0: two
	run       func(ctx context.Context, b *bench, g *group) error
}

// tasks in the order of the table.
func tasks() []task {
	var all []task
	for _, w := range workloads() {
		all = append(all, task{name: w.group, about: w.about, run: measureMoves(w, stock)})
	}
	lazily := criuWorkload("criu-lazy")
	all = append(all,
		task{name: lazily.group, about: lazily.about + ", against CRIU's own lazy pages", run: measureMoves(lazily, lazy)},
		task{name: "criu-pre-dump", about: "CRIU's own pre-dump chain", run: measurePreDump},
		task{name: lineupGroup, about: "one redis, back and forth", run: measureLineup},
		task{name: outpacedGroup, about: outpacedSize + " rewritten at " + outpacedRate + ", over a link of 1 Gbit/s", bandwidth: outpacedLink, run: measureOutpaced},
		task{name: crowdGroup, about: "ten shards of 32 MiB, one after the other and at once", run: measureCrowd},
	)
	for _, l := range links {
		all = append(all, task{name: l.group, about: "bytes over " + l.about, bandwidth: l.bandwidth, run: measureThroughput(l)})
	}
	return append(all,
		task{name: profileGroup, about: "what profiling costs, with and without in turns", run: measureProfile},
		task{name: closedLoopGroup, about: "a day of six shards on three hosts of 0.3 CPUs, with forecasts and without in turns", hosts: 3, run: measureClosedLoop},
	)
}

func main() {
	leak.ServeHelper()
	// Inside the lab's hosts this program is the client, the rival and the ends
	// of a transfer.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case clientVerb:
			os.Exit(clientMain(os.Args[2:]))
		case stockVerb:
			os.Exit(stockMain())
		case receiveVerb:
			os.Exit(receiveMain(os.Args[2:]))
		case sendVerb:
			os.Exit(sendMain(os.Args[2:]))
		case heapVerb:
			os.Exit(heapMain(os.Args[2:]))
		}
	}
	if err := nameLab(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(exitWrong)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	os.Exit(start(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func start(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	opt, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return exitDone
	}
	if err != nil {
		return exitUsage
	}
	if opt.list {
		for _, t := range tasks() {
			fmt.Fprintf(stdout, "%-22s %s\n", t.name, t.about)
		}
		return exitDone
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(stderr, "bench: hosts are namespaces, which only root can make: run `make bench`, which asks sudo")
		return exitWrong
	}
	r, err := measure(ctx, opt, stderr)
	if r != nil { // also when it ends early: each line says what it rests on
		err = errors.Join(err, show(stdout, r, opt.out))
	}
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(stderr, "bench: interrupted;", err)
		return exitInterrupted
	case err != nil:
		fmt.Fprintln(stderr, "bench:", err)
		return exitWrong
	}
	return exitDone
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.BoolVar(&o.quick, "quick", false, "2 runs of each instead of 5, and 10 moves in a row: to see that it works, not to believe")
	only := flags.String("only", "", "measure only the groups whose name matches; --list names them")
	flags.IntVar(&o.runs, "runs", 0, "runs of each subject in a group")
	flags.IntVar(&o.moves, "moves", 0, "moves in a row")
	flags.StringVar(&o.out, "out", "bench", "directory of results.json and blackout.svg")
	flags.StringVar(&o.bin, "bin", "", "directory of tranship and transhipd (default: bin of the repository)")
	flags.BoolVar(&o.list, "list", false, "name the groups")
	flags.BoolVar(&o.fresh, "fresh", false, "forget what an earlier run measured of other groups")
	flags.BoolVar(&o.add, "add", false, "closed-loop: go on where an earlier run ended, until there are --runs of each")
	flags.DurationVar(&o.limit, "for", 0, "closed-loop: begin nothing after this time (default: no limit)")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	var err error
	if o.only, err = regexp.Compile(*only); err == nil && flags.NArg() > 0 {
		err = fmt.Errorf("unexpected %q", flags.Arg(0))
	}
	if o.runs < 0 || o.moves < 0 {
		err = errors.New("--runs and --moves: at least 1")
	}
	if err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return o, err
	}
	defaults := map[bool][2]int{false: {5, 100}, true: {2, 10}}[o.quick]
	if o.runs == 0 {
		o.runs = defaults[0]
	}
	if o.moves == 0 {
		o.moves = defaults[1]
	}
	return o, nil
}

// bench is one run of it.
type bench struct {
	opt     options
	tool    *tool
	self    string
	scratch string // seen by every host under the same path
	images  map[string]bool
	stderr  io.Writer
	begun   time.Time
}

func (b *bench) say(format string, args ...any) { fmt.Fprintf(b.stderr, format+"\n", args...) }

// nameLab gives the lab a name of its own, unless it has one. Package lab takes the
// name from the environment when the program begins, so it begins once more.
func nameLab() error {
	if os.Getenv(lab.NameVariable) != "" {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return syscall.Exec(self, os.Args, append(os.Environ(), lab.NameVariable+"=bench"))
}

// measure is the benchmark in order; the lab is down again when it returns.
func measure(ctx context.Context, opt options, stderr io.Writer) (r *results, err error) {
	b := &bench{opt: opt, images: map[string]bool{}, stderr: stderr, begun: time.Now()}
	if b.tool, err = findTool(opt.bin, os.Getenv(lab.NameVariable)); err != nil {
		return nil, err
	}
	if b.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if b.scratch, err = os.MkdirTemp("", "tranship-bench-"); err != nil {
		return nil, err
	}
	defer os.RemoveAll(b.scratch)
	r = &results{}
	if !opt.fresh {
		if r, err = loadResults(opt.out); err != nil {
			return nil, err
		}
	}
	r.SchemaVersion, r.MeasuredAt, r.Method = resultsVersion, time.Now().UTC().Truncate(time.Second), method
	r.Machine = b.machine(ctx)
	defer func() {
		after, cancel := context.WithTimeout(context.WithoutCancel(ctx), downLimit)
		defer cancel()
		if _, downErr := b.tool.tranship(after, "lab", "down"); downErr != nil {
			err = errors.Join(err, fmt.Errorf("take the lab down: %w", downErr))
		}
	}()
	// What an interrupted run left is not what this one begins with.
	if _, err := b.tool.tranship(ctx, "lab", "down"); err != nil {
		return r, fmt.Errorf("remains of an earlier run: %w", err)
	}
	return r, b.measureTasks(ctx, r)
}

// measureTasks measures group after group; each is saved as soon as it is
// whole. A group that fails does not keep the others from being measured.
func (b *bench) measureTasks(ctx context.Context, r *results) error {
	var failed []error
	all := tasks()
	for _, t := range all {
		if !b.opt.only.MatchString(t.name) {
			continue
		}
		b.say("%s: %s", t.name, t.about)
		g := group{Name: t.name, About: t.about, MeasuredAt: time.Now().UTC().Truncate(time.Second), Load: load1()}
		if old, ok := r.group(t.name); ok && b.opt.add && t.name == closedLoopGroup {
			g.Samples, g.Recording = old.Samples, old.Recording
		}
		err := b.inLab(ctx, t, &g)
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", t.name, err))
			b.say("  %v", err)
			// What was measured before stays: its number is in the table.
			g.Absent = append(g.Absent, absent{Subject: "the rest", Why: err.Error()})
		}
		g.LoadEnd = load1()
		r.put(g)
		r.sort(all)
		r.Rows = targets(r)
		if err := r.save(b.opt.out); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return errors.Join(append(failed, context.Cause(ctx))...)
		}
	}
	return errors.Join(failed...)
}

// inLab measures one group in a lab that is up, with the links that it wants.
func (b *bench) inLab(ctx context.Context, t task, g *group) error {
	up := []string{"lab", "up", "--hosts", strconv.Itoa(max(2, t.hosts))}
	if t.bandwidth != "" {
		up = append(up, "--bandwidth", t.bandwidth)
	}
	if _, err := b.tool.tranship(ctx, up...); err != nil {
		return fmt.Errorf("bring up the lab: %w", err)
	}
	return t.run(ctx, b, g)
}

// machine adds the versions of what is measured.
func (b *bench) machine(ctx context.Context) machine {
	m := thisMachine()
	m.CRIU = firstLine(ctx, "criu", "--version")
	m.Runc = firstLine(ctx, "runc", "--version")
	m.Tranship = firstLine(ctx, b.tool.bin, "version")
	return m
}

// firstLine is what a program says of itself; "" when it says nothing.
func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := run(ctx, commandOf(ctx, name, args...))
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.Join(strings.Fields(line), " ")
}

// sort puts groups into the order of the tasks.
func (r *results) sort(order []task) {
	at := func(g group) int {
		return slices.IndexFunc(order, func(t task) bool { return t.name == g.Name })
	}
	slices.SortStableFunc(r.Groups, func(a, b group) int { return at(a) - at(b) })
}

// show prints the table and draws the plot.
func show(stdout io.Writer, r *results, dir string) error {
	if err := printTable(stdout, r); err != nil {
		return err
	}
	svg := drawBlackout(r)
	if svg == nil {
		return nil
	}
	if err := os.WriteFile(filepath.Join(dir, "blackout.svg"), svg, 0o644); err != nil {
		return fmt.Errorf("the plot: %w", err)
	}
	return nil
}
