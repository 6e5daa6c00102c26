package profiler

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/daemon/runtime"
	"github.com/tranship/tranship/ebpf/probe"
	"github.com/tranship/tranship/ebpf/profile"
	"github.com/tranship/tranship/internal/testenv"
)

// feed is a containerd of which the test decides what it says.
type feed struct {
	events chan runtime.TaskEvent
	mu     sync.Mutex
	tasks  map[string]runtime.Task
}

var _ Tasks = (*feed)(nil)

func (f *feed) WatchTasks(ctx context.Context, emit func(runtime.TaskEvent)) error {
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case e := <-f.events:
			emit(e)
		}
	}
}

func (f *feed) Tasks(context.Context) ([]runtime.Task, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []runtime.Task
	for _, t := range f.tasks {
		out = append(out, t)
	}
	return out, nil
}

func (f *feed) Labels(context.Context, string, string) (map[string]string, error) {
	return map[string]string{LabelTenant: "acme"}, nil
}

func (f *feed) say(t runtime.Task, ended bool) {
	f.mu.Lock()
	if ended {
		delete(f.tasks, t.Name)
	} else {
		f.tasks[t.Name] = t
	}
	f.mu.Unlock()
	f.events <- runtime.TaskEvent{Task: t, Ended: ended}
}

// running starts a profiler of this machine.
func running(t testing.TB, change func(*Config)) (*Profiler, *feed) {
	t.Helper()
	testenv.NeedRoot(t)
	testenv.NeedKernel(t, 5, 15)
	f := &feed{events: make(chan runtime.TaskEvent, 64), tasks: map[string]runtime.Task{}}
	cfg := Config{
		Node: "test", Tasks: f, StorePath: filepath.Join(t.TempDir(), "p.db"), Retention: retention,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if change != nil {
		change(&cfg)
	}
	t.Cleanup(func() { removeParents(t) })
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, p.Close()); err != nil {
			t.Error(err)
		}
	})
	return p, f
}

// removeParents removes the directories of containers' cgroups.
func removeParents(t testing.TB) {
	host, _, err := runtime.HostPlace()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range host.Dirs {
		top := filepath.Join(d.Path, fmt.Sprintf("tranship-profiler-%d", os.Getpid()))
		for _, dir := range []string{filepath.Join(top, "churn"), top} {
			if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
				t.Errorf("%s: %v", dir, err)
			}
		}
	}
}

// container is a process in cgroups of its own.
type container struct {
	task runtime.Task
	cmd  *exec.Cmd
	dirs []string
}

// startContainer starts one that computes.
func startContainer(name string) (*container, error) {
	return startContainerThat(name, "while :; do :; done", 0)
}

// startContainerThat starts one that does what a line of shell says, in new
// namespaces.
func startContainerThat(name, does string, namespaces uintptr) (*container, error) {
	host, _, err := runtime.HostPlace()
	if err != nil {
		return nil, err
	}
	c := &container{}
	join := ""
	seen := map[string]bool{}
	for _, d := range host.Dirs {
		dir := filepath.Join(d.Path, fmt.Sprintf("tranship-profiler-%d", os.Getpid()), "churn", name)
		if seen[dir] {
			continue
		}
		seen[dir] = true
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return nil, err
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		c.dirs = append(c.dirs, dir)
		join += "echo $$ >" + dir + "/cgroup.procs && "
	}
	// It waits for a byte, so that it is profiled before it does anything.
	c.cmd = exec.Command("/bin/sh", "-c", join+"echo ready; read go; "+does)
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Cloneflags: namespaces}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	in, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	c.task = runtime.Task{Namespace: "churn", Name: name, PID: c.cmd.Process.Pid}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		return nil, fmt.Errorf("%q %w", line, errors.Join(err, c.stop()))
	}
	_, err = in.Write([]byte("\n"))
	return c, err
}

