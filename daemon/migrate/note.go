package migrate

import (
	"fmt"
	"strings"

	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// described adds in words where the pages of a shard are, or why it does not go on.
func (m *Manager) described(v *v1.Migration, e *Entry) *v1.Migration {
	if note, _ := m.noteOf(e); note != "" {
		v.Reason = note
		if e.Mode == ModePostCopy && e.State != Returning {
			v.Phase = PhasePostCopy
		}
	}
	return v
}

// Note says what an operator should know of a shard in post-copy, or of one that
// could not be given back, "" of others, and whether what is here of it stands
// still.
func (m *Manager) Note(namespace, name string) (note string, frozen bool) {
	id := m.MigrationOf(namespace, name)
	if id == "" {
		return "", false
	}
	for _, role := range []Role{Source, Destination} {
		if e, err := m.journal.Get(role, id); err == nil {
			return m.noteOf(e)
		}
	}
	return "", false
}

// because is Note behind the word that a shard is migrating.
func (m *Manager) because(namespace, name string) string {
	note, _ := m.Note(namespace, name)
	if note == "" {
		return ""
	}
	return ": it " + note
}

func (m *Manager) noteOf(e *Entry) (note string, frozen bool) {
	left := strings.ReplaceAll(e.Left, "\n", "; ")
	switch {
	case e.State == Returning && e.Runs:
		return "runs here as before; what is left of its migration is removed as soon as that can be done: " + left, false
	case e.State == Returning:
		return "is to go on here, and does as soon as that can be done: " + left, false // as it may, in part
	case e.Mode != ModePostCopy:
	case e.State == Serving && e.Code == CodePagesLost:
		return fmt.Sprintf("was lost on %s (%s), and is here as it was when it was frozen: tranship migrations resolve %s --keep here|there",
			e.Peer, e.Reason, e.ID), true
	case e.State == Serving:
		return fmt.Sprintf("runs on %s, which still fetches the last pages of its memory from here", e.Peer), true
	case e.State == Running:
		m.mu.Lock()
		in := m.incoming[e.ID]
		m.mu.Unlock()
		if in != nil && !in.pull.whole.Load() {
			return fmt.Sprintf("runs here, and the last pages of its memory are still on %s", e.Peer), false
		}
	}
	return "", false
}

// Pulling says that a shard runs here and lacks pages that are elsewhere. It may
// be stopped and removed nevertheless: its source may be gone for good.
func (m *Manager) Pulling(namespace, name string) bool {
	in := m.arriving(shardKey{namespace, name})
	return in != nil && in.entry.Mode == ModePostCopy && !in.pull.whole.Load()
}
