// Package doctor finds out whether this machine can be a tranship host: what is
// there, what is missing, and for everything that is not as it should be, what
// to do. It changes nothing and installs nothing.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/track"
)

// Level says how bad a finding is.
type Level string

const (
	OK Level = "ok"
	// Warn: the host works, but slower or with less than it could.
	Warn Level = "warn"
	// Missing: the host cannot move shards.
	Missing Level = "missing"
)

// Finding is the answer to one question about the machine.
type Finding struct {
	Name  string `json:"name"`
	Level Level  `json:"level"`
	// Found is what is there.
	Found string `json:"found"`
	// Do is the remedy; "" when there is nothing to do.
	Do string `json:"do,omitempty"`
}

// Healthy says that nothing required is missing.
func Healthy(findings []Finding) bool {
	for _, f := range findings {
		if f.Level == Missing {
			return false
		}
	}
	return true
}

// Machine is what is examined. The zero value is the machine at hand; tests
// put files and answers of their own in its place.
type Machine struct {
	// Root is put before every path that is read.
	Root string
	// Output runs a program and returns what it says.
	Output func(ctx context.Context, name string, args ...string) (string, error)
	// Tracker says which dirty tracking works here, and why no better one.
	Tracker func() (track.Kind, error)
	// CNIBin are the directories with CNI plugins.
	CNIBin []string
	// Signals says where what is profiled comes from; nil leaves that out.
	Signals func() []Signal
}

// commandTimeout bounds each program that is asked: `criu check` takes a
// fraction of a second.
const commandTimeout = 20 * time.Second

