package criu

import (
	"bufio"
	"os"
	"strings"
)

// tailLines is how much of CRIU's log an error carries: the first cause and
// what followed usually fit.
const tailLines = 8

// ErrorTail returns the last lines of a CRIU log that tell of errors, or its
// last lines when none does; "" when the log cannot be read.
func ErrorTail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	var errs, last []string
	keep := func(lines []string, line string) []string {
		if len(lines) == tailLines {
			lines = lines[1:]
		}
		return append(lines, line)
	}
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := strings.TrimSpace(sc.Text())
		if line == "" {
			continue
		}
		last = keep(last, line)
		if strings.Contains(line, "Error") {
			errs = keep(errs, line)
		}
	}
	if len(errs) > 0 {
		return strings.Join(errs, "\n")
	}
	return strings.Join(last, "\n")
}
