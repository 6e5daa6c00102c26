package migrate

import (
	"context"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseSharedWritable(t *testing.T) {
	got := parseSharedWritable(`00400000-00401000 r-xp 00000000 08:01 1                                 /bin/x
7f0000000000-7f0000001000 rw-s 00000000 08:01 2                          /data/a file
7f0000001000-7f0000002000 r--s 00000000 08:01 3                          /data/readonly
7f0000002000-7f0000003000 rw-s 00000000 00:01 4                          /dev/zero (deleted)
7f0000003000-7f0000004000 rw-s 00000000 08:01 5                          /data/new\012line
7f0000004000-7f0000005000 rw-p 00000000 00:00 0
7f0000005000-7f0000006000 rw-s 00000000 00:0e 6                          anon_inode:[perf_event]
`)
	if want := []string{"/data/a file", "/data/new\nline"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStartTimeNamesThisProcess(t *testing.T) {
	a, err := startTime(os.Getpid())
	if err != nil || a == 0 {
		t.Fatal(a, err)
	}
	if b, err := startTime(os.Getpid()); err != nil || a != b {
		t.Fatalf("%d, then %d, %v", a, b, err)
	}
}

func TestStatusFields(t *testing.T) {
	if got := ownerOf(os.Getpid()); got != os.Getuid() {
		t.Errorf("owner %d, want %d", got, os.Getuid())
	}
	if os.Geteuid() == 0 && !hasCapability(os.Getpid(), 1) { // CAP_DAC_OVERRIDE
		t.Error("root has no CAP_DAC_OVERRIDE")
	}
	if hasCapability(os.Getpid(), 63) {
		t.Error("a capability that there is not")
	}
}

func TestAProcessIsReleasedWhenItsTracerLetsGo(t *testing.T) {
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	if _, err := unix.Wait4(cmd.Process.Pid, nil, 0, nil); err != nil { // stopped by its exec
		t.Fatal(err)
	}
	released := make(chan time.Time, 1)
	go func() { released <- awaitReleased(t.Context(), cmd.Process.Pid) }()
	select {
	case <-released:
		t.Error("a process that is traced was taken for released")
	case <-time.After(20 * releasePoll):
	}
	ended, end := context.WithCancel(t.Context())
	end()
	awaitReleased(ended, cmd.Process.Pid) // does not wait for it
	at := time.Now()
	if err := unix.PtraceDetach(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if got := <-released; got.Before(at) {
		t.Errorf("released %v before it was let go", at.Sub(got))
	}
	awaitReleased(t.Context(), 0) // nobody to wait for
}
