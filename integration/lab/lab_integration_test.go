//go:build integration

package lab_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/internal/testenv"
)

// deadline bounds what a test waits for; on an idle machine it is a second.
const deadline = time.Minute

// up brings up a lab for one test.
func up(t *testing.T, opts lab.Options) *lab.Lab {
	t.Helper()
	testenv.NeedRoot(t)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		if err := lab.Down(ctx); err != nil {
			t.Error(err)
		}
	})
	return upAgain(t, opts)
}

// upAgain is Up on whatever is there.
func upAgain(t *testing.T, opts lab.Options) *lab.Lab {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	l, err := lab.Up(ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func host(t *testing.T, l *lab.Lab, name string) *lab.Host {
	t.Helper()
	h, err := l.Host(name)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// sh runs a line of shell in a host and returns its trimmed output.
func sh(t *testing.T, h *lab.Host, line string) string {
	t.Helper()
	out, err := h.Exec(t.Context(), "sh", "-c", line)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(deadline); time.Now().Before(end); <-tick.C {
		if done() {
			return
		}
	}
	t.Fatalf("not within %v: %s", deadline, what)
}

// root is this lab's directory on the machine.
var root = func() string {
	if name := os.Getenv(lab.NameVariable); name != "" {
		return "/var/lib/tranship-lab." + name
	}
	return "/var/lib/tranship-lab"
}()

// traces is what a lab could leave on the machine.
func traces(t *testing.T) []string {
	t.Helper()
	var found []string
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(raw), "\n") {
		if fields := strings.Fields(line); len(fields) > 4 {
			found = append(found, "mount "+fields[4])
		}
	}
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		found = append(found, "link "+l.Name)
	}
	paths, err := filepath.Glob("/sys/fs/cgroup/*/" + filepath.Base(root))
	if err != nil {
		t.Fatal(err)
	}
	paths = append(paths, filepath.Join("/sys/fs/cgroup", filepath.Base(root)), root)
	if others, _ := filepath.Glob("/var/lib/tranship-lab*/state.json"); len(others) == 0 || len(others) == 1 && filepath.Dir(others[0]) == root {
		// These are shared with other labs.
		paths = append(paths, "/run/tranship-lab.lock", "/etc/tranship", "/var/lib/tranship", "/var/lib/containerd")
	}
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			found = append(found, "path "+p)
		}
	}
	// A namespace lives as long as a process in it, which is what Down kills.
	spaces := map[string]bool{}
	for _, kind := range []string{"net", "mnt", "pid", "uts", "ipc", "cgroup"} {
		paths, _ := filepath.Glob("/proc/[0-9]*/ns/" + kind)
		for _, p := range paths {
			if to, err := os.Readlink(p); err == nil {
				spaces[to] = true
			}
		}
	}
	for s := range spaces {
		found = append(found, "namespace "+s)
	}
	slices.Sort(found)
	return found
}

func TestDownLeavesNothing(t *testing.T) {
	testenv.NeedRoot(t)
	if err := lab.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := traces(t)
	l := up(t, lab.Options{Hosts: 2, NoDaemon: true})
	if during := traces(t); len(during) <= len(before) {
		t.Fatal("a lab left no trace even while it was up: this test looks at the wrong things")
	}
	h := host(t, l, "host-1")
	runShard(t, l, h, "frozen")
	// A frozen cgroup's tasks do not die of SIGKILL on v1, and an overlay mount
	// keeps its directories busy.
	sh(t, h, "ctr task pause frozen")
	// A process that left its session and its parent behind.
	sh(t, h, "setsid sh -c 'sleep 1000 & sleep 1000' >/dev/null 2>&1 </dev/null & ")

	if err := l.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	after := traces(t)
	for _, x := range after {
		if !slices.Contains(before, x) && !isOthersNamespace(x) {
			t.Errorf("left behind: %s", x)
		}
	}
	if _, err := lab.Open(); !errors.Is(err, lab.ErrDown) {
		t.Errorf("after Down: %v", err)
	}
	if err := lab.Down(t.Context()); err != nil {
		t.Errorf("a second Down: %v", err)
	}
}

