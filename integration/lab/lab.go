// Package lab makes hosts out of namespaces on one machine: each with its own
// network, mounts, processes, host name, cgroups and /run, its own stock
// containerd and its own transhipd, joined by a switch, plus a client outside
// the pool. Integration tests, benchmarks and newcomers all use it.
//
// It refuses to touch the machine: nothing is created in the machine's network
// namespace, and outside /var/lib/tranship-lab nothing but missing mount points.
// Down leaves no process, mount, namespace, cgroup or link behind, whatever
// crashed before.
//
// Flow of Up: layout (names and addresses) → spawn (namespaces and cgroups) →
// boot (mounts, inside) → supervise (services, inside) → wire (links) → await.
package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// readyDeadline bounds how long one host's containerd or transhipd may take to
// answer. A cold containerd takes 1–2 s on a loaded two-core machine.
const readyDeadline = 60 * time.Second

// Options say what Up makes. The zero value is two hosts on an unlimited link.
type Options struct {
	// Hosts is the number of hosts in the pool, 2 when zero.
	Hosts int
	// Bandwidth limits each host's link in each direction; 0 is no limit.
	Bandwidth BitRate
	// Etcd runs an etcd on the client host.
	Etcd bool
	// NoDaemon leaves transhipd out: containerd only.
	NoDaemon bool
	// BinDir holds the build's tranship and transhipd; "" looks beside the
	// running program, then in bin/ of the enclosing module.
	BinDir string
	// Progress gets one line per step; nil is silence. It is called from
	// several goroutines, one call at a time.
	Progress func(line string)
}

// Lab is a running lab. Its methods may be called concurrently.
type Lab struct {
	state state
}

// Up brings up whatever of the lab is missing, and returns when every
// containerd and transhipd answers. A second Up finds everything there; it
// starts what died and adds hosts, but removes none. When ctx is cancelled
// before a new lab is up, nothing of it is left; when a host does not come up,
// the lab stays for inspection and the error carries the end of the log.
func Up(ctx context.Context, opts Options) (*Lab, error) {
	if err := needRoot(); err != nil {
		return nil, err
	}
	opts, err := opts.complete()
	if err != nil {
		return nil, err
	}
	unlock, err := acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()

	l, err := load()
	fresh := errors.Is(err, ErrDown)
	switch {
	case fresh:
		// What a crash left behind would be mistaken for ours.
		if err := sweep(ctx); err != nil {
			return nil, fmt.Errorf("remains of an earlier lab: %w", err)
		}
		l = &Lab{}
	case err != nil:
		return nil, err
	}
	if err := l.bringUp(ctx, opts); err != nil {
		if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
			err = fmt.Errorf("%w: %w", ctx.Err(), err) // whatever the cause is, callers see a cancellation
		}
		if ctx.Err() != nil && fresh {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), downDeadline)
			defer cancel()
			return nil, errors.Join(err, sweep(undo))
		}
		return nil, err
	}
	return l, nil
}

// Open returns the lab that is up, or ErrDown.
func Open() (*Lab, error) { return load() }

func (o Options) complete() (Options, error) {
	if o.Hosts == 0 {
		o.Hosts = 2
	}
	if o.Hosts < 1 || o.Hosts > maxHosts {
		return o, fmt.Errorf("%d hosts: a lab has between 1 and %d", o.Hosts, maxHosts)
	}
	if o.Etcd {
		if _, err := exec.LookPath("etcd"); err != nil {
			return o, fmt.Errorf("%w: apt-get install etcd-server", err)
		}
	}
	if o.Progress == nil {
		o.Progress = func(string) {}
	}
	dir, err := findBinDir(o.BinDir)
	if err != nil {
		return o, err
	}
	o.BinDir = dir
	need := []string{"tranship", "transhipd"}
	if o.NoDaemon {
		need = need[:1]
	}
	for _, name := range need {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return o, fmt.Errorf("%w: run `make build` first", err)
		}
	}
	return o, nil
}

// findBinDir resolves Options.BinDir.
func findBinDir(dir string) (string, error) {
	if dir != "" {
		return filepath.Abs(dir)
	}
	if self, err := os.Executable(); err == nil && filepath.Base(self) == "tranship" {
		return filepath.Dir(self), nil
	}
	at, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(at, "go.mod")); err == nil {
			return filepath.Join(at, "bin"), nil
		}
		up := filepath.Dir(at)
		if up == at {
			return "", errors.New("the directory with tranship and transhipd is unknown: set Options.BinDir")
		}
		at = up
	}
}

