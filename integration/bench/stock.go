package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"time"
)

// stockVerb makes this program the rival, inside a host: it runs a container
// with runc alone, and moves it as an administrator would:
//
//  1. runc checkpoint --tcp-established, to a tmpfs
//  2. cp -a, from tmpfs to tmpfs: what a link would have to carry
//  3. runc restore -d --tcp-established, from the copy
//
// It takes one line of JSON a request on standard input and answers each with
// one line; at the end of its input it removes everything that it made.
const stockVerb = "stock"

// stockRequest asks for one move, in one of the ways that have a subject's name:
// stock; lazy leaves the memory behind and fetches it when the restored
// container asks for it; preDump copies memory twice while it runs, and in the
// end only what was written since.
type stockRequest struct {
	Way string `json:"way"`
}

// stockReply is one move; times are by one clock, in milliseconds.
type stockReply struct {
	Error        string  `json:"error,omitempty"`
	CheckpointMs float64 `json:"checkpoint_ms"`
	CopyMs       float64 `json:"copy_ms"`
	RestoreMs    float64 `json:"restore_ms"`
	// RuncStartMs is what starting runc twice takes, measured beside the move.
	RuncStartMs float64 `json:"runc_start_ms"`
	// DumpMs and CRIURestoreMs are CRIU's own, from its logs.
	DumpMs        float64 `json:"criu_dump_ms"`
	CRIURestoreMs float64 `json:"criu_restore_ms"`
	// PreDumpMs is what was done while the container ran.
	PreDumpMs float64 `json:"pre_dump_ms,omitempty"`
	// FillMs is how long after the restore the last page came, lazily.
	FillMs float64 `json:"fill_ms,omitempty"`
	Bytes  int64   `json:"bytes"`
}

func (r stockReply) blackoutMs() float64 {
	return r.CheckpointMs + r.CopyMs + r.RestoreMs - r.RuncStartMs
}

// stockOptions say what container to run.
type stockOptions struct {
	// Spec is that of the shard it is compared with, as `ctr containers info`
	// prints it.
	Spec    json.RawMessage `json:"spec"`
	Image   string          `json:"image"`
	Address string          `json:"address"` // with prefix, on the shards' bridge
	Bridge  string          `json:"bridge"`
}

// stockMain reads its options as the first line.
func stockMain() int {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 4<<20)
	answer := json.NewEncoder(os.Stdout)
	var o stockOptions
	if !lines.Scan() {
		return 2
	}
	if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
		_ = answer.Encode(stockReply{Error: err.Error()})
		return 2
	}
	c := &stockContainer{o: o, dir: "/run/tranship-bench"}
	ctx := context.Background()
	err := c.start(ctx)
	if err == nil {
		err = answer.Encode(stockReply{}) // it runs
	}
	for err == nil && lines.Scan() {
		var req stockRequest
		if err = json.Unmarshal(lines.Bytes(), &req); err != nil {
			break
		}
		var reply stockReply
		if reply, err = c.move(ctx, req); err == nil {
			err = answer.Encode(reply)
		}
	}
	err = errors.Join(err, c.remove(ctx))
	if err != nil {
		_ = answer.Encode(stockReply{Error: err.Error()})
		return 1
	}
	return 0
}

// stockContainer is a container that runc runs. It has two places, each with a
// network namespace and a state of its own: lazily it runs in the second one
// before it has left the first.
type stockContainer struct {
	o     stockOptions
	dir   string // on the host's own tmpfs
	at    int    // its place, 0 or 1
	moves int
	pipes [6]*os.File // read and write ends of the container's standard streams
	undo  []func(context.Context) error
}

func (c *stockContainer) path(parts ...string) string {
	return filepath.Join(append([]string{c.dir}, parts...)...)
}

func (c *stockContainer) netns(place int) string { return fmt.Sprintf("tranship-bench-%d", place) }
func (c *stockContainer) port(place int) string  { return fmt.Sprintf("tsbench%d", place) }
func (c *stockContainer) id(place int) string    { return fmt.Sprintf("bench-%d", place) }
func (c *stockContainer) bundle(place int) string {
	return c.path(fmt.Sprintf("bundle-%d", place))
}

