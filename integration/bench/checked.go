package main

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strconv"
	"time"

	"github.com/tranship/tranship/integration/workload/memcheck"
)

// checked is a shard that rewrites its memory at random, at a rate, and knows
// what each page must hold.
type checked struct {
	*shard
	checker string
}

// checkedImage packs and imports what such a shard runs, once.
func (b *bench) checkedImage(ctx context.Context) (name, checker string, err error) {
	name, checker = "bench.tranship.io/memcheck:latest", filepath.Join(b.scratch, "checker")
	if b.images[name] {
		return name, checker, nil
	}
	if err := buildChecker(ctx, checker); err != nil {
		return "", "", err
	}
	program := filepath.Join(b.scratch, "memcheck")
	if err := memcheck.Build(ctx, program); err != nil {
		return "", "", err
	}
	if _, err := b.tool.tranship(ctx, "lab", "image", "--name", name, "--bin", program); err != nil {
		return "", "", err
	}
	b.images[name] = true
	return name, checker, nil
}

// startChecked starts one on host-1 and waits until it has written all of its
// memory, with what does not compress. What is returned with an error has to be
// removed all the same.
func (b *bench) startChecked(ctx context.Context, id, size, rate string) (*checked, error) {
	image, checker, err := b.checkedImage(ctx)
	if err != nil {
		return nil, err
	}
	s, err := startShard(ctx, b.tool, b.self, id, image, "memcheck", "--features=plain", "--size="+size, "--rate="+rate,
		"--hot=100", "--compressible=0", "--procs=1", "--threads=1", "--verify=600000")
	if err != nil {
		return nil, err
	}
	c := &checked{s, checker}
	return c, poll(ctx, id+" has written its memory", seldom, 2*time.Minute, func() (bool, error) {
		_, err := c.ask(ctx, "stat")
		return err == nil, ctx.Err()
	})
}

// ask is a verb of its control port; verify fails if it finds anything wrong.
func (c *checked) ask(ctx context.Context, what string) (memcheck.Stat, error) {
	var stat memcheck.Stat
	addr := net.JoinHostPort(c.address(), strconv.Itoa(memcheck.DefaultPort))
	out, err := c.tool.on(ctx, "client", c.checker, "memcheck", what, "--addr", addr)
	if err != nil {
		return stat, err
	}
	return stat, document(out, &stat)
}

// removeChecked ends shards, also when ctx has ended.
func removeChecked(ctx context.Context, all ...*checked) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), downLimit)
	defer cancel()
	var errs []error
	for _, c := range all {
		if c != nil {
			errs = append(errs, c.remove(ctx))
		}
	}
	return errors.Join(errs...)
}
