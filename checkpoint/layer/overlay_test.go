package layer

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/testenv"
)

// host is one side: image layers below, the writable layer on top.
type host struct{ lower, upper, work, merged string }

func (h host) mount(t testing.TB, options string) {
	t.Helper()
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s%s", h.lower, h.upper, h.work, options)
	must(t, unix.Mount("overlay", h.merged, "overlay", 0, data))
}

// TestOverlay lets the kernel make the marks (whiteouts, opaque and redirected
// directories, metadata-only copies) and lets it read them at the other side.
func TestOverlay(t *testing.T) {
	testenv.NeedRoot(t)
	for _, fsys := range testFilesystems(t) {
		for _, options := range []string{",index=off", ",index=off,redirect_dir=on,metacopy=on"} {
			t.Run(fsys.name+options, func(t *testing.T) {
				var hosts [2]host
				for i := range hosts {
					d := fsys.dir(t)
					hosts[i] = host{d + "/lower", d + "/upper", d + "/work", d + "/merged"}
					for _, dir := range []string{"/lower", "/upper", "/work", "/merged"} {
						must(t, os.Mkdir(d+dir, 0o755))
					}
				}
				a, b := hosts[0], hosts[1]
				for _, dir := range []string{"/etc/conf.d", "/var/log", "/usr/lib/deep/er", "/opaque/old"} {
					must(t, os.MkdirAll(a.lower+dir, 0o755))
					for i := range 4 {
						put(t, fmt.Sprint(a.lower, dir, "/f", i), fill(byte(i), 5000))
					}
				}
				// The image is the same at the other host, but not the same inodes.
				if out, err := exec.Command("cp", "-a", a.lower+"/.", b.lower).CombinedOutput(); err != nil {
					t.Fatalf("cp: %v: %s", err, out)
				}

				a.mount(t, options)
				mounted := true
				defer func() {
					if mounted {
						must(t, unix.Unmount(a.merged, 0))
					}
				}()
				m := a.merged
				must(t, os.Remove(m+"/etc/conf.d/f0"))
				must(t, os.Remove(m+"/var/log/f1"))
				must(t, os.RemoveAll(m+"/opaque"))
				must(t, os.Mkdir(m+"/opaque", 0o750))
				put(t, m+"/opaque/new", []byte("x"))
				put(t, m+"/etc/conf.d/f1", []byte("changed"))
				index, _, _ := pass(t, a.upper, b.upper, nil, Options{})

				must(t, unix.Chmod(m+"/usr/lib/deep/er/f2", 0o4711)) // metadata only
				must(t, os.Link(m+"/usr/lib/deep/er/f3", m+"/usr/lib/hard"))
				if err := os.Rename(m+"/usr/lib/deep", m+"/usr/lib/moved"); err != nil {
					// Without redirect_dir a directory of the image cannot be
					// renamed; mv then copies it.
					if out, err := exec.Command("mv", m+"/usr/lib/deep", m+"/usr/lib/moved").CombinedOutput(); err != nil {
						t.Fatalf("mv: %v: %s", err, out)
					}
				}
				put(t, m+"/etc/conf.d/f0", []byte("back")) // replaces a whiteout
				must(t, os.RemoveAll(m+"/var"))
				must(t, os.Symlink("usr", m+"/var"))
				must(t, os.Remove(m+"/opaque/new"))
				f, err := os.OpenFile(m+"/etc/conf.d/f2", os.O_RDWR|os.O_APPEND, 0)
				must(t, err)
				_, err = f.WriteString("appended")
				must(t, err)
				must(t, f.Close())
				must(t, unix.Setxattr(m+"/etc/conf.d/f3", "security.capability", capability, 0))

				_, _, _ = pass(t, a.upper, b.upper, index, Options{Frozen: true})
				mustEqual(t, a.upper, b.upper)
				marks := strings.Join(values(describe(t, a.upper)), "\n")
				for _, mark := range wantMarks(options) {
					if !strings.Contains(marks, mark) {
						t.Errorf("the kernel made no %s here, so the test shows less than it claims", mark)
					}
				}

				b.mount(t, options)
				defer func() { must(t, unix.Unmount(b.merged, 0)) }()
				mustEqual(t, a.merged, b.merged)
				must(t, unix.Unmount(a.merged, 0))
				mounted = false
			})
		}
	}
}

func wantMarks(options string) []string {
	marks := []string{"whiteout", "trusted.overlay.opaque"}
	if strings.Contains(options, "metacopy") {
		marks = append(marks, "trusted.overlay.metacopy", "trusted.overlay.redirect")
	}
	return marks
}

func values(m map[string]string) []string {
	var out []string
	for _, v := range m {
		out = append(out, v)
	}
	return out
}
