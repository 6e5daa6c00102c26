package control

import (
	"encoding/json"
	"time"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// The JSON documents that the CLI prints. Programs rely on them: fields are
// added, never renamed, and a change that breaks readers raises SchemaVersion.
// They are written by hand rather than by protojson, which makes strings of
// 64-bit numbers.

// SchemaVersion stands in every document.
const SchemaVersion = 1

// Document begins every JSON document.
type Document struct {
	SchemaVersion int `json:"schema_version"`
}

// NewDocument is the beginning of a document of this version.
func NewDocument() Document { return Document{SchemaVersion: SchemaVersion} }

// Shard is one shard.
type Shard struct {
	Name             string            `json:"name"`
	Namespace        string            `json:"namespace"`
	Node             string            `json:"node"`
	Image            string            `json:"image"`
	Status           string            `json:"status"`
	PID              uint32            `json:"pid"`
	ExitCode         uint32            `json:"exit_code"`
	Network          string            `json:"network"`
	IP               string            `json:"ip"`
	MAC              string            `json:"mac"`
	NetnsPath        string            `json:"netns_path"`
	MemoryLimitBytes int64             `json:"memory_limit_bytes"`
	MemoryUsedBytes  int64             `json:"memory_used_bytes"`
	CPUs             float64           `json:"cpus"`
	Labels           map[string]string `json:"labels"`
	Command          []string          `json:"command"`
	CreatedAt        time.Time         `json:"created_at"`
	MigrationID      string            `json:"migration_id"`
	// Note is what an operator should know of it, mostly nothing.
	Note string `json:"note,omitempty"`
}

// ShardOf converts a message. IP loses its prefix length, which is the pool's
// and not the shard's.
func ShardOf(m *v1.Shard) Shard {
	labels := m.GetLabels()
	if labels == nil {
		labels = map[string]string{}
	}
	return Shard{
		Name: m.GetName(), Namespace: m.GetNamespace(), Node: m.GetNode(), Image: m.GetImage(),
		Status: m.GetStatus(), PID: m.GetPid(), ExitCode: m.GetExitCode(),
		Network: m.GetNetwork(), IP: addressOf(m.GetIp()), MAC: m.GetMac(), NetnsPath: m.GetNetnsPath(),
		MemoryLimitBytes: m.GetMemoryLimitBytes(), MemoryUsedBytes: m.GetMemoryUsedBytes(), CPUs: m.GetCpus(),
		Labels: labels, Command: append([]string{}, m.GetCommand()...),
		CreatedAt: time.UnixMilli(m.GetCreatedAtUnixMs()).UTC(), MigrationID: m.GetMigrationId(),
		Note: m.GetNote(),
	}
}

func addressOf(prefix string) string {
	for i := range prefix {
		if prefix[i] == '/' {
			return prefix[:i]
		}
	}
	return prefix
}

// ShardDocument is what `run` prints.
type ShardDocument struct {
	Document
	Shard
}

// InspectDocument is what `inspect` prints.
type InspectDocument struct {
	Document
	Shard
	Spec json.RawMessage `json:"spec"`
}

// ShardsDocument is what `ps` prints.
type ShardsDocument struct {
	Document
	Shards           []Shard  `json:"shards"`
	UnreachableNodes []string `json:"unreachable_nodes"`
}

// Versions are those of a host's parts.
type Versions struct {
	Tranship   string `json:"tranship"`
	Kernel     string `json:"kernel"`
	Containerd string `json:"containerd"`
	Runc       string `json:"runc"`
	CRIU       string `json:"criu"`
	Protocol   uint32 `json:"protocol"`
	Arch       string `json:"arch"`
}

// VersionsOf converts a message.
func VersionsOf(m *v1.Versions) Versions {
	return Versions{
		Tranship: m.GetTranship(), Kernel: m.GetKernel(), Containerd: m.GetContainerd(),
		Runc: m.GetRunc(), CRIU: m.GetCriu(), Protocol: m.GetProtocol(), Arch: m.GetArch(),
	}
}

// Node is one host.
type Node struct {
	Name                 string   `json:"name"`
	Address              string   `json:"address"`
	Self                 bool     `json:"self"`
	State                string   `json:"state"`
	Error                string   `json:"error"`
	MemoryTotalBytes     int64    `json:"memory_total_bytes"`
	MemoryAvailableBytes int64    `json:"memory_available_bytes"`
	CPUs                 uint32   `json:"cpus"`
	Shards               uint32   `json:"shards"`
	Tracker              string   `json:"tracker"`
	Versions             Versions `json:"versions"`

	ID          string            `json:"id"`
	Zone        string            `json:"zone"`
	Labels      map[string]string `json:"labels"`
	CostPerHour float64           `json:"cost_per_hour"`
	// CPULoad is 0 to 1 of all CPUs, null where nothing measures it.
	CPULoad    *float64 `json:"cpu_load"`
	Cordoned   bool     `json:"cordoned"`
	Membership string   `json:"membership"`
	Authority  bool     `json:"authority"`
	// CertificateEnds is the zero time where it is not known.
	CertificateEnds time.Time `json:"certificate_ends"`
}

// NodeOf converts a message.
func NodeOf(m *v1.Node) Node {
	labels := m.GetLabels()
	if labels == nil {
		labels = map[string]string{}
	}
	var ends time.Time
	if ms := m.GetCertificateEndsUnixMs(); ms != 0 {
		ends = time.UnixMilli(ms).UTC()
	}
	return Node{
		Name: m.GetName(), Address: m.GetAddress(), Self: m.GetSelf(), State: m.GetState(), Error: m.GetError(),
		MemoryTotalBytes: m.GetMemoryTotalBytes(), MemoryAvailableBytes: m.GetMemoryAvailableBytes(),
		CPUs: m.GetCpus(), Shards: m.GetShards(), Tracker: m.GetTracker(), Versions: VersionsOf(m.GetVersions()),
		ID: m.GetId(), Zone: m.GetZone(), Labels: labels, CostPerHour: m.GetCostPerHour(), CPULoad: m.CpuLoad,
		Cordoned: m.GetCordoned(), Membership: m.GetMembership(), Authority: m.GetAuthority(), CertificateEnds: ends,
	}
}

// NodesDocument is what `nodes` prints.
type NodesDocument struct {
	Document
	Nodes []Node `json:"nodes"`
}

// VersionDocument is what `version` prints. Daemon is nil when none answers.
type VersionDocument struct {
	Document
	Client string    `json:"client"`
	Node   string    `json:"node"`
	Daemon *Versions `json:"daemon"`
}

// Finding is one result of pre-flight.
type Finding struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Advice  string `json:"advice"`
	Warning bool   `json:"warning"`
}

