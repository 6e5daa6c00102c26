package workloads

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"go.yaml.in/yaml/v3"
)

// A file in YAML (or JSON, which is YAML) has the same keys as one in TOML and is
// made into that, so that both are read by the same rules. Only where a mistake is
// has to be found in what was written.

// isYAML goes by the name, and of standard input by what it holds: TOML that
// begins with a table is a list to YAML, and with a key it is a text.
func isYAML(name string, raw []byte) bool {
	switch strings.ToLower(filepath.Ext(name)) {
	case ".yaml", ".yml", ".json":
		return true
	case ".toml":
		return false
	}
	var doc yaml.Node
	err := yaml.NewDecoder(bytes.NewReader(raw)).Decode(&doc)
	return err == nil && len(doc.Content) == 1 && doc.Content[0].Kind == yaml.MappingNode
}

// fromYAML is raw as TOML, and the lines of what was written.
func fromYAML(name string, raw []byte) (text []byte, where lineMap, err error) {
	mistake := func(line int, format string, args ...any) error {
		return Mistake{name, line, fmt.Sprintf(format, args...)}
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	var doc, more yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, lineMap{}, nil
	} else if err != nil {
		return nil, nil, yamlMistake(name, err)
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, nil, mistake(more.Line, "a second document; write all workloads into one list")
	}
	var content map[string]any
	if err := doc.Decode(&content); err != nil { // also refuses what aliases make too large
		return nil, nil, yamlMistake(name, err)
	}
	where = lineMap{}
	if err := where.yaml("", doc.Content[0], mistake); err != nil {
		return nil, nil, err
	}
	text, err = toml.Marshal(content)
	if err != nil {
		return nil, nil, mistake(0, "%v; correct it", err)
	}
	return text, where, nil
}

// yamlMistake takes an error of decoding apart, which is a text: "yaml: line 5: …"
// or "yaml: unmarshal errors:\n  line 5: …".
func yamlMistake(name string, err error) Mistake {
	text := strings.TrimPrefix(strings.TrimPrefix(err.Error(), "yaml: "), "unmarshal errors:\n")
	text = strings.Join(strings.Fields(text), " ")
	line := 0
	if rest, ok := strings.CutPrefix(text, "line "); ok {
		if number, what, ok := strings.Cut(rest, ": "); ok {
			if n, err := strconv.Atoi(number); err == nil {
				line, text = n, what
			}
		}
	}
	return Mistake{name, line, text + "; correct it"}
}

// yaml notes the lines of all keys below a node, and refuses what TOML has not.
func (m lineMap) yaml(key string, n *yaml.Node, mistake func(int, string, ...any) error) error {
	join := func(name string) string { return strings.TrimPrefix(key+"."+name, ".") }
	switch n.Kind {
	case yaml.AliasNode:
		return mistake(n.Line, "%s is an alias (*%s); write out what it stands for", key, n.Value)
	case yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			name := n.Content[i]
			if name.Tag == "!!merge" {
				return mistake(name.Line, "<< merges mappings; write out what it stands for")
			}
			m[join(name.Value)] = name.Line
			if err := m.yaml(join(name.Value), n.Content[i+1], mistake); err != nil {
				return err
			}
		}
	case yaml.SequenceNode:
		for i, item := range n.Content {
			at := key + "." + strconv.Itoa(i)
			m[at] = item.Line
			if err := m.yaml(at, item, mistake); err != nil {
				return err
			}
		}
	case yaml.ScalarNode:
		if n.Tag == "!!null" {
			return mistake(n.Line, "%s has no value; give it one or leave it out", key)
		}
	}
	return nil
}

// written finds where something in the TOML that was made of a file is in it.
func (m lineMap) written(text []byte, line int) int {
	for key, at := range lines(text) {
		if at == line {
			if found, ok := m[key]; ok {
				return found
			}
		}
	}
	return 0
}
