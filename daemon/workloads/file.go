package workloads

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// MaxFile bounds a workload file.
const MaxFile = 1 << 20

// file is what people write, in TOML or YAML: a list of workloads.
type file struct {
	Workload []fileWorkload `toml:"workload"`
}

type fileWorkload struct {
	Name        string            `toml:"name"`
	Tenant      string            `toml:"tenant"`
	Priority    int               `toml:"priority"`
	Image       string            `toml:"image"`
	Command     []string          `toml:"command"`
	Env         map[string]string `toml:"env"`
	Network     string            `toml:"network"`
	Shards      int               `toml:"shards"`
	Size        fileSize          `toml:"size"`
	Volumes     []fileVolume      `toml:"volumes"`
	Spread      fileSpread        `toml:"spread"`
	Affinity    fileAffinity      `toml:"affinity"`
	Pinned      bool              `toml:"pinned"`
	Windows     []string          `toml:"windows"`
	MaxBlackout string            `toml:"max_blackout"`
	Autopilot   string            `toml:"autopilot"`
}

type fileSize struct {
	CPUs   fileCPUs   `toml:"cpus"`
	Memory fileMemory `toml:"memory"`
}

type fileCPUs struct {
	Request float64 `toml:"request"`
	Limit   float64 `toml:"limit"`
}

type fileMemory struct {
	Request bytesOf `toml:"request"`
	Limit   bytesOf `toml:"limit"`
}

type fileVolume struct {
	Kind        string `toml:"kind"`
	Source      string `toml:"source"`
	Destination string `toml:"destination"`
	ReadOnly    bool   `toml:"read_only"`
}

type fileSpread struct {
	PerHost int `toml:"per_host"`
	PerZone int `toml:"per_zone"`
}

type fileAffinity struct {
	Near   []string          `toml:"near"`
	Avoid  []string          `toml:"avoid"`
	Zones  []string          `toml:"zones"`
	Labels map[string]string `toml:"labels"`
}

// bytesOf is a size like "256M".
type bytesOf int64

// UnmarshalText reads it.
func (b *bytesOf) UnmarshalText(text []byte) error {
	n, err := ParseSize(string(text))
	*b = bytesOf(n)
	return err
}

