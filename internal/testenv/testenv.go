// Package testenv says what a test needs of the machine it runs on.
//
// A plain `go test ./...` skips what the machine lacks and names the lack.
// With TRANSHIP_TEST_STRICT=1, which `make test` and CI set, the same lack is
// a failure: a suite that skips everything must not look green.
package testenv

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// StrictVariable turns skips for missing requirements into failures.
const StrictVariable = "TRANSHIP_TEST_STRICT"

// NeedRoot skips the test unless it runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "root")
	}
}

// NeedKernel skips the test on a kernel older than major.minor.
func NeedKernel(t testing.TB, major, minor int) {
	t.Helper()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatalf("uname: %v", err)
	}
	release := unix.ByteSliceToString(uts.Release[:])
	newEnough, err := atLeast(release, major, minor)
	if err != nil {
		t.Fatal(err)
	}
	if !newEnough {
		Missing(t, fmt.Sprintf("Linux %d.%d or newer, this is %s", major, minor, release))
	}
}

// Missing ends the test because the machine lacks something.
func Missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv(StrictVariable) == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s; make test installs and runs it", what)
}

func atLeast(release string, major, minor int) (bool, error) {
	var haveMajor, haveMinor int
	if _, err := fmt.Sscanf(release, "%d.%d", &haveMajor, &haveMinor); err != nil {
		return false, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return haveMajor > major || haveMajor == major && haveMinor >= minor, nil
}
