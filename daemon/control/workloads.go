package control

import (
	"encoding/json"
	"time"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// WorkloadStep is one thing that a change does, or would do.
type WorkloadStep struct {
	Op     string `json:"op"`
	Shard  string `json:"shard"`
	Node   string `json:"node"`
	Detail string `json:"detail"`
}

// WorkloadChange is how the change of one workload ended.
type WorkloadChange struct {
	Workload string         `json:"workload"`
	Owner    string         `json:"owner"`
	Outcome  string         `json:"outcome"` // done | nothing | planned | refused | failed | cancelled
	Reason   string         `json:"reason"`
	Done     uint32         `json:"done"`
	Steps    []WorkloadStep `json:"steps"`
	Refused  []string       `json:"refused"`
}

// WorkloadChangeOf converts a plan and its result.
func WorkloadChangeOf(p *v1.WorkloadPlan, r *v1.WorkloadResult, done uint32) WorkloadChange {
	c := WorkloadChange{
		Workload: p.GetWorkload(), Owner: p.GetOwner(), Outcome: r.GetOutcome(), Reason: r.GetReason(), Done: done,
		Steps: []WorkloadStep{}, Refused: append([]string{}, p.GetRefused()...),
	}
	for _, s := range p.GetSteps() {
		c.Steps = append(c.Steps, WorkloadStep{Op: s.GetOp(), Shard: s.GetShard(), Node: s.GetNode(), Detail: s.GetDetail()})
	}
	return c
}

// WorkloadChangesDocument is what `workload apply`, `scale` and `rm` print.
type WorkloadChangesDocument struct {
	Document
	DryRun    bool             `json:"dry_run"`
	Workloads []WorkloadChange `json:"workloads"`
}

// Workload is one workload and what runs of it.
type Workload struct {
	Name       string `json:"name"`
	Namespace  string `json:"namespace"`
	Tenant     string `json:"tenant"`
	Owner      string `json:"owner"` // "": nobody applied it
	Generation uint64 `json:"generation"`
	// ChangedFrom is the host at which the last change was said, to its owner or
	// through another host; ChangedAt is by the owner's clock.
	ChangedFrom string          `json:"changed_from"`
	ChangedAt   string          `json:"changed_at"`
	Priority    uint32          `json:"priority"`
	Wanted      uint32          `json:"wanted"`
	Running     int             `json:"running"`
	Joined      int             `json:"joined"` // containers that joined by label
	Autopilot   string          `json:"autopilot"`
	Spec        json.RawMessage `json:"spec"`
	Shards      []Shard         `json:"shards"`
}

// labelIndex is on shards that an owner started, and not on those that joined.
const labelIndex = "tranship.io/index"

// WorkloadOf converts a message.
func WorkloadOf(m *v1.Workload) Workload {
	w := Workload{
		Name: m.GetName(), Namespace: m.GetNamespace(), Tenant: m.GetTenant(), Owner: m.GetOwner(), Generation: m.GetGeneration(),
		Priority: m.GetPriority(), Wanted: m.GetWanted(), Autopilot: m.GetAutopilot(), Spec: m.GetSpecJson(), Shards: []Shard{},
	}
	w.ChangedFrom = m.GetChangedFrom()
	if at := m.GetChangedAtUnixMs(); at > 0 {
		w.ChangedAt = time.UnixMilli(at).UTC().Format(time.RFC3339)
	}
	if len(w.Spec) == 0 {
		w.Spec = json.RawMessage("null")
	}
	for _, s := range m.GetShards() {
		w.Shards = append(w.Shards, ShardOf(s))
		if _, managed := s.GetLabels()[labelIndex]; !managed {
			w.Joined++
		} else if s.GetStatus() == "running" {
			w.Running++
		}
	}
	return w
}

// WorkloadsDocument is what `workload ls` prints.
type WorkloadsDocument struct {
	Document
	Workloads        []Workload `json:"workloads"`
	UnreachableNodes []string   `json:"unreachable_nodes"`
}
