package migrate

import (
	"bufio"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/criu"
	"github.com/tranship/tranship/checkpoint/track"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
)

// maxClockSkew is how far two hosts' clocks may be apart: certificates,
// deadlines and log lines stop making sense long before a minute.
const maxClockSkew = 30 * time.Second

// memoryReserve is what a destination keeps free for itself.
const memoryReserve = 128 << 20

// refuse and warn make findings; every message names the thing, every advice
// the next step.
func refuse(code, advice, format string, args ...any) *v1.Finding {
	return &v1.Finding{Code: code, Advice: advice, Message: fmt.Sprintf(format, args...)}
}

func warn(code, advice, format string, args ...any) *v1.Finding {
	f := refuse(code, advice, format, args...)
	f.Warning = true
	return f
}

// refused says whether any finding is more than a warning.
func refused(findings []*v1.Finding) bool {
	return slices.ContainsFunc(findings, func(f *v1.Finding) bool { return !f.Warning })
}

// hostFacts is what the two ends compare. Pure checks work on it.
type hostFacts struct {
	Node            string
	Versions        *v1.Versions
	CPUFeatures     []string
	MemoryAvailable int64
	Now             time.Time
}

// compareHosts finds what differs between the ends in a way that forbids a move.
func compareHosts(src, dst hostFacts, memory int64, roundTrip time.Duration) []*v1.Finding {
	out := append(tooOld(src), tooOld(dst)...)
	if src.Versions.GetArch() != dst.Versions.GetArch() {
		out = append(out, refuse("architecture", "choose a node of the same architecture",
			"%s is %s, %s is %s", src.Node, src.Versions.GetArch(), dst.Node, dst.Versions.GetArch()))
	}
	if src.Versions.GetProtocol() != dst.Versions.GetProtocol() {
		out = append(out, refuse("protocol", "install the same tranship on both hosts",
			"transfer protocol %d on %s, %d on %s", src.Versions.GetProtocol(), src.Node, dst.Versions.GetProtocol(), dst.Node))
	}
	if newer(src.Versions.GetCriu(), dst.Versions.GetCriu()) {
		out = append(out, refuse("criu-older", "install CRIU "+src.Versions.GetCriu()+" or newer on "+dst.Node+": make setup",
			"%s has CRIU %s, older than %s on %s: it may not read the images", dst.Node, dst.Versions.GetCriu(), src.Versions.GetCriu(), src.Node))
	}
	if missing := missingFeatures(src.CPUFeatures, dst.CPUFeatures); len(missing) > 0 {
		out = append(out, refuse("cpu-features", "choose a node with these features, or mask them on "+src.Node,
			"%s lacks CPU features that the shard may already use: %s", dst.Node, strings.Join(missing, " ")))
	}
	if need := memory + memoryReserve; dst.MemoryAvailable < need {
		out = append(out, refuse("memory", "free memory on "+dst.Node+" or choose another node",
			"the shard needs %s (%s in use and %s to spare), %s has %s available", mib(need), mib(memory), mib(memoryReserve), dst.Node, mib(dst.MemoryAvailable)))
	}
	if skew := dst.Now.Sub(src.Now).Abs() - roundTrip; skew > maxClockSkew {
		out = append(out, refuse("clocks", "synchronise both clocks (NTP)",
			"the clocks of %s and %s are %v apart", src.Node, dst.Node, skew.Round(time.Second)))
	}
	return out
}

// Oldest versions that are known to work. Kernel: pidfd_getfd, cgroup.kill and
// what Debian and Ubuntu had when this was written. containerd and runc: Debian
// 12's.
const (
	minKernel     = "5.15"
	minContainerd = "1.6"
	minRunc       = "1.1"
)

// tooOld finds what a host must update, or lacks, before shards can move.
func tooOld(h hostFacts) []*v1.Finding {
	v := h.Versions
	var major, minor int
	_, _ = fmt.Sscanf(v.GetKernel(), "%d.%d", &major, &minor)
	var out []*v1.Finding
	for _, part := range []struct{ code, name, have, min string }{
		{"kernel", "Linux", v.GetKernel(), minKernel},
		{"containerd", "containerd", strings.TrimPrefix(v.GetContainerd(), "v"), minContainerd},
		{"runc", "runc", v.GetRunc(), minRunc},
		{"criu", "CRIU", v.GetCriu(), criu.MinVersionFor(major, minor).String()},
	} {
		switch {
		case part.have == "":
			out = append(out, refuse(part.code, "install it: tranship doctor on "+h.Node+" says how", "%s is missing on %s", part.name, h.Node))
		case newer(part.min, part.have):
			out = append(out, refuse(part.code, "update it: tranship doctor on "+h.Node+" says how",
				"%s %s on %s is older than %s", part.name, part.have, h.Node, part.min))
		}
	}
	return out
}

