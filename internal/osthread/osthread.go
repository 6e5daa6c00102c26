// Package osthread runs what spoils a thread: entering a namespace, tracing,
// unsharing. The thread ends with it and takes back nothing.
package osthread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Do runs f on a thread of its own that ends afterwards, and waits for f. It is
// never the main thread: Go parks that one instead of ending it (runtime/proc.go,
// mexit), so a namespace that it had entered would be held for as long as the
// process lives, and /proc/self would show it to everybody.
func Do(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: Go ends the thread with the goroutine.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// As long as this goroutine holds it, the next one gets another.
			defer runtime.UnlockOSThread()
			done <- Do(f)
			return
		}
		done <- f()
	}()
	return <-done
}
