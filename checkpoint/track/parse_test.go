package track

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

const smapsExample = `55d0c8a00000-55d0c8a21000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
Rss:                 100 kB
Swap:                  0 kB
VmFlags: rd wr mr mw me ac uw
7f0000000000-7f0040000000 ---p 00000000 00:00 0 
Rss:                   0 kB
Swap:                  0 kB
VmFlags: mr mw me nr
7f1000000000-7f1000001000 rw-p 00000000 00:00 0                          [anon:a name: with a colon]
Rss:                   0 kB
Swap:                  4 kB
VmFlags: rd wr lo
7f2000000000-7f2000001000 r-xp 00001000 fd:01 1234                       /usr/lib/x y (deleted)
VmFlags: rd ex
7f3000000000-7f3000200000 rw-p 00000000 00:0f 99                         /anon_hugepage (deleted)
VmFlags: rd wr ht
7f4000000000-7f4000001000 rw-s 00000000 00:01 77                         /dev/zero (deleted)
VmFlags: rd wr sh
7f5000000000-7f5000001000 rw-p 00000000 00:06 5                          /dev/zero
VmFlags: rd wr
7f6000000000-7f6000001000 rw-p 00000000 00:00 0 
VmFlags: rd wr dp
7ffd00000000-7ffd00004000 r--p 00000000 00:00 0                          [vvar]
VmFlags: rd io pf
7ffd00004000-7ffd00005000 r--p 00000000 00:00 0                          [vvar_vclock]
VmFlags: rd io pf
7ffd00006000-7ffd00008000 r-xp 00000000 00:00 0                          [vdso]
VmFlags: rd ex
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex
`

func TestMappingsThatAreEligible(t *testing.T) {
	all, err := parseMappings(strings.NewReader(smapsExample))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct {
		what            string
		eligible, empty bool
	}{
		{"the heap", true, false},
		{"a reservation", true, true},
		{"locked memory", false, false},
		{"a file", false, false},
		{"huge TLB pages", false, false},
		{"shared memory", false, false},
		{"the zero device", true, false},
		{"droppable memory", false, false},
		{"vvar", false, false},
		{"vvar of a clock", false, false},
		{"vdso", false, false},
		{"vsyscall", false, false},
	} {
		if got := all[i].eligible(); got != want.eligible {
			t.Errorf("%s: eligible %v, want %v", want.what, got, want.eligible)
		}
		if all[i].empty != want.empty {
			t.Errorf("%s: empty %v, want %v", want.what, all[i].empty, want.empty)
		}
	}
	if len(all) != 12 {
		t.Errorf("%d mappings, want 12", len(all))
	}
	if got := all[2].name; got != "[anon:a name: with a colon]" {
		t.Errorf("name %q", got)
	}
	if !all[3].exec || all[3].inode != 1234 || all[3].name != "/usr/lib/x y (deleted)" || all[3].pages() != 1 {
		t.Errorf("a file was read as %+v", all[3])
	}
}

func TestMalformedMappingsAreRefused(t *testing.T) {
	for _, text := range []string{
		"x", "1000-2000", "1000-2000 rw-p", "1000-2000 rw-p 0 00:00", "2000-1000 rw-p 0 00:00 0", "1000-1000 rw-p 0 00:00 0",
		"1001-2000 rw-p 0 00:00 0", "1000-2001 rw-p 0 00:00 0", "1000-2000 rw 0 00:00 0", "1000-2000 rw-p 0 00:00 x",
		"g000-2000 rw-p 0 00:00 0", "10000000000000000-2000 rw-p 0 00:00 0", "Rss: 0 kB",
		"1000-2000 rw-p 0 00:00 0\nRss 0 kB",
	} {
		if all, err := parseMappings(strings.NewReader(text)); err == nil {
			t.Errorf("%q was read as %+v", text, all)
		}
	}
}

func FuzzMappings(f *testing.F) {
	f.Add([]byte(smapsExample))
	for i := 0; i < len(smapsExample); i += 37 {
		f.Add([]byte(smapsExample[:i]))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		all, err := parseMappings(bytes.NewReader(text))
		if err != nil {
			return
		}
		for _, m := range all {
			if m.start >= m.end || m.start%page != 0 || m.end%page != 0 {
				t.Errorf("mapping %+v", m)
			}
		}
	})
}

