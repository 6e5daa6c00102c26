package closedloop

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/tranship/tranship/daemon/control"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/integration/lab"
)

// host is one of the pool, with its configuration as it was.
type host struct {
	*lab.Host
	pool *lab.Lab
	was  []byte
}

const configPath = "/etc/tranship/config.toml"

func openHost(l *lab.Lab, h *lab.Host) (*host, error) {
	o := &host{Host: h, pool: l}
	var err error
	o.was, err = os.ReadFile(o.path(configPath))
	return o, err
}

// path of a file of the host.
func (h *host) path(name string) string { return filepath.Join(h.Root(), name) }

func (h *host) stop(ctx context.Context) error {
	if err := h.KillDaemon(ctx); err != nil {
		return fmt.Errorf("%s: %w", h.Name(), err)
	}
	return nil
}

// start begins the daemon with a policy. A round a second: whoever reacts sees
// what there is as soon as it can.
func (h *host) start(ctx context.Context, policy Policy) error {
	autopilot, kind := "on", "forecast"
	switch policy {
	case None:
		autopilot = "off"
	case Reactive:
		kind = "reactive"
	}
	text := fmt.Sprintf("autopilot = %q\n%s\n[host]\ncpus = %v\n[balance]\nevery_seconds = 1\npolicy = %q\n", autopilot, h.was, cpus, kind)
	if err := os.WriteFile(h.path(configPath), []byte(text), 0o600); err != nil {
		return err
	}
	return h.StartDaemon(ctx)
}

// reset is how the host was.
func (h *host) reset(ctx context.Context) error {
	return errors.Join(h.stop(ctx), os.WriteFile(h.path(configPath), h.was, 0o600), h.quota(ctx, 0), h.StartDaemon(ctx))
}

// quota holds all shards of the host together to so many CPUs, 0 any number; what
// the host does itself is not in it. The period of 20 ms keeps a shard that has
// to wait for the next one from being late by that alone.
func (h *host) quota(ctx context.Context, cpus float64) error {
	const script = `set -e
for d in /sys/fs/cgroup/cpu /sys/fs/cgroup; do
	[ -e $d/cgroup.procs ] || continue
	mkdir -p $d/tranship
	if [ -e $d/tranship/cpu.cfs_quota_us ]; then
		echo 20000 > $d/tranship/cpu.cfs_period_us; echo $1 > $d/tranship/cpu.cfs_quota_us; exit 0
	elif [ -e $d/tranship/cpu.max ]; then
		[ $1 -ge 0 ] && echo $1 20000 > $d/tranship/cpu.max || echo max 20000 > $d/tranship/cpu.max; exit 0
	fi
done
echo no cgroup takes a quota >&2; exit 1`
	us := -1
	if cpus > 0 {
		us = int(cpus * 20000)
	}
	_, err := h.Exec(ctx, "sh", "-c", script, "sh", fmt.Sprint(us))
	return err
}

// run starts a shard that serves, and says where.
func (h *host) run(ctx context.Context, name, image string) (addr string, err error) {
	out, err := h.Exec(ctx, "tranship", "run", "-o", "json", "--name", name, "--label", "tranship.io/workload="+workload, image,
		"checker", "work", "serve", "--listen", fmt.Sprintf("0.0.0.0:%d", port), "--cost", cost.String())
	if err != nil {
		return "", err
	}
	var doc struct{ IP string }
	if err := json.Unmarshal(out, &doc); err != nil || doc.IP == "" {
		return "", fmt.Errorf("run %s: %q: %w", name, out, err)
	}
	ip, _, _ := strings.Cut(doc.IP, "/")
	return fmt.Sprintf("%s:%d", ip, port), nil
}

// remove ends a shard, from wherever it is.
func (h *host) remove(ctx context.Context, name string) error {
	node := h.Name()
	out, err := h.Exec(ctx, "tranship", "ps", "-o", "json")
	if err != nil {
		return err
	}
	var doc struct{ Shards []struct{ Name, Node string } }
	if err := json.Unmarshal(out, &doc); err != nil {
		return fmt.Errorf("tranship ps: %w", err)
	}
	for _, s := range doc.Shards {
		if s.Name == name {
			node = s.Node
		}
	}
	at, err := h.pool.Host(node)
	if err != nil {
		return err
	}
	_, err = at.Exec(ctx, "tranship", "rm", "-f", name)
	return err
}

