package memcheck

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/workload/check"
	"github.com/tranship/tranship/internal/testenv"
)

// build compiles once for all tests. A machine without a C compiler skips,
// unless TRANSHIP_TEST_STRICT says that everything must be there.
var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "memcheck-test-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "memcheck")
	return path, Build(context.Background(), path, "-Wall", "-Wextra", "-Werror")
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := build(); err == nil {
		os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

func program(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("cc"); err != nil && os.Getenv("CC") == "" {
		testenv.Missing(t, "a C compiler with a static C library")
	}
	path, err := build()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// start runs memcheck and waits for its first line. It ends with the test.
func start(t *testing.T, args ...string) (addr string, cmd *exec.Cmd) {
	t.Helper()
	cmd = exec.Command(program(t), append([]string{"--listen=127.0.0.1:0", "--dir=" + filepath.Join(t.TempDir(), "layer")}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		for {
			if _, err := lines.ReadString('\n'); err != nil {
				break
			}
		}
		cmd.Wait()
		if t.Failed() {
			t.Logf("stderr of memcheck:\n%s", stderr.String())
		}
	})
	line, err := lines.ReadString('\n')
	if err != nil {
		cmd.Wait()
		t.Fatalf("memcheck did not start: %v\n%s", err, stderr.String())
	}
	var ready struct {
		Ready  bool   `json:"ready"`
		Listen string `json:"listen"`
	}
	if err := json.Unmarshal([]byte(line), &ready); err != nil || !ready.Ready {
		t.Fatalf("first line %q: %v", line, err)
	}
	return ready.Listen, cmd
}

func dial(t *testing.T, addr string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.RequestTimeout = 30 * time.Second
	return c
}

// waitLimit says that something will never come; a busy machine with a slow disk
// takes half a minute for what an idle one does in two seconds.
const waitLimit = 3 * time.Minute

// until asks for stat until done is true.
func until(t *testing.T, c *Client, what string, done func(Stat) bool) Stat {
	t.Helper()
	deadline := time.Now().Add(waitLimit)
	for {
		s, err := c.Stat(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if done(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v; last answer: %+v", what, waitLimit, s)
		}
		select { // a poll a while; there is nothing to wait on
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

var features = []string{
	"plain", "maps", "heap", "stack", "thp", "sparse", "regs", "fork",
	"shared", "pipe", "socket", "loopback", "eventfd", "signal", "timer", "timerfd",
	"memfd", "shm", "private", "mapped", "log", "unlinked",
}

func TestAProgramThatNobodyTouchesFindsNothingWrong(t *testing.T) {
	addr, cmd := start(t, "--size=16MiB", "--rate=16MiB/s", "--verify=500")
	c := dial(t, addr)
	s := until(t, c, "every feature at work", func(s Stat) bool {
		for _, f := range features {
			if s.Steps[f] < 20 {
				return false
			}
		}
		return s.Forks > 3 && s.Records > 20 && s.SlowestPassMS > 0
	})
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	if s.MremapRefused != 0 {
		t.Errorf("the kernel refused %d resizes", s.MremapRefused)
	}
	if s.Processes < 5 || s.PID != cmd.Process.Pid || s.LongestPauseMS <= 0 || s.WatchPauseMS <= 0 {
		t.Errorf("2 workers, 2 peers and main are at least 5 processes with pauses: %+v", s)
	}
	// 4096 pages have to be seen twice by a full pass, even if nothing else is.
	before := s.VerifiedPages
	if s, err := c.Verify(t.Context()); err != nil || s.Err() != nil || s.VerifiedPages-before < 4096 {
		t.Fatalf("verify: %v, %d pages, %v", err, s.VerifiedPages-before, s.Err())
	}
	if prev, err := c.Mark(t.Context(), 41); err != nil || prev != 0 {
		t.Fatalf("first mark: %d, %v", prev, err)
	}
	if prev, err := c.Mark(t.Context(), 42); err != nil || prev != 41 {
		t.Fatalf("second mark: %d, %v", prev, err)
	}
	if s, err := c.Quit(t.Context()); err != nil || s.Err() != nil {
		t.Fatalf("quit: %v, %v", err, s.Err())
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("exit status: %v", err)
	}
}

func TestDamageIsFound(t *testing.T) {
	for _, c := range []struct {
		corrupt string
		want    string // in the first error
	}{
		{"plain:bit", "bits differ"},
		{"plain:zero", "all zero"},
		{"plain:stale", "holds generation"},
		{"plain:swap", "of page"},
		{"maps:bit", "maps: page"},
		{"maps:zero", "all zero"},
		{"maps:lost", "is PROT_NONE, but can be read"},
		{"heap", "heap: word"},
		{"stack", "stack: word"},
		{"thp:stale", "thp: page"},
		{"sparse:zero", "sparse: page"},
		{"regs", "regs: "},
		{"fork", "fork (child): page"},
		{"shared:bit", "shared (worker's half): page"},
		{"shared:stale", "shared (worker's half): page"},
		{"pipe:bit", "pipe: byte"},
		{"pipe:lost", "pipe: byte"},
		{"socket:bit", "socket: byte"},
		{"loopback:lost", "loopback: byte"},
		{"eventfd", "eventfd: "},
		{"signal", "signal: "},
		{"timer", "timer: the POSIX timer has not fired"},
		{"timerfd", "timerfd: it has not fired"},
		{"memfd:bit", "memfd: page"},
		{"memfd:zero", "all zero"},
		{"shm:stale", "shm: page"},
		{"private:zero", "private: page"},
		{"mapped:bit", "mapped: page"},
		{"log:lost", "log: "},
		{"unlinked", "unlinked: page"},
	} {
		t.Run(c.corrupt, func(t *testing.T) {
			feature, _, _ := strings.Cut(c.corrupt, ":")
			addr, cmd := start(t, "--size=1MiB", "--rate=1MiB/s", "--procs=1", "--verify=200",
				"--features="+feature, "--corrupt="+c.corrupt, "--corrupt-after=200")
			client := dial(t, addr)
			s := until(t, client, "the damage is found", func(s Stat) bool { return len(s.Errors) > 0 })
			if s.OK || s.Err() == nil {
				t.Errorf("there are errors, but ok is %v", s.OK)
			}
			if !strings.Contains(s.Errors[0], c.want) {
				t.Errorf("first error %q does not say %q", s.Errors[0], c.want)
			}
			if _, err := client.Quit(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
				t.Errorf("exit status after an error: %v", err)
			}
		})
	}
}

// The program's own --corrupt could know too well where it looks. Here the bit
// is flipped from outside, in whatever page lies in the middle of the biggest mapping.
func TestABitFlippedFromOutsideIsFound(t *testing.T) {
	addr, _ := start(t, "--size=64MiB", "--rate=1MiB/s", "--procs=1", "--features=plain", "--verify=300")
	c := dial(t, addr)
	s := until(t, c, "a worker", func(s Stat) bool { return len(s.Threads) > 0 && s.SlowestPassMS > 0 })
	pid := s.Threads[0].PID
	start, size := biggestMapping(t, pid)
	if size < 64<<20 { // stacks have 8 MiB
		t.Fatalf("the biggest mapping has %d bytes only", size)
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		testenv.Missing(t, "access to the memory of a child: "+err.Error())
	}
	defer mem.Close()
	var b [1]byte
	at := int64(start+size/2) + 2048
	if _, err := mem.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := mem.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	s = until(t, c, "the bit is found", func(s Stat) bool { return len(s.Errors) > 0 })
	if !strings.Contains(s.Errors[0], "1 bits differ") {
		t.Errorf("error: %s", s.Errors[0])
	}
}

func biggestMapping(t *testing.T, pid int) (start, size uint64) {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		from, to, _ := strings.Cut(f[0], "-")
		a, err1 := strconv.ParseUint(from, 16, 64)
		b, err2 := strconv.ParseUint(to, 16, 64)
		if err1 != nil || err2 != nil {
			t.Fatalf("maps: %q", line)
		}
		if f[1] == "rw-p" && b-a > size {
			start, size = a, b-a
		}
	}
	return start, size
}

func TestTheDeathOfAWorkerIsAnError(t *testing.T) {
	addr, _ := start(t, "--size=1MiB", "--features=plain")
	c := dial(t, addr)
	s := until(t, c, "two workers", func(s Stat) bool { return len(s.Threads) >= 4 })
	if err := syscall.Kill(s.Threads[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s = until(t, c, "the death is noticed", func(s Stat) bool { return len(s.Errors) > 0 })
	if !strings.Contains(s.Errors[0], "ended with status 0x9") {
		t.Errorf("error: %s", s.Errors[0])
	}
}

func TestAStoppedProgramReportsThePause(t *testing.T) {
	addr, _ := start(t, "--size=4MiB", "--procs=1")
	c := dial(t, addr)
	s := until(t, c, "a watch thread", func(s Stat) bool { return s.WatchPauseMS > 0 })
	if err := c.Reset(t.Context()); err != nil {
		t.Fatal(err)
	}
	var worker int
	for _, th := range s.Threads {
		if th.Name == "0/watch" {
			worker = th.PID
		}
	}
	began := time.Now()
	if err := syscall.Kill(worker, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	<-time.After(300 * time.Millisecond) // this is the pause itself
	if err := syscall.Kill(worker, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s = until(t, c, "the pause", func(s Stat) bool { return s.WatchPauseMS >= 290 })
	if took := time.Since(began); s.WatchPauseMS > float64(took.Milliseconds())+1 {
		t.Errorf("a pause of %f ms within %s", s.WatchPauseMS, took)
	}
	if at := time.Unix(0, s.WatchPauseAtUnixNS); at.Before(began.Add(-200*time.Millisecond)) || at.After(began.Add(300*time.Millisecond)) {
		t.Errorf("the pause began at %s, SIGSTOP was sent at %s", at, began)
	}
	if err := s.Err(); err != nil {
		t.Errorf("a pause is no error: %v", err)
	}
}

func TestWatchNoticesARollback(t *testing.T) {
	good := Stat{OK: true, PID: 1, Writes: 10, VerifiedPages: 10, Forks: 1}
	for _, c := range []struct {
		name   string
		change func(*Stat)
		want   string
	}{
		{"fewer writes than before", func(s *Stat) { s.Writes = 9 }, "writes went back from 10 to 9"},
		{"another process", func(s *Stat) { s.PID = 2 }, "pid 2 answers"},
		{"an error inside", func(s *Stat) { s.OK, s.ErrorCount = false, 1 }, "found 1 errors"},
		{"nothing wrong", func(s *Stat) { s.Writes = 11 }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			after := good
			c.change(&after)
			err := advanced(good, after)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestWatchEndsWellOnlyAfterAFullPass(t *testing.T) {
	addr, _ := start(t, "--size=1MiB", "--procs=1", "--features=plain,fork")
	rec := check.NewRecorder("memcheck")
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	if err := Watch(ctx, addr, 10*time.Millisecond, rec); err != nil {
		t.Fatal(err)
	}
	rep := rec.Report(true)
	if !rep.OK || rep.Requests < 20 || rep.Facts["verify_ms"] == nil {
		t.Errorf("report: %+v", rep)
	}
}

// What other processors than amd64 get, on this one.
func TestThePortableRegistersWorkToo(t *testing.T) {
	program(t) // skips without a compiler
	path := filepath.Join(t.TempDir(), "memcheck")
	if err := Build(t.Context(), path, "-Wall", "-Wextra", "-Werror", "-DPORTABLE_REGS"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--listen=127.0.0.1:0", "--dir="+t.TempDir(), "--features=regs", "--procs=1", "--corrupt=regs", "--corrupt-after=200")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	line, err := lines.ReadString('\n')
	var ready struct {
		Listen string `json:"listen"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(line), &ready)
	}
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	c := dial(t, ready.Listen)
	s := until(t, c, "the damage is found", func(s Stat) bool { return len(s.Errors) > 0 })
	if s.ErrorCount != 1 || !strings.Contains(s.Errors[0], "regs: sum") {
		t.Errorf("errors: %q", s.Errors)
	}
	if _, err := c.Quit(t.Context()); err != nil {
		t.Fatal(err)
	}
	for err == nil { // to the end, or Wait could close the pipe under it
		_, err = lines.ReadString('\n')
	}
	cmd.Wait()
	if cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("exit code %d", cmd.ProcessState.ExitCode())
	}
}

func TestBadOptionsAreRefused(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, arg := range []string{
		"--size=much", "--features=telepathy", "--corrupt=plain:gently", "--corrupt=telepathy",
		"--procs=0", "--procs=32 --threads=32", "--listen=nowhere", "--dir=/dev/null", "word",
	} {
		args := append([]string{"--listen=127.0.0.1:0", "--dir=" + t.TempDir()}, strings.Fields(arg)...)
		cmd := exec.CommandContext(ctx, program(t), args...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState.ExitCode() != 2 || len(out) == 0 {
			t.Errorf("%s: %v, %q", arg, err, out)
		}
	}
}
