package migrate

import "testing"

func TestRecoveryNeverRunsTwoCopies(t *testing.T) {
	source := []State{Preparing, Stopping, Yielded, Serving, Returning, Done, Aborted}
	destination := []State{Receiving, Sealed, Starting, Running, Done, Aborted}
	for _, s := range source {
		act := recoveryOf(Source, s)
		// A source lets its copy run only in states in which it tells the
		// destination that it has not committed.
		if act == undoAll && decisionOf(s) == decisionCommitted {
			t.Errorf("source %s: goes on here and tells the destination to run", s)
		}
		if s == Serving && (act != serve || decisionOf(s) != decisionCommitted) {
			t.Errorf("source %s: %s, although the shard runs there", s, act)
		}
		if s == Returning && (act != again || decisionOf(s) != decisionAborted) {
			t.Errorf("source %s: %s, and tells the destination %s", s, act, decisionOf(s))
		}
		if s == Yielded && act != ask {
			t.Errorf("source %s: %s", s, act)
		}
	}
	for _, s := range destination {
		act := recoveryOf(Destination, s)
		if s == Receiving && act != undoAll {
			t.Errorf("destination %s: %s although the source may go on", s, act)
		}
		if s == Running && act != finish {
			t.Errorf("destination %s: %s although the source is discarded", s, act)
		}
		if s == Sealed && act != wait {
			t.Errorf("destination %s: %s although only the source knows", s, act)
		}
	}
	for _, s := range []State{Done, Aborted} {
		if recoveryOf(Source, s) != nothing || recoveryOf(Destination, s) != nothing {
			t.Errorf("%s is not final", s)
		}
	}
}