// ask calls the daemon by its socket.
func ask[T any](h *host, do func(*control.Client) (*connect.Response[T], error)) (*T, error) {
	client, err := control.NewClient("unix://" + h.path("/run/tranship/tranship.sock"))
	if err != nil {
		return nil, err
	}
	defer client.Close()
	resp, err := do(client)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", h.Name(), err)
	}
	return resp.Msg, nil
}

// decisions since then.
func (h *host) decisions(ctx context.Context, since time.Time) ([]control.Decision, error) {
	m, err := ask(h, func(c *control.Client) (*connect.Response[v1.DecisionsResponse], error) {
		return c.Balance.Decisions(ctx, connect.NewRequest(&v1.DecisionsRequest{SinceUnixMs: since.UnixMilli()}))
	})
	return control.DecisionsOf(m.GetDecisions()), err
}

// tens of seconds of a shard since then.
func (h *host) tens(ctx context.Context, name string, since time.Time) ([]*v1.LoadPoint, error) {
	m, err := ask(h, func(c *control.Client) (*connect.Response[v1.PointsResponse], error) {
		return c.Profiles.Points(ctx, connect.NewRequest(&v1.PointsRequest{
			Namespace: "default", Shard: name, StepSeconds: int64(profile.DecaSecond / time.Second), FromUnixMs: since.UnixMilli(),
		}))
	})
	return m.GetPoints(), err
}

// awaitCalm waits until shards that have no load yet use next to nothing.
func (h *host) awaitCalm(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, fmt.Errorf("the shards on %s do not settle", h.Name()))
	defer cancel()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		m, err := ask(h, func(c *control.Client) (*connect.Response[v1.LoadResponse], error) {
			return c.Profiles.Load(ctx, connect.NewRequest(&v1.LoadRequest{}))
		})
		used := 0.0
		for _, s := range m.GetShards() {
			used += s.GetRates()[profile.CPU.String()]
		}
		if err == nil && len(m.GetShards()) >= shards && used < cpus/10 {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}

// planning is the mean time of a round since the daemon began.
func (h *host) planning(ctx context.Context) (time.Duration, error) {
	out, err := h.Exec(ctx, "curl", "-sf", "http://127.0.0.1:9464/metrics")
	if err != nil {
		return 0, err
	}
	rounds, seconds, err := planningOf(string(out))
	if err != nil || rounds == 0 {
		return 0, fmt.Errorf("%s: %v rounds of planning in its metrics: %w", h.Name(), rounds, err)
	}
	return time.Duration(seconds / rounds * float64(time.Second)), nil
}

func planningOf(metrics string) (rounds, seconds float64, err error) {
	for line := range strings.Lines(metrics) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		into := map[string]*float64{"tranship_balance_rounds_total": &rounds, "tranship_balance_plan_seconds_total": &seconds}[name]
		if into == nil {
			continue
		}
		if *into, err = strconv.ParseFloat(value, 64); err != nil {
			return 0, 0, fmt.Errorf("metric %s: %w", name, err)
		}
	}
	return rounds, seconds, nil
}

// awaitPool waits until the host reaches all n.
func (h *host) awaitPool(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, fmt.Errorf("%s does not reach the others", h.Name()))
	defer cancel()
	for tick := time.NewTicker(200 * time.Millisecond); ; {
		m, err := ask(h, func(c *control.Client) (*connect.Response[v1.ListNodesResponse], error) {
			return c.Nodes.ListNodes(ctx, connect.NewRequest(&v1.ListNodesRequest{}))
		})
		alive := 0
		for _, node := range m.GetNodes() {
			if node.GetState() == control.NodeAlive {
				alive++
			}
		}
		if err == nil && alive == n {
			tick.Stop()
			return nil
		}
		select {
		case <-ctx.Done():
			tick.Stop()
			return errors.Join(context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}
