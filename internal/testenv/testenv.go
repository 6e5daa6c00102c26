// Package testenv says what a test needs of the machine. A missing requirement
// skips the test, except under TRANSHIP_TEST_STRICT=1 (make test, CI), where it
// fails: nothing is skipped silently there.
package testenv

import (
	"os"
	"testing"
)

// StrictVariable turns skips for missing requirements into failures.
const StrictVariable = "TRANSHIP_TEST_STRICT"

// Missing ends the test because the machine lacks something.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv(StrictVariable) == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s; make test installs and runs it", what)
}

// NeedRoot ends the test unless it runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "root")
	}
}
