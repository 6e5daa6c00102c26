package lab

import "testing"

func TestOnlyWhatEndsWhileItIsWaitedForIsACrashLoop(t *testing.T) {
	var c crashes
	for _, look := range []struct {
		starts, ended int
		enough        bool
	}{{11, 0, false}, {12, 1, false}, {13, 2, false}, {14, 3, true}} {
		if ended, enough := c.loop(look.starts); ended != look.ended || enough != look.enough {
			t.Errorf("start %d: ended %d times, enough %v; want %d, %v", look.starts, ended, enough, look.ended, look.enough)
		}
	}
}
