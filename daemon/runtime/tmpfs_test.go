package runtime

import (
	"errors"
	"reflect"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestTmpfsOf(t *testing.T) {
	const dev = "31 30 0:50 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755,inode64\n"
	spec := &specs.Spec{Mounts: []specs.Mount{
		{Type: "proc", Destination: "/proc"},
		{Type: "tmpfs", Destination: "/dev/"},
		{Type: "tmpfs", Destination: "/data"},
	}}
	want := []TmpfsMount{{At: "/dev", Options: "size=65536k,mode=755"}}
	for _, c := range []struct {
		name, mountinfo string
		want            []TmpfsMount
	}{
		{"as runc made it", dev, want},
		{"with other mounts inside", dev + "32 31 0:51 / /dev/pts rw - devpts devpts rw\n", want},
		{"not mounted any more", "", nil},
		{"hidden by another mount", dev + "40 31 0:60 / /dev rw - tmpfs tmpfs rw\n", nil},
		{"a part of another tmpfs", "31 30 0:50 /sub /dev rw - tmpfs tmpfs rw\n", nil},
		{"another file system by now", "31 30 0:50 / /dev rw - ext4 /dev/sda rw\n", nil},
		{"optional fields", "31 30 0:50 / /dev rw shared:3 master:2 - tmpfs tmpfs rw,nr_inodes=10,huge=always\n", []TmpfsMount{{At: "/dev", Options: "nr_inodes=10"}}},
		{"one that the specification does not have", "31 30 0:50 / /tmp rw - tmpfs tmpfs rw\n", nil},
		{"lines that are cut", "31 30 0:50 / /dev\n31 30 0:50 / /dev rw - tmpfs\n", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := tmpfsOf(spec, c.mountinfo); !reflect.DeepEqual(got, c.want) {
				t.Errorf("%+v, want %+v", got, c.want)
			}
		})
	}
}

func TestATmpfsFromAPeerMustBeTheSpecifications(t *testing.T) {
	spec := &specs.Spec{Mounts: []specs.Mount{{Type: "tmpfs", Destination: "/dev"}, {Type: "tmpfs", Destination: "/a b"}, {Type: "bind", Destination: "/etc"}}}
	if err := (TmpfsMount{At: "/dev", Options: "size=1k,mode=755"}).validate(spec); err != nil {
		t.Error(err)
	}
	for _, m := range []TmpfsMount{
		{At: "/etc"},
		{At: "/dev/../etc"},
		{At: ""},
		{At: "/a b"},
		{At: "/other"},
		{At: "/dev", Options: "size=1k,huge=always"},
		{At: "/dev", Options: "context=x"},
		{At: "/dev", Options: "size=1k,,"},
	} {
		if err := m.validate(spec); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", m, err)
		}
	}
}