func TestStatOfAProcessWithAnyName(t *testing.T) {
	const tail = " S 17 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 9 0 123456 1 1 1"
	for _, name := range []string{"bash", "a b", "a) R 1 (b", ")", ""} {
		st, err := parseStat([]byte("42 (" + name + ")" + tail))
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if want := (stat{state: 'S', ppid: 17, threads: 9, start: 123456}); st != want {
			t.Errorf("%q: %+v, want %+v", name, st, want)
		}
	}
	for i := range len("42 (x)" + " S 17 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 9") {
		if st, err := parseStat([]byte(("42 (x)" + tail)[:i])); err == nil {
			t.Errorf("cut at %d it was read as %+v", i, st)
		}
	}
}

func FuzzStat(f *testing.F) {
	f.Add([]byte("42 (x) S 17 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 9 0 123456"))
	f.Fuzz(func(_ *testing.T, raw []byte) { _, _ = parseStat(raw) })
}

func TestIdentityOfAProcess(t *testing.T) {
	for _, tt := range []struct {
		name, status string
		pids         []int
		dead         bool
		wantErr      bool
	}{
		{name: "one in a namespace", status: "Name:\tx\nState:\tS (sleeping)\nNSpid:\t4711\t12\nThreads:\t1\n", pids: []int{4711, 12}},
		{name: "a zombie", status: "State:\tZ (zombie)\nNSpid:\t4711\t12\nThreads:\t1\n", pids: []int{4711, 12}, dead: true},
		{name: "one whose main thread has exited", status: "State:\tZ (zombie)\nNSpid:\t4711\nThreads:\t2\n", pids: []int{4711}},
		{name: "a name that looks like a field", status: "Name:\tNSpid:\nState:\tR\nNSpid:\t1\nThreads:\t1\n", pids: []int{1}},
		{name: "no pid", status: "State:\tS\nNSpid:\t\n", wantErr: true},
		{name: "no state", status: "NSpid:\t1\n", wantErr: true},
		{name: "a pid that is none", status: "State:\tS\nNSpid:\tx\n", wantErr: true},
		{name: "nothing", wantErr: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			id, err := parseIdentity([]byte(tt.status))
			if (err != nil) != tt.wantErr {
				t.Fatalf("error %v, want one: %v", err, tt.wantErr)
			}
			if err == nil && (!slices.Equal(id.pids, tt.pids) || id.dead != tt.dead) {
				t.Errorf("got %+v, want pids %v, dead %v", id, tt.pids, tt.dead)
			}
		})
	}
}

func FuzzIdentity(f *testing.F) {
	f.Add([]byte("State:\tS\nNSpid:\t4711\t12\nThreads:\t1\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if id, err := parseIdentity(raw); err == nil && len(id.pids) == 0 {
			t.Error("an identity without a pid")
		}
	})
}

func TestMountsThatMayPinPages(t *testing.T) {
	for _, tt := range []struct {
		line string
		want bool
	}{
		{"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw", false},
		{"36 35 98:0 / / rw - overlay overlay rw,lowerdir=fuse", false},
		{"36 35 0:40 / /sys/fs/fuse/connections rw - fusectl fusectl rw", false},
		{"36 35 0:40 / / rw shared:1 - fuse.fuse-overlayfs fuse-overlayfs rw", true},
		{"36 35 0:40 / /data rw - fuse x rw", true},
		{"36 35 0:40 / /data rw - virtiofs x rw", true},
		{"36 35 0:40 / /data rw - 9p x rw", true},
		{"", false},
	} {
		if got := pinningMount([]byte(tt.line + "\n")); got != tt.want {
			t.Errorf("%q: %v, want %v", tt.line, got, tt.want)
		}
	}
}

func TestFlagsOfADescriptor(t *testing.T) {
	for _, tt := range []struct {
		info string
		want bool
	}{
		{"pos:\t0\nflags:\t0100002\nmnt_id:\t29\n", false},
		{"pos:\t0\nflags:\t07777777\nmnt_id:\t29\n", true},
		{"pos:\t0\nflags:\t9\n", true},
		{"pos:\t0\n", true},
	} {
		if got := openedDirect([]byte(tt.info)); got != tt.want {
			t.Errorf("%q: %v, want %v", tt.info, got, tt.want)
		}
	}
}
