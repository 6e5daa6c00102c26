package migrate

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/tranship/tranship/daemon/runtime"
)

// containerd may be restarted while a shard stands still.
func TestAShardIsThawedThoughContainerdIsAway(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "freezer.state")
	for path, content := range map[string]string{state: "FROZEN", filepath.Join(dir, "cgroup.procs"): ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// A runtime that can ask nobody refuses an entry without a name.
	m := &Manager{cfg: Config{StoreDir: t.TempDir()}, rt: &runtime.Runtime{}}
	o := &outgoing{m: m, entry: &Entry{ID: "m-1"}, cgroup: runtime.Cgroup{Dir: dir}}
	if err := o.thaw(t.Context()); err != nil {
		t.Errorf("thaw: %v", err)
	}
	if now, err := os.ReadFile(state); err != nil || string(now) != "THAWED" {
		t.Errorf("it is %s, %v", now, err)
	}
}