func (c *container) stop() error {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
	var errs []error
	for _, dir := range c.dirs {
		for deadline := time.Now().Add(10 * time.Second); ; {
			err := unix.Rmdir(dir)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				errs = append(errs, fmt.Errorf("%s: %w", dir, err))
				break
			}
		}
	}
	return errors.Join(errs...)
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); <-time.After(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func (p *Profiler) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.subjects)
}

// brief is how long a shard lives at least in the test below: less than what a
// sample takes, or word of it on a busy machine.
const brief = 50 * time.Millisecond

func TestFiveHundredShardsInAMinute(t *testing.T) {
	p, f := running(t, nil)
	if p.probe == nil {
		testenv.Missing(t, "BPF: "+p.probeWhy.Error())
	}
	before, err := p.probe.Entries()
	if err != nil {
		t.Fatal(err)
	}
	// The host's own files are opened by the first samples.
	eventually(t, "the host is sampled", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.tick > 2
	})
	open := descriptors(t)
	const count, abreast = 500, 4
	begun := time.Now()
	var wg sync.WaitGroup
	for worker := range abreast {
		wg.Go(func() {
			for i := range count / abreast {
				c, err := startContainer(fmt.Sprintf("%d-%d", worker, i))
				if err != nil {
					t.Error(err)
					return
				}
				// Word of some comes at once, of others when they are gone already.
				late := i%3 == 0
				if !late {
					f.say(c.task, false)
				}
				<-time.After(brief) // its life: nothing waits for anybody to notice
				err = c.stop()
				if late {
					f.say(c.task, false)
				}
				// Every other exit is lost, as events may be: then its pidfd tells.
				if i%2 == 0 {
					f.say(c.task, true)
				} else {
					f.mu.Lock()
					delete(f.tasks, c.task.Name)
					f.mu.Unlock()
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(begun)
	t.Logf("%d shards in %v", count, took)
	if took > time.Minute {
		t.Errorf("it took %v", took)
	}
	eventually(t, "none is left", func() bool { return p.count() == 0 && len(f.events) == 0 })
	after, err := p.probe.Entries()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cgroups", "netns"} {
		if after[name] != before[name] {
			t.Errorf("map %s has %d entries, before %d", name, after[name], before[name])
		}
	}
	if n := len(p.probe.Tracked()); n != 0 {
		t.Errorf("%d slots are taken", n)
	}
	eventually(t, fmt.Sprintf("%d descriptors again, not %d", open, descriptors(t)), func() bool { return descriptors(t) <= open })
	seen := func() (n int) {
		for worker := range abreast {
			for i := range count / abreast {
				points, err := p.store.Minutes(fmt.Sprintf("churn/%d-%d", worker, i), time.Time{})
				if err != nil {
					t.Fatal(err)
				}
				if len(points) > 0 && points[0].Mean[profile.CPU] > 0 && points[0].Covered > 0 {
					n++
				}
			}
		}
		return n
	}
	eventually(t, "all minutes are written", func() bool { return len(p.writes) == 0 })
	eventually(t, "all have left what they used", func() bool { return seen() == count })
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unwatch != 0 || p.dropped != 0 {
		t.Errorf("%d not seen, %d batches dropped", p.unwatch, p.dropped)
	}
}

// TestASubjectWhoseFilesCannotBeReadKeepsItsOtherSignals takes the files from under a shard.
func TestASubjectWhoseFilesCannotBeReadKeepsItsOtherSignals(t *testing.T) {
	p, f := running(t, nil)
	c, err := startContainer("unreadable")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.stop(); err != nil {
			t.Error(err)
		}
	}()
	f.say(c.task, false)
	eventually(t, "it is profiled", func() bool { return p.count() == 1 })
	p.mu.Lock()
	s := p.subjects["churn/unreadable"]
	for _, file := range []*file{&s.files.used, &s.files.memory} {
		path := file.path
		if err := file.close(); err != nil {
			t.Error(err)
		}
		*file = newFile(path + "-gone")
	}
	s.files.knowsInactive = false
	p.mu.Unlock()
	eventually(t, "its CPU is known, its memory not", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return usesCPUWithout(s, profile.MemoryBytes)
	})
}

// usesCPUWithout says whether a shard's last sample knows of CPU time and not of
// another signal. Under the profiler's lock.
func usesCPUWithout(s *subject, signal profile.Signal) bool {
	last, ok := s.profile.Last()
	if !ok {
		return false
	}
	_, known := last.Get(signal)
	cpu, ok := last.Get(profile.CPU)
	return ok && cpu > 0 && !known
}

// TestAShardBeyondAllSlotsIsCountedFromItsFiles starts one when every slot is taken.
func TestAShardBeyondAllSlotsIsCountedFromItsFiles(t *testing.T) {
	p, _ := running(t, nil)
	if p.probe == nil {
		testenv.Missing(t, "BPF: "+p.probeWhy.Error())
	}
	crowded := func() *container {
		p.mu.Lock() // so that nobody gives back what belongs to no shard
		defer p.mu.Unlock()
		for i := 0; ; i++ {
			_, err := p.probe.Track(fmt.Sprintf("crowd/%d", i), probe.Identity{Tasks: 1<<41 + uint64(i)})
			if errors.Is(err, probe.ErrFull) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		c, err := startContainer("crowded")
		if err != nil {
			t.Fatal(err)
		}
		s, err := p.newSubject(c.task)
		if err == nil {
			err = p.insert(s)
		}
		if err != nil {
			t.Fatal(errors.Join(err, c.stop()))
		}
		return c
	}
	c := crowded()
	defer func() {
		if err := c.stop(); err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "its CPU comes from a file, its waits from nowhere", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		s := p.subjects["churn/crowded"]
		if s == nil {
			t.Fatal("it is not profiled")
		}
		if s.slot >= 0 {
			t.Fatalf("it has slot %d", s.slot)
		}
		return usesCPUWithout(s, profile.Wait)
	})
}

// refusedVariable makes the test below the process that may not load programs.
const refusedVariable = "TRANSHIP_TEST_REFUSED"

// TestAKernelThatRefusesPrograms runs without the capabilities for BPF, which is
// what a locked-down kernel comes to.
func TestAKernelThatRefusesPrograms(t *testing.T) {
	if os.Getenv(refusedVariable) == "" {
		testenv.NeedRoot(t)
		again := exec.Command("setpriv", "--bounding-set", "-sys_admin,-bpf,-perfmon", os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
		again.Env = append(os.Environ(), refusedVariable+"=1")
		out, err := again.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	p, f := running(t, nil)
	if p.probe != nil {
		for _, part := range probe.Parts {
			if p.probe.Failed(part) == nil {
				t.Errorf("%s counts without being allowed to", part)
			}
		}
	}
	countsFromFiles(t, p, f)
}

// TestAHostWithoutAnyProgram has no types of the kernel, and so no program.
func TestAHostWithoutAnyProgram(t *testing.T) {
	p, f := running(t, func(c *Config) { c.BTF = "/dev/null" })
	for _, part := range probe.Parts {
		if p.probe.Failed(part) == nil {
			t.Errorf("%s counts without the kernel's types", part)
		}
	}
	countsFromFiles(t, p, f)
}

// countsFromFiles starts a container, whose CPU has to be known, and says so.
func countsFromFiles(t *testing.T, p *Profiler, f *feed) {
	t.Helper()
	c, err := startContainer("files")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.stop(); err != nil {
			t.Error(err)
		}
	}()
	f.say(c.task, false)
	eventually(t, "its CPU comes from a file", func() bool {
		points, err := p.Points("churn", "files", time.Second, time.Time{})
		return err == nil && len(points) > 0 && points[len(points)-1].Mean[profile.CPU] > 0
	})
	for _, s := range p.Sources() {
		if strings.HasPrefix(s.From, "bpf:") {
			t.Errorf("%v claims to come from %s", s.Signal, s.From)
		}
		if s.Signal == profile.Wait && s.Why == "" {
			t.Error("nobody says why waits are unknown")
		}
	}
}
