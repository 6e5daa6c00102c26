package control

import (
	"time"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// PlanDocument is what `tranship plan -o json` prints. Losses are in seconds of
// overload, weighted by priority.
type PlanDocument struct {
	Document
	Node      string      `json:"node"`
	At        *time.Time  `json:"at"` // of the last round; null: none yet
	Autopilot string      `json:"autopilot"`
	EveryS    float64     `json:"every_s"`
	Shards    uint32      `json:"shards"`
	Overload  []PlanSpan  `json:"overload"`
	Loss      float64     `json:"loss"`
	Decisions []Decision  `json:"decisions"`
	Held      []HeldRoom  `json:"held"`
	Faults    []PeerFault `json:"faults"`
	Trouble   string      `json:"trouble"`
}

// PlanSpan is the probability of overload until so many seconds from now.
type PlanSpan struct {
	WithinS     float64 `json:"within_s"`
	Probability float64 `json:"probability"`
}

// HeldRoom is promised to a shard of another host.
type HeldRoom struct {
	Shard   string    `json:"shard"`
	From    string    `json:"from"`
	Reason  string    `json:"reason"`
	Expires time.Time `json:"expires"`
}

// PeerFault is why a host's word could not be used.
type PeerFault struct {
	Node string `json:"node"`
	Why  string `json:"why"`
}

// HistoryDocument is what `tranship plan --history -o json` prints, the newest
// first.
type HistoryDocument struct {
	Document
	Decisions []Decision `json:"decisions"`
}

// Decision is one, taken or not.
type Decision struct {
	ID          uint64        `json:"id"`
	At          time.Time     `json:"at"`
	Last        time.Time     `json:"last"` // the last round that came to the same
	Rounds      uint32        `json:"rounds"`
	Kind        string        `json:"kind"`
	Namespace   string        `json:"namespace"`
	Shard       string        `json:"shard"` // "": of the host as a whole
	Reason      string        `json:"reason"`
	Words       string        `json:"words"`
	From        string        `json:"from"`
	To          string        `json:"to"`
	Outcome     string        `json:"outcome"`
	Detail      string        `json:"detail"`
	Benefit     float64       `json:"benefit"`
	Price       float64       `json:"price"`
	Overload    float64       `json:"overload"`
	Expected    *DecisionCost `json:"expected,omitempty"`
	Real        *DecisionCost `json:"real,omitempty"`
	Asked       []AskedTarget `json:"asked"`
	MigrationID string        `json:"migration_id"`
	CPUsFrom    float64       `json:"cpus_from"`
	CPUsTo      float64       `json:"cpus_to"`
}

// DecisionCost is of a move.
type DecisionCost struct {
	Bytes               float64 `json:"bytes"`
	TookMs              float64 `json:"took_ms"`
	BlackoutMs          float64 `json:"blackout_ms"`
	DirtyBytesPerSecond float64 `json:"dirty_bytes_per_second"`
}

// AskedTarget is a target's answer; code "" is that it granted.
type AskedTarget struct {
	Node  string `json:"node"`
	Code  string `json:"code"`
	Words string `json:"words"`
}

// PlanOf converts a message.
func PlanOf(m *v1.PlanResponse) PlanDocument {
	doc := PlanDocument{
		Document: NewDocument(), Node: m.GetNode(), Autopilot: m.GetAutopilot(), EveryS: float64(m.GetEveryMs()) / 1e3, Shards: m.GetShards(),
		Overload: []PlanSpan{}, Loss: m.GetLoss(), Decisions: DecisionsOf(m.GetDecisions()), Held: []HeldRoom{}, Faults: []PeerFault{}, Trouble: m.GetTrouble(),
	}
	if m.GetAtUnixMs() != 0 {
		at := time.UnixMilli(m.GetAtUnixMs()).UTC()
		doc.At = &at
	}
	for _, s := range m.GetSpans() {
		doc.Overload = append(doc.Overload, PlanSpan{WithinS: float64(s.GetUntilMs()) / 1e3, Probability: s.GetOverload()})
	}
	for _, h := range m.GetHeld() {
		doc.Held = append(doc.Held, HeldRoom{Shard: h.GetShard(), From: h.GetFrom(), Reason: h.GetReason(), Expires: time.UnixMilli(h.GetExpiresUnixMs()).UTC()})
	}
	for _, f := range m.GetFaults() {
		doc.Faults = append(doc.Faults, PeerFault{Node: f.GetNode(), Why: f.GetWhy()})
	}
	return doc
}

// DecisionsOf converts messages.
func DecisionsOf(list []*v1.BalanceDecision) []Decision {
	out := []Decision{}
	for _, m := range list {
		d := Decision{
			ID: m.GetId(), At: time.UnixMilli(m.GetAtUnixMs()).UTC(), Last: time.UnixMilli(m.GetLastUnixMs()).UTC(), Rounds: m.GetRounds(),
			Kind: m.GetKind(), Namespace: m.GetNamespace(), Shard: m.GetName(), Reason: m.GetReason(), Words: m.GetWords(),
			From: m.GetFrom(), To: m.GetTo(), Outcome: m.GetOutcome(), Detail: m.GetDetail(), Benefit: m.GetBenefit(), Price: m.GetPrice(),
			Overload: m.GetOverload(), Expected: decisionCost(m.GetExpected()), Real: decisionCost(m.GetReal()), Asked: []AskedTarget{},
			MigrationID: m.GetMigrationId(), CPUsFrom: m.GetCpusFrom(), CPUsTo: m.GetCpusTo(),
		}
		for _, a := range m.GetAsked() {
			d.Asked = append(d.Asked, AskedTarget{Node: a.GetNode(), Code: a.GetCode(), Words: a.GetWords()})
		}
		out = append(out, d)
	}
	return out
}

func decisionCost(m *v1.BalanceCost) *DecisionCost {
	if m == nil {
		return nil
	}
	return &DecisionCost{Bytes: m.GetBytes(), TookMs: m.GetTookMs(), BlackoutMs: m.GetBlackoutMs(), DirtyBytesPerSecond: m.GetDirtyBytesPerSecond()}
}
