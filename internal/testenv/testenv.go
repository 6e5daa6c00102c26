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

// Strict reports whether a missing requirement is a failure.
func Strict() bool { return os.Getenv("TRANSHIP_TEST_STRICT") == "1" }

// NeedRoot skips the test unless it runs as root.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Lacks(t, "needs root: make test runs it")
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
		Lacks(t, fmt.Sprintf("needs Linux %d.%d or newer, this is %s", major, minor, release))
	}
}

// Lacks ends the test because the machine lacks what it needs: a skip, or a
// failure when strict.
func Lacks(t testing.TB, reason string) {
	t.Helper()
	if Strict() {
		t.Fatalf("%s (TRANSHIP_TEST_STRICT=1)", reason)
	}
	t.Skip(reason)
}

func atLeast(release string, major, minor int) (bool, error) {
	var haveMajor, haveMinor int
	if _, err := fmt.Sscanf(release, "%d.%d", &haveMajor, &haveMinor); err != nil {
		return false, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return haveMajor > major || haveMajor == major && haveMinor >= minor, nil
}
