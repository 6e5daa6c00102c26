package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
)

// PrivatePath is where set-up puts a CRIU newer than the distribution's.
const PrivatePath = "/usr/local/lib/tranship/criu/criu"

// MinVersion is the oldest CRIU that works anywhere: 4.1.1 dumps processes that
// are under write-protect tracking and starts on kernels from 6.13 on.
var MinVersion = Version{4, 1, 1}

// MinVersionFor is the oldest CRIU that works on a kernel: from Linux 6.16 on,
// TCP sockets have no SO_PASSCRED, and a CRIU before 4.2 insists on asking.
func MinVersionFor(kernelMajor, kernelMinor int) Version {
	if kernelMajor > 6 || kernelMajor == 6 && kernelMinor >= 16 {
		return Version{4, 2, 0}
	}
	return MinVersion
}

// Version is CRIU's version.
type Version struct{ Major, Minor, Sublevel int }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Sublevel) }

// Less orders versions.
func (v Version) Less(o Version) bool {
	if v.Major != o.Major {
		return v.Major < o.Major
	}
	if v.Minor != o.Minor {
		return v.Minor < o.Minor
	}
	return v.Sublevel < o.Sublevel
}

// ErrNotFound says that no CRIU is installed.
var ErrNotFound = errors.New("criu is not installed")

// Find returns the CRIU to use: configured if not "", else the private one,
// else the first on PATH.
func Find(configured string) (string, error) {
	if configured != "" {
		return configured, nil
	}
	if _, err := os.Stat(PrivatePath); err == nil {
		return PrivatePath, nil
	}
	path, err := exec.LookPath("criu")
	if err != nil {
		return "", fmt.Errorf("%w: neither %s nor a criu on PATH", ErrNotFound, PrivatePath)
	}
	return path, nil
}

var versionLine = regexp.MustCompile(`(?m)^Version:\s*(\d+)\.(\d+)(?:\.(\d+))?`)

// VersionOf asks a binary for its version.
func VersionOf(ctx context.Context, path string) (Version, error) {
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return Version{}, fmt.Errorf("%s --version: %w", path, err)
	}
	return parseVersion(string(out))
}

func parseVersion(out string) (Version, error) {
	m := versionLine.FindStringSubmatch(out)
	if m == nil {
		return Version{}, fmt.Errorf("no version in %q", out)
	}
	var v Version
	v.Major, _ = strconv.Atoi(m[1])
	v.Minor, _ = strconv.Atoi(m[2])
	v.Sublevel, _ = strconv.Atoi(m[3])
	return v, nil
}

// Warm has CRIU examine the kernel once and keep what it found in /run/criu.kdat,
// which costs it half a second that no blackout should pay. That the kernel
// lacks something is not this function's to tell.
func Warm(ctx context.Context, path string) error {
	var exit *exec.ExitError
	if err := exec.CommandContext(ctx, path, "check").Run(); err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("%s check: %w", path, err)
	}
	return nil
}
