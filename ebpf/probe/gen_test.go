package probe

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tranship/tranship/internal/testenv"
)

// objectsBy is the compiler that the committed objects come from, Debian 12's;
// another one makes others, which are not wrong.
const objectsBy = "clang version 14."

func TestCommittedObjectsAreWhatTheSourcesMake(t *testing.T) {
	testenv.NeedGenerator(t, "clang", objectsBy)
	dir := t.TempDir()
	for _, from := range []string{"gen.go", "bpf"} {
		to := filepath.Join(dir, from)
		if out, err := exec.Command("cp", "-r", from, to).CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	module, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	tool, err := exec.Command("go", "tool", "-modfile", strings.TrimSpace(string(module)), "-n", "bpf2go").Output()
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile("gen.go")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		args, ok := strings.CutPrefix(line, "//go:generate go tool bpf2go ")
		if !ok {
			continue
		}
		cmd := exec.Command(strings.TrimSpace(string(tool)), strings.Fields(args)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOPACKAGE=probe")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	made, err := filepath.Glob(filepath.Join(dir, "*_bpfel.*"))
	if err != nil || len(made) != 16 {
		t.Fatalf("%d files were made, %v", len(made), err)
	}
	for _, path := range made {
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		have, err := os.ReadFile(filepath.Base(path))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(have, want) {
			t.Errorf("%s is stale: make generate", filepath.Base(path))
		}
	}
}