// isOthersNamespace says that a namespace belongs to none of the lab's
// processes; other tests on the machine make some as well.
func isOthersNamespace(trace string) bool {
	space, ok := strings.CutPrefix(trace, "namespace ")
	if !ok {
		return false
	}
	kind, _, _ := strings.Cut(space, ":")
	paths, _ := filepath.Glob("/proc/[0-9]*/ns/" + kind)
	for _, p := range paths {
		if to, err := os.Readlink(p); err != nil || to != space {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(p)), "cmdline"))
		if bytes.Contains(cmdline, []byte(root+"/")) {
			return false
		}
	}
	return true
}

// runShard runs a container that sleeps, from an image of this machine's sleep.
func runShard(t *testing.T, l *lab.Lab, h *lab.Host, name string) {
	t.Helper()
	if err := l.Image(t.Context(), "default", lab.ImageSpec{Name: "lab/sleep:1", Bins: []string{"/bin/sleep"}, Cmd: []string{"sleep", "1000"}}); err != nil {
		t.Fatal(err)
	}
	sh(t, h, "ctr run -d lab/sleep:1 "+name)
}

func TestHostsAreHosts(t *testing.T) {
	l := up(t, lab.Options{Hosts: 2, NoDaemon: true})
	if len(l.Hosts()) != 2 {
		t.Fatalf("%d hosts", len(l.Hosts()))
	}
	for _, name := range []string{"host-1", "host-2", "client"} {
		h := host(t, l, name)
		t.Run(name, func(t *testing.T) {
			if got := sh(t, h, "hostname; cat /etc/hostname"); got != name+"\n"+name {
				t.Errorf("its name is %q", got)
			}
			if got := sh(t, h, "stat -f -c %T /run"); got != "tmpfs" {
				t.Errorf("/run is a %s", got)
			}
			if got := sh(t, h, "cat /proc/1/comm"); got != "tranship" {
				t.Errorf("process 1 is %q", got)
			}
			if got := sh(t, h, "cut -d: -f3 /proc/self/cgroup | sort -u"); got != "/" && got != "/init" {
				t.Errorf("its cgroups are %q, not its own", got)
			}
			if got := sh(t, h, "for p in tranship ctr criu; do command -v $p; done"); !strings.Contains(got, "/bin/tranship\n") || strings.Count(got, "\n") != 2 {
				t.Errorf("on its PATH: %q", got)
			}
			for _, other := range []string{"host-1", "host-2", "client"} {
				if _, err := h.Exec(t.Context(), "ping", "-c1", "-W1", other); err != nil {
					t.Error(err)
				}
			}
		})
	}
	status := l.Status(t.Context())
	for _, hs := range status.Hosts {
		if !hs.Running || hs.Containerd != hs.InPool || hs.Transhipd || len(hs.Addresses) != 2 {
			t.Errorf("%+v", hs)
		}
	}
}

