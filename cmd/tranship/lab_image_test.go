package main

import (
	"slices"
	"testing"
)

func TestCommandWords(t *testing.T) {
	for _, tt := range []struct {
		name  string
		given []string
		want  []string
		bad   bool
	}{
		{name: "one is a command line", given: []string{"redis-server --port 6379"}, want: []string{"redis-server", "--port", "6379"}},
		{name: "several are words as they stand", given: []string{"sh", "-c", "a b"}, want: []string{"sh", "-c", "a b"}},
		{name: "an array is JSON", given: []string{`["sh", "-c", "a 'b'"]`}, want: []string{"sh", "-c", "a 'b'"}},
		{name: "quotes keep words together", given: []string{`sh -c "echo 'a b'" ''`}, want: []string{"sh", "-c", "echo 'a b'", ""}},
		{name: "single quotes keep backslashes", given: []string{`a '\n' b\ c`}, want: []string{"a", `\n`, "b c"}},
		{name: "quotes may begin inside a word", given: []string{`--save=""x`}, want: []string{"--save=x"}},
		{name: "space around is nothing", given: []string{"  a\tb\n"}, want: []string{"a", "b"}},
		{name: "an open quote", given: []string{`sh -c "echo`}, bad: true},
		{name: "a backslash at the end", given: []string{`sh \`}, bad: true},
		{name: "half an array", given: []string{`["sh"`}, bad: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := commandWords(tt.given)
			if (err != nil) != tt.bad || !slices.Equal(got, tt.want) {
				t.Errorf("commandWords(%q) = %q, %v", tt.given, got, err)
			}
		})
	}
}
