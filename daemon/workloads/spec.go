// Package workloads says what a workload is and what makes the pool look like
// it. It owns the file (file.go), the desired state (Spec), the steps from what
// is to what is wanted (plan.go) and where new shards go (place.go), all pure;
// it refuses to know hosts, containers and clocks. daemon/workloads/steward
// does what it says.
//
// Flow: Parse → Spec → Plan (compare, count tenants, place) → steps.
package workloads

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Spec is the desired state of one workload. Its JSON is what hosts keep and
// exchange.
type Spec struct {
	Name      string   `json:"name"`
	Namespace string   `json:"namespace"` // containerd's
	Tenant    string   `json:"tenant,omitempty"`
	Priority  int      `json:"priority"`
	Image     string   `json:"image"`
	Command   []string `json:"command,omitempty"`
	// Env may hold {index} and {count}, which each shard has its own for.
	Env     map[string]string `json:"env,omitempty"`
	Network string            `json:"network,omitempty"`
	Shards  int               `json:"shards"`
	Size    Size              `json:"size"`
	Volumes []Volume          `json:"volumes,omitempty"`
	Spread  Spread            `json:"spread"`
	Near    []string          `json:"near,omitempty"`  // workloads that a shard's host must run
	Avoid   []string          `json:"avoid,omitempty"` // and must not
	Zones   []string          `json:"zones,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"` // of the host
	Pinned  bool              `json:"pinned,omitempty"`
	// Windows are HH:MM-HH:MM, UTC, in which shards may move by themselves.
	Windows     []string      `json:"windows,omitempty"`
	MaxBlackout time.Duration `json:"max_blackout_ns,omitempty"`
	Autopilot   string        `json:"autopilot,omitempty"` // off, advise, on; "": the host's
}

// Size of one shard. 0 is no limit, and nothing that it counts on.
type Size struct {
	CPURequest    float64 `json:"cpu_request,omitempty"`
	CPULimit      float64 `json:"cpu_limit,omitempty"`
	MemoryRequest int64   `json:"memory_request,omitempty"` // bytes
	MemoryLimit   int64   `json:"memory_limit,omitempty"`
}

// Volume is a directory or file of the host that a shard sees.
type Volume struct {
	Kind        string `json:"kind"` // shared: the same on every host; copy: moves along
	Source      string `json:"source"`
	Destination string `json:"destination"`
	ReadOnly    bool   `json:"read_only,omitempty"`
}

// Spread bounds how shards pile up; 0 is no bound.
type Spread struct {
	PerHost int `json:"per_host,omitempty"`
	PerZone int `json:"per_zone,omitempty"`
}

// Bounds of a spec, far beyond use.
const (
	MaxShards   = 10_000
	maxName     = 50 // with -9999 it is a hostname
	maxText     = 4096
	maxEntries  = 256
	minMemory   = 6 << 20 // runc itself needs this much
	maxMemory   = 1 << 50
	minCPUs     = 0.01
	maxCPUs     = 4096
	maxBlackout = time.Minute
)

var nameRule = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)

// problem is a mistake: the key that it is in, what is wrong and what to do.
type problem struct{ key, text string }

func (p problem) Error() string { return p.key + ": " + p.text }

// Validate reports every mistake, each as KEY: what is wrong; what to do.
func (s *Spec) Validate() error {
	var errs []error
	for _, p := range s.problems() {
		errs = append(errs, p)
	}
	return errors.Join(errs...)
}