// ParseSize reads 512M, 1.5G or a number of bytes. Units are powers of two.
func ParseSize(s string) (int64, error) {
	bad := fmt.Errorf("size %.80q: write it like 512M or 2G", s)
	number := strings.TrimSuffix(strings.TrimSuffix(strings.ToLower(s), "b"), "i")
	scale := 1.0
	if n := len(number); n > 0 {
		if i := strings.IndexByte("kmgt", number[n-1]); i >= 0 {
			number, scale = number[:n-1], math.Pow(1024, float64(i+1))
		}
	}
	if number == "" || strings.Trim(number, "0123456789.") != "" {
		return 0, bad
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || f*scale > maxMemory {
		return 0, bad
	}
	return int64(f * scale), nil
}

// Mistake is one thing that is wrong with a file.
type Mistake struct {
	File string
	Line int // from 1; 0 when it is of the whole file
	Text string
}

func (m Mistake) Error() string {
	if m.Line == 0 {
		return m.File + ": " + m.Text
	}
	return fmt.Sprintf("%s:%d: %s", m.File, m.Line, m.Text)
}

// Parse reads a workload file. namespace is containerd's for all of it. The
// error is every Mistake, joined, a line each. The specs are in an order in
// which they can be applied: whom a workload is near comes first.
func Parse(name string, raw []byte, namespace string) ([]*Spec, error) {
	whole := func(format string, args ...any) error { return Mistake{File: name, Text: fmt.Sprintf(format, args...)} }
	if len(raw) > MaxFile {
		return nil, whole("%d bytes are too many; a workload file has at most %d", len(raw), MaxFile)
	}
	text, begin := raw, "[[workload]]"
	lineOf := func(line int) int { return line }
	var where lineMap
	if isYAML(name, raw) {
		var err error
		if text, where, err = fromYAML(name, raw); err != nil {
			return nil, err
		}
		begin = "workload: and a list"
		lineOf = func(line int) int { return where.written(text, line) }
	}
	var f file
	dec := toml.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&f); err != nil {
		return nil, decodeMistakes(name, err, lineOf)
	}
	if len(f.Workload) == 0 {
		return nil, whole("no workload in it; begin one with %s", begin)
	}
	if where == nil {
		where = lines(raw)
	}
	var errs []error
	mistake := func(i int, key, text string) {
		errs = append(errs, Mistake{name, where.of(i, key), text})
	}
	specs := make([]*Spec, len(f.Workload))
	first := map[string]int{}
	for i := range f.Workload {
		w := &f.Workload[i]
		s, problems := w.spec(namespace)
		specs[i] = s
		if w.Shards == 0 && where.of(i, "shards") == where.of(i, "") {
			problems = append(problems, problem{"shards", "the number of shards is missing; write shards = 1"})
		}
		for _, p := range problems {
			mistake(i, p.key, p.Error())
		}
		if j, twice := first[s.Name]; twice && s.Name != "" {
			mistake(i, "name", fmt.Sprintf("name: %s is already the name of the workload in line %d; choose another", s.Name, where.of(j, "name")))
		} else {
			first[s.Name] = i
		}
	}
	if cycle := cycleOf(specs, first); len(cycle) > 1 {
		mistake(first[cycle[0]], "affinity.near", fmt.Sprintf("affinity.near: %s is a cycle, and none could be placed first; leave one of them out", strings.Join(cycle, " → ")))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return inOrder(specs, first), nil
}

// decodeMistakes takes an error of decoding apart; lineOf is where in the file a
// line of what was decoded is.
func decodeMistakes(name string, err error, lineOf func(int) int) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		var errs []error
		for _, e := range strict.Errors {
			line, _ := e.Position()
			errs = append(errs, Mistake{name, lineOf(line), fmt.Sprintf("unknown key %s; remove it or correct its spelling", strings.Join(e.Key(), "."))})
		}
		return errors.Join(errs...)
	}
	var syntax *toml.DecodeError
	if errors.As(err, &syntax) {
		line, _ := syntax.Position()
		text := strings.TrimPrefix(syntax.Error(), "toml: ")
		return Mistake{name, lineOf(line), strings.ReplaceAll(text, "\n", " ") + "; correct the line"}
	}
	return Mistake{File: name, Text: strings.ReplaceAll(strings.TrimPrefix(err.Error(), "toml: "), "\n", " ") + "; correct it"}
}

func (w *fileWorkload) spec(namespace string) (*Spec, []problem) {
	s := &Spec{
		Name: w.Name, Namespace: namespace, Tenant: w.Tenant, Priority: w.Priority, Image: w.Image, Command: w.Command, Env: w.Env,
		Network: w.Network, Shards: w.Shards, Pinned: w.Pinned, Windows: w.Windows, Autopilot: w.Autopilot,
		Size: Size{
			CPURequest: w.Size.CPUs.Request, CPULimit: w.Size.CPUs.Limit,
			MemoryRequest: int64(w.Size.Memory.Request), MemoryLimit: int64(w.Size.Memory.Limit),
		},
		Spread: Spread{PerHost: w.Spread.PerHost, PerZone: w.Spread.PerZone},
		Near:   w.Affinity.Near, Avoid: w.Affinity.Avoid, Zones: w.Affinity.Zones, Labels: w.Affinity.Labels,
	}
	for _, v := range w.Volumes {
		s.Volumes = append(s.Volumes, Volume(v))
	}
	var problems []problem
	if w.MaxBlackout != "" {
		d, err := time.ParseDuration(w.MaxBlackout)
		if err != nil || d < time.Millisecond {
			problems = append(problems, problem{"max_blackout", fmt.Sprintf("%.80q is not a duration; write it like 300ms", w.MaxBlackout)})
		} else {
			s.MaxBlackout = d
		}
	}
	return s, append(problems, s.problems()...)
}

