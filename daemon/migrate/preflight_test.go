package migrate

import (
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/checkpoint"
	v1 "github.com/tranship/tranship/daemon/control/transhipv1"
	"github.com/tranship/tranship/internal/osthread"
)

func facts(node string) hostFacts {
	return hostFacts{
		Node:            node,
		Versions:        &v1.Versions{Arch: "amd64", Protocol: 1, Criu: "4.2.1", Kernel: "6.12.1-amd64", Containerd: "1.6.20~ds1", Runc: "1.1.5+ds1"},
		CPUFeatures:     []string{"avx2", "sse2"},
		MemoryAvailable: 4 << 30,
		Now:             time.Unix(1000, 0),
	}
}

func codes(findings []*v1.Finding) []string {
	var out []string
	for _, f := range findings {
		out = append(out, f.GetCode())
		if f.GetMessage() == "" || f.GetAdvice() == "" {
			out = append(out, "silent:"+f.GetCode())
		}
	}
	return out
}

func TestCompareHosts(t *testing.T) {
	tests := []struct {
		name   string
		change func(dst *hostFacts)
		want   []string
	}{
		{"equal hosts have nothing against it", func(*hostFacts) {}, nil},
		{"another architecture", func(d *hostFacts) { d.Versions.Arch = "arm64" }, []string{"architecture"}},
		{"another protocol", func(d *hostFacts) { d.Versions.Protocol = 2 }, []string{"protocol"}},
		{"an older CRIU at the destination", func(d *hostFacts) { d.Versions.Criu = "4.1.1" }, []string{"criu-older"}},
		{"a CRIU that does not know the kernel", func(d *hostFacts) { d.Versions.Criu, d.Versions.Kernel = "4.1.1", "6.18.0" }, []string{"criu", "criu-older"}},
		{"an old kernel", func(d *hostFacts) { d.Versions.Kernel = "5.10.0-30-amd64" }, []string{"kernel"}},
		{"an old containerd", func(d *hostFacts) { d.Versions.Containerd = "v1.4.13" }, []string{"containerd"}},
		{"an old runc", func(d *hostFacts) { d.Versions.Runc = "1.0.3" }, []string{"runc"}},
		{"no CRIU", func(d *hostFacts) { d.Versions.Criu = "" }, []string{"criu", "criu-older"}},
		{"a newer CRIU at the destination is fine", func(d *hostFacts) { d.Versions.Criu = "4.10" }, nil},
		{"a CPU that lacks a feature", func(d *hostFacts) { d.CPUFeatures = []string{"sse2"} }, []string{"cpu-features"}},
		{"a CPU with more features is fine", func(d *hostFacts) { d.CPUFeatures = append(d.CPUFeatures, "avx512f") }, nil},
		{"too little memory", func(d *hostFacts) { d.MemoryAvailable = 1 << 30 }, []string{"memory"}},
		{"clocks far apart", func(d *hostFacts) { d.Now = d.Now.Add(-time.Hour) }, []string{"clocks"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dst := facts("b")
			tt.change(&dst)
			got := codes(compareHosts(facts("a"), dst, 1<<30, time.Millisecond))
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestJudgeDescriptor(t *testing.T) {
	p := checkpoint.Process{PID: 7}
	tests := []struct {
		name  string
		d     descriptor
		moves bool
		want  string
	}{
		{"a plain file", descriptor{target: "/data/x"}, true, ""},
		{"an epoll", descriptor{target: "anon_inode:[eventpoll]"}, true, ""},
		{"an io_uring", descriptor{target: "anon_inode:[io_uring]"}, true, "io-uring"},
		{"a userfaultfd", descriptor{target: "anon_inode:[userfaultfd]"}, true, "userfaultfd"},
		{"a perf event", descriptor{target: "anon_inode:[perf_event]"}, true, "descriptor"},
		{"the null device", descriptor{target: "/dev/null"}, true, ""},
		{"shared memory", descriptor{target: "/dev/shm/x (deleted)"}, true, ""},
		{"a device", descriptor{target: "/dev/kvm"}, true, "device"},
		{"an MPTCP socket", descriptor{target: "socket:[1]", protocol: protoMPTCP}, true, "mptcp"},
		{"a connection whose address moves", descriptor{target: "socket:[1]", protocol: 6, state: tcpEstablished}, true, ""},
		{"a connection whose address stays", descriptor{target: "socket:[1]", protocol: 6, state: tcpEstablished}, false, "connections"},
		{"a listener in the host's network", descriptor{target: "socket:[1]", protocol: 6, state: 10}, false, ""},
		{"a connection over loopback", descriptor{target: "socket:[1]", protocol: 6, state: tcpEstablished, loopback: true}, false, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := judgeDescriptor("redis", p, tt.d, tt.moves)
			if got := f.GetCode(); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestOpenDescriptorsSeesTheStateOfSockets(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	found := slices.ContainsFunc(openDescriptors(os.Getpid()), func(d descriptor) bool {
		return d.protocol == 6 && d.state == tcpEstablished && d.loopback
	})
	if !found {
		t.Error("the established loopback connection of this process was not seen")
	}
}

func TestFilesThatOnlyAThreadHasOpenAreRefused(t *testing.T) {
	self := []checkpoint.Process{{PID: 1, HostPID: os.Getpid()}}
	found := func() []string { return codes(checkProcesses("redis", self, true)) }
	if got := found(); slices.Contains(got, "file-table") {
		t.Errorf("threads that share one table: %v", got)
	}
	err := osthread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_FILES); err != nil {
			return err
		}
		if got := found(); !slices.Contains(got, "file-table") {
			t.Errorf("a thread that has its own: %v", got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestParseCPUFeaturesKeepsWhatProgramsCanUse(t *testing.T) {
	got := parseCPUFeatures("processor\t: 0\nflags\t\t: fpu sse2 avx2 ibrs md_clear avx512f\n\nprocessor\t: 1\nflags\t: sse2\n")
	if strings.Join(got, " ") != "avx2 avx512f fpu sse2" && strings.Join(got, " ") != "avx2 avx512f sse2" {
		t.Errorf("got %v", got)
	}
	if got := parseCPUFeatures(""); got != nil {
		t.Errorf("got %v from nothing", got)
	}
}

func TestMemoryAvailable(t *testing.T) {
	total, avail := MemoryOf("MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n")
	if total != 24000000<<10 || avail != 1<<20 {
		t.Errorf("total %d, available %d", total, avail)
	}
}
