package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/tranship/tranship/integration/workload/pgcheck"
)

// workload is what is moved, and what its client does meanwhile.
type workload struct {
	group   string
	about   string
	bytes   int64 // that the client puts there
	port    string
	command []string
	// load and run are the client's verbs; its numbers follow the address.
	load, run   string
	loadN, runN []string
	postgres    bool
	// alone measures CRIU by itself too, without a client.
	alone bool
}

const overwriteRate = "50e6" // bytes a second

func redisWorkload(group, about string, bytes int64) workload {
	return workload{
		group: group, about: about, bytes: bytes, port: "6379",
		command: []string{"redis-server", "--save", "", "--protected-mode", "no"},
		load:    "redis-load", loadN: []string{strconv.FormatInt(bytes, 10)},
		run: "redis-run", runN: []string{overwriteRate},
	}
}

// workloads in the order of the table.
func workloads() []workload {
	idle := redisWorkload("idle", "a redis without data, asked 100 times a second", 64<<10)
	idle.runN, idle.alone = []string{"0", "100"}, true
	const pgBytes = 200 << 20 // fills most of 256 MiB of shared_buffers
	all := []workload{idle}
	for _, size := range []struct {
		name  string
		bytes int64
	}{{"64MiB", 64 << 20}, {"256MiB", 256 << 20}, {"1GiB", 1 << 30}, {"4GiB", 4 << 30}} {
		all = append(all, redisWorkload("redis-"+size.name, "redis with "+size.name+" of values, 50 MB/s overwritten", size.bytes))
	}
	return append(all, workload{
		group: "postgres", about: "PostgreSQL with 256 MiB of shared_buffers, 200 transactions a second", bytes: pgBytes, port: "5432",
		command: []string{"checker", "pg", "serve", "--shared-buffers", "256MB"},
		load:    "pg-init", loadN: []string{strconv.Itoa(pgBytes)}, run: "pg-run", postgres: true,
	})
}

// criuWorkload is what CRIU's own ways are measured with.
func criuWorkload(group string) workload {
	return redisWorkload(group, "redis with 256MiB of values, 50 MB/s overwritten", 256<<20)
}

// measureMoves moves a shard and its rival in turn, each under its own client,
// and only the client of the one that is moved works meanwhile.
func measureMoves(w workload, way string) func(context.Context, *bench, *group) error {
	return func(ctx context.Context, b *bench, g *group) (err error) {
		if why := tooLarge(w.bytes); why != "" {
			g.Absent = append(g.Absent, absent{Subject: tranship, Why: why}, absent{Subject: way, Why: why})
			return nil
		}
		p, err := b.makePair(ctx, w, way, g)
		if p != nil {
			defer func() { err = errors.Join(err, p.remove(context.WithoutCancel(ctx))) }()
		}
		if err != nil {
			return err
		}
		for i := range b.opt.runs {
			// T A, A T, …: what comes second is not always the same one.
			for j := range 2 {
				if err := p.moveOne(ctx, b, g, (i+j)%2); err != nil {
					return err
				}
			}
		}
		for _, c := range p.clients {
			if err := c.end(ctx); err != nil {
				return err
			}
		}
		p.clients = nil
		if w.alone {
			return p.moveAlone(ctx, b, g)
		}
		return nil
	}
}

// pair is a shard and its rival, each with its client.
type pair struct {
	subjects []subject
	clients  []*client
}

func (b *bench) makePair(ctx context.Context, w workload, way string, g *group) (*pair, error) {
	image, command, err := b.image(ctx, w)
	if err != nil {
		return nil, err
	}
	p := &pair{}
	own, err := startShard(ctx, b.tool, b.self, "bench-0", image, command...)
	if err != nil {
		return p, err
	}
	p.subjects = append(p.subjects, own)
	if err := b.load(ctx, w, own); err != nil {
		return p, err
	}
	row, err := own.row(ctx)
	if err != nil {
		return p, err
	}
	g.MemoryMiB = float64(row.Memory) / (1 << 20)
	spec, err := own.spec(ctx)
	if err != nil {
		return p, err
	}
	other, err := startRival(ctx, b.tool, b.self, way, stockOptions{Spec: spec, Image: image, Address: rivalAddress + "/16", Bridge: "tranship0"})
	if err != nil {
		return p, err
	}
	p.subjects = append(p.subjects, other)
	if err := b.load(ctx, w, other); err != nil {
		return p, err
	}
	for _, s := range p.subjects {
		c, err := startClient(ctx, b.tool, b.self, append([]string{w.run, s.address() + ":" + w.port}, w.runN...)...)
		if err != nil {
			return p, err
		}
		p.clients = append(p.clients, c)
		if err := c.pause(ctx); err != nil {
			return p, err
		}
	}
	return p, nil
}

// load fills what has just been started and may take a moment to listen.
func (b *bench) load(ctx context.Context, w workload, s subject) error {
	b.say("  filling %s of %s", w.about, s.name())
	addr := s.address() + ":" + w.port
	knock := fmt.Sprintf("exec 3<>/dev/tcp/%s/%s", s.address(), w.port)
	err := poll(ctx, addr+" listens", seldom, time.Minute, func() (bool, error) {
		_, err := b.tool.on(ctx, "client", "bash", "-c", knock)
		return err == nil, ctx.Err()
	})
	if err != nil {
		return err
	}
	_, err = b.tool.on(ctx, "client", append([]string{b.self, clientVerb, w.load, addr}, w.loadN...)...)
	if err != nil {
		return fmt.Errorf("fill %s: %w", addr, err)
	}
	return nil
}

