package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// shard is a container that tranship moves between host-1 and host-2.
type shard struct {
	tool    *tool
	self    string
	id      string
	ip      string
	node    string
	tracker string // what the last move said
}

var (
	_ subject = (*shard)(nil)
	_ subject = (*rival)(nil)
)

// migration is the contract's document, as far as it is used here.
type migration struct {
	SchemaVersion int     `json:"schema_version"`
	Outcome       string  `json:"outcome"`
	Reason        string  `json:"reason"`
	Tracker       string  `json:"tracker"`
	TotalMs       float64 `json:"total_ms"`
	BlackoutMs    float64 `json:"blackout_ms"`
	BytesSent     int64   `json:"bytes_sent"`
	Blackout      []struct {
		Name string  `json:"name"`
		Node string  `json:"node"`
		Of   string  `json:"of"`
		Ms   float64 `json:"ms"`
	} `json:"blackout"`
}

func startShard(ctx context.Context, t *tool, self, id, image string, command ...string) (*shard, error) {
	out, err := t.on(ctx, "host-1", append([]string{"tranship", "run", "-o", "json", "--name", id, image}, command...)...)
	if err != nil {
		return nil, fmt.Errorf("start a shard: %w", err)
	}
	var doc struct {
		IP string `json:"ip"`
	}
	if err := document(out, &doc); err != nil {
		return nil, fmt.Errorf("start a shard: %w", err)
	}
	ip, _, _ := strings.Cut(doc.IP, "/")
	return &shard{tool: t, self: self, id: id, ip: ip, node: "host-1"}, nil
}

// spec is the container's OCI spec.
func (s *shard) spec(ctx context.Context) (json.RawMessage, error) {
	out, err := s.tool.on(ctx, s.node, "ctr", "containers", "info", s.id)
	if err != nil {
		return nil, err
	}
	var doc struct{ Spec json.RawMessage }
	if err := document(out, &doc); err != nil {
		return nil, fmt.Errorf("container %s: %w", s.id, err)
	}
	if len(doc.Spec) == 0 {
		return nil, fmt.Errorf("container %s: no spec", s.id)
	}
	return doc.Spec, nil
}

func (s *shard) name() string    { return tranship }
func (s *shard) address() string { return s.ip }

func (s *shard) move(ctx context.Context) (sample, error) { return s.moveBy(ctx) }

// moveBy moves it with flags of migrate.
func (s *shard) moveBy(ctx context.Context, flags ...string) (sample, error) {
	to := map[string]string{"host-1": "host-2", "host-2": "host-1"}[s.node]
	out, err := s.tool.on(ctx, s.node, append([]string{"tranship", "migrate", "-o", "json", s.id, to}, flags...)...)
	if err != nil {
		return sample{}, err
	}
	var m migration
	if err := document(out, &m); err != nil {
		return sample{}, fmt.Errorf("move %s to %s: %w", s.id, to, err)
	}
	if m.Outcome != "done" || m.BlackoutMs <= 0 {
		return sample{}, fmt.Errorf("move %s to %s: %s (%s), blackout %.0f ms", s.id, to, m.Outcome, m.Reason, m.BlackoutMs)
	}
	s.node, s.tracker = to, m.Tracker
	v := sample{Subject: tranship, Values: map[string]float64{
		blackoutMetric: m.BlackoutMs, totalMetric: m.TotalMs, bytesMetric: float64(m.BytesSent),
	}, Steps: map[string]float64{}}
	for _, step := range m.Blackout {
		name := step.Name
		if step.Of != "" {
			name = step.Of + ": " + name
		}
		if step.Node == to { // both hosts have a journal
			name = "destination: " + name
		}
		v.Steps[name] = step.Ms
	}
	return v, nil
}

// shardRow is a line of `tranship ps`.
type shardRow struct {
	Name      string `json:"name"`
	Node      string `json:"node"`
	PID       int    `json:"pid"`
	Memory    int64  `json:"memory_used_bytes"`
	Migration string `json:"migration_id"`
}

func (s *shard) row(ctx context.Context) (shardRow, error) {
	out, err := s.tool.on(ctx, s.node, "tranship", "ps", "-o", "json")
	if err != nil {
		return shardRow{}, err
	}
	var doc struct {
		Shards []shardRow `json:"shards"`
	}
	if err := document(out, &doc); err != nil {
		return shardRow{}, fmt.Errorf("tranship ps: %w", err)
	}
	for _, row := range doc.Shards {
		if row.Name == s.id && row.Node == s.node {
			return row, nil
		}
	}
	return shardRow{}, fmt.Errorf("%s is not on %s", s.id, s.node)
}

// settle waits until the shard's memory is placed.
func (s *shard) settle(ctx context.Context) error {
	return poll(ctx, "the memory of "+s.id+" is placed", seldom, 2*time.Minute, func() (bool, error) {
		row, err := s.row(ctx)
		return row.Migration == "", err
	})
}

func (s *shard) remove(ctx context.Context) error {
	_, err := s.tool.on(ctx, s.node, "tranship", "rm", "-f", s.id)
	return err
}

// runs says whether it is still where it was.
func (s *shard) runs(ctx context.Context) bool {
	_, err := s.row(ctx)
	return err == nil
}