func TestAProgramInAHostIsLikeOneHere(t *testing.T) {
	l := up(t, lab.Options{Hosts: 1, NoDaemon: true})
	h := host(t, l, "host-1")

	t.Run("its exit code comes through", func(t *testing.T) {
		for _, code := range []int{0, 1, 42, 255} {
			err := h.Command(t.Context(), "sh", "-c", fmt.Sprintf("exit %d", code)).Run()
			if got := exitCode(err); got != code {
				t.Errorf("exit %d came through as %d (%v)", code, got, err)
			}
		}
	})
	t.Run("a signal's exit code is the shell's", func(t *testing.T) {
		if got := exitCode(h.Command(t.Context(), "sh", "-c", "kill -9 $$").Run()); got != 128+9 {
			t.Errorf("got %d", got)
		}
	})
	t.Run("a program that is not there is 127", func(t *testing.T) {
		if got := exitCode(h.Command(t.Context(), "no-such-program").Run()); got != 127 {
			t.Errorf("got %d", got)
		}
	})
	t.Run("input and both outputs are its own", func(t *testing.T) {
		cmd := h.Command(t.Context(), "sh", "-c", "cat; echo err >&2")
		var out, errs bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(strings.Repeat("x", 1<<20)), &out, &errs
		if err := cmd.Run(); err != nil || out.Len() != 1<<20 || errs.String() != "err\n" {
			t.Errorf("%d bytes, %q, %v", out.Len(), errs.String(), err)
		}
	})
	t.Run("its output ends when it closes it", func(t *testing.T) {
		cmd := h.Command(t.Context(), "sh", "-c", "echo all; exec >/dev/null; trap 'exit 5' TERM; while :; do sleep 0.05; done")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(out); err != nil || string(got) != "all\n" {
			t.Errorf("%q, %v", got, err)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if got := exitCode(cmd.Wait()); got != 5 {
			t.Errorf("exit code %d", got)
		}
	})
	t.Run("the environment and the directory are the caller's", func(t *testing.T) {
		cmd := h.Command(t.Context(), "sh", "-c", "echo $X; pwd")
		cmd.Env, cmd.Dir = append(os.Environ(), "X=y"), "/usr"
		if out, err := cmd.Output(); err != nil || string(out) != "y\n/usr\n" {
			t.Errorf("%q, %v", out, err)
		}
	})
	t.Run("signals reach it", func(t *testing.T) {
		cmd := h.Command(t.Context(), "sh", "-c", "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.05; done")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 6)
		if _, err := out.Read(line); err != nil || string(line) != "ready\n" {
			t.Fatalf("%q, %v", line, err)
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if got := exitCode(cmd.Wait()); got != 3 {
			t.Errorf("exit code %d", got)
		}
	})
	t.Run("it does not outlive its caller", func(t *testing.T) {
		cmd := h.Command(t.Context(), "sleep", "987")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		running := func() bool { return h.Command(t.Context(), "pgrep", "-f", "^sleep 987").Run() == nil }
		eventually(t, "the program runs", running)
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		eventually(t, "the program is gone with its caller", func() bool { return !running() })
	})
	t.Run("what it left in the background stays", func(t *testing.T) {
		sh(t, h, "sleep 986 >/dev/null 2>&1 </dev/null &")
		if err := h.Command(t.Context(), "pkill", "-f", "^sleep 986").Run(); err != nil {
			t.Errorf("it was gone: %v", err)
		}
	})
}

func exitCode(err error) int {
	var ended *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &ended):
		return ended.ExitCode()
	}
	return -1
}

func TestUpFindsWhatIsThere(t *testing.T) {
	first := up(t, lab.Options{Hosts: 1, NoDaemon: true})
	before := pids(t, first, "host-1")

	again := upAgain(t, lab.Options{Hosts: 2, NoDaemon: true})
	if got := pids(t, again, "host-1"); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("a second Up changed %v into %v", before, got)
	}
	sh(t, host(t, again, "host-2"), "grep host-1 /etc/hosts")
	sh(t, host(t, again, "host-1"), "grep host-2 /etc/hosts")

	t.Run("and starts a host again whose init was killed", func(t *testing.T) {
		kill(t, before["init"])
		third := upAgain(t, lab.Options{Hosts: 2, NoDaemon: true})
		if got := pids(t, third, "host-1"); got["init"] == before["init"] || got["containerd"] == 0 {
			t.Errorf("after the kill: %v, before: %v", got, before)
		}
		sh(t, host(t, third, "host-2"), "ping -c1 -W5 host-1")
	})
	t.Run("and starts everything when all of it was killed", func(t *testing.T) {
		for _, name := range []string{"host-1", "host-2", "client"} {
			kill(t, pids(t, again, name)["init"])
		}
		sh(t, upAgain(t, lab.Options{Hosts: 2, NoDaemon: true}).Client(), "ping -c1 -W5 host-2")
	})
}

