package leak

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	ServeHelper()
	serveUffd()
	os.Exit(m.Run())
}

func snapshot(items map[Category][]Item) Snapshot {
	return Snapshot{SchemaVersion: SchemaVersion, Host: "h", Items: items, TmpfsBytes: map[string]int64{}}
}

func TestADiffSaysWhatIsMoreAndWhatIsMissing(t *testing.T) {
	item := func(keys ...string) (items []Item) {
		for _, k := range keys {
			items = append(items, Item{Key: k, Detail: "pid 1"})
		}
		return items
	}
	for _, c := range []struct {
		name          string
		before, after Snapshot
		ignores       []Ignore
		want          []string
	}{
		{"nothing", snapshot(nil), snapshot(nil), nil, nil},
		{"the same in another order", snapshot(map[Category][]Item{Process: item("a", "b", "a")}), snapshot(map[Category][]Item{Process: item("b", "a", "a")}), nil, nil},
		{
			"a process more", snapshot(map[Category][]Item{Process: item("a")}), snapshot(map[Category][]Item{Process: item("a", "b")}), nil,
			[]string{"h: process left behind: b (pid 1)"},
		},
		{
			"a process that is stopped now", snapshot(map[Category][]Item{Process: item("a")}), snapshot(map[Category][]Item{Process: item("a (stopped)")}), nil,
			[]string{"h: process missing: a (pid 1)", "h: process left behind: a (stopped) (pid 1)"},
		},
		{
			"two of the same more", snapshot(map[Category][]Item{Uffd: item("x")}), snapshot(map[Category][]Item{Uffd: item("x", "x", "x")}), nil,
			[]string{"h: 2 × userfaultfd left behind: x (pid 1)"},
		},
		{
			"one that may come", snapshot(nil), snapshot(map[Category][]Item{Cgroup: item("/tranship", "/tranship/default/a")}),
			Standing,
			[]string{"h: cgroup left behind: /tranship/default/a (pid 1)"},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got []string
			for _, change := range Diff(c.before, c.after, c.ignores) {
				got = append(got, change.String())
			}
			if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(c.want))) {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestATmpfsThatGrewIsALeakButNotByAFewPages(t *testing.T) {
	before, after := snapshot(nil), snapshot(nil)
	before.TmpfsBytes["/run"] = 10 << 20
	after.TmpfsBytes["/run"] = 10<<20 + tmpfsTolerance
	if got := Diff(before, after, nil); len(got) != 0 {
		t.Errorf("within the tolerance: %v", got)
	}
	after.TmpfsBytes["/run"]++
	after.TmpfsBytes["/run/new"] = 64 << 20
	if got := Diff(before, after, nil); len(got) != 2 || got[1].Detail[0] != "65536 KiB more than before" {
		t.Errorf("beyond it: %v", got)
	}
}

func TestTheStandingIgnoresAreNarrow(t *testing.T) {
	const host = " in the namespace of the host's own"
	for _, c := range []struct {
		cat  Category
		key  string
		want bool
	}{
		{Cgroup, "/tranship", true},
		{Cgroup, "/tranship/default", true},
		{Cgroup, "/tranship/default/redis-0", false},
		{Cgroup, "/tranship/default (frozen)", false},
		{Link, "bridge tranship-stage0" + host, true},
		{Link, "veth veth…, port of tranship-stage0" + host, false},
		{File, "/run/tranship/criu/default/", true},
		{File, "/run/tranship/criu/default", false},
		{File, "/run/tranship/criu/default/redis-0.conf", false},
		{File, "/run/tranship/netns/default--redis-0", false},
		{File, "/run/tranship/store/20300101-abc/", false},
		{File, "/run/containerd/io.containerd.runtime.v2.task/default/", true},
		{File, "/run/containerd/io.containerd.runtime.v2.task/default/redis-0/", false},
		{File, "/var/lib/tranship/logs/default/redis-0.log", false},
		{Process, "/tranship", false},
	} {
		if got := ignored(Standing, c.cat, c.key); got != c.want {
			t.Errorf("%s %s: ignored is %v", c.cat, c.key, got)
		}
	}
	for _, i := range Standing {
		if len(i.Why) < 20 {
			t.Errorf("%s %s is not explained", i.Category, i.Key)
		}
	}
}

func TestMountinfo(t *testing.T) {
	got, err := parseMountinfo([]byte("22 27 0:21 / /proc rw,relatime - proc proc rw\n" +
		"30 25 0:27 /a\\040b /mnt/c\\134d rw shared:1 master:2 - tmpfs some\\040where rw,size=1k\n" +
		"31 25 0:4 net:[4026532798] /run/netns/x rw shared:5 - nsfs nsfs rw\n"))
	want := []mount{{"/", "/proc", "proc", "proc"}, {"/a b", `/mnt/c\d`, "tmpfs", "some where"}, {"net:[4026532798]", "/run/netns/x", "nsfs", "nsfs"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"22 27 0:21 / /proc rw proc proc rw", "22 27 - proc", "x"} {
		if got, err := parseMountinfo([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

func TestNftObjectsAreComparedWithoutTheirHandles(t *testing.T) {
	parse := func(handle string) []string {
		keys, err := parseNft([]byte(`{"nftables":[{"metainfo":{"version":"1.0.6"}},{"table":{"family":"inet","name":"CRIU-1","handle":` + handle + `}}]}`))
		if err != nil {
			t.Fatal(err)
		}
		return keys
	}
	if a, b := parse("1"), parse("17"); len(a) != 1 || !slices.Equal(a, b) || !strings.Contains(a[0], `table {"family":"inet","name":"CRIU-1"}`) {
		t.Errorf("%q and %q", a, b)
	}
	if keys, err := parseNft(nil); err != nil || keys != nil {
		t.Errorf("an empty ruleset: %q, %v", keys, err)
	}
	if _, err := parseNft([]byte("Error: syntax")); err == nil {
		t.Error("something else is a ruleset")
	}
}

func TestCgroupsAreListedOnceAndFrozenOnesStandOut(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  []string
	}{
		{"v1 and hybrid", map[string]string{
			"cpu/tranship/a/tasks": "", "freezer/tranship/a/freezer.state": "FROZEN\n", "freezer/tranship/b/freezer.state": "THAWED\n", "unified/cgroup.procs": "",
		}, []string{"/tranship", "/tranship/a (frozen)", "/tranship/b"}},
		{"v2", map[string]string{
			"cgroup.controllers": "cpu", "tranship/cgroup.freeze": "0\n", "tranship/a/cgroup.freeze": "1\n",
		}, []string{"/tranship", "/tranship/a (frozen)"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for path, text := range c.files {
				if err := os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s := snapshot(map[Category][]Item{})
			if err := s.cgroups(root); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, i := range s.Items[Cgroup] {
				got = append(got, i.Key)
			}
			if slices.Sort(got); !slices.Equal(got, c.want) {
				t.Errorf("%q", got)
			}
		})
	}
}

func TestFilesAreListedToTheirDepth(t *testing.T) {
	root := t.TempDir()
	for _, path := range []string{
		"run/tranship/store/m1/pages/1.pages",
		"run/containerd/io.containerd.runtime.v2.task/default/r0/rootfs/bin/sh",
		"var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/17/fs/etc/passwd",
		"tmp/somebody/else",
		"tmp/.criu.cgyard.x/file",
	} {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := snapshot(map[Category][]Item{})
	if err := s.files(root); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range s.Items[File] {
		got = append(got, i.Key)
	}
	for _, want := range []string{
		"/run/tranship/store/m1/pages/1.pages",
		"/run/containerd/io.containerd.runtime.v2.task/default/r0/",
		"/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/N/",
		"/tmp/.criu.cgyard.x/",
	} {
		if !slices.Contains(got, want) {
			t.Errorf("%s is not listed", want)
		}
	}
	for _, not := range []string{"rootfs", "somebody", "/17", "passwd"} {
		if i := slices.IndexFunc(got, func(k string) bool { return strings.Contains(k, not) }); i >= 0 {
			t.Errorf("%s is listed", got[i])
		}
	}
}

// host answers with one snapshot after the other, then with the last one again.
type host struct {
	answers []Snapshot
	calls   int
	err     error
}

var _ Host = (*host)(nil)

func (h *host) Exec(context.Context, ...string) ([]byte, error) {
	if h.err != nil {
		return nil, h.err
	}
	s := h.answers[min(h.calls, len(h.answers)-1)]
	h.calls++
	return json.Marshal(s)
}

func TestAwaitGivesCleanUpItsTime(t *testing.T) {
	clean := snapshot(map[Category][]Item{Process: {{Key: "init"}}})
	dirty := snapshot(map[Category][]Item{Process: {{Key: "init"}, {Key: "shim"}}})
	h := &host{answers: []Snapshot{dirty, dirty, clean}}
	if changes, err := Await(t.Context(), h, "helper", clean, nil); err != nil || changes != nil || h.calls != 3 {
		t.Errorf("%v, %v after %d looks", changes, err, h.calls)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	changes, err := Await(ctx, &host{answers: []Snapshot{dirty}}, "helper", clean, nil)
	if err != nil || len(changes) != 1 {
		t.Fatalf("%v, %v", changes, err)
	}
	if err := Err(changes); err == nil || !strings.Contains(err.Error(), "process left behind: shim") {
		t.Errorf("as an error: %v", err)
	}
	if _, err := Await(t.Context(), &host{err: errors.New("unreachable")}, "helper", clean, nil); err == nil {
		t.Error("a host that does not answer is clean")
	}
	if _, err := Take(t.Context(), &host{answers: []Snapshot{{}}}, "helper"); err == nil {
		t.Error("a host without processes is an inventory")
	}
	if Err(nil) != nil {
		t.Error("no changes are an error")
	}
}