// FindingsOf converts messages; never nil.
func FindingsOf(ms []*v1.Finding) []Finding {
	findings := make([]Finding, 0, len(ms))
	for _, m := range ms {
		findings = append(findings, Finding{Code: m.GetCode(), Message: m.GetMessage(), Advice: m.GetAdvice(), Warning: m.GetWarning()})
	}
	return findings
}

// Refused reports whether a finding is more than a warning.
func Refused(findings []Finding) bool {
	for _, f := range findings {
		if !f.Warning {
			return true
		}
	}
	return false
}

// CheckDocument is what `check` prints.
type CheckDocument struct {
	Document
	Shard     string    `json:"shard"`
	Namespace string    `json:"namespace"`
	Node      string    `json:"node"`
	Movable   bool      `json:"movable"`
	Findings  []Finding `json:"findings"`
}

// Phase is one step of a migration.
type Phase struct {
	Name string  `json:"name"`
	Ms   float64 `json:"ms"`
}

// Round is one round of pre-copy.
type Round struct {
	N         uint32  `json:"n"`
	Pages     int64   `json:"pages"`
	BytesRaw  int64   `json:"bytes_raw"`
	BytesSent int64   `json:"bytes_sent"`
	Ms        float64 `json:"ms"`
	// ThrottledCPUs is what the shard was held to meanwhile, 0 if it was not.
	ThrottledCPUs float64 `json:"throttled_cpus,omitempty"`
	As            PagesAs `json:"pages_as"`
}

