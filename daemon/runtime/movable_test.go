package runtime

import (
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestWhatKeepsAShardFromMoving(t *testing.T) {
	without := func(kind specs.LinuxNamespaceType) func(*Record, *specs.Spec) {
		return func(_ *Record, s *specs.Spec) {
			for i, ns := range s.Linux.Namespaces {
				if ns.Type == kind {
					s.Linux.Namespaces = append(s.Linux.Namespaces[:i:i], s.Linux.Namespaces[i+1:]...)
					return
				}
			}
		}
	}
	for _, tt := range []struct {
		name   string
		change func(*Record, *specs.Spec)
		want   string // codes; warnings in parentheses
	}{
		{"a shard of Run's can move", nil, ""},
		{"another orchestrator's namespace", func(r *Record, _ *specs.Spec) { r.Namespace = "k8s.io" }, "(foreign-namespace)"},
		{"a stopped shard", func(r *Record, _ *specs.Spec) { r.Status = StatusStopped }, "not-running"},
		{"a paused shard", func(r *Record, _ *specs.Spec) { r.Status = StatusPaused }, "paused"},
		{"a shard that is arriving", func(r *Record, _ *specs.Spec) { r.Labels = map[string]string{LabelIncoming: "m1"} }, "incoming"},
		{"a terminal", func(r *Record, _ *specs.Spec) { r.IO.Terminal = true }, "terminal"},
		{"a runtime that is a virtual machine", func(r *Record, _ *specs.Spec) { r.Runtime.Name = "io.containerd.kata.v2" }, "runtime"},
		{"a directory as root", func(r *Record, _ *specs.Spec) { r.Snapshot = SnapshotRecord{} }, "rootfs"},
		{"another snapshotter", func(r *Record, _ *specs.Spec) { r.Snapshot.Snapshotter = "zfs" }, "snapshotter"},
		{"an image that is gone", func(r *Record, _ *specs.Spec) { r.Image.Problem = "gone" }, "image"},
		{"the host's processes", without(specs.PIDNamespace), "pid-namespace"},
		{"the host's shared memory", without(specs.IPCNamespace), "ipc-namespace"},
		{"another container's processes", func(_ *Record, s *specs.Spec) { s.Linux.Namespaces[0].Path = "/proc/7/ns/pid" }, "pid-namespace"},
		{"a user namespace", func(_ *Record, s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
		}, "user-namespace"},
		{"the host's network", func(r *Record, _ *specs.Spec) { r.Network = NetworkRecord{Kind: NetworkHost} }, "(host-network)"},
		{"somebody's network namespace", func(r *Record, _ *specs.Spec) { r.Network = NetworkRecord{Kind: NetworkNetns, Path: "/n"} }, "(external-netns)"},
		{"a sysctl of the network", func(_ *Record, s *specs.Spec) { s.Linux.Sysctl = map[string]string{"net.core.somaxconn": "9"} }, "sysctl"},
		{"a sysctl of shared memory moves with it", func(_ *Record, s *specs.Spec) { s.Linux.Sysctl = map[string]string{"kernel.shmmax": "9"} }, ""},
		{"a shard that may change its network", func(_ *Record, s *specs.Spec) {
			s.Process.Capabilities.Effective = []string{"CAP_NET_ADMIN"}
		}, "(net-admin)"},
		{"a bind mount that nobody spoke about", func(_ *Record, s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/data", Destination: "/data"})
		}, "mount-policy"},
		{"a bind mount by its option", func(_ *Record, s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "none", Source: "/data", Destination: "/data", Options: []string{"rbind"}})
		}, "mount-policy"},
		{"a bind mount that every host has", func(r *Record, s *specs.Spec) {
			r.Mounts = []Mount{{Source: "/data", Destination: "/data", Policy: MountShared}}
			s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/data", Destination: "/data"})
		}, ""},
		{"huge pages", func(_ *Record, s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Type: "hugetlbfs", Destination: "/huge"})
		}, "mount-type"},
		{"a disk", func(_ *Record, s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda"}} }, "device"},
		{"a device that all have", func(_ *Record, s *specs.Spec) { s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/null"}} }, ""},
		{"hooks", func(_ *Record, s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/x"}}} }, "hooks"},
		{"empty hooks", func(_ *Record, s *specs.Spec) { s.Hooks = &specs.Hooks{} }, ""},
		{"several reasons are all told", func(r *Record, s *specs.Spec) {
			r.IO.Terminal = true
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/sda"}, {Path: "/dev/kvm"}}
		}, "terminal device device"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var codes []string
			for _, f := range Movable(sampleRecord(t, tt.change)) {
				if f.Message == "" || f.Advice == "" {
					t.Errorf("%s says nothing: %+v", f.Code, f)
				}
				code := f.Code
				if f.Warning {
					code = "(" + code + ")"
				}
				codes = append(codes, code)
			}
			if got := strings.Join(codes, " "); got != tt.want {
				t.Errorf("findings %q, want %q", got, tt.want)
			}
		})
	}
}