// cycleOf finds a cycle among the workloads of a file that are near each other.
func cycleOf(specs []*Spec, index map[string]int) []string {
	const open, closed = 1, 2
	state := map[string]int{}
	var way []string
	var visit func(name string) []string
	visit = func(name string) []string {
		i, here := index[name]
		if !here || state[name] == closed {
			return nil
		}
		if state[name] == open {
			return append(slices.Clone(way[slices.Index(way, name):]), name)
		}
		state[name] = open
		way = append(way, name)
		for _, other := range specs[i].Near {
			if other == name {
				continue // said already
			}
			if cycle := visit(other); cycle != nil {
				return cycle
			}
		}
		way = way[:len(way)-1]
		state[name] = closed
		return nil
	}
	for _, s := range specs {
		if cycle := visit(s.Name); cycle != nil {
			return cycle
		}
	}
	return nil
}

// inOrder puts whom a workload is near before it; there is no cycle.
func inOrder(specs []*Spec, index map[string]int) []*Spec {
	var out []*Spec
	done := map[string]bool{}
	var add func(s *Spec)
	add = func(s *Spec) {
		if done[s.Name] {
			return
		}
		done[s.Name] = true
		for _, other := range s.Near {
			if i, here := index[other]; here {
				add(specs[i])
			}
		}
		out = append(out, s)
	}
	for _, s := range specs {
		add(s)
	}
	return out
}

// lineMap knows the line of every key of a file: "workload.0.size.cpus" → 7.
type lineMap map[string]int

// of is the line of a key of the i-th workload, or of what holds it.
func (m lineMap) of(i int, key string) int {
	at := "workload." + strconv.Itoa(i)
	for full := at + "." + key; len(full) > len(at); full = full[:strings.LastIndexByte(full, '.')] {
		if line, ok := m[full]; ok {
			return line
		}
	}
	return m[at]
}

// lines walks a file that decodes.
func lines(raw []byte) lineMap {
	m := lineMap{}
	var p unstable.Parser
	p.Reset(raw)
	count := map[string]int{} // of array tables
	prefix := ""
	line := func(n *unstable.Node) int { return p.Shape(n.Raw).Start.Line }
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			prefix = ""
			var at int
			for it := e.Key(); it.Next(); {
				prefix += string(it.Node().Data)
				at = line(it.Node())
				n, array := count[prefix]
				if e.Kind == unstable.ArrayTable && it.IsLast() {
					count[prefix] = n + 1
					prefix += "." + strconv.Itoa(n)
				} else if array {
					prefix += "." + strconv.Itoa(n-1)
				}
				if !it.IsLast() {
					prefix += "."
				}
			}
			m[prefix] = at
		case unstable.KeyValue:
			m.keyValue(prefix, e, line)
		}
	}
	return m
}

func (m lineMap) keyValue(prefix string, e *unstable.Node, line func(*unstable.Node) int) {
	key := prefix
	for it := e.Key(); it.Next(); {
		if key != "" {
			key += "."
		}
		key += string(it.Node().Data)
		if _, known := m[key]; !known {
			m[key] = line(it.Node())
		}
	}
	m.value(key, e.Value(), line)
}

func (m lineMap) value(key string, v *unstable.Node, line func(*unstable.Node) int) {
	switch v.Kind {
	case unstable.InlineTable:
		for it := v.Children(); it.Next(); {
			if it.Node().Kind == unstable.KeyValue {
				m.keyValue(key, it.Node(), line)
			}
		}
	case unstable.Array:
		i := 0
		for it := v.Children(); it.Next(); {
			if it.Node().Kind == unstable.InlineTable {
				m.value(key+"."+strconv.Itoa(i), it.Node(), line)
			}
			i++
		}
	}
}
