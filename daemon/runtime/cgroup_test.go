package runtime

import (
	"strings"
	"testing"
)

func TestTheCgroupIsFoundInEveryLayout(t *testing.T) {
	const (
		hybridMounts = `31 24 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro
32 31 0:28 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
33 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:31 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
`
		v2Mounts = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
	)
	for _, tt := range []struct {
		name, membership, mounts string
		controller               string
		want                     string // "" for an error
		wantV2                   bool
	}{
		{
			name:       "v2",
			membership: "0::/tranship/default/web\n", mounts: v2Mounts, controller: "freezer",
			want: "/sys/fs/cgroup/tranship/default/web", wantV2: true,
		},
		{
			name:       "hybrid has the freezer in v1",
			membership: "6:freezer:/tranship/default/web\n4:memory:/m\n0::/u\n", mounts: hybridMounts, controller: "freezer",
			want: "/sys/fs/cgroup/freezer/tranship/default/web",
		},
		{
			name:       "hybrid without a v1 freezer",
			membership: "4:memory:/m\n0::/tranship/default/web\n", mounts: hybridMounts, controller: "freezer",
			want: "/sys/fs/cgroup/unified/tranship/default/web", wantV2: true,
		},
		{
			name:       "controllers that share a hierarchy",
			membership: "1:cpu,cpuacct:/x\n", mounts: hybridMounts, controller: "cpuacct",
			want: "/sys/fs/cgroup/cpu,cpuacct/x",
		},
		{
			name:       "a mount of a subtree",
			membership: "6:freezer:/outer/tranship/web\n", mounts: "32 31 0:28 /outer /cg/freezer rw - cgroup cgroup rw,freezer\n", controller: "freezer",
			want: "/cg/freezer/tranship/web",
		},
		{
			name:       "a process outside the mounted subtree",
			membership: "6:freezer:/else\n", mounts: "32 31 0:28 /outer /cg/freezer rw - cgroup cgroup rw,freezer\n", controller: "freezer",
		},
		{
			name:       "a process outside our cgroup namespace",
			membership: "0::/../else\n", mounts: v2Mounts, controller: "freezer",
		},
		{
			name:       "the root is never a shard's",
			membership: "0::/\n", mounts: v2Mounts, controller: "freezer",
		},
		{
			name:       "no cgroup file system",
			membership: "0::/x\n", mounts: "31 24 0:27 / / rw - ext4 /dev/vda rw\n", controller: "freezer",
		},
		{
			name:       "a mount point with a space",
			membership: "0::/x\n", mounts: "30 24 0:26 / /my\\040cg rw - cgroup2 cgroup2 rw\n", controller: "freezer",
			want: "/my cg/x", wantV2: true,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			paths, err := parseMembership(strings.NewReader(tt.membership))
			if err != nil {
				t.Fatal(err)
			}
			mounts, err := parseCgroupMounts(strings.NewReader(tt.mounts))
			if err != nil {
				t.Fatal(err)
			}
			got, v2, err := locate(tt.controller, paths, mounts)
			if got != tt.want || v2 != tt.wantV2 || (err != nil) != (tt.want == "") {
				t.Errorf("%q v2=%v %v", got, v2, err)
			}
		})
	}
}

func FuzzCgroupFiles(f *testing.F) {
	f.Add("0::/a\n1:cpu,cpuacct:/b\n", "30 24 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n")
	f.Fuzz(func(t *testing.T, membership, mountinfo string) {
		paths, err := parseMembership(strings.NewReader(membership))
		if err != nil {
			return
		}
		mounts, err := parseCgroupMounts(strings.NewReader(mountinfo))
		if err != nil {
			return
		}
		dir, _, err := locate("freezer", paths, mounts)
		if err == nil && dir == "" {
			t.Error("found nothing, and called it success")
		}
	})
}