// Examine asks all questions, in the order of a shard's way: kernel, cgroups,
// containerd, network, dump, transfer, restore.
func (m Machine) Examine(ctx context.Context) []Finding {
	if m.Output == nil {
		m.Output = output
	}
	if m.CNIBin == nil {
		m.CNIBin = []string{"/usr/lib/cni", "/opt/cni/bin"}
	}
	var findings []Finding
	for _, ask := range []func(context.Context) Finding{
		m.platform, m.kernel, m.privileges, m.cgroups,
		m.program("containerd", "containerd", "apt-get install containerd"),
		m.program("runc", "runc", "apt-get install runc"),
		m.containerdSocket, m.overlay, m.cni, m.nft, m.bridgeFilter,
		m.criu, m.criuForRunc, m.userfaultfd, m.tracker, m.pipes, m.offload,
		m.runDir, m.memory,
	} {
		findings = append(findings, ask(ctx))
	}
	return append(findings, m.signals(ctx)...)
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (m Machine) platform(context.Context) Finding {
	f := Finding{Name: "platform", Level: OK, Found: fmt.Sprintf("linux/%s, pages of %d bytes", runtime.GOARCH, os.Getpagesize())}
	if os.Getpagesize() != checkpoint.PageSize {
		f.Level, f.Do = Missing, fmt.Sprintf("boot a kernel with pages of %d bytes", checkpoint.PageSize)
	}
	return f
}

func (m Machine) kernel(context.Context) Finding {
	release := m.line("/proc/sys/kernel/osrelease")
	f := Finding{Name: "kernel", Level: OK, Found: release}
	switch {
	case !m.linux(0, 0):
		f.Level, f.Found, f.Do = Missing, "unknown release "+strconv.Quote(release), "mount /proc"
	case !m.linux(5, 15):
		f.Level, f.Do = Missing, "boot Linux 5.15 or newer"
	case !m.linux(6, 7):
		f.Level, f.Do = Warn, "Linux 6.7 or newer tracks written pages without stopping the shard"
	}
	return f
}

// linux says whether the kernel is this version or a newer one.
func (m Machine) linux(major, minor int) bool {
	var haveMajor, haveMinor int
	if _, err := fmt.Sscanf(m.line("/proc/sys/kernel/osrelease"), "%d.%d", &haveMajor, &haveMinor); err != nil {
		return false
	}
	return haveMajor > major || haveMajor == major && haveMinor >= minor
}

// neededCapabilities by their bit (linux/capability.h).
var neededCapabilities = []struct {
	bit  uint
	name string
}{{12, "CAP_NET_ADMIN"}, {19, "CAP_SYS_PTRACE"}, {21, "CAP_SYS_ADMIN"}}

const capSysResource = 24

func (m Machine) privileges(context.Context) Finding {
	f := Finding{Name: "privileges", Level: OK, Found: "root"}
	effective, err := m.capabilities()
	if err != nil {
		return Finding{Name: f.Name, Level: Missing, Found: err.Error(), Do: "mount /proc"}
	}
	var lacking []string
	for _, c := range neededCapabilities {
		if effective>>c.bit&1 == 0 {
			lacking = append(lacking, c.name)
		}
	}
	if len(lacking) > 0 {
		return Finding{Name: f.Name, Level: Missing, Found: "without " + strings.Join(lacking, ", "), Do: "run it as root: sudo tranship doctor"}
	}
	if effective>>capSysResource&1 == 0 {
		f.Level, f.Found = Warn, "root without CAP_SYS_RESOURCE"
		f.Do = "a container or nested machine took it away; see the line on pipes"
	}
	return f
}

func (m Machine) capabilities() (uint64, error) {
	for _, line := range strings.Split(m.text("/proc/self/status"), "\n") {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	return 0, errors.New("/proc/self/status shows no capabilities")
}

func (m Machine) cgroups(context.Context) Finding {
	f := Finding{Name: "cgroups", Level: OK}
	var have []string
	switch {
	case m.exists("/sys/fs/cgroup/cgroup.controllers"):
		f.Found = "v2"
		have = strings.Fields(m.text("/sys/fs/cgroup/cgroup.controllers"))
		have = append(have, "freezer") // part of v2 itself since Linux 5.2
	case m.exists("/sys/fs/cgroup/unified/cgroup.controllers"):
		f.Found = "v1 with v2 beside it (hybrid)"
	default:
		f.Found = "v1"
	}
	for _, name := range []string{"cpu", "memory", "pids", "freezer"} {
		if !slices.Contains(have, name) && !m.exists("/sys/fs/cgroup/"+name+"/cgroup.procs") {
			f.Level, f.Do = Missing, "mount the cgroup controller "+name+" below /sys/fs/cgroup"
			f.Found += ", without " + name
		}
	}
	return f
}

// program asks a program for its version.
func (m Machine) program(name, command, remedy string) func(context.Context) Finding {
	return func(ctx context.Context) Finding {
		out, err := m.Output(ctx, command, "--version")
		if err != nil {
			return Finding{Name: name, Level: Missing, Found: err.Error(), Do: remedy}
		}
		first, _, _ := strings.Cut(out, "\n")
		return Finding{Name: name, Level: OK, Found: first}
	}
}

func (m Machine) containerdSocket(ctx context.Context) Finding {
	const socket = "/run/containerd/containerd.sock"
	f := Finding{Name: "containerd answers", Level: OK, Found: socket}
	if !m.exists(socket) {
		return Finding{Name: f.Name, Level: Warn, Found: "no " + socket, Do: "systemctl start containerd (the lab brings its own)"}
	}
	if out, err := m.Output(ctx, "ctr", "--connect-timeout", "5s", "version"); err != nil {
		return Finding{Name: f.Name, Level: Warn, Found: lastLine(out, err), Do: "systemctl restart containerd"}
	}
	return f
}

func (m Machine) overlay(context.Context) Finding {
	for _, line := range strings.Split(m.text("/proc/filesystems"), "\n") {
		if slices.Contains(strings.Fields(line), "overlay") {
			return Finding{Name: "overlayfs", Level: OK, Found: "in the kernel"}
		}
	}
	return Finding{Name: "overlayfs", Level: Missing, Found: "unknown to the kernel", Do: "modprobe overlay"}
}

func (m Machine) cni(context.Context) Finding {
	var lacking []string
	at := ""
	for _, plugin := range []string{"bridge", "static"} {
		dir := ""
		for _, d := range m.CNIBin {
			if m.exists(filepath.Join(d, plugin)) {
				dir = d
				break
			}
		}
		if dir == "" {
			lacking = append(lacking, plugin)
		} else {
			at = dir
		}
	}
	if len(lacking) > 0 {
		return Finding{
			Name: "CNI plugins", Level: Missing, Found: "no " + strings.Join(lacking, ", ") + " in " + strings.Join(m.CNIBin, ", "),
			Do: "apt-get install containernetworking-plugins",
		}
	}
	return Finding{Name: "CNI plugins", Level: OK, Found: "bridge, static in " + at}
}

func (m Machine) nft(ctx context.Context) Finding {
	out, err := m.Output(ctx, "nft", "list", "tables")
	if err != nil {
		return Finding{Name: "nftables", Level: Missing, Found: lastLine(out, err), Do: "apt-get install nftables; the kernel needs CONFIG_NF_TABLES"}
	}
	return Finding{Name: "nftables", Level: OK, Found: "answers"}
}

func (m Machine) bridgeFilter(context.Context) Finding {
	if m.line("/proc/sys/net/bridge/bridge-nf-call-iptables") == "1" {
		return Finding{
			Name: "bridge filter", Level: Warn, Found: "every bridged frame passes iptables",
			Do: "sysctl net.bridge.bridge-nf-call-iptables=0, or allow the shards' subnet in the FORWARD chain",
		}
	}
	return Finding{Name: "bridge filter", Level: OK, Found: "off"}
}

// oldestCRIU is the first that works with this kernel. Linux 6.16 refuses
// SO_PASSCRED on TCP sockets, which CRIU asks them for until 4.2; `criu check`
// does not notice.
func (m Machine) oldestCRIU() criu.Version {
	if oldest := (criu.Version{Major: 4, Minor: 2}); m.linux(6, 16) && criu.MinVersion.Less(oldest) {
		return oldest
	}
	return criu.MinVersion
}

func (m Machine) criu(ctx context.Context) Finding {
	const name = "CRIU"
	oldest := m.oldestCRIU()
	remedy := fmt.Sprintf("make setup installs one that works, or install CRIU %v or newer", oldest)
	path, err := criu.Find("")
	if err != nil {
		return Finding{Name: name, Level: Missing, Found: err.Error(), Do: remedy}
	}
	version, err := criu.VersionOf(ctx, path)
	if err != nil {
		return Finding{Name: name, Level: Missing, Found: err.Error(), Do: remedy}
	}
	found := fmt.Sprintf("%v in %s", version, path)
	if version.Less(oldest) {
		return Finding{Name: name, Level: Missing, Found: found, Do: remedy}
	}
	if out, err := m.Output(ctx, path, "check"); err != nil {
		return Finding{Name: name, Level: Missing, Found: found + ": " + lastLine(out, err), Do: remedy}
	}
	return Finding{Name: name, Level: OK, Found: found}
}

// criuForRunc: transhipd dumps with a path of its own, but runc restores with
// what it finds by name, and images of a newer CRIU are not for an older one.
func (m Machine) criuForRunc(ctx context.Context) Finding {
	const name = "CRIU for runc"
	const remedy = "ln -sf /usr/local/lib/tranship/criu/criu /usr/local/sbin/criu, and have /usr/local/sbin on containerd's PATH"
	ours, err := criu.Find("")
	if err != nil {
		return Finding{Name: name, Level: Missing, Found: "no CRIU at all", Do: "see the line on CRIU"}
	}
	theirs, err := exec.LookPath("criu")
	if err != nil {
		return Finding{Name: name, Level: Missing, Found: "no criu on the PATH", Do: remedy}
	}
	v1, err1 := criu.VersionOf(ctx, ours)
	v2, err2 := criu.VersionOf(ctx, theirs)
	if err := errors.Join(err1, err2); err != nil {
		return Finding{Name: name, Level: Missing, Found: err.Error(), Do: remedy}
	}
	if v2.Less(v1) {
		return Finding{Name: name, Level: Missing, Found: fmt.Sprintf("%s is %v, older than %v in %s", theirs, v2, v1, ours), Do: remedy}
	}
	return Finding{Name: name, Level: OK, Found: fmt.Sprintf("%v in %s", v2, theirs)}
}

func (m Machine) userfaultfd(context.Context) Finding {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno == 0 {
		unix.Close(int(fd))
		return Finding{Name: "userfaultfd", Level: OK, Found: "in the kernel"}
	}
	do := "boot a kernel with CONFIG_USERFAULTFD"
	if errno == unix.EPERM {
		do = "run it as root"
	}
	return Finding{Name: "userfaultfd", Level: Missing, Found: errno.Error(), Do: do}
}

func (m Machine) tracker(context.Context) Finding {
	const name = "dirty tracking"
	if m.Tracker == nil {
		return Finding{Name: name, Level: Warn, Found: "not examined"}
	}
	kind, why := m.Tracker()
	f := Finding{Name: name, Level: OK, Found: string(kind)}
	if why != nil {
		f.Found += " (" + why.Error() + ")"
	}
	switch kind {
	case track.UffdWP:
	case track.SoftDirty:
		f.Level, f.Do = Warn, "Linux 6.7 or newer tracks without stopping the shard"
	default:
		f.Level, f.Do = Warn, "without it memory is copied while the shard stands still: boot Linux 6.7 or newer, or one with CONFIG_MEM_SOFT_DIRTY"
	}
	return f
}

// widePipe is where CRIU's dump of a gigabyte stops getting faster.
const widePipe = 8 << 20

func (m Machine) pipes(context.Context) Finding {
	f := Finding{Name: "pipes", Level: OK, Found: "fs.pipe-max-size=" + m.line("/proc/sys/fs/pipe-max-size")}
	size, err := strconv.Atoi(m.line("/proc/sys/fs/pipe-max-size"))
	if err != nil {
		return Finding{Name: f.Name, Level: Warn, Found: err.Error(), Do: "mount /proc"}
	}
	effective, err := m.capabilities()
	if err == nil && effective>>capSysResource&1 == 1 {
		f.Found += ", no limit with CAP_SYS_RESOURCE"
		return f
	}
	if size < widePipe {
		f.Level, f.Do = Warn, fmt.Sprintf("sysctl fs.pipe-max-size=%d takes some 100 ms per GiB off the blackout", widePipe)
	}
	return f
}

func (m Machine) runDir(context.Context) Finding {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join("/", m.Root, "/run"), &st); err != nil {
		return Finding{Name: "/run", Level: Warn, Found: err.Error(), Do: "mount -t tmpfs tmpfs /run"}
	}
	if st.Type != unix.TMPFS_MAGIC {
		return Finding{Name: "/run", Level: Warn, Found: "not a tmpfs", Do: "mount a tmpfs on /run: CRIU keeps its cache there, and starts 55 ms faster with it"}
	}
	return Finding{Name: "/run", Level: OK, Found: "tmpfs"}
}

// fewMemory is what a host without any shard uses, and a small shard twice.
const fewMemory = 1 << 30

func (m Machine) memory(context.Context) Finding {
	f := Finding{Name: "memory", Level: Warn, Found: "unknown", Do: "mount /proc"}
	for _, line := range strings.Split(m.text("/proc/meminfo"), "\n") {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "MemAvailable:" {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			break
		}
		f = Finding{Name: f.Name, Level: OK, Found: fmt.Sprintf("%.1f GiB available", float64(kib)/(1<<20))}
		if kib<<10 < fewMemory {
			f.Level, f.Do = Warn, "shards that arrive are refused for lack of memory: free some"
		}
	}
	return f
}

func (m Machine) text(path string) string {
	raw, err := os.ReadFile(filepath.Join("/", m.Root, path))
	if err != nil {
		return "" // an absent file is an absent feature
	}
	return string(raw)
}

func (m Machine) line(path string) string { return strings.TrimSpace(m.text(path)) }

func (m Machine) exists(path string) bool {
	_, err := os.Stat(filepath.Join("/", m.Root, path))
	return !errors.Is(err, fs.ErrNotExist) && err == nil
}

func lastLine(out string, err error) string {
	if out == "" {
		return err.Error()
	}
	return out[strings.LastIndexByte(out, '\n')+1:]
}
