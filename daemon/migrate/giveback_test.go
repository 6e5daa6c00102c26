package migrate

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/daemon/runtime"
)

// standing is a migration of a shard that stands still, in a cgroup that is a
// directory, and the file that says so. Nobody can ask containerd: a runtime that
// can ask nobody refuses an entry without a name.
func standing(t *testing.T, m *Manager) (*outgoing, string) {
	t.Helper()
	dir := t.TempDir()
	state := filepath.Join(dir, "freezer.state")
	for path, content := range map[string]string{state: "FROZEN", filepath.Join(dir, "cgroup.procs"): ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pid := os.Getpid()
	start, err := startTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	o := m.newOutgoing(&v1.MigrateRequest{Node: "there"})
	o.entry.State, o.entry.InitPID = Stopping, pid
	o.entry.home = &home{rec: &runtime.Record{PID: uint32(pid)}, cgroup: runtime.Cgroup{Dir: dir}, start: start}
	return o, state
}

// containerd may be restarted while a shard stands still.
func TestAShardIsThawedThoughContainerdIsAway(t *testing.T) {
	m := &Manager{cfg: Config{StoreDir: t.TempDir()}, rt: &runtime.Runtime{}}
	o, state := standing(t, m)
	if err := o.thaw(t.Context()); err != nil {
		t.Errorf("thaw: %v", err)
	}
	if now, err := os.ReadFile(state); err != nil || string(now) != "THAWED" {
		t.Errorf("it is %s, %v", now, err)
	}
}

func TestAShardThatCouldNotBeThawedIsTriedAgainUntilItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := inDoubt(t, fakePeer{})
		o, state := standing(t, m)
		key, id := shardKey{}, o.entry.ID
		if err := m.claim(key, id); err != nil {
			t.Fatal(err)
		}
		m.outgoing[id] = o
		o.undo.push("freeze", o.thaw)
		files := filepath.Join(m.dir(id, Source), imagesDir)
		if err := errors.Join(os.MkdirAll(files, 0o700), os.Remove(state), os.Mkdir(state, 0o700)); err != nil {
			t.Fatal(err)
		}
		m.conclude(t.Context(), o, errors.New("the link was cut"))

		result, _ := o.report.snapshot()
		if result.GetOutcome() != OutcomeInDoubt || result.GetCode() != CodeReturning || !strings.Contains(result.GetReason(), "thaw") {
			t.Errorf("the client hears %v", result)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // it is tried meanwhile
		e, err := m.journal.Get(Source, id)
		if err != nil || e.State != Returning || e.Runs {
			t.Fatalf("the journal says %+v, %v", e, err)
		}
		if decisionOf(e.State) != decisionAborted {
			t.Error("the destination is kept waiting")
		}
		if note, _ := m.Note("", ""); !strings.Contains(note, "thaw") {
			t.Errorf("the operator hears %q", note)
		}
		second := m.newOutgoing(&v1.MigrateRequest{Node: "there"})
		if err := m.launch(second); err != nil || len(second.findings) != 1 || !strings.Contains(second.findings[0].GetMessage(), "thaw") {
			t.Errorf("a second migration: %v, %v", second.findings, err)
		}
		for _, keep := range []string{keepHere, keepThere} {
			_, err = m.Resolve(t.Context(), connect.NewRequest(&v1.ResolveRequest{Id: id, Keep: keep}))
			if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "thaw") {
				t.Errorf("kept %s: %v", keep, err)
			}
		}
		if !exists(files) {
			t.Error("what says what is to be undone is gone")
		}

		if err := errors.Join(os.Remove(state), os.WriteFile(state, []byte("FROZEN"), 0o600)); err != nil {
			t.Fatal(err)
		}
		m.work.Wait()
		if now, err := os.ReadFile(state); err != nil || string(now) != "THAWED" {
			t.Errorf("it is %s, %v", now, err)
		}
		if e, err = m.journal.Get(Source, id); err != nil || e.State != Aborted || e.Code != CodeFailed || e.Reason != "the link was cut" {
			t.Errorf("the journal says %+v, %v", e, err)
		}
		if exists(files) || m.MigrationOf("", "") != "" {
			t.Error("it holds the shard, or its files, still")
		}
		// From here on it may be another migration's.
		if err := os.WriteFile(state, []byte("FROZEN"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err = m.Resolve(t.Context(), connect.NewRequest(&v1.ResolveRequest{Id: id, Keep: keepHere})); connect.CodeOf(err) != connect.CodeFailedPrecondition {
			t.Errorf("resolved once more: %v", err)
		}
		if now, err := os.ReadFile(state); err != nil || string(now) != "FROZEN" {
			t.Errorf("it is %s, %v", now, err)
		}
	})
}

// What is left of the dump cannot be removed while containerd is away, nor can the
// restart monitor be told; the shard runs all the same, and may be paused.
func TestAShardThatRunsAgainIsNotThawedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := inDoubt(t, fakePeer{})
		o, state := standing(t, m)
		id := o.entry.ID
		if err := m.claim(shardKey{}, id); err != nil {
			t.Fatal(err)
		}
		o.undo.push("freeze", o.thaw)
		o.entry.MarkedStop = true
		m.conclude(t.Context(), o, errCancelled)
		if result, _ := o.report.snapshot(); result.GetOutcome() != OutcomeAborted {
			t.Errorf("the client hears %v", result)
		}
		e, err := m.journal.Get(Source, id)
		if err != nil || e.State != Returning || !e.Runs {
			t.Fatalf("the journal says %+v, %v", e, err)
		}
		if err := os.WriteFile(state, []byte("FROZEN"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // it is tried meanwhile
		if note, _ := m.Note("", ""); !strings.Contains(note, "restart label") {
			t.Errorf("the operator hears %q", note)
		}
		if now, err := os.ReadFile(state); err != nil || string(now) != "FROZEN" {
			t.Errorf("it is %s, %v", now, err)
		}
	})
}

func TestADaemonThatComesBackTriesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, other := inDoubt(t, fakePeer{})
		other.State = Done
		e := &Entry{ID: "m-2", Role: Source, State: Returning, Peer: "there", Code: CodeCancelled, Left: "thaw: it was stuck"}
		remaps := filepath.Join(m.dir(e.ID, Source), imagesDir, "remap-fpath.img")
		if err := errors.Join(
			m.journal.Put(other), m.journal.Put(e),
			os.MkdirAll(filepath.Dir(remaps), 0o700), os.WriteFile(remaps, nil, 0o600),
		); err != nil {
			t.Fatal(err)
		}
		if err := m.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // it is tried meanwhile
		if now, err := m.journal.Get(Source, e.ID); err != nil || now.State != Returning || !strings.Contains(now.Left, "link remaps") {
			t.Errorf("the journal says %+v, %v", now, err)
		}
		if m.MigrationOf("", "") != e.ID {
			t.Error("the shard is not claimed")
		}
		if err := os.Remove(remaps); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // it is tried meanwhile
		if now, err := m.journal.Get(Source, e.ID); err != nil || now.State != Aborted || now.Code != CodeCancelled {
			t.Errorf("the journal says %+v, %v", now, err)
		}
		if m.MigrationOf("", "") != "" {
			t.Error("the shard is claimed still")
		}
	})
}
