package sim

import (
	"embed"
	"path"
	"strings"
)

//go:embed scenarios/*.toml
var builtin embed.FS

// Builtin is the text of a scenario that comes with tranship.
func Builtin(name string) ([]byte, bool) {
	if strings.ContainsAny(name, "/\\") {
		return nil, false
	}
	text, err := builtin.ReadFile(path.Join("scenarios", name+".toml"))
	return text, err == nil
}

// Builtins are their names.
func Builtins() []string {
	files, _ := builtin.ReadDir("scenarios") // cannot fail: it is in the program
	out := make([]string, len(files))
	for i, f := range files {
		out[i] = strings.TrimSuffix(f.Name(), ".toml")
	}
	return out
}