// PagesAs says how pages that are not zero went over the wire.
type PagesAs struct {
	// Unchanged pages did not: the destination had them.
	Unchanged int64 `json:"unchanged"`
	Raw       int64 `json:"raw"`
	S2        int64 `json:"s2"`
	Zstd      int64 `json:"zstd"`
	// Delta pages went as what had changed in them.
	Delta int64 `json:"delta"`
	// Copy pages went as the place of another page with the same content.
	Copy int64 `json:"copy"`
	// Twin pages went as the hash of a page that another shard has there.
	Twin int64 `json:"twin"`
}

// Migration is one migration, under way or ended.
type Migration struct {
	ID         string    `json:"id"`
	Shard      string    `json:"shard"`
	Namespace  string    `json:"namespace"`
	From       string    `json:"from"`
	To         string    `json:"to"`
	Mode       string    `json:"mode"`
	Outcome    string    `json:"outcome"`
	Reason     string    `json:"reason"`
	Code       string    `json:"code"`
	Tracker    string    `json:"tracker"`
	StartedAt  time.Time `json:"started_at"`
	TotalMs    float64   `json:"total_ms"`
	BlackoutMs float64   `json:"blackout_ms"`
	Phases     []Phase   `json:"phases"`
	Rounds     []Round   `json:"rounds"`
	BytesRaw   int64     `json:"bytes_raw"`
	BytesSent  int64     `json:"bytes_sent"`
	Pages      int64     `json:"pages"`
	Phase      string    `json:"phase"`
	Role       string    `json:"role"`
	// FrozenAtMs is when the blackout began, after StartedAt; 0 if it did not.
	FrozenAtMs float64 `json:"frozen_at_ms"`
	// Blackout are the parts of the blackout, in the order in which they ended.
	Blackout []Step `json:"blackout"`
	// ClockErrorMs is how far the at_ms of the other host may be off.
	ClockErrorMs float64 `json:"clock_error_ms"`
}

// MigrationOf converts a message; its lists are never nil.
func MigrationOf(m *v1.Migration) Migration {
	out := Migration{
		ID: m.GetId(), Shard: m.GetShard(), Namespace: m.GetNamespace(), From: m.GetFrom(), To: m.GetTo(),
		Mode: m.GetMode(), Outcome: m.GetOutcome(), Reason: m.GetReason(), Code: m.GetCode(), Tracker: m.GetTracker(),
		StartedAt: time.UnixMilli(m.GetStartedAtUnixMs()).UTC(), TotalMs: m.GetTotalMs(), BlackoutMs: m.GetBlackoutMs(),
		Phases: phasesOf(m.GetPhases()), Rounds: []Round{}, BytesRaw: m.GetBytesRaw(), BytesSent: m.GetBytesSent(),
		Pages: m.GetPages(), Phase: m.GetPhase(), Role: m.GetRole(), Blackout: []Step{}, ClockErrorMs: m.GetClockErrorMs(), FrozenAtMs: m.GetFrozenAtMs(),
	}
	for _, r := range m.GetRounds() {
		out.Rounds = append(out.Rounds, Round{N: r.GetN(), Pages: r.GetPages(), BytesRaw: r.GetBytesRaw(), BytesSent: r.GetBytesSent(), Ms: r.GetMs(), ThrottledCPUs: r.GetThrottledCpus(), As: pagesAsOf(r.GetAs())})
	}
	for _, p := range m.GetBlackout() {
		out.Blackout = append(out.Blackout, Step{Name: p.GetName(), Node: p.GetNode(), Of: p.GetOf(), AtMs: p.GetAtMs(), Ms: p.GetMs()})
	}
	return out
}

