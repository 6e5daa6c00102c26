package control

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// generatedBy is the compiler whose version the committed code names, Debian
// 12's. Its plugins are tools of this module.
const generatedBy = "libprotoc 3.21.12"

func TestCommittedCodeIsWhatTheProtocolMakes(t *testing.T) {
	// Building needs no protoc, so neither do the tests; CI installs it
	// (scripts/setup.sh generate) and insists.
	version, err := exec.Command("protoc", "--version").Output()
	if err != nil || strings.TrimSpace(string(version)) != generatedBy {
		if os.Getenv("TRANSHIP_TEST_GENERATE") == "1" {
			t.Fatalf("%s is not here but %q, %v", generatedBy, version, err)
		}
		t.Skipf("without %s; TRANSHIP_TEST_GENERATE=1 makes that a failure", generatedBy)
	}
	root := filepath.Join("..", "..")
	dir := t.TempDir()
	args := []string{"daemon/control/tranship.proto"}
	for name, out := range map[string]string{"protoc-gen-go": "go", "protoc-gen-connect-go": "connect-go"} {
		path, err := exec.Command("go", "tool", "-n", name).Output()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		args = append(args, "--plugin="+strings.TrimSpace(string(path)),
			"--"+out+"_out="+dir, "--"+out+"_opt=module=github.com/tranship/tranship")
	}
	cmd := exec.Command("protoc", args...)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"tranship.pb.go", "transhipv1connect/tranship.connect.go"} {
		name = filepath.Join("transhipv1", name)
		want, err := os.ReadFile(filepath.Join(dir, "daemon", "control", name))
		if err != nil {
			t.Fatal(err)
		}
		have, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(have, want) {
			t.Errorf("%s is stale: make generate", name)
		}
	}
}