func (s *Spec) problems() (out []problem) {
	bad := func(key, format string, args ...any) {
		out = append(out, problem{key, fmt.Sprintf(format, args...)})
	}
	word := func(key, v string) {
		if len(v) > maxName || !nameRule.MatchString(v) {
			bad(key, "%.80q is not a name; use up to %d small letters, digits and dashes between them", v, maxName)
		}
	}
	word("name", s.Name)
	if s.Tenant != "" {
		word("tenant", s.Tenant)
	}
	if s.Priority < 0 || s.Priority > 9 {
		bad("priority", "%d is not a priority; use 0 (yields first) to 9", s.Priority)
	}
	if s.Image == "" || len(s.Image) > maxText {
		bad("image", "an image is needed; ctr images ls lists those that a host has")
	}
	if s.Shards < 0 || s.Shards > MaxShards {
		bad("shards", "%d shards are not possible; use 0 to %d", s.Shards, MaxShards)
	}
	if !slices.Contains([]string{"", "shard", "host", "none"}, s.Network) {
		bad("network", "%q is unknown; use shard, host or none", s.Network)
	}
	if !slices.Contains([]string{"", "off", "advise", "on"}, s.Autopilot) {
		bad("autopilot", "%q is unknown; use off, advise or on", s.Autopilot)
	}
	if s.MaxBlackout < 0 || s.MaxBlackout > maxBlackout {
		bad("max_blackout", "%v is not possible; use 1ms to %v", s.MaxBlackout, maxBlackout)
	}
	if len(s.Command) > maxEntries || len(s.Env) > maxEntries || len(s.Volumes) > 16 || len(s.Labels) > 16 || len(s.Zones) > 16 {
		bad("name", "a workload has at most %d words of command and variables, and 16 volumes, labels and zones", maxEntries)
	}
	s.Size.problems(bad)
	s.volumeProblems(bad)
	s.ruleProblems(bad, word)
	return out
}

func (z Size) problems(bad func(key, format string, args ...any)) {
	for _, c := range []struct {
		key string
		v   float64
	}{{"size.cpus.request", z.CPURequest}, {"size.cpus.limit", z.CPULimit}} {
		if c.v != 0 && !(c.v >= minCPUs && c.v <= maxCPUs) {
			bad(c.key, "%v CPUs are not possible; use %v to %d, or leave it out for none", c.v, minCPUs, maxCPUs)
		}
	}
	if z.MemoryRequest < 0 || z.MemoryRequest > maxMemory {
		bad("size.memory.request", "%d bytes are not possible; write it like 256M", z.MemoryRequest)
	}
	if z.MemoryLimit != 0 && (z.MemoryLimit < minMemory || z.MemoryLimit > maxMemory) {
		bad("size.memory.limit", "%s is not possible; a container needs at least %s", FormatSize(z.MemoryLimit), FormatSize(minMemory))
	}
	if z.CPULimit > 0 && z.CPURequest > z.CPULimit {
		bad("size.cpus.request", "%v CPUs are more than the limit of %v; raise the limit or lower the request", z.CPURequest, z.CPULimit)
	}
	if z.MemoryLimit > 0 && z.MemoryRequest > z.MemoryLimit {
		bad("size.memory.request", "%s are more than the limit of %s; raise the limit or lower the request", FormatSize(z.MemoryRequest), FormatSize(z.MemoryLimit))
	}
}

func (s *Spec) volumeProblems(bad func(key, format string, args ...any)) {
	seen := map[string]bool{}
	for i, v := range s.Volumes {
		key := fmt.Sprintf("volumes.%d.", i)
		if v.Kind != "shared" && v.Kind != "copy" {
			bad(key+"kind", "%q is no kind of volume; use shared (the same directory on every host) or copy (moves with the shard)", v.Kind)
		}
		if !path.IsAbs(v.Source) || len(v.Source) > maxText {
			bad(key+"source", "%.80q is not an absolute path of the host; write it like /srv/web/{index}", v.Source)
		}
		to := path.Clean(v.Destination)
		if !path.IsAbs(v.Destination) || to == "/" || len(v.Destination) > maxText {
			bad(key+"destination", "%.80q is not an absolute path in the shard; write it like /data", v.Destination)
		}
		if seen[to] {
			bad(key+"destination", "%s is the place of two volumes; give each its own", to)
		}
		seen[to] = true
	}
}

