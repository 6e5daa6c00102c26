package workloads

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Host of the pool, as it was last heard of.
type Host struct {
	Name, Zone                   string
	Labels                       map[string]string
	Alive, Cordoned              bool
	CPUs                         int
	CPULoad                      float64 // 0 to 1 of all CPUs
	MemoryTotal, MemoryAvailable int64
	Shards                       []Shard // all that is there, whoever's
}

// Shard is a container on a host.
type Shard struct {
	Namespace, Name string
	Workload        string // "": none
	Tenant          string
	Index           int      // -1: it joined by label, and is nobody's to change
	Avoid           []string // workloads that it keeps off its host
	Running         bool
	State           string // for a person, when it does not run
	Moving          string // the migration that moves it
	Incoming        bool   // what a migration builds; the shard is elsewhere
	Image           string
	CPUs            float64 // limits in force, 0 none
	Memory          int64
	RequestCPUs     float64
	RequestMemory   int64
	Used            int64 // memory
	Held            int64 // of Used, what it cannot give back
	Digest          string
	// Policy are the labels that Input.Policy is compared with.
	Policy map[string]string
}

// Tenant is what the shards of a tenant may count on together; 0 is no bound.
type Tenant struct {
	CPUs   float64
	Memory int64
	Shards int
}

// Input of a plan.
type Input struct {
	Name, Namespace string
	Want            *Spec // nil: nothing is to be left of it
	Hosts           []Host
	// Begun are the indexes of shards that were ever started and not seen removed.
	Begun []int
	// Others are the pool's other workloads.
	Others []*Spec
	// Tenants by name.
	Tenants map[string]Tenant
	// Policy are the labels that a shard of Want carries.
	Policy map[string]string
	// Prefer says on which host a new shard, by name, goes if it may: an earlier
	// plan said so, and loads have changed a little since.
	Prefer map[string]string
}

// Operations of a step.
const (
	Remove  = "remove"
	Change  = "change"  // in place, under its processes
	Replace = "replace" // stopped, removed and started anew
	Add     = "add"
)

// Step is one thing to do for one shard.
type Step struct {
	Op     string
	Index  int
	Shard  string
	Node   string
	Detail string
}

func (s Step) String() string {
	switch s.Op {
	case Add:
		return fmt.Sprintf("+ shard %s on %s", s.Shard, s.Node)
	case Remove:
		return fmt.Sprintf("- %s on %s", s.Shard, s.Node)
	case Replace:
		return fmt.Sprintf("± %s on %s replaced: %s", s.Shard, s.Node, s.Detail)
	}
	return fmt.Sprintf("~ %s %s in place", s.Shard, s.Detail)
}

// Plan is what makes the pool look as wanted.
type Plan struct {
	Steps   []Step // in the order in which they are done
	Refused []string
}

