package pgcheck

import (
	"context"
	_ "embed" // the C source
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

//go:embed c/asroot.c
var asRoot []byte

// BuildAsRoot compiles into the shared library out what lets PostgreSQL run as
// root, for ServeOptions.AsRoot: only for machines whose root has no
// CAP_SYS_RESOURCE, where CRIU can dump no other user's processes.
func BuildAsRoot(ctx context.Context, out string) error {
	cc := os.Getenv("CC")
	if cc == "" {
		cc = "cc"
	}
	dir, err := os.MkdirTemp("", "pgcheck-")
	if err != nil {
		return fmt.Errorf("build %s: %w", out, err)
	}
	defer os.RemoveAll(dir)
	source := filepath.Join(dir, "asroot.c")
	if err := os.WriteFile(source, asRoot, 0o600); err != nil {
		return fmt.Errorf("build %s: %w", out, err)
	}
	if msg, err := exec.CommandContext(ctx, cc, "-shared", "-fPIC", "-O2", "-Wall", "-o", out, source).CombinedOutput(); err != nil {
		return fmt.Errorf("build %s with %s: %w\n%s", out, cc, err, msg)
	}
	return nil
}