func (c *stockContainer) start(ctx context.Context) error {
	if err := os.RemoveAll(c.dir); err != nil { // an earlier one that was killed
		return err
	}
	if err := os.MkdirAll(c.path("rootfs"), 0o700); err != nil {
		return err
	}
	c.undo = append(c.undo, func(context.Context) error { return os.RemoveAll(c.dir) })
	// From the snapshotter that the shards use, writable.
	if err := sh(ctx, "ctr", "images", "mount", "--rw", "--snapshotter", "overlayfs", c.o.Image, c.path("rootfs")); err != nil {
		return err
	}
	c.undo = append(c.undo, func(ctx context.Context) error {
		return sh(ctx, "ctr", "images", "unmount", "--rm", c.path("rootfs"))
	})
	for place := range 2 {
		if err := c.makePlace(ctx, place); err != nil {
			return err
		}
	}
	if err := sh(ctx, "ip", "link", "set", c.port(0), "up"); err != nil {
		return err
	}
	// Anonymous pipes, as containerd's shim gives: CRIU knows how to leave them.
	for i := range 3 {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		c.pipes[2*i], c.pipes[2*i+1] = r, w
	}
	go drain(c.pipes[2])
	go drain(c.pipes[4])
	c.undo = append(c.undo, c.kill)
	return c.runc(ctx, 0, "run", "-d", "--bundle", c.bundle(0), c.id(0))
}

// makePlace makes a bundle and a network namespace, whose link is down.
func (c *stockContainer) makePlace(ctx context.Context, place int) error {
	spec, err := stockSpec(c.o.Spec, "/run/netns/"+c.netns(place), fmt.Sprintf("/tranship-bench/%d", place), c.path("rootfs"))
	if err != nil {
		return err
	}
	if err := os.Mkdir(c.bundle(place), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(c.bundle(place), "config.json"), spec, 0o600); err != nil {
		return err
	}
	ns, port := c.netns(place), c.port(place)
	c.undo = append(c.undo, func(ctx context.Context) error { return sh(ctx, "ip", "netns", "del", ns) })
	const mac = "02:74:0a:59:c8:01" // the same in both places: its peers need not learn another one
	for _, args := range [][]string{
		{"netns", "add", ns},
		{"link", "add", port, "type", "veth", "peer", "name", "eth0", "address", mac, "netns", ns},
		{"link", "set", port, "master", c.o.Bridge},
		{"-n", ns, "addr", "add", c.o.Address, "dev", "eth0"},
		{"-n", ns, "link", "set", "eth0", "up"},
		{"-n", ns, "link", "set", "lo", "up"},
	} {
		if err := sh(ctx, "ip", args...); err != nil {
			return err
		}
	}
	return nil
}

// stockSpec is a shard's own spec for plain runc: another cgroup, another
// network namespace, and nothing that only tranship's restore needs.
func stockSpec(raw json.RawMessage, netns, cgroup, rootfs string) ([]byte, error) {
	var spec map[string]any
	if err := json.Unmarshal(raw, &spec); err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	delete(spec, "annotations")
	spec["root"] = map[string]any{"path": rootfs}
	linux, ok := spec["linux"].(map[string]any)
	if !ok {
		return nil, errors.New("spec: it is none of Linux")
	}
	linux["cgroupsPath"] = cgroup
	namespaces, _ := linux["namespaces"].([]any)
	found := false
	for _, ns := range namespaces {
		if ns, ok := ns.(map[string]any); ok && ns["type"] == "network" {
			ns["path"], found = netns, true
		}
	}
	if !found {
		return nil, errors.New("spec: no network namespace of its own")
	}
	return json.Marshal(spec)
}

// runc runs it with the container's standard streams, which -d passes on.
func (c *stockContainer) runc(ctx context.Context, place int, args ...string) error {
	cmd := exec.CommandContext(ctx, "runc", append([]string{"--root", c.path(fmt.Sprintf("state-%d", place)), "--log", c.path("runc.log")}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.pipes[0], c.pipes[3], c.pipes[5]
	if err := cmd.Run(); err != nil {
		said, _ := os.ReadFile(c.path("runc.log"))
		return fmt.Errorf("runc %v: %w%s", args, err, tail(string(said)))
	}
	return nil
}

func (c *stockContainer) move(ctx context.Context, req stockRequest) (stockReply, error) {
	c.moves++
	dir := c.path(fmt.Sprintf("move-%d", c.moves))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return stockReply{}, err
	}
	defer os.RemoveAll(dir)
	var r stockReply
	var err error
	if r.RuncStartMs, err = c.startTwice(ctx); err != nil {
		return r, err
	}
	switch req.Way {
	case lazy:
		err = c.moveLazily(ctx, dir, &r)
	case preDump:
		err = c.moveStock(ctx, dir, preDumps, &r)
	case stock:
		err = c.moveStock(ctx, dir, 0, &r)
	default:
		err = fmt.Errorf("unknown way %q", req.Way)
	}
	return r, err
}

// startTwice measures what runc needs to start, twice.
func (c *stockContainer) startTwice(ctx context.Context) (float64, error) {
	began := time.Now()
	for range 2 {
		if err := sh(ctx, "runc", "--version"); err != nil {
			return 0, err
		}
	}
	return ms(time.Since(began)), nil
}

// moveStock moves the container, after so many pre-dumps.
func (c *stockContainer) moveStock(ctx context.Context, dir string, pre int, r *stockReply) error {
	here, there := filepath.Join(dir, "here"), filepath.Join(dir, "there")
	dumpWork, restoreWork := filepath.Join(dir, "dump"), filepath.Join(dir, "restore")
	for _, d := range []string{here, there} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
	}
	began := time.Now()
	parent, err := c.preDump(ctx, dir, pre)
	if err != nil {
		return err
	}
	r.PreDumpMs = ms(time.Since(began))
	began = time.Now()
	args := []string{"checkpoint", "--image-path", filepath.Join(here, "images"), "--work-path", dumpWork, "--tcp-established"}
	if err := c.runc(ctx, c.at, append(append(args, parent...), c.id(c.at))...); err != nil {
		return errors.Join(err, logOf(dumpWork, "dump.log"))
	}
	dumped := time.Now()
	if err := sh(ctx, "cp", "-a", filepath.Join(here, "images"), there); err != nil {
		return err
	}
	copied := time.Now()
	err = c.runc(ctx, c.at, "restore", "-d", "--image-path", filepath.Join(there, "images"), "--work-path", restoreWork, "--tcp-established", "--bundle", c.bundle(c.at), c.id(c.at))
	if err != nil {
		return errors.Join(err, logOf(restoreWork, "restore.log"))
	}
	restored := time.Now()
	r.CheckpointMs, r.CopyMs, r.RestoreMs = ms(dumped.Sub(began)), ms(copied.Sub(dumped)), ms(restored.Sub(copied))
	return c.account(dir, there, r)
}