const (
	// baseline is how long a client works before its container moves: a gap is
	// one beside a time without.
	baseline = time.Second
	// afterwards is how many answers it has to get once it has moved.
	afterwards = 100
)

// moveOne moves one of the two under its client.
func (p *pair) moveOne(ctx context.Context, b *bench, g *group, which int) error {
	s, c := p.subjects[which], p.clients[which]
	if err := c.resume(ctx); err != nil {
		return err
	}
	v, err := moveUnder(ctx, s, c)
	if err != nil {
		return err
	}
	if err := c.pause(ctx); err != nil {
		return err
	}
	g.Samples = append(g.Samples, v)
	b.say("  %-16s blackout %6.0f ms, total %6.0f ms, client's longest gap %6.0f ms", v.Subject, v.Values[blackoutMetric], v.Values[totalMetric], v.Values[gapMetric])
	return s.settle(ctx)
}

// moveUnder moves a container whose client works, and adds what that saw.
func moveUnder(ctx context.Context, s subject, c *client) (sample, error) {
	select {
	case <-ctx.Done():
		return sample{}, context.Cause(ctx)
	case <-time.After(baseline):
	}
	if err := c.begin(ctx); err != nil {
		return sample{}, err
	}
	v, err := s.move(ctx)
	if err != nil {
		return v, err
	}
	r, err := c.goOn(ctx, afterwards)
	if err != nil {
		return v, fmt.Errorf("after a move with %s: %w", s.name(), err)
	}
	v.Values[gapMetric] = r.LongestGapMS
	return v, nil
}

// stockAlone is the rival without a client: its CRIU has no connection to save.
const stockAlone = "runc, no client"

func (p *pair) moveAlone(ctx context.Context, b *bench, g *group) error {
	for range b.opt.runs {
		v, err := p.subjects[1].move(ctx)
		if err != nil {
			return err
		}
		v.Subject = stockAlone
		g.Samples = append(g.Samples, v)
		b.say("  %-16s CRIU alone %6.0f ms", v.Subject, v.Values[criuMetric])
	}
	return nil
}

func (p *pair) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for _, c := range p.clients {
		c.kill()
	}
	var errs []error
	for _, s := range p.subjects {
		errs = append(errs, s.remove(ctx))
	}
	return errors.Join(errs...)
}

// tooLarge says why a shard of so many bytes cannot be measured here: besides
// the shard that is moved there are its page store and its copy, or two sets of
// images, and the other subject.
func tooLarge(bytes int64) string {
	const copies = 4.6 // an allocator's overhead included
	raw, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return err.Error()
	}
	_, rest, _ := strings.Cut(string(raw), "MemAvailable:")
	var kib int64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		return "available memory: " + err.Error()
	}
	if need := int64(copies * float64(bytes)); kib<<10 < need {
		return fmt.Sprintf("needs %d MiB of memory, and %d MiB are available", need>>20, kib>>10)
	}
	return ""
}

// image packs and imports what a workload runs, once, and says how it is run.
func (b *bench) image(ctx context.Context, w workload) (name string, command []string, err error) {
	checker := filepath.Join(b.scratch, "checker")
	bins, command := []string{"/usr/bin/redis-server"}, w.command
	name = "bench.tranship.io/redis:latest"
	if w.postgres {
		name = "bench.tranship.io/postgres:latest"
		if err := buildChecker(ctx, checker); err != nil {
			return "", nil, err
		}
		found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
		if len(found) == 0 {
			return "", nil, errors.New("PostgreSQL is not installed: make setup")
		}
		latest := found[len(found)-1]
		bins = []string{checker, latest, filepath.Join(filepath.Dir(latest), "initdb"), "/bin/sh"}
		// CRIU reads the limits of another user's processes, which takes
		// CAP_SYS_RESOURCE: where root lacks it PostgreSQL runs as root.
		if !haveCapability(capSysResource) {
			library := filepath.Join(b.scratch, "asroot.so")
			if err := pgcheck.BuildAsRoot(ctx, library); err != nil {
				return "", nil, err
			}
			bins, command = append(bins, library), append(command[:len(command):len(command)], "--as-root", library)
		}
	}
	if b.images[name] {
		return name, command, nil
	}
	args := []string{"lab", "image", "--name", name}
	for _, bin := range bins {
		args = append(args, "--bin", bin)
	}
	if _, err := b.tool.tranship(ctx, args...); err != nil {
		return "", nil, err
	}
	b.images[name] = true
	return name, command, nil
}

func buildChecker(ctx context.Context, out string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "./integration/workload/cmd/checker")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // static: an image of one file
	if _, err := run(ctx, cmd); err != nil {
		return fmt.Errorf("build the checker: %w", err)
	}
	return nil
}

const capSysResource = 24 // linux/capability.h

func haveCapability(capability uint) bool {
	status, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(status), "\nCapEff:\t")
	line, _, _ := strings.Cut(rest, "\n")
	set, err := strconv.ParseUint(line, 16, 64)
	return err == nil && set>>capability&1 == 1
}

// measurePreDump measures CRIU's own pre-dump chain where there is one: it is
// incremental only if CRIU finds the kernel's soft-dirty bits.
func measurePreDump(ctx context.Context, b *bench, g *group) error {
	if _, err := b.tool.on(ctx, "host-1", "criu", "check", "--feature", "mem_dirty_track"); err != nil {
		g.Absent = append(g.Absent, absent{Subject: preDump, Why: "CRIU finds no soft-dirty bits in this kernel (criu check --feature mem_dirty_track)"})
		return ctx.Err()
	}
	return measureMoves(criuWorkload("criu-pre-dump"), preDump)(ctx, b, g)
}
