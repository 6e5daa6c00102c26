// Command leakcheck takes the inventory of the host that it runs in, and
// compares two of them:
//
//	tranship lab exec host-1 -- leakcheck > before
//	…
//	tranship lab exec host-1 -- leakcheck > after
//	leakcheck before after
//
// It exits with 1 when something was left behind or is missing.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/tranship/tranship/integration/leak"
)

func main() {
	leak.ServeHelper()
	changed, err := run(os.Args[1:])
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, "leakcheck:", err)
		os.Exit(2)
	case changed:
		os.Exit(1)
	}
}

func run(args []string) (changed bool, err error) {
	switch len(args) {
	case 0:
		s, err := leak.Collect(context.Background())
		if err != nil {
			return false, err
		}
		return false, json.NewEncoder(os.Stdout).Encode(s)
	case 2:
		var s [2]leak.Snapshot
		for i, path := range args {
			raw, err := os.ReadFile(path)
			if err != nil {
				return false, err
			}
			if err := json.Unmarshal(raw, &s[i]); err != nil {
				return false, fmt.Errorf("%s: %w", path, err)
			}
		}
		changes := leak.Diff(s[0], s[1], leak.Standing)
		for _, c := range changes {
			fmt.Println(c)
		}
		return len(changes) > 0, nil
	}
	return false, fmt.Errorf("no arguments take an inventory, two files are compared")
}