func (s *Spec) ruleProblems(bad func(key, format string, args ...any), word func(key, v string)) {
	if s.Spread.PerHost < 0 || s.Spread.PerHost > MaxShards {
		bad("spread.per_host", "%d is not possible; use 1 or more, or leave it out", s.Spread.PerHost)
	}
	if s.Spread.PerZone < 0 || s.Spread.PerZone > MaxShards {
		bad("spread.per_zone", "%d is not possible; use 1 or more, or leave it out", s.Spread.PerZone)
	}
	for key, list := range map[string][]string{"affinity.near": s.Near, "affinity.avoid": s.Avoid} {
		if len(list) > 16 {
			bad(key, "%d workloads; name at most 16", len(list))
		}
		for _, other := range list {
			word(key, other)
		}
	}
	for _, other := range s.Near {
		if slices.Contains(s.Avoid, other) {
			bad("affinity.avoid", "%s is to be near %s and to avoid it; choose one", s.Name, other)
		}
	}
	if slices.Contains(s.Near, s.Name) {
		bad("affinity.near", "%s is to be near itself, a cycle; use spread instead", s.Name)
	}
	if slices.Contains(s.Avoid, s.Name) {
		bad("affinity.avoid", "%s is to avoid itself; use spread.per_host = 1", s.Name)
	}
	for _, z := range s.Zones {
		if !word63.MatchString(z) {
			bad("affinity.zones", "%.80q is not a zone; tranship nodes shows those that there are", z)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
		if !word63.MatchString(k) || !word63.MatchString(s.Labels[k]) {
			bad("affinity.labels", "%.80q = %.80q is not a label of hosts; use up to 63 letters, digits, dots, dashes and slashes", k, s.Labels[k])
		}
	}
	for _, w := range s.Windows {
		if !window.MatchString(w) || w[:5] == w[6:] {
			bad("windows", "%.80q is not a time of day; write it like 02:00-05:00 (UTC)", w)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(s.Env)) {
		if k == "" || strings.ContainsAny(k, "=\x00") || strings.Contains(s.Env[k], "\x00") || len(k)+len(s.Env[k]) > maxText {
			bad("env", "%.80q is not a variable; use NAME = \"value\" of up to %d characters", k, maxText)
		}
		if k == "SHARD_INDEX" || k == "SHARD_COUNT" {
			bad("env", "%s is set for every shard; leave it out", k)
		}
	}
}

var (
	word63 = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?$`)
	window = regexp.MustCompile(`^([01][0-9]|2[0-3]):[0-5][0-9]-(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$`)
)

// Shard is the name of a shard.
func (s *Spec) Shard(index int) string { return s.Name + "-" + strconv.Itoa(index) }

// EnvOf is what a shard's processes are given, sorted. SHARD_COUNT is the number
// of shards when it was started: a process cannot be told a new one.
func (s *Spec) EnvOf(index int) []string {
	env := []string{"SHARD_COUNT=" + strconv.Itoa(s.Shards), "SHARD_INDEX=" + strconv.Itoa(index)}
	for k, v := range s.Env {
		env = append(env, k+"="+s.fill(v, index))
	}
	slices.Sort(env)
	return env
}

// SourceOf is where a volume of a shard is on the host.
func (s *Spec) SourceOf(v Volume, index int) string { return s.fill(v.Source, index) }

func (s *Spec) fill(text string, index int) string {
	return strings.NewReplacer("{index}", strconv.Itoa(index), "{count}", strconv.Itoa(s.Shards)).Replace(text)
}

// Digest is of what cannot change under running processes: a shard with another
// one has to be replaced.
func (s *Spec) Digest() string {
	fixed := Spec{
		Name: s.Name, Namespace: s.Namespace, Image: s.Image, Command: s.Command, Env: s.Env, Network: s.Network, Volumes: s.Volumes,
	}
	raw, err := json.Marshal(fixed)
	if err != nil {
		panic(err) // strings, numbers and lists of them
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:8])
}

// Decode reads a spec that another process sent, and checks all of it.
func Decode(raw []byte) (*Spec, error) {
	s := new(Spec)
	dec := json.NewDecoder(strings.NewReader(string(raw)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(s); err != nil {
		return nil, fmt.Errorf("workload: %w", err)
	}
	if err := s.Validate(); err != nil {
		return nil, fmt.Errorf("workload %.80q: %w", s.Name, err)
	}
	return s, nil
}

// Encode is what Decode reads.
func (s *Spec) Encode() []byte {
	raw, err := json.Marshal(s)
	if err != nil {
		panic(err) // Validate refuses NaN
	}
	return raw
}

// FormatSize writes bytes as a file would.
func FormatSize(n int64) string {
	for _, u := range []struct {
		s    string
		size int64
	}{{"T", 1 << 40}, {"G", 1 << 30}, {"M", 1 << 20}, {"K", 1 << 10}} {
		switch {
		case n >= u.size && n%u.size == 0:
			return strconv.FormatInt(n/u.size, 10) + u.s
		case n >= 10*u.size:
			return strconv.FormatFloat(float64(n)/float64(u.size), 'f', 1, 64) + u.s
		}
	}
	return strconv.FormatInt(n, 10)
}
