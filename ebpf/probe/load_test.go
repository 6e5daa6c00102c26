package probe

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// loadVariable makes this test binary a load instead of a test.
const loadVariable = "TRANSHIP_PROBE_LOAD"

func TestMain(m *testing.M) {
	if load := os.Getenv(loadVariable); load != "" {
		be(load)
		return
	}
	os.Exit(m.Run())
}

// be does what a load's name says until it is killed.
func be(load string) {
	fmt.Println("ready")
	name, _, _ := strings.Cut(load, " ")
	switch name {
	case "threads": // four that compute and sleep in turns, each a different mixture
		runtime.GOMAXPROCS(4)
		for i := range 4 {
			go func() {
				runtime.LockOSThread()
				for {
					spin(time.Duration(1+i) * 3 * time.Millisecond)
					nap(time.Duration(4-i) * time.Millisecond)
				}
			}()
		}
	case "forks": // short-lived children, one after another
		go func() {
			for {
				_ = exec.Command("/bin/true").Run()
			}
		}()
	case "faults": // pages touched and given back
		go func() {
			const size = 4 << 20
			for {
				mem, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
				if err != nil {
					panic(err)
				}
				for i := 0; i < size; i += 4096 {
					mem[i] = 1
				}
				if err := syscall.Munmap(mem); err != nil {
					panic(err)
				}
				nap(time.Millisecond)
			}
		}()
	case "spin":
		go func() {
			for {
				spin(time.Second)
			}
		}()
	}
	select {}
}

func spin(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); {
	}
}

// nap blocks the thread itself, where time.Sleep would only park a goroutine.
func nap(d time.Duration) {
	ts := syscall.NsecToTimespec(int64(d))
	_ = syscall.Nanosleep(&ts, nil)
}
