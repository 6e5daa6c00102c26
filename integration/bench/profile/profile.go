// Package profile measures what profiling costs: in one run, with and without,
// in turns, so that a machine whose speed drifts drifts for both; and beside it
// a poller of cgroup files, which is what most agents do.
package profile

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/probe"
	"github.com/tranship/tranship/integration/lab"
)

// Row is one result.
type Row struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	// Target is what it must reach, "" for a figure to compare with; Met says
	// whether it does.
	Target string `json:"target,omitempty"`
	Met    bool   `json:"met"`
	// Detail is what the value was made of.
	Detail string `json:"detail,omitempty"`
}

const (
	shards = 100
	// window is over which costs are measured.
	window = 20 * time.Second
	// Rounds of with and without: short ones, and many, because a machine with
	// something else to do is slower for seconds at a time. They end when what is
	// known is known well enough, which does not depend on what it is, so that a
	// target is not met by trying until it is. Two processes of a pipe also find
	// themselves on one CPU or on two, which is a factor of five: they are pinned
	// to one, where a switch is cheapest and its cost shows most. Redis and its
	// client are pinned to one each.
	leastRounds, mostRounds = 31, 121
	image                   = "bench.tranship.io/profile:1"
)

type bench struct {
	l      *lab.Lab
	h      *lab.Host // the only one that profiles meanwhile
	other  *lab.Host
	redis  string // address of a shard
	rows   []Row
	unload []string // shards to remove
}

// Run measures on host-1 of a lab that is up with two hosts, and leaves it as it
// was.
func Run(ctx context.Context, l *lab.Lab) (rows []Row, err error) {
	b := &bench{l: l}
	if b.h, err = l.Host("host-1"); err != nil {
		return nil, err
	}
	if b.other, err = l.Host("host-2"); err != nil {
		return nil, err
	}
	defer func() {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
		defer cancel()
		for _, name := range b.unload {
			_, e := b.h.Exec(undo, "tranship", "rm", "-f", name)
			err = errors.Join(err, e)
		}
		err = errors.Join(err, b.other.StartDaemon(undo))
	}()
	// All hosts of a lab share one kernel, and the programs of each run at every
	// switch: a second host would be counted to the first.
	if err := b.off(ctx, b.other); err != nil {
		return nil, err
	}
	if err := b.prepare(ctx); err != nil {
		return nil, fmt.Errorf("profile bench: %w", err)
	}
	for _, measure := range []func(context.Context) error{b.cost, b.poller, b.throughput} {
		if err := measure(ctx); err != nil {
			return b.rows, fmt.Errorf("profile bench: %w", err)
		}
	}
	return b.rows, nil
}

// prepare starts the shards: each one busy for a hundredth of a CPU, and one
// Redis.
func (b *bench) prepare(ctx context.Context) error {
	spec := lab.ImageSpec{Name: image, Bins: []string{"/usr/bin/stress-ng", "/usr/bin/redis-server", "/usr/bin/taskset"}, Cmd: []string{"stress-ng"}}
	if err := b.l.Image(ctx, "default", spec); err != nil {
		return err
	}
	if err := b.run(ctx, "bench-redis", "taskset", "-c", "0", "redis-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no"); err != nil {
		return err
	}
	out, err := b.h.Exec(ctx, "tranship", "ps", "--local")
	if err != nil {
		return err
	}
	m := regexp.MustCompile(`(?m)^bench-redis .*?(\d+\.\d+\.\d+\.\d+)`).FindSubmatch(out)
	if m == nil {
		return fmt.Errorf("bench-redis is not among\n%s", out)
	}
	b.redis = string(m[1])
	var g errgroup.Group
	g.SetLimit(2)
	for i := range shards - 1 {
		name := fmt.Sprintf("bench-%03d", i)
		b.unload = append(b.unload, name)
		g.Go(func() error {
			_, err := b.h.Exec(ctx, "tranship", "run", "--name", name, image, "stress-ng", "--cpu", "1", "--cpu-load", "1", "--timeout", "3600")
			return err
		})
	}
	return g.Wait()
}

func (b *bench) run(ctx context.Context, name string, command ...string) error {
	b.unload = append(b.unload, name)
	_, err := b.h.Exec(ctx, append([]string{"tranship", "run", "--name", name, image}, command...)...)
	return err
}

const pinDir = "/sys/fs/bpf/tranship"

// off ends a host's profiling: the daemon first, then what it pinned.
func (b *bench) off(ctx context.Context, h *lab.Host) error {
	if err := h.KillDaemon(ctx); err != nil {
		return err
	}
	return probe.Remove(h.Root() + pinDir)
}

// on begins it, and waits until a sample was taken.
func (b *bench) on(ctx context.Context) error {
	if err := b.h.StartDaemon(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		out, err := b.h.Exec(ctx, "tranship", "top", "--local", "-o", "json")
		if err == nil && strings.Contains(string(out), `"bench-redis"`) {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("profiling does not begin: %w", errors.Join(context.Cause(ctx), err))
		}
	}
}