// kill ends a process and returns when it is dead. One that is dying still looks
// alive, and has no namespaces any more.
func kill(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the killed process is dead", func() bool {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		return n == 1
	})
}

func pids(t *testing.T, l *lab.Lab, name string) map[string]int {
	t.Helper()
	current, err := lab.Open()
	if err != nil {
		current = l
	}
	got, err := host(t, current, name).PIDs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestAServiceThatDiesIsStartedAgain(t *testing.T) {
	l := up(t, lab.Options{Hosts: 1, NoDaemon: true})
	h := host(t, l, "host-1")
	before := pids(t, l, "host-1")["containerd"]
	if err := syscall.Kill(before, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "containerd answers again", func() bool {
		hs := l.Status(t.Context()).Hosts[0]
		return hs.Containerd && hs.Services["containerd"].PID != before
	})

	if err := h.KillService(t.Context(), "containerd"); err != nil {
		t.Fatal(err)
	}
	if now := pids(t, l, "host-1")["containerd"]; now != 0 {
		t.Errorf("a service that was killed on purpose runs as %d", now)
	}
	if err := h.StartService(t.Context(), "containerd"); err != nil {
		t.Fatal(err)
	}
	sh(t, h, "ctr version")
}

func TestACutCableLosesEveryPacket(t *testing.T) {
	l := up(t, lab.Options{Hosts: 2, NoDaemon: true})
	client := l.Client()
	ping := func(to string) error { return client.Command(t.Context(), "ping", "-c1", "-W1", to).Run() }
	if err := ping("host-1"); err != nil {
		t.Fatal(err)
	}
	if err := host(t, l, "host-1").CutLink(); err != nil {
		t.Fatal(err)
	}
	if ping("host-1") == nil {
		t.Error("a packet came through a cut cable")
	}
	if err := ping("host-2"); err != nil {
		t.Errorf("another host's cable was cut: %v", err)
	}
	if err := host(t, l, "host-1").RestoreLink(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "packets come through again", func() bool { return ping("host-1") == nil })
}

// speed sends for a moment from one host to another, and measures at the end
// that receives, so that what waits in queues does not count.
const speed = `
import socket, sys, time
if sys.argv[1] == "receive":
    s = socket.create_server(("", 5201)); print("ready", flush=True)
    c, _ = s.accept(); c.recv(1 << 20); start = time.monotonic(); n = 0
    while (b := c.recv(1 << 20)): n += len(b)
    print(int(8 * n / (time.monotonic() - start)))
else:
    c = socket.create_connection((sys.argv[2], 5201)); end = time.monotonic() + 1.5
    while time.monotonic() < end: c.sendall(bytes(1 << 16))
`

func TestBandwidthIsLimitedInBothDirections(t *testing.T) {
	const limit = 50_000_000
	l := up(t, lab.Options{Hosts: 2, NoDaemon: true, Bandwidth: limit})
	for _, way := range [][2]string{{"host-1", "host-2"}, {"client", "host-1"}} {
		from, to := host(t, l, way[0]), host(t, l, way[1])
		recv := to.Command(t.Context(), "/usr/bin/python3", "-c", speed, "receive")
		out, err := recv.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := recv.Start(); err != nil {
			t.Fatal(err)
		}
		var word string
		if _, err := fmt.Fscanln(out, &word); err != nil || word != "ready" {
			t.Fatalf("receiver: %q, %v", word, err)
		}
		if _, err := from.Exec(t.Context(), "/usr/bin/python3", "-c", speed, "send", to.Name()); err != nil {
			t.Fatal(err)
		}
		var got int64
		if _, err := fmt.Fscanln(out, &got); err != nil {
			t.Fatal(err)
		}
		if err := recv.Wait(); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s → %s: %.1f Mbit/s", way[0], way[1], float64(got)/1e6)
		if got > limit*115/100 || got < limit*60/100 {
			t.Errorf("%d bit/s over a link of %d", got, int64(limit))
		}
	}
}

func TestAnInterruptedUpLeavesNothing(t *testing.T) {
	testenv.NeedRoot(t)
	if err := lab.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := traces(t)
	for _, at := range []string{"starting switch", "starting host-1", "starting client", "client is up"} {
		t.Run(at, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			_, err := lab.Up(ctx, lab.Options{Hosts: 2, NoDaemon: true, Progress: func(line string) {
				if line == at {
					cancel()
				}
			}})
			if err == nil {
				t.Error("a cancelled Up reported success")
				if err := lab.Down(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			for _, x := range traces(t) {
				if !slices.Contains(before, x) && !isOthersNamespace(x) {
					t.Errorf("left behind: %s", x)
				}
			}
		})
	}
}

func TestImagesOfHostProgramsRun(t *testing.T) {
	l := up(t, lab.Options{Hosts: 2, NoDaemon: true})
	for _, tt := range []struct {
		name string
		spec lab.ImageSpec
		want string
	}{
		{"a program with libraries", lab.ImageSpec{Bins: []string{"/usr/bin/redis-server"}, Cmd: []string{"redis-server", "--version"}}, "Redis server v="},
		{"a script", lab.ImageSpec{Bins: []string{"/usr/bin/ldd", "/bin/cat"}, Cmd: []string{"ldd", "--version"}}, "ldd ("},
		{"Python with compiled modules", lab.ImageSpec{Bins: []string{"/usr/bin/python3"}, Cmd: []string{"python3", "-c", "import ssl, json, socket; print('imported')"}}, "imported"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.spec.Name = "lab.test/" + strings.ReplaceAll(strings.ToLower(tt.name), " ", "-") + ":1"
			if err := l.Image(t.Context(), "default", tt.spec); err != nil {
				t.Fatal(err)
			}
			for _, h := range l.Hosts() {
				if got := sh(t, h, "ctr run --rm "+tt.spec.Name+" once"); !strings.Contains(got, tt.want) {
					t.Errorf("%s: %q", h.Name(), got)
				}
			}
		})
	}
}

func TestTheCommandLineSpeaksJSON(t *testing.T) {
	l := up(t, lab.Options{Hosts: 1, NoDaemon: true})
	out, err := exec.Command(filepath.Join(l.Status(t.Context()).BinDir, "tranship"), "-o", "json", "lab", "status").Output()
	if err != nil {
		t.Fatal(err)
	}
	var st lab.Status
	if err := json.Unmarshal(out, &st); err != nil || st.SchemaVersion != 1 || !st.Up || len(st.Hosts) != 2 {
		t.Errorf("%s: %v", out, err)
	}
}

func TestTranshipdAnswersOnEveryHost(t *testing.T) {
	l := up(t, lab.Options{Hosts: 3})
	for _, hs := range l.Status(t.Context()).Hosts {
		if hs.Transhipd != hs.InPool {
			t.Errorf("%+v", hs)
		}
	}
	var nodes struct {
		Nodes []struct{ Name, State string }
	}
	h := host(t, l, "host-2")
	eventually(t, "all hosts know each other", func() bool {
		out, err := h.Exec(t.Context(), "tranship", "nodes", "-o", "json")
		if err != nil || json.Unmarshal(out, &nodes) != nil {
			return false
		}
		alive := 0
		for _, n := range nodes.Nodes {
			if n.State == "alive" {
				alive++
			}
		}
		return alive == 3
	})

	if err := h.KillDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := h.Command(t.Context(), "tranship", "ps").Run(); exitCode(err) != 6 {
		t.Errorf("without its daemon, tranship ps ended with %v", err)
	}
	if err := h.StartDaemon(t.Context()); err != nil {
		t.Fatal(err)
	}
	sh(t, h, "tranship ps")
}