// preDumps is how long the chain is: the first takes everything, the second
// what was written meanwhile.
const preDumps = 2

// preDump writes the memory of the running container so many times, each on
// top of the one before, copies each, and returns what the dump then needs.
// Parents are named relative to the images that build on them.
func (c *stockContainer) preDump(ctx context.Context, dir string, n int) (parent []string, err error) {
	for i := range n {
		name := fmt.Sprintf("pre-%d", i)
		images, work := filepath.Join(dir, "here", name), filepath.Join(dir, name+"-work")
		args := []string{"checkpoint", "--pre-dump", "--image-path", images, "--work-path", work, "--tcp-established"}
		if err := c.runc(ctx, c.at, append(append(args, parent...), c.id(c.at))...); err != nil {
			return nil, errors.Join(err, logOf(work, "dump.log"))
		}
		if err := sh(ctx, "cp", "-a", images, filepath.Join(dir, "there")); err != nil {
			return nil, err
		}
		parent = []string{"--parent-path", "../" + name}
	}
	return parent, nil
}

// account reads what CRIU says of itself, and the size of the images.
func (c *stockContainer) account(dir, images string, r *stockReply) error {
	var err error
	if r.DumpMs, err = criuMs(filepath.Join(dir, "dump", "dump.log")); err != nil {
		return err
	}
	if r.CRIURestoreMs, err = criuMs(filepath.Join(dir, "restore", "restore.log")); err != nil {
		return err
	}
	return filepath.WalkDir(images, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			r.Bytes += info.Size()
		}
		return err
	})
}

// logTime is how CRIU begins each line: seconds since its start.
var logTime = regexp.MustCompile(`(?m)^\((\d+\.\d+)\)`)

// criuMs is the time of the last line of CRIU's log.
func criuMs(path string) (float64, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("CRIU's log: %w", err)
	}
	all := logTime.FindAllSubmatch(raw, -1)
	if len(all) == 0 {
		return 0, fmt.Errorf("%s: no line has a time", path)
	}
	seconds, err := strconv.ParseFloat(string(all[len(all)-1][1]), 64)
	return seconds * 1e3, err
}

// kill ends the container in both places.
func (c *stockContainer) kill(ctx context.Context) error {
	var errs []error
	for place := range 2 {
		if _, err := os.Stat(c.path(fmt.Sprintf("state-%d", place), c.id(place))); err == nil {
			errs = append(errs, c.runc(ctx, place, "delete", "--force", c.id(place)))
		}
	}
	return errors.Join(errs...)
}

// remove undoes everything, last things first.
func (c *stockContainer) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	var errs []error
	for i := len(c.undo) - 1; i >= 0; i-- {
		errs = append(errs, c.undo[i](ctx))
	}
	return errors.Join(errs...)
}

// drain takes what the container says until the process ends.
func drain(f *os.File) {
	buf := make([]byte, 64<<10)
	for {
		if _, err := f.Read(buf); err != nil {
			return
		}
	}
}

// logOf is the end of a log as an error.
func logOf(dir, name string) error {
	raw, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	return errors.New(name + tail(string(raw)))
}

func sh(ctx context.Context, name string, args ...string) error {
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w%s", name, args, err, tail(string(out)))
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