// cost is what programs and daemon use with 100 shards, of one CPU.
func (b *bench) cost(ctx context.Context) error {
	if err := b.on(ctx); err != nil {
		return err
	}
	stop, err := probe.CountRunTime()
	if err != nil {
		return err
	}
	defer stop()
	pids, err := b.h.PIDs(ctx)
	if err != nil {
		return err
	}
	pid := pids["transhipd"]
	dirs, err := filepath.Glob(b.h.Root() + pinDir + "/*")
	if err != nil || len(dirs) != 1 {
		return fmt.Errorf("pinned programs: %v %w", dirs, err)
	}
	// The first minute of a daemon is not like those that follow.
	if err := wait(ctx, window/2); err != nil {
		return err
	}
	begun := time.Now()
	before, err := probe.PinnedStats(dirs[0])
	if err != nil {
		return err
	}
	cpu, err := cpuOf(pid)
	if err != nil {
		return err
	}
	if err := wait(ctx, window); err != nil {
		return err
	}
	after, err := probe.PinnedStats(dirs[0])
	if err != nil {
		return err
	}
	cpuAfter, err := cpuOf(pid)
	if err != nil {
		return err
	}
	took := time.Since(begun).Seconds()
	programs, daemon := (after.RunTime-before.RunTime)/took, (cpuAfter-cpu)/took
	runs := float64(after.Runs-before.Runs) / took
	b.add(Row{
		Name: fmt.Sprintf("programs and daemon, %d shards", shards), Value: 100 * (programs + daemon), Unit: "% of a CPU", Target: "< 1",
		Met:    programs+daemon < 0.01,
		Detail: fmt.Sprintf("programs %.3f %% at %.0f runs/s (%.0f ns each, the measuring included), daemon %.3f %%", 100*programs, runs, 1e9*programs/max(runs, 1), 100*daemon),
	})
	return nil
}

// poller reads, once a second for every shard, the files that say less of it.
func (b *bench) poller(ctx context.Context) error {
	files := []string{
		"cpuacct/%s/cpuacct.usage", "cpu/%s/cpu.stat", "memory/%s/memory.usage_in_bytes", "memory/%s/memory.stat",
		"blkio/%s/blkio.throttle.io_service_bytes_recursive", "blkio/%s/blkio.throttle.io_serviced_recursive",
	}
	top := b.h.Root() + "/sys/fs/cgroup/"
	if _, err := os.Stat(top + "cgroup.controllers"); err == nil {
		files = []string{"%s/cpu.stat", "%s/memory.current", "%s/memory.stat", "%s/io.stat", "%s/cpu.pressure", "%s/memory.pressure", "%s/io.pressure"}
	}
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		return err
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	begun := time.Now()
	read := 0
	for time.Since(begun) < window {
		for _, name := range b.unload {
			var pid string
			for i, f := range files {
				raw, err := os.ReadFile(top + fmt.Sprintf(f, "tranship/default/"+name))
				if err != nil {
					return err
				}
				read += len(strings.Fields(string(raw)))
				if i == 0 {
					procs, err := os.ReadFile(filepath.Join(filepath.Dir(top+fmt.Sprintf(f, "tranship/default/"+name)), "cgroup.procs"))
					if err != nil {
						return err
					}
					pid, _, _ = strings.Cut(string(procs), "\n")
				}
			}
			raw, err := os.ReadFile("/proc/" + pid + "/net/dev")
			if err != nil {
				return err
			}
			read += len(strings.Fields(string(raw)))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
	took := time.Since(begun).Seconds()
	if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
		return err
	}
	used := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()).Seconds()
	b.add(Row{
		Name: fmt.Sprintf("for comparison: a poller of cgroup files, %d shards", shards), Value: 100 * used / took, Unit: "% of a CPU",
		Met: true, Detail: fmt.Sprintf("%d fields read; it knows no waits, no latencies, no retransmits", read),
	})
	return nil
}

// throughput runs two loads with and without the programs, in turns; with them
// somebody reads all counts once a second. The other shards are stopped before:
// they would be noise, not cost. The daemon is not started and stopped for every
// turn, since that would be the larger part of it.
func (b *bench) throughput(ctx context.Context) error {
	for _, name := range b.unload {
		if name != "bench-redis" {
			if _, err := b.h.Exec(ctx, "tranship", "rm", "-f", name); err != nil {
				return err
			}
		}
	}
	b.unload = []string{"bench-redis"}
	if err := b.off(ctx, b.h); err != nil {
		return err
	}
	for _, m := range []match{
		{name: "perf bench sched pipe on one CPU, with to without", target: ">= 0.97", least: 0.97, wide: 0.03, run: b.pipe, with: counted},
		{name: "for comparison: the same, with an empty program at each switch", wide: 0.03, run: b.pipe, with: beside},
		{name: "redis-benchmark, with to without", target: ">= 0.995", least: 0.995, wide: 0.005, run: b.redisBenchmark, with: counted},
	} {
		if err := b.play(ctx, &m); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
	}
	return b.on(ctx)
}

// match is a load that is run with something and without, in turns.
type match struct {
	name, target string
	least        float64
	wide         float64 // what the interval has to be narrower than: what the target lets be lost
	run          func(context.Context) (float64, error)
	with         func(context.Context, func(context.Context) (float64, error)) (float64, error)
}

