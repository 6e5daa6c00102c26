package control

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tranship/tranship/internal/testenv"
)

// generatedBy is the compiler whose version the committed code names, Debian
// 12's. Its plugins are tools of this module.
const generatedBy = "libprotoc 3.21.12"

func TestCommittedCodeIsWhatTheProtocolMakes(t *testing.T) {
	testenv.NeedGenerator(t, "protoc", generatedBy+"\n")
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
