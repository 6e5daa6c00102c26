// Package workcheck is a server whose requests cost CPU, and a load of a pattern
// that says how long each request waited. It is what shards are that are worth
// moving before their load comes.
//
// A request is 16 bytes, its number on the connection and a key; so is the
// answer, the number again and what follows from key and how many requests the
// connection has had. A request that is lost, doubled or answered by a server
// that has forgotten is an error, not a slow one.
package workcheck

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/integration/workload/check"
)

const frameSize = 16

// answer to the count-th request of a connection.
func answer(key, count uint64) uint64 { return check.Mix(key ^ check.Mix(count)) }

// Serve answers on l until ctx is done. Every request takes cost of CPU time,
// however long that lasts; those of a connection one after the other.
func Serve(ctx context.Context, l net.Listener, cost time.Duration) error {
	var all sync.WaitGroup
	defer all.Wait()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil && ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serve work on %s: %w", l.Addr(), err)
		}
		all.Go(func() {
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			defer stop()
			defer conn.Close()
			// A client that goes away, or talks nonsense, ends its own connection.
			_ = serve(conn, cost)
		})
	}
}

func serve(conn net.Conn, cost time.Duration) error {
	runtime.LockOSThread() // whose CPU time is what is counted
	defer runtime.UnlockOSThread()
	var frame [frameSize]byte
	for count := uint64(0); ; count++ {
		if _, err := io.ReadFull(conn, frame[:]); err != nil {
			return err
		}
		if err := burn(cost); err != nil {
			return err
		}
		key := binary.LittleEndian.Uint64(frame[8:])
		binary.LittleEndian.PutUint64(frame[8:], answer(key, count))
		if _, err := conn.Write(frame[:]); err != nil {
			return err
		}
	}
}

// burn uses cost of the thread's CPU time. A thread that was restored elsewhere
// counts from zero again, so steps are added up.
func burn(cost time.Duration) error {
	last, err := threadTime()
	for spent := time.Duration(0); spent < cost && err == nil; {
		var now time.Duration
		if now, err = threadTime(); now > last {
			spent += now - last
		}
		last = now
	}
	return err
}

func threadTime() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0, fmt.Errorf("CPU time of the thread: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// ErrAnswer is one that does not follow from the requests.
var ErrAnswer = errors.New("a wrong answer")
