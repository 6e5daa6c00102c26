package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// lazyPort is where CRIU's page server listens, on loopback of the host.
const lazyPort = "27277"

// moveLazily moves the container from one place to the other with CRIU's own
// lazy pages, as runc's documentation has it:
//
//  1. runc checkpoint --lazy-pages writes all but the memory, says so, and
//     serves the memory from the frozen container
//  2. cp -a of the images; the link of the old place goes down
//  3. criu lazy-pages fetches pages for whoever asks on its socket
//  4. runc restore --lazy-pages; the link of the new place goes up
//  5. the checkpoint ends with the last page
func (c *stockContainer) moveLazily(ctx context.Context, dir string, r *stockReply) error {
	from, to := c.at, 1-c.at
	images, moved := filepath.Join(dir, "images"), filepath.Join(dir, "moved")
	dumpWork, restoreWork := filepath.Join(dir, "dump"), filepath.Join(dir, "restore")
	if err := os.Mkdir(restoreWork, 0o700); err != nil {
		return err
	}
	began := time.Now()
	dump, ready, err := c.lazyDump(ctx, from, images, dumpWork)
	if err != nil {
		return err
	}
	// Whatever becomes of it: what was started is waited for.
	defer func() {
		if dump.ProcessState == nil {
			_ = dump.Process.Kill()
			_ = dump.Wait()
		}
	}()
	if err := ready(); err != nil {
		return errors.Join(err, logOf(dumpWork, "dump.log"))
	}
	dumped := time.Now()
	if err := sh(ctx, "cp", "-a", images, moved); err != nil {
		return err
	}
	if err := sh(ctx, "ip", "link", "set", c.port(from), "down"); err != nil {
		return err
	}
	copied := time.Now()
	fetch, err := lazyFetch(ctx, moved, restoreWork)
	if err != nil {
		return err
	}
	defer func() {
		if fetch.ProcessState == nil {
			_ = fetch.Process.Kill()
			_ = fetch.Wait()
		}
	}()
	err = c.runc(ctx, to, "restore", "-d", "--lazy-pages", "--image-path", moved, "--work-path", restoreWork,
		"--tcp-established", "--bundle", c.bundle(to), c.id(to))
	if err != nil {
		return errors.Join(err, logOf(restoreWork, "restore.log"))
	}
	// Not before: where there is no connection yet, a frame would be answered
	// with a reset.
	if err := sh(ctx, "ip", "link", "set", c.port(to), "up"); err != nil {
		return err
	}
	restored := time.Now()
	c.at = to
	if err := errors.Join(fetch.Wait(), dump.Wait()); err != nil {
		return fmt.Errorf("the rest of the pages: %w", err)
	}
	r.FillMs = ms(time.Since(restored))
	r.CheckpointMs, r.CopyMs, r.RestoreMs = ms(dumped.Sub(began)), ms(copied.Sub(dumped)), ms(restored.Sub(copied))
	return c.account(dir, moved, r)
}

// lazyDump starts the checkpoint; ready returns when it serves pages.
func (c *stockContainer) lazyDump(ctx context.Context, place int, images, work string) (*exec.Cmd, func() error, error) {
	status, said, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer said.Close()
	cmd := exec.CommandContext(ctx, "runc", "--root", c.path(fmt.Sprintf("state-%d", place)), "--log", c.path("runc.log"),
		"checkpoint", "--lazy-pages", "--page-server", "127.0.0.1:"+lazyPort, "--status-fd", "3",
		"--image-path", images, "--work-path", work, "--tcp-established", c.id(place))
	cmd.ExtraFiles = []*os.File{said}
	if err := cmd.Start(); err != nil {
		status.Close()
		return nil, nil, fmt.Errorf("runc checkpoint --lazy-pages: %w", err)
	}
	return cmd, func() error {
		defer status.Close()
		if n, err := status.Read(make([]byte, 1)); n != 1 {
			text, _ := os.ReadFile(c.path("runc.log"))
			return fmt.Errorf("runc checkpoint --lazy-pages did not get ready: %w%s", err, tail(string(text)))
		}
		return nil
	}, nil
}

// lazyFetch starts CRIU's lazy-pages daemon and returns when its socket is there.
func lazyFetch(ctx context.Context, images, work string) (*exec.Cmd, error) {
	cmd := exec.CommandContext(ctx, "criu", "lazy-pages", "--page-server", "--address", "127.0.0.1", "--port", lazyPort,
		"-D", images, "-W", work, "-o", "lazy-pages.log", "-v1")
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("criu lazy-pages: %w", err)
	}
	err := poll(ctx, "criu lazy-pages listens", often, 10*time.Second, func() (bool, error) {
		_, err := os.Stat(filepath.Join(work, "lazy-pages.socket"))
		return err == nil, nil
	})
	if err != nil {
		_ = cmd.Process.Kill()
		return nil, errors.Join(err, cmd.Wait(), logOf(work, "lazy-pages.log"))
	}
	return cmd, nil
}