func mib(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }

// newer says whether version a is newer than b, both dotted numbers.
func newer(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range max(len(as), len(bs)) {
		var x, y int
		if i < len(as) {
			_, _ = fmt.Sscanf(as[i], "%d", &x)
		}
		if i < len(bs) {
			_, _ = fmt.Sscanf(bs[i], "%d", &y)
		}
		if x != y {
			return x > y
		}
	}
	return false
}

// userFeatures are the /proc/cpuinfo flags (features on arm64) that a program
// can use by itself. Kernel-only flags (mitigations, virtualisation) may differ.
var userFeatures = []string{
	"adx", "aes", "amx_", "avx", "bmi", "cldemote", "clflushopt", "clwb", "cmov", "cx16", "cx8", "erms", "f16c", "fma",
	"fsgsbase", "fsrm", "gfni", "lahf_lm", "lzcnt", "abm", "mmx", "movbe", "movdir", "pclmulqdq", "popcnt", "prefetchw", "3dnowprefetch",
	"rdpid", "rdrand", "rdseed", "rdtscp", "sha", "sm3", "sm4", "sse", "ssse3", "serialize", "tbm", "vaes", "vpclmulqdq", "waitpkg",
	"xop", "xsave", "fp", "asimd", "crc32", "atomics", "sve", "sme", "bf16", "i8mm", "dcpop", "lrcpc", "pmull", "jscvt", "fcma", "ssbs", "bti", "paca", "pacg", "mte",
}

// parseCPUFeatures reads the first processor's flags from a /proc/cpuinfo.
func parseCPUFeatures(cpuinfo string) []string {
	sc := bufio.NewScanner(strings.NewReader(cpuinfo))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		key, value, ok := strings.Cut(sc.Text(), ":")
		if key = strings.TrimSpace(key); !ok || (key != "flags" && key != "Features") {
			continue
		}
		var out []string
		for f := range strings.FieldsSeq(value) {
			if slices.ContainsFunc(userFeatures, func(p string) bool { return strings.HasPrefix(f, p) }) {
				out = append(out, f)
			}
		}
		slices.Sort(out)
		return slices.Compact(out)
	}
	return nil
}

func missingFeatures(src, dst []string) []string {
	var out []string
	for _, f := range src {
		if !slices.Contains(dst, f) {
			out = append(out, f)
		}
	}
	return out
}

// MemoryOf reads MemAvailable from a /proc/meminfo, in bytes.
func MemoryOf(meminfo string) (total, available int64) {
	for line := range strings.Lines(meminfo) {
		var kib int64
		if _, err := fmt.Sscanf(line, "MemTotal: %d kB", &kib); err == nil {
			total = kib << 10
		}
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); err == nil {
			available = kib << 10
		}
	}
	return total, available
}

// checkProcesses looks at what the shard's processes hold right now that CRIU
// cannot carry.
func checkProcesses(shard string, procs []checkpoint.Process, addressMoves bool) []*v1.Finding {
	var out []*v1.Finding
	seen := map[string]bool{}
	add := func(f *v1.Finding) {
		if !seen[f.GetMessage()] {
			seen[f.GetMessage()] = true
			out = append(out, f)
		}
	}
	limited := !hasCapability(os.Getpid(), unix.CAP_SYS_RESOURCE)
	for _, p := range procs {
		if limited && ownerOf(p.HostPID) > 0 {
			// CRIU reads the resource limits of every process (prlimit(2)).
			add(refuse("capability", "give transhipd CAP_SYS_RESOURCE, or run the shard as root",
				"process %d of %s is not root's, and transhipd has no CAP_SYS_RESOURCE to look at it", p.PID, shard))
		}
		if len(track.OwnTables(p.HostPID)) > 0 {
			// CRIU dumps the process's, and restores every thread with that.
			add(refuse("file-table", "run the program without unshare(CLONE_FILES)",
				"a thread of process %d of %s has open files of its own, which CRIU cannot carry", p.PID, shard))
		}
		for _, d := range openDescriptors(p.HostPID) {
			if f := judgeDescriptor(shard, p, d, addressMoves); f != nil {
				add(f)
			}
		}
	}
	return out
}