// bringUp is Up under the lock.
func (l *Lab) bringUp(ctx context.Context, opts Options) error {
	plan := newPlan(opts, l.state)
	if err := writePKI(plan); err != nil {
		return err
	}
	l.state.BinDir, l.state.Bandwidth = opts.BinDir, opts.Bandwidth
	// The switch comes first: every link has an end in it. One after the other,
	// because each is cheap and what is recorded must be what exists.
	for _, node := range plan.nodes {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := l.ensureNode(ctx, plan, node, opts); err != nil {
			return fmt.Errorf("%s: %w", node.Name, err)
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	for _, node := range plan.nodes {
		if node.Role == roleSwitch {
			continue
		}
		group.Go(func() error {
			if err := l.ensureServices(ctx, plan, node, opts); err != nil {
				return fmt.Errorf("%s: %w", node.Name, err)
			}
			opts.Progress(node.Name + " is up")
			return nil
		})
	}
	return group.Wait()
}

// ensureNode makes a node's namespaces unless they are there, and its link.
func (l *Lab) ensureNode(ctx context.Context, plan plan, node nodePlan, opts Options) error {
	if err := writeNodeFiles(plan, node); err != nil {
		return err
	}
	rec, ok := l.state.node(node.Name)
	if !ok || !rec.alive() {
		opts.Progress("starting " + node.Name)
		// Of a host whose init was killed, cgroups and mount points remain.
		if err := clearNode(ctx, node.Name); err != nil {
			return err
		}
		var err error
		rec, err = spawn(ctx, node, opts.BinDir)
		if err != nil {
			return err
		}
		l.state.put(rec)
		if err := l.state.save(); err != nil {
			return err
		}
	}
	if node.Role == roleSwitch {
		return wireSwitch(rec.PID)
	}
	hub, _ := l.state.node(switchName)
	return wireHost(hub.PID, rec.PID, node, opts.Bandwidth)
}

// ensureServices starts what a host runs and waits until it answers.
func (l *Lab) ensureServices(ctx context.Context, plan plan, node nodePlan, opts Options) error {
	rec, _ := l.state.node(node.Name)
	hub, _ := l.state.node(switchName)
	if err := awaitNetwork(ctx, hub, rec); err != nil {
		return err
	}
	services, err := servicesFor(plan, node, opts)
	if err != nil {
		return err
	}
	for _, svc := range services {
		if _, err := call(ctx, node.Name, request{Op: opEnsure, Service: &svc}); err != nil {
			return err
		}
		if err := awaitService(ctx, rec, svc.Name); err != nil {
			return err
		}
	}
	return nil
}

// awaitNetwork is awaitLink with a deadline.
func awaitNetwork(ctx context.Context, hub, rec nodeRecord) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyDeadline, errors.New("its link does not come up"))
	defer cancel()
	return awaitLink(ctx, hub.PID, rec.PID, rec.Name)
}

// Hosts returns the pool's hosts in order, without the client.
func (l *Lab) Hosts() []*Host {
	var hosts []*Host
	for _, rec := range l.state.Nodes {
		if rec.Role == roleHost {
			hosts = append(hosts, &Host{lab: l, rec: rec})
		}
	}
	return hosts
}

// Host returns a host or the client by name.
func (l *Lab) Host(name string) (*Host, error) {
	rec, ok := l.state.node(name)
	if !ok || rec.Role == roleSwitch {
		return nil, fmt.Errorf("the lab has no host %q", name)
	}
	return &Host{lab: l, rec: rec}, nil
}

// Client returns the host outside the pool.
func (l *Lab) Client() *Host {
	rec, _ := l.state.node(clientName)
	return &Host{lab: l, rec: rec}
}

// Down ends this lab; see the function Down.
func (l *Lab) Down(ctx context.Context) error { return Down(ctx) }

// ErrDown says that no lab is up.
var ErrDown = errors.New("no lab is up: run `tranship lab up`")

func needRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("the lab makes namespaces, mounts and cgroups: run it as root")
	}
	return checkName()
}

// state is what Up leaves for the commands after it.
type state struct {
	SchemaVersion int          `json:"schema_version"`
	BinDir        string       `json:"bin_dir"`
	Bandwidth     BitRate      `json:"bandwidth"`
	Nodes         []nodeRecord `json:"nodes"`
}

// nodeRecord identifies a node's init by pid and start time, because pids are
// used again.
type nodeRecord struct {
	Name  string `json:"name"`
	Role  role   `json:"role"`
	PID   int    `json:"pid"`
	Start uint64 `json:"start"`
}

func (r nodeRecord) alive() bool {
	start, running := startTime(r.PID)
	return running && start == r.Start
}

func (s *state) node(name string) (nodeRecord, bool) {
	for _, rec := range s.Nodes {
		if rec.Name == name {
			return rec, true
		}
	}
	return nodeRecord{}, false
}

func (s *state) put(rec nodeRecord) {
	for i := range s.Nodes {
		if s.Nodes[i].Name == rec.Name {
			s.Nodes[i] = rec
			return
		}
	}
	s.Nodes = append(s.Nodes, rec)
}

// save replaces the state file in one step: a reader sees the old or the new.
func (s *state) save() error {
	s.SchemaVersion = 1
	raw, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	next := statePath + ".next"
	if err := os.WriteFile(next, append(raw, '\n'), 0o600); err != nil {
		return fmt.Errorf("recording the lab: %w", err)
	}
	return os.Rename(next, statePath)
}

// load returns the lab on record; one none of whose processes is alive is down.
func load() (*Lab, error) {
	s, err := readState()
	if err != nil {
		return nil, err
	}
	for _, rec := range s.Nodes {
		if rec.alive() {
			return &Lab{state: s}, nil
		}
	}
	return nil, ErrDown
}

func readState() (state, error) {
	raw, err := os.ReadFile(statePath)
	if errors.Is(err, os.ErrNotExist) {
		return state{}, ErrDown
	}
	if err != nil {
		return state{}, fmt.Errorf("reading the lab's state: %w", err)
	}
	var s state
	if err := json.Unmarshal(raw, &s); err != nil {
		return state{}, fmt.Errorf("%s: %w", statePath, err)
	}
	return s, nil
}
