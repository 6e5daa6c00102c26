package layer

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/testenv"
)

// testFilesystem is one that layers live on: times and holes differ.
type testFilesystem struct {
	name string
	base string
}

func (f testFilesystem) dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(f.base, "layer")
	must(t, err)
	return dir
}

// testFilesystems mounts a tmpfs and an ext4 of its own.
func testFilesystems(t testing.TB) []testFilesystem {
	t.Helper()
	return []testFilesystem{{"tmpfs", mountTmpfs(t, "size=1g")}, {"ext4", mountExt4(t)}}
}

func mountTmpfs(t testing.TB, options string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NODEV, options))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func mountExt4(t testing.TB) string {
	t.Helper()
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		testenv.Missing(t, "mkfs.ext4")
	}
	image := t.TempDir() + "/image"
	f, err := os.Create(image)
	must(t, err)
	must(t, f.Truncate(512<<20))
	must(t, f.Close())
	if out, err := exec.Command("mkfs.ext4", "-q", "-I", "256", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-o", "loop,nodev,acl,user_xattr", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

func ctimeOf(t testing.TB, path string) stamp {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Lstat(path, &st))
	return stamp{int64(st.Ctim.Sec), int64(st.Ctim.Nsec)}
}

// waitSettled returns once nothing below dir is too young to be trusted.
func waitSettled(t testing.TB, dir string) {
	t.Helper()
	root, err := openRoot(dir)
	must(t, err)
	defer root.Close()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		tree, err := walk(t.Context(), root, false)
		must(t, err)
		settled, all := settledBefore(time.Now(), time.Time{}), true
		tree.root.each(func(n *node) { all = all && settled(n) })
		if all {
			return
		}
	}
}
