package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/integration/bench/closedloop"
	"github.com/tranship/tranship/integration/bench/profile"
)

const resultsVersion = 1

// results is what a benchmark leaves behind, bench/results.json.
type results struct {
	SchemaVersion int       `json:"schema_version"`
	MeasuredAt    time.Time `json:"measured_at"`
	Machine       machine   `json:"machine"`
	// Method says how each number is measured.
	Method []string `json:"method"`
	Groups []group  `json:"groups"`
	Rows   []row    `json:"rows"`
}

// machine is what the numbers depend on.
type machine struct {
	Kernel   string `json:"kernel"`
	CPU      string `json:"cpu"`
	CPUs     int    `json:"cpus"`
	MemMiB   int64  `json:"memory_mib"`
	CRIU     string `json:"criu"`
	Runc     string `json:"runc"`
	Tranship string `json:"tranship"`
}

// group is what was measured together, alternating.
type group struct {
	Name       string    `json:"name"`
	About      string    `json:"about"`
	MeasuredAt time.Time `json:"measured_at"`
	// Load is the machine's load average of a minute when the group began, and
	// when it ended: what else ran is in the numbers too.
	Load    float64 `json:"load_at_begin"`
	LoadEnd float64 `json:"load_at_end"`
	// MemoryMiB is what the shard's processes had in memory.
	MemoryMiB float64  `json:"memory_mib,omitempty"`
	Samples   []sample `json:"samples,omitempty"`
	Absent    []absent `json:"absent,omitempty"`
	// Found is what a package of its own has measured and judged.
	Found []profile.Row `json:"found,omitempty"`
	// Recording is the load that a past was made of.
	Recording *closedloop.Recording `json:"recording,omitempty"`
}

// sample is one measurement of one subject.
type sample struct {
	Subject string `json:"subject"`
	// Values by metric; its name ends with the unit.
	Values map[string]float64 `json:"values"`
	// Steps is where the blackout went, in milliseconds.
	Steps map[string]float64 `json:"steps,omitempty"`
}

// absent is what could not be measured here.
type absent struct {
	Subject string `json:"subject"`
	Why     string `json:"why"`
}

// row is a line of the table of targets.
type row struct {
	Name   string   `json:"name"`
	Value  *float64 `json:"value"` // null when it was not measured
	Unit   string   `json:"unit"`
	Target float64  `json:"target"`
	// AtLeast turns the comparison: otherwise the value is at most the target.
	AtLeast bool `json:"at_least"`
	Pass    bool `json:"pass"`
	// Few is how many samples it should rest on, when it rests on fewer: then it
	// passes nothing.
	Few  int    `json:"too_few_of,omitempty"`
	Note string `json:"note,omitempty"`
}

// of returns the values of one metric of one subject.
func (g group) of(subject, metric string) []float64 {
	var out []float64
	for _, s := range g.Samples {
		if v, ok := s.Values[metric]; ok && s.Subject == subject {
			out = append(out, v)
		}
	}
	return out
}

// subjects in the order of their first sample.
func (g group) subjects() []string {
	var out []string
	for _, s := range g.Samples {
		if !slices.Contains(out, s.Subject) {
			out = append(out, s.Subject)
		}
	}
	return out
}

func (r *results) group(name string) (group, bool) {
	for _, g := range r.Groups {
		if g.Name == name {
			return g, true
		}
	}
	return group{}, false
}

// put adds a group, or replaces an older measurement of it.
func (r *results) put(g group) {
	for i := range r.Groups {
		if r.Groups[i].Name == g.Name {
			r.Groups[i] = g
			return
		}
	}
	r.Groups = append(r.Groups, g)
}

const resultsFile = "results.json"

// loadResults reads what an earlier run left; nothing is no error.
func loadResults(dir string) (*results, error) {
	raw, err := os.ReadFile(filepath.Join(dir, resultsFile))
	if errors.Is(err, os.ErrNotExist) {
		return &results{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("earlier results: %w", err)
	}
	var r results
	if err := json.Unmarshal(raw, &r); err != nil {
		return nil, fmt.Errorf("earlier results in %s: %w", dir, err)
	}
	if r.SchemaVersion != resultsVersion {
		return nil, fmt.Errorf("earlier results in %s are of version %d: remove them", dir, r.SchemaVersion)
	}
	return &r, nil
}

func (r *results) save(dir string) error {
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("results: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("results: %w", err)
	}
	next := filepath.Join(dir, resultsFile+".next")
	if err := os.WriteFile(next, append(raw, '\n'), 0o644); err != nil {
		return fmt.Errorf("results: %w", err)
	}
	return os.Rename(next, filepath.Join(dir, resultsFile))
}

// load1 is the load average of the last minute, 0 where it cannot be read.
func load1() float64 {
	raw, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	var v float64
	if _, err := fmt.Sscan(string(raw), &v); err != nil {
		return 0
	}
	return v
}

// thisMachine fills in what the kernel knows; versions are the caller's.
func thisMachine() machine {
	var m machine
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.MemMiB = int64(info.Totalram) * int64(info.Unit) >> 20
	}
	raw, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(raw)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "processor":
			m.CPUs++
		case "model name":
			m.CPU = strings.TrimSpace(value)
		}
	}
	return m
}
