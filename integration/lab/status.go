package lab

import (
	"context"
	"strings"
	"time"
)

// Status is what `lab status` prints.
type Status struct {
	SchemaVersion int          `json:"schema_version"`
	Name          string       `json:"name,omitempty"`
	Up            bool         `json:"up"`
	BinDir        string       `json:"bin_dir,omitempty"`
	Bandwidth     string       `json:"bandwidth,omitempty"`
	Hosts         []HostStatus `json:"hosts"`
}

// HostStatus is one host, or the client, which is not in the pool.
type HostStatus struct {
	Name      string   `json:"name"`
	InPool    bool     `json:"in_pool"`
	Running   bool     `json:"running"`
	Addresses []string `json:"addresses"`
	// PID is the host's process 1, as the machine counts.
	PID        int                      `json:"pid"`
	Services   map[string]ServiceStatus `json:"services"`
	Containerd bool                     `json:"containerd"`
	Transhipd  bool                     `json:"transhipd"`
	LogDir     string                   `json:"log_dir"`
}

// ServiceStatus is a service; Answers says more than Running.
type ServiceStatus struct {
	Running bool `json:"running"`
	Answers bool `json:"answers"`
	// PID is the machine's number, HostPID the host's own.
	PID     int `json:"pid,omitempty"`
	HostPID int `json:"host_pid,omitempty"`
	Starts  int `json:"starts"`
}

// statusDeadline bounds the question to one host: a status must not hang on a
// host that does.
const statusDeadline = 5 * time.Second

// Status asks every host. A host that does not answer is not an error but
// shown as not running.
func (l *Lab) Status(ctx context.Context) Status {
	st := Status{SchemaVersion: 1, Up: true, Name: strings.TrimPrefix(labName, "."), BinDir: l.state.BinDir, Hosts: []HostStatus{}}
	if l.state.Bandwidth > 0 {
		st.Bandwidth = l.state.Bandwidth.String()
	}
	p := newPlan(Options{}, l.state)
	for _, node := range p.nodes {
		rec, ok := l.state.node(node.Name)
		if !ok || node.Role == roleSwitch {
			continue
		}
		st.Hosts = append(st.Hosts, hostStatus(ctx, node, rec))
	}
	return st
}

func hostStatus(ctx context.Context, node nodePlan, rec nodeRecord) HostStatus {
	ctx, cancel := context.WithTimeout(ctx, statusDeadline)
	defer cancel()
	hs := HostStatus{
		Name: node.Name, InPool: node.Role == roleHost, Running: rec.alive(), PID: rec.PID,
		Addresses: []string{node.Host.Addr().String(), node.Shard.Addr().String()},
		Services:  map[string]ServiceStatus{}, LogDir: nodeDir(node.Name),
	}
	ans, err := call(ctx, node.Name, request{Op: opStatus})
	if err != nil {
		hs.Running = false
		return hs
	}
	outer := pidsOf(rec.PID)
	for _, s := range ans.Services {
		hs.Services[s.Name] = ServiceStatus{
			Running: s.PID != 0, Answers: s.PID != 0 && probe(ctx, rec, s.Name) == nil,
			PID: outer[s.PID], HostPID: s.PID, Starts: s.Starts,
		}
	}
	hs.Containerd = hs.Services[serviceContainerd].Answers
	hs.Transhipd = hs.Services[serviceDaemon].Answers
	return hs
}
