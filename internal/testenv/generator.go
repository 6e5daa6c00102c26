package testenv

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// NeedGenerator skips the test unless a compiler of generated files is there in
// the version that the committed ones come from. Building needs none, so neither
// do the tests; CI installs it (scripts/setup.sh generate) and insists.
func NeedGenerator(t testing.TB, program, version string) {
	t.Helper()
	got, err := exec.Command(program, "--version").Output()
	if err == nil && strings.Contains(string(got), version) {
		return
	}
	if os.Getenv("TRANSHIP_TEST_GENERATE") == "1" {
		t.Fatalf("%q is not here but %q, %v", version, got, err)
	}
	t.Skipf("without %q; TRANSHIP_TEST_GENERATE=1 makes that a failure", version)
}