// Fingerprint is equal for plans that do the same.
func (p Plan) Fingerprint() string {
	h := sha256.New()
	for _, s := range p.Steps {
		fmt.Fprintf(h, "%s\x00%s\x00%s\x00%s\n", s.Op, s.Shard, s.Node, s.Detail)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// planner gathers one plan.
type planner struct {
	in    Input
	found map[int]place
	Plan
}

// place is a shard where it is.
type place struct {
	host  *Host
	shard *Shard
}

// Make compares what is with what is wanted:
//
//  1. find the workload's shards on the hosts
//  2. those beyond the number go; those that are there are changed in place or
//     replaced; missing ones are placed
//  3. count what the tenant then uses
//
// What cannot be done is in Refused, each with the next step; then nothing is
// to be done at all. A shard that is missing may be on a host that does not
// answer: it is not started a second time. Hosts are not changed.
func Make(in Input) Plan {
	in.Hosts = slices.Clone(in.Hosts)
	for i := range in.Hosts {
		in.Hosts[i].Shards = slices.Clone(in.Hosts[i].Shards)
	}
	p := &planner{in: in, found: map[int]place{}}
	p.find()
	var missing []int
	wanted := 0
	if in.Want != nil {
		wanted = in.Want.Shards
	}
	for _, i := range slices.Sorted(maps.Keys(p.found)) {
		if i >= wanted {
			p.remove(i)
		}
	}
	for i := range wanted {
		at, ok := p.found[i]
		if !ok {
			missing = append(missing, i)
			continue
		}
		p.keep(i, at)
	}
	p.notHidden()
	if in.Want != nil {
		p.noCycle()
		p.count()
		p.add(missing)
	}
	order := []string{Remove, Change, Replace, Add}
	slices.SortStableFunc(p.Steps, func(a, b Step) int { return slices.Index(order, a.Op) - slices.Index(order, b.Op) })
	return p.Plan
}

func (p *planner) refuse(format string, args ...any) {
	p.Refused = append(p.Refused, fmt.Sprintf(format, args...))
}

// find maps indexes to shards. A shard on its way shows on two hosts.
func (p *planner) find() {
	var arriving []*Shard
	for h := range p.in.Hosts {
		host := &p.in.Hosts[h]
		for s := range host.Shards {
			shard := &host.Shards[s]
			if shard.Namespace != p.in.Namespace || shard.Workload != p.in.Name || shard.Index < 0 {
				continue
			}
			if shard.Incoming {
				arriving = append(arriving, shard)
				continue
			}
			other, twice := p.found[shard.Index]
			if !twice {
				p.found[shard.Index] = place{host, shard}
				continue
			}
			if other.shard.Moving == "" && shard.Moving == "" {
				p.refuse("%s is on %s and on %s: remove the wrong one there, with tranship rm", shard.Name, other.host.Name, host.Name)
			} else if shard.Running && !other.shard.Running {
				p.found[shard.Index] = place{host, shard}
			}
		}
	}
	for _, s := range arriving {
		if _, ok := p.found[s.Index]; !ok {
			p.refuse("%s is being moved, and its old host does not show it: do this again when it has arrived (tranship migrations)", s.Name)
		}
	}
}

// moving refuses to touch a shard under a migration.
func (p *planner) moving(at place) bool {
	if at.shard.Moving == "" {
		return false
	}
	p.refuse("%s is being moved: wait for migration %s, or tranship cancel %s on %s", at.shard.Name, at.shard.Moving, at.shard.Moving, at.host.Name)
	return true
}

func (p *planner) remove(index int) {
	at := p.found[index]
	if p.moving(at) {
		return
	}
	p.Steps = append(p.Steps, Step{Op: Remove, Index: index, Shard: at.shard.Name, Node: at.host.Name})
	at.host.Shards = slices.DeleteFunc(at.host.Shards, func(s Shard) bool { return s.Namespace == p.in.Namespace && s.Name == at.shard.Name })
	delete(p.found, index)
	// Deleting shifted what other places of this host point to.
	p.repoint(at.host)
}

func (p *planner) repoint(host *Host) {
	for s := range host.Shards {
		shard := &host.Shards[s]
		if at, ok := p.found[shard.Index]; ok && at.host == host && shard.Namespace == p.in.Namespace && shard.Workload == p.in.Name && !shard.Incoming {
			p.found[shard.Index] = place{host, shard}
		}
	}
}

// keep changes or replaces a shard that is there, or leaves it alone.
func (p *planner) keep(index int, at place) {
	want, s := p.in.Want, at.shard
	step := Step{Index: index, Shard: s.Name, Node: at.host.Name}
	switch {
	case !s.Running:
		step.Op, step.Detail = Replace, "it is "+s.State
	case s.Digest != want.Digest():
		step.Op, step.Detail = Replace, "command, environment, network or volumes differ"
		if s.Image != "" && s.Image != want.Image && !strings.HasSuffix(s.Image, "/"+want.Image) {
			step.Detail = "image " + s.Image + " → " + want.Image
		}
	default:
		step.Op, step.Detail = Change, p.differences(s)
		if step.Detail == "" {
			return
		}
	}
	if p.moving(at) {
		return
	}
	if why := p.misplaced(at, step.Op); why != "" {
		p.refuse("%s is on %s, which %s: tranship migrate it to a host that may run it, and do this again", s.Name, at.host.Name, why)
	}
	if step.Op == Replace && at.host.Cordoned {
		p.refuse("%s would be replaced (%s) on %s, which is cordoned: tranship uncordon it, or move the shard first", s.Name, step.Detail, at.host.Name)
	}
	if z := want.Size.MemoryLimit; step.Op == Change && z > 0 && z < s.Held {
		p.refuse("%s has %s of memory that it cannot give back, and the limit would be %s: choose a limit above that", s.Name, FormatSize(s.Held), FormatSize(z))
	}
	p.grows(at)
	p.Steps = append(p.Steps, step)
}

// misplaced says why a shard may not be where it is by the rules that are wanted,
// "" when it may. Only who changes the rules is told, and who starts it anew:
// else a shard that a person moved could not be changed any more.
func (p *planner) misplaced(at place, op string) string {
	rules := []string{"tranship.io/zones", "tranship.io/host-labels", "tranship.io/avoid", "tranship.io/near"}
	if op == Change && !slices.ContainsFunc(rules, func(k string) bool { return at.shard.Policy[k] != p.in.Policy[k] }) {
		return ""
	}
	want, h := *p.in.Want, *at.host
	want.Size, want.Spread.PerZone = Size{}, 0
	if op == Change {
		want.Spread.PerHost = 0
	}
	// Room and cordon are others' business here.
	h.Cordoned, h.Alive, h.CPUs, h.MemoryTotal, h.MemoryAvailable = false, true, maxCPUs, maxMemory, maxMemory
	h.Shards = slices.DeleteFunc(slices.Clone(h.Shards), func(s Shard) bool { return s.Namespace == p.in.Namespace && s.Name == at.shard.Name })
	return Unfit(&want, at.shard.Name, &h, nil)
}

// noCycle refuses a workload that closes a circle of those that are near each
// other: once its shards were gone, none could be placed first.
func (p *planner) noCycle() {
	index := map[string]int{p.in.Want.Name: 0}
	specs := []*Spec{p.in.Want}
	for _, s := range p.in.Others {
		if s.Namespace == p.in.Namespace {
			index[s.Name] = len(specs)
			specs = append(specs, s)
		}
	}
	if cycle := cycleOf(specs, index); len(cycle) > 1 && slices.Contains(cycle, p.in.Want.Name) {
		p.refuse("affinity.near: %s is a cycle, and none could be placed first: leave one of them out", strings.Join(cycle, " → "))
	}
}

// differences of what can change in place, in words.
func (p *planner) differences(s *Shard) string {
	z := p.in.Want.Size
	var out []string
	if s.Memory != z.MemoryLimit {
		out = append(out, fmt.Sprintf("memory %s → %s", orNone(s.Memory), orNone(z.MemoryLimit)))
	}
	// The autopilot may have put a limit of its own in force, below the label's.
	if s.CPUs != z.CPULimit && (s.Policy["tranship.io/autopilot"] != "on" || s.Policy["tranship.io/limit-cpus"] != p.in.Policy["tranship.io/limit-cpus"]) {
		out = append(out, fmt.Sprintf("cpus %s → %s", cpusOrNone(s.CPUs), cpusOrNone(z.CPULimit)))
	}
	keys := slices.Collect(maps.Keys(p.in.Policy))
	for k := range s.Policy {
		if _, both := p.in.Policy[k]; !both {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		name := strings.TrimPrefix(k, "tranship.io/")
		if s.Policy[k] == p.in.Policy[k] || strings.HasPrefix(name, "limit-") && len(out) > 0 {
			continue
		}
		out = append(out, fmt.Sprintf("%s %s → %s", name, readable(name, s.Policy[k]), readable(name, p.in.Policy[k])))
	}
	return strings.Join(out, ", ")
}

func orNone(n int64) string {
	if n == 0 {
		return "unlimited"
	}
	return FormatSize(n)
}

func cpusOrNone(c float64) string {
	if c == 0 {
		return "unlimited"
	}
	return fmt.Sprintf("%g", c)
}

// readable is a label's value for a person.
func readable(name, value string) string {
	if value == "" {
		return "-"
	}
	if n, err := strconv.ParseInt(value, 10, 64); err == nil && strings.HasSuffix(name, "-memory") {
		return FormatSize(n)
	}
	return value
}

// grows refuses a larger request that the host has no room for, and counts it.
func (p *planner) grows(at place) {
	z, s := p.in.Want.Size, at.shard
	cpus, memory := z.CPURequest-s.RequestCPUs, z.MemoryRequest-s.RequestMemory
	room := at.host.room()
	if cpus > 0 && cpus > room.cpus+epsilon {
		p.refuse("%s cannot grow on %s: %.2f CPUs more are needed, and %.2f are free; move it (tranship migrate), or lower size.cpus.request", s.Name, at.host.Name, cpus, max(0, room.cpus))
	}
	if memory > 0 && memory > room.memory {
		p.refuse("%s cannot grow on %s: %s more are needed, and %s are free; move it (tranship migrate), or lower size.memory.request", s.Name, at.host.Name, FormatSize(memory), FormatSize(max(0, room.memory)))
	}
	s.RequestCPUs, s.RequestMemory = z.CPURequest, z.MemoryRequest
}

// notHidden refuses while a shard may be on a host that does not answer: a
// second copy would be worse than none.
func (p *planner) notHidden() {
	var silent []string
	for _, h := range p.in.Hosts {
		if !h.Alive {
			silent = append(silent, h.Name)
		}
	}
	if len(silent) == 0 {
		return
	}
	var hidden []string
	for _, i := range p.in.Begun {
		if _, ok := p.found[i]; ok || slices.ContainsFunc(p.Steps, func(s Step) bool { return s.Index == i }) {
			continue
		}
		hidden = append(hidden, fmt.Sprintf("%s-%d", p.in.Name, i))
	}
	if len(hidden) > 0 {
		p.refuse("%s may be on %s, which does not answer: bring it back, or, if it is gone for good, tranship cluster revoke it",
			strings.Join(hidden, ", "), strings.Join(silent, ", "))
	}
}

// counts is what a shard counts for its tenant: its request, or without one its limit.
func (z Size) counts() (cpus float64, memory int64) {
	cpus, memory = z.CPURequest, z.MemoryRequest
	if cpus == 0 {
		cpus = z.CPULimit
	}
	if memory == 0 {
		memory = z.MemoryLimit
	}
	return cpus, memory
}

// count adds up what the tenant would use.
func (p *planner) count() {
	want := p.in.Want
	quota, bounded := p.in.Tenants[want.Tenant]
	if want.Tenant == "" || !bounded {
		return
	}
	managed := map[string]bool{want.Name: true}
	var cpus float64
	var memory int64
	var shards int
	for _, s := range append(slices.Clone(p.in.Others), want) {
		if s.Tenant != want.Tenant {
			continue
		}
		managed[s.Name] = true
		c, m := s.Size.counts()
		cpus, memory, shards = cpus+c*float64(s.Shards), memory+m*int64(s.Shards), shards+s.Shards
	}
	for _, h := range p.in.Hosts {
		for _, s := range h.Shards {
			if s.Tenant != want.Tenant || s.Incoming || s.Index >= 0 && managed[s.Workload] {
				continue
			}
			c, m := Size{CPURequest: s.RequestCPUs, CPULimit: s.CPUs, MemoryRequest: s.RequestMemory, MemoryLimit: s.Memory}.counts()
			cpus, memory, shards = cpus+c, memory+m, shards+1
		}
	}
	c, m := want.Size.counts()
	next := fmt.Sprintf("lower the size or the number of shards, or raise [tenants.%s] in the hosts' config.toml", want.Tenant)
	switch {
	case quota.CPUs > 0 && c == 0 && want.Shards > 0:
		p.refuse("tenant %s may use %g CPUs, so size.cpus.request has to be said", want.Tenant, quota.CPUs)
	case quota.CPUs > 0 && cpus > quota.CPUs+epsilon:
		p.refuse("tenant %s may use %g CPUs and would use %g: %s", want.Tenant, quota.CPUs, cpus, next)
	}
	switch {
	case quota.Memory > 0 && m == 0 && want.Shards > 0:
		p.refuse("tenant %s may use %s of memory, so size.memory.request has to be said", want.Tenant, FormatSize(quota.Memory))
	case quota.Memory > 0 && memory > quota.Memory:
		p.refuse("tenant %s may use %s of memory and would use %s: %s", want.Tenant, FormatSize(quota.Memory), FormatSize(memory), next)
	}
	if quota.Shards > 0 && shards > quota.Shards {
		p.refuse("tenant %s may have %d shards and would have %d: %s", want.Tenant, quota.Shards, shards, next)
	}
}

// epsilon is less CPU than anybody asks for, and more than sums of floats err by.
const epsilon = 1e-6

// Grows says why a shard cannot have the requests of a spec on its host; "" when
// it can.
func Grows(h Host, name string, want *Spec) string {
	for i := range h.Shards {
		s := &h.Shards[i]
		if s.Namespace != want.Namespace || s.Name != name {
			continue
		}
		p := &planner{in: Input{Want: want}}
		p.grows(place{&h, &Shard{Name: s.Name, RequestCPUs: s.RequestCPUs, RequestMemory: s.RequestMemory}})
		return strings.Join(p.Refused, "; ")
	}
	return ""
}