// descriptor is one open file of a process.
type descriptor struct {
	fd     int
	target string
	// protocol and state are set for sockets; state is a TCP state, 0 if none.
	protocol int
	state    uint8
	loopback bool
}

const (
	protoMPTCP     = 262
	tcpEstablished = 1
	tcpSynSent     = 2
)

// anonymous inodes that CRIU knows how to restore (criu/files.c, criu/files-ext.c).
var knownAnonInodes = []string{"[eventpoll]", "[eventfd]", "[signalfd]", "[timerfd]", "inotify", "[fanotify]", "[pidfd]", "[memfd]"}

func judgeDescriptor(shard string, p checkpoint.Process, d descriptor, addressMoves bool) *v1.Finding {
	who := fmt.Sprintf("process %d of %s", p.PID, shard)
	switch {
	case strings.HasPrefix(d.target, "anon_inode:"):
		kind := strings.TrimPrefix(d.target, "anon_inode:")
		switch {
		case kind == "[io_uring]":
			return refuse("io-uring", "run the program without io_uring", "%s uses io_uring, which CRIU cannot carry", who)
		case kind == "[userfaultfd]":
			return refuse("userfaultfd", "run the program without userfaultfd", "%s uses a userfaultfd of its own", who)
		case !slices.Contains(knownAnonInodes, kind):
			return refuse("descriptor", "close it before moving the shard", "%s has %s open, which CRIU cannot carry", who, kind)
		}
	case strings.HasPrefix(d.target, "/dev/"):
		return judgeDevice(who, d.target)
	case d.protocol == protoMPTCP:
		return refuse("mptcp", "run the program with plain TCP (GODEBUG=multipathtcp=0 for Go)", "%s has an MPTCP socket, which CRIU cannot carry", who)
	case d.protocol == unix.IPPROTO_TCP && !addressMoves && !d.loopback && (d.state == tcpEstablished || d.state == tcpSynSent):
		return refuse("connections", "use --net shard, so that the address moves along, or close the connections",
			"%s has established TCP connections in a network that stays behind", who)
	}
	return nil
}

// plainDevices need no state of their own.
var plainDevices = []string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"}

func judgeDevice(who, target string) *v1.Finding {
	target = strings.TrimSuffix(target, " (deleted)")
	if slices.Contains(plainDevices, target) || strings.HasPrefix(target, "/dev/shm/") || strings.HasPrefix(target, "/dev/pts/") ||
		strings.HasPrefix(target, "/dev/mqueue/") || target == "/dev/ptmx" {
		return nil
	}
	if fi, err := os.Stat(target); err == nil && fi.Mode()&os.ModeDevice == 0 {
		return nil
	}
	return refuse("device", "stop using the device, or keep the shard where it is", "%s has the device %s open", who, target)
}

// openDescriptors lists a process's descriptors; what vanishes meanwhile is left out.
func openDescriptors(pid int) []descriptor {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	pidfd := -1
	defer func() {
		if pidfd >= 0 {
			_ = unix.Close(pidfd)
		}
	}()
	out := make([]descriptor, 0, len(entries))
	for _, e := range entries {
		d := descriptor{}
		if _, err := fmt.Sscanf(e.Name(), "%d", &d.fd); err != nil {
			continue
		}
		if d.target, err = os.Readlink(dir + "/" + e.Name()); err != nil {
			continue
		}
		if strings.HasPrefix(d.target, "socket:") {
			if pidfd < 0 {
				if pidfd, err = unix.PidfdOpen(pid, 0); err != nil {
					return out
				}
			}
			d.inspectSocket(pidfd)
		}
		out = append(out, d)
	}
	return out
}

func (d *descriptor) inspectSocket(pidfd int) {
	sock, err := unix.PidfdGetfd(pidfd, d.fd, 0)
	if err != nil {
		return
	}
	defer unix.Close(sock)
	d.protocol, _ = unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	if d.protocol != unix.IPPROTO_TCP {
		return
	}
	if info, err := unix.GetsockoptTCPInfo(sock, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
		d.state = info.State
	}
	switch peer, _ := unix.Getpeername(sock); a := peer.(type) {
	case *unix.SockaddrInet4:
		d.loopback = a.Addr[0] == 127
	case *unix.SockaddrInet6:
		d.loopback = a.Addr == [16]byte{15: 1}
	}
}