func pagesAsOf(m *v1.PagesAs) PagesAs {
	return PagesAs{Unchanged: m.GetUnchanged(), Raw: m.GetRaw(), S2: m.GetS2(), Zstd: m.GetZstd(), Delta: m.GetDelta(), Copy: m.GetCopy(), Twin: m.GetTwin()}
}

// Step is a part of a blackout.
type Step struct {
	Name string `json:"name"`
	Node string `json:"node,omitempty"`
	// Of is the step that this is a part of.
	Of string `json:"of,omitempty"`
	// AtMs is its begin after the first frozen task, negative if unknown.
	AtMs float64 `json:"at_ms"`
	Ms   float64 `json:"ms"`
}

func phasesOf(ms []*v1.Phase) []Phase {
	phases := make([]Phase, 0, len(ms))
	for _, p := range ms {
		phases = append(phases, Phase{Name: p.GetName(), Ms: p.GetMs()})
	}
	return phases
}

// MigrationDocument is what `migrate` and `migrations ID` print. Findings are
// those of pre-flight, when it refused or nothing was to be moved.
type MigrationDocument struct {
	Document
	Migration
	DryRun   bool      `json:"dry_run,omitempty"`
	Findings []Finding `json:"findings,omitempty"`
}

// MigrationsDocument is what `migrations` prints.
type MigrationsDocument struct {
	Document
	Migrations []Migration `json:"migrations"`
}

// CordonDocument is what `cordon` and `uncordon` print.
type CordonDocument struct {
	Document
	Node     string `json:"node"`
	Cordoned bool   `json:"cordoned"`
}

// DrainedShard is the end of one shard of a host that was drained.
type DrainedShard struct {
	Namespace   string  `json:"namespace"`
	Name        string  `json:"name"`
	To          string  `json:"to"`
	MigrationID string  `json:"migration_id"`
	BlackoutMs  float64 `json:"blackout_ms"`
	Code        string  `json:"code"`
	Reason      string  `json:"reason"`
}

// DrainDocument is what `drain` prints.
type DrainDocument struct {
	Document
	Node    string         `json:"node"`
	Outcome string         `json:"outcome"`
	Moved   []DrainedShard `json:"moved"`
	Stayed  []DrainedShard `json:"stayed"`
}

// DrainOf converts a result; its lists are never nil.
func DrainOf(m *v1.DrainResult) DrainDocument {
	list := func(ms []*v1.DrainedShard) []DrainedShard {
		out := make([]DrainedShard, 0, len(ms))
		for _, s := range ms {
			out = append(out, DrainedShard{
				Namespace: s.GetNamespace(), Name: s.GetName(), To: s.GetTo(), MigrationID: s.GetMigrationId(),
				BlackoutMs: s.GetBlackoutMs(), Code: s.GetCode(), Reason: s.GetReason(),
			})
		}
		return out
	}
	return DrainDocument{
		Document: NewDocument(), Node: m.GetNode(), Outcome: m.GetOutcome(), Moved: list(m.GetMoved()), Stayed: list(m.GetStayed()),
	}
}

// TokenDocument is what `cluster token` prints.
type TokenDocument struct {
	Document
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"`
	Address   string    `json:"address"`
}

// ClusterDocument is what `cluster init`, `join` and `leave` print.
type ClusterDocument struct {
	Document
	Node string `json:"node"`
	ID   string `json:"id"`
	// Authority is the host that has the CA's key.
	Authority string `json:"authority"`
}

// RevokeDocument is what `cluster revoke` prints.
type RevokeDocument struct {
	Document
	Node    string   `json:"node"`
	Told    []string `json:"told"`
	NotTold []string `json:"not_told"`
}