func (b *bench) play(ctx context.Context, m *match) error {
	var with, without []float64
	var ratio, low, high float64
	for round := 0; round < leastRounds || round < mostRounds && high-low > m.wide; round++ {
		turns := []bool{true, false}
		if round%2 == 1 {
			slices.Reverse(turns) // neither is always the first
		}
		for _, on := range turns {
			run, into := m.run, &without
			if on {
				run, into = func(ctx context.Context) (float64, error) { return m.with(ctx, m.run) }, &with
			}
			v, err := run(ctx)
			if err != nil {
				return err
			}
			*into = append(*into, v)
		}
		ratio, low, high = compare(with, without)
	}
	b.add(Row{
		Name: m.name, Value: ratio, Unit: "ratio", Target: m.target, Met: low >= m.least,
		Detail: fmt.Sprintf("median of %d pairs, known to lie between %.4f and %.4f; the target counts as met when all of that reaches it; %.0f and %.0f a second", len(with), low, high, median(with), median(without)),
	})
	return nil
}

// beside runs a load while an empty program runs at every switch.
func beside(ctx context.Context, load func(context.Context) (float64, error)) (float64, error) {
	stop, err := probe.AttachEmpty()
	if err != nil {
		return 0, err
	}
	v, err := load(ctx)
	return v, errors.Join(err, stop())
}

// counted runs a load once while the programs count.
func counted(ctx context.Context, load func(context.Context) (float64, error)) (float64, error) {
	place, unified, err := runtime.HostPlace()
	if err != nil {
		return 0, err
	}
	p, err := probe.Open(probe.Config{Unified: unified, Host: probe.Identity{Tasks: place.Dirs["cpu"].ID, Block: place.Dirs["blkio"].ID, Netns: place.Netns}})
	if err != nil {
		return 0, err
	}
	defer p.Close()
	for _, part := range probe.Parts {
		if err := p.Failed(part); err != nil {
			return 0, fmt.Errorf("%s: %w", part, err)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	var g errgroup.Group
	g.Go(func() error {
		for ctx.Err() == nil {
			if err := p.Refresh(); err != nil {
				return err
			}
			for slot := range shards {
				if _, _, err := p.Read(slot); err != nil {
					return err
				}
			}
			_ = wait(ctx, time.Second) // the end of ctx ends the loop
		}
		return nil
	})
	v, err := load(ctx)
	cancel()
	return v, errors.Join(err, g.Wait())
}

var usecsPerOp = regexp.MustCompile(`([\d.]+) usecs/op`)

// pipe returns passes of a token a second.
func (b *bench) pipe(ctx context.Context) (float64, error) {
	out, err := b.h.Exec(ctx, "taskset", "-c", "0", "perf", "bench", "sched", "pipe", "-l", "30000")
	if err != nil {
		return 0, err
	}
	m := usecsPerOp.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("perf says %s", out)
	}
	us, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil || us <= 0 {
		return 0, fmt.Errorf("perf says %s", out)
	}
	return 1e6 / us, nil
}

var requestsPerSecond = regexp.MustCompile(`GET: ([\d.]+) requests per second`)

// redisBenchmark returns requests a second, from another host.
func (b *bench) redisBenchmark(ctx context.Context) (float64, error) {
	out, err := b.l.Client().Exec(ctx, "taskset", "-c", "1", "redis-benchmark", "-h", b.redis, "-t", "get", "-n", "40000", "-c", "20", "-q")
	if err != nil {
		return 0, err
	}
	all := requestsPerSecond.FindAllSubmatch(out, -1)
	if len(all) == 0 {
		return 0, fmt.Errorf("redis-benchmark says %s", out)
	}
	return strconv.ParseFloat(string(all[len(all)-1][1]), 64)
}

// compare returns the median of the pairs' ratios, and the bounds within which it
// lies at 95 %: the order statistics n/2 ± 0.98 √n, which suppose nothing about
// how the noise of the machine is distributed. A median alone would meet or miss
// a target by luck.
func compare(with, without []float64) (ratio, low, high float64) {
	ratios := make([]float64, len(with))
	for i := range with {
		ratios[i] = with[i] / without[i]
	}
	slices.Sort(ratios)
	n := float64(len(ratios))
	off := int(math.Ceil(0.98 * math.Sqrt(n)))
	return median(ratios), ratios[max(0, len(ratios)/2-off)], ratios[min(len(ratios)-1, len(ratios)/2+off)]
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

func (b *bench) add(r Row) { b.rows = append(b.rows, r) }

// cpuOf is what a process has used, in seconds (proc_pid_stat(5)).
func cpuOf(pid int) (float64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	f := strings.Fields(string(raw[strings.LastIndexByte(string(raw), ')')+1:]))
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %s", pid, raw)
	}
	user, err1 := strconv.ParseFloat(f[11], 64)
	system, err2 := strconv.ParseFloat(f[12], 64)
	const ticks = 100 // USER_HZ of every platform that is supported
	return (user + system) / ticks, errors.Join(err1, err2)
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
