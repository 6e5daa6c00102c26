package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tranship/tranship/internal/testenv"
)

// posixACL is "u::rw-,u:1234:r--,g::r--,m::r--,o::r--" as the kernel keeps it.
var posixACL = []byte{
	2, 0, 0, 0,
	1, 0, 6, 0, 0xff, 0xff, 0xff, 0xff,
	2, 0, 4, 0, 0xd2, 4, 0, 0,
	4, 0, 4, 0, 0xff, 0xff, 0xff, 0xff,
	0x10, 0, 4, 0, 0xff, 0xff, 0xff, 0xff,
	0x20, 0, 4, 0, 0xff, 0xff, 0xff, 0xff,
}

// defaultACL gives children more than posixACL, so that inheriting it shows.
var defaultACL = []byte{
	2, 0, 0, 0,
	1, 0, 7, 0, 0xff, 0xff, 0xff, 0xff,
	2, 0, 7, 0, 0xd2, 4, 0, 0,
	4, 0, 5, 0, 0xff, 0xff, 0xff, 0xff,
	0x10, 0, 7, 0, 0xff, 0xff, 0xff, 0xff,
	0x20, 0, 5, 0, 0xff, 0xff, 0xff, 0xff,
}

// capability is "cap_net_bind_service=ep", version 2.
var capability = []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// TestOneChange makes a tree, sends it, changes something, sends the change and
// compares. Each case is one kind of thing that can be in a layer.
func TestOneChange(t *testing.T) {
	testenv.NeedRoot(t)
	cases := []struct {
		name   string
		before func(t *testing.T, dir string)
		after  func(t *testing.T, dir string)
	}{
		{"nothing at all", nil, nil},
		{"a file that stays", func(t *testing.T, d string) { put(t, d+"/f", []byte("x")) }, nil},
		{"an empty file that gets content", func(t *testing.T, d string) { put(t, d+"/f", nil) }, func(t *testing.T, d string) { put(t, d+"/f", []byte("x")) }},
		{"a file that is emptied", func(t *testing.T, d string) { put(t, d+"/f", fill(1, 700<<10)) }, func(t *testing.T, d string) { put(t, d+"/f", nil) }},
		{"a file that shrinks inside a chunk", func(t *testing.T, d string) { put(t, d+"/f", fill(1, 700<<10)) }, func(t *testing.T, d string) { must(t, os.Truncate(d+"/f", 300<<10+17)) }},
		{"a file that shrinks and grows again as a hole", func(t *testing.T, d string) { put(t, d+"/f", fill(1, 700<<10)) }, func(t *testing.T, d string) {
			must(t, os.Truncate(d+"/f", 100))
			must(t, os.Truncate(d+"/f", 700<<10))
		}},
		{"a file that grows by a hole", func(t *testing.T, d string) { put(t, d+"/f", fill(1, 1000)) }, func(t *testing.T, d string) { must(t, os.Truncate(d+"/f", 5<<20)) }},
		{"a large file that changes in three places", func(t *testing.T, d string) { put(t, d+"/f", fill(1, 6<<20)) }, func(t *testing.T, d string) {
			f, err := os.OpenFile(d+"/f", os.O_WRONLY, 0)
			must(t, err)
			for _, off := range []int64{0, 3<<20 - 1, 6<<20 - 1} {
				_, err = f.WriteAt([]byte{0xaa, 0xbb}, off)
				must(t, err)
			}
			must(t, f.Close())
		}},
		{"a hole that is punched", func(t *testing.T, d string) { put(t, d+"/f", fill(1, 2<<20)) }, func(t *testing.T, d string) {
			f, err := os.OpenFile(d+"/f", os.O_RDWR, 0)
			must(t, err)
			must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 100<<10, 900<<10))
			must(t, f.Close())
		}},
		{"a file that goes", func(t *testing.T, d string) { put(t, d+"/f", []byte("x")) }, func(t *testing.T, d string) { must(t, os.Remove(d+"/f")) }},
		{"a tree that goes", func(t *testing.T, d string) {
			must(t, os.MkdirAll(d+"/a/b/c", 0o755))
			put(t, d+"/a/b/c/f", []byte("x"))
		}, func(t *testing.T, d string) { must(t, os.RemoveAll(d+"/a")) }},
		{"a file that becomes a directory", func(t *testing.T, d string) { put(t, d+"/f", []byte("x")) }, func(t *testing.T, d string) {
			must(t, os.Remove(d+"/f"))
			must(t, os.Mkdir(d+"/f", 0o711))
			put(t, d+"/f/inner", []byte("y"))
		}},
		{"a directory that becomes a symbolic link to where it was", func(t *testing.T, d string) {
			must(t, os.Mkdir(d+"/d", 0o755))
			put(t, d+"/d/f", []byte("x"))
		}, func(t *testing.T, d string) {
			must(t, os.Rename(d+"/d", d+"/e"))
			must(t, os.Symlink("e", d+"/d"))
		}},
		{"a symbolic link that becomes a directory", func(t *testing.T, d string) { must(t, os.Symlink("/etc", d+"/d")) }, func(t *testing.T, d string) {
			must(t, os.Remove(d+"/d"))
			must(t, os.Mkdir(d+"/d", 0o755))
			put(t, d+"/d/passwd", []byte("mine"))
		}},
		{"a symbolic link that leads elsewhere", func(t *testing.T, d string) { must(t, os.Symlink("a", d+"/l")) }, func(t *testing.T, d string) {
			must(t, os.Remove(d+"/l"))
			must(t, os.Symlink(strings.Repeat("x", maxTarget), d+"/l"))
			must(t, unix.Lchown(d+"/l", 7, 8))
		}},
		{"two files that swap names", func(t *testing.T, d string) {
			put(t, d+"/a", fill(1, 2000))
			put(t, d+"/b", fill(2, 400<<10))
		}, func(t *testing.T, d string) {
			must(t, unix.Renameat2(unix.AT_FDCWD, d+"/a", unix.AT_FDCWD, d+"/b", unix.RENAME_EXCHANGE))
		}},
		{"a file written anew and renamed over the old", func(t *testing.T, d string) { put(t, d+"/f", fill(1, 2<<20)) }, func(t *testing.T, d string) {
			b := fill(1, 2<<20)
			b[1<<20] ^= 1
			put(t, d+"/f.new", b)
			must(t, os.Rename(d+"/f.new", d+"/f"))
		}},
		{"a directory that is renamed", func(t *testing.T, d string) {
			must(t, os.MkdirAll(d+"/a/b", 0o755))
			put(t, d+"/a/b/f", []byte("x"))
		}, func(t *testing.T, d string) { must(t, os.Rename(d+"/a", d+"/z")) }},
		{"names of all bytes and of 255 bytes", func(t *testing.T, d string) {
			put(t, d+"/new\nline", []byte("1"))
			put(t, d+"/\xff\xfe not UTF-8", []byte("2"))
			put(t, d+"/"+strings.Repeat("ü", 127)+"x", []byte("3"))
			put(t, d+"/ ", []byte("4"))
			put(t, d+"/..dots", []byte("5"))
			must(t, os.Mkdir(d+"/"+strings.Repeat("\\", 255), 0o755))
		}, func(t *testing.T, d string) {
			put(t, d+"/new\nline", []byte("changed"))
			must(t, os.Remove(d+"/\xff\xfe not UTF-8"))
		}},
		{"order by name is not order by path", func(t *testing.T, d string) {
			must(t, os.MkdirAll(d+"/a/x", 0o755))
			put(t, d+"/a-b", []byte("1"))
			put(t, d+"/a/x/f", []byte("2"))
			put(t, d+"/a!", []byte("3"))
		}, func(t *testing.T, d string) { put(t, d+"/a/x/f", []byte("3")) }},
		{"owners, modes with special bits, times with nanoseconds", func(t *testing.T, d string) {
			put(t, d+"/f", []byte("x"))
			must(t, os.Mkdir(d+"/d", 0o755))
		}, func(t *testing.T, d string) {
			must(t, os.Chown(d+"/f", 1234, 5678))
			must(t, unix.Chmod(d+"/f", 0o6751))
			must(t, os.Chown(d+"/d", 0, 99))
			must(t, unix.Chmod(d+"/d", 0o3777))
			must(t, os.Chtimes(d+"/f", time.Time{}, time.Unix(-5, 123456789)))
			must(t, os.Chtimes(d+"/d", time.Time{}, time.Unix(1<<31+7, 999999999)))
			must(t, unix.Chmod(d, 0o1700))
		}},
		{"set-uid survives a change of content", func(t *testing.T, d string) {
			put(t, d+"/f", []byte("x"))
			must(t, unix.Chmod(d+"/f", 0o4755))
			must(t, unix.Setxattr(d+"/f", "security.capability", capability, 0))
		}, func(t *testing.T, d string) {
			put(t, d+"/f", []byte("yy"))
			must(t, unix.Chmod(d+"/f", 0o4755))
			must(t, unix.Setxattr(d+"/f", "security.capability", capability, 0))
		}},
		{"a capability that is lost", func(t *testing.T, d string) {
			put(t, d+"/f", []byte("x"))
			must(t, unix.Setxattr(d+"/f", "security.capability", capability, 0))
		}, func(t *testing.T, d string) { must(t, unix.Removexattr(d+"/f", "security.capability")) }},
		{"attributes that come, change and go", func(t *testing.T, d string) {
			put(t, d+"/f", []byte("x"))
			must(t, unix.Setxattr(d+"/f", "trusted.one", []byte("1"), 0))
			must(t, unix.Setxattr(d+"/f", "trusted.two", nil, 0))
		}, func(t *testing.T, d string) {
			must(t, unix.Setxattr(d+"/f", "trusted.one", bytes.Repeat([]byte{0}, 900), 0))
			must(t, unix.Removexattr(d+"/f", "trusted.two"))
			must(t, unix.Setxattr(d+"/f", "security.three", []byte("3"), 0))
			must(t, unix.Setxattr(d, "trusted.overlay.opaque", []byte("y"), 0))
		}},
		{"ACLs, also where a default one would be inherited", func(t *testing.T, d string) {
			must(t, os.Mkdir(d+"/d", 0o755))
			put(t, d+"/d/plain", []byte("x"))
			put(t, d+"/d/acl", []byte("x"))
			must(t, unix.Setxattr(d+"/d/acl", "system.posix_acl_access", posixACL, 0))
			must(t, unix.Setxattr(d+"/d", "system.posix_acl_default", defaultACL, 0))
		}, func(t *testing.T, d string) {
			must(t, os.Mkdir(d+"/d/sub", 0o755)) // inherits
			put(t, d+"/d/late", []byte("y"))     // inherits
			must(t, unix.Mkfifo(d+"/d/fifo", 0o600))
			must(t, unix.Removexattr(d+"/d/sub", "system.posix_acl_default"))
		}},
		{"fifos, sockets, devices, and their attributes", func(t *testing.T, d string) {
			must(t, unix.Mkfifo(d+"/fifo", 0o640))
			must(t, unix.Mknod(d+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
			must(t, unix.Mknod(d+"/block", unix.S_IFBLK|0o600, int(unix.Mkdev(259, 1<<19))))
			must(t, unix.Mknod(d+"/sock", unix.S_IFSOCK|0o755, 0))
			must(t, unix.Setxattr(d+"/fifo", "trusted.x", []byte("1"), 0))
			must(t, os.Symlink("/nowhere", d+"/link"))
			must(t, unix.Lsetxattr(d+"/link", "trusted.x", []byte("2"), 0))
		}, func(t *testing.T, d string) {
			must(t, unix.Chmod(d+"/fifo", 0o601))
			must(t, os.Remove(d+"/null"))
			must(t, unix.Mknod(d+"/null", unix.S_IFBLK|0o666, int(unix.Mkdev(1, 3))))
			must(t, os.Chown(d+"/sock", 3, 4))
			must(t, unix.Lsetxattr(d+"/link", "trusted.x", []byte("3"), 0))
		}},
		{"hard links of a file that changes", func(t *testing.T, d string) {
			put(t, d+"/b", fill(1, 600<<10))
			must(t, os.Link(d+"/b", d+"/a"))
			must(t, os.Mkdir(d+"/d", 0o755))
			must(t, os.Link(d+"/b", d+"/d/c"))
		}, func(t *testing.T, d string) {
			f, err := os.OpenFile(d+"/d/c", os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte("through another name"), 300<<10)
			must(t, err)
			must(t, f.Close())
		}},
		{"a link that comes before the others", func(t *testing.T, d string) {
			put(t, d+"/m", []byte("x"))
			must(t, os.Link(d+"/m", d+"/z"))
		}, func(t *testing.T, d string) { must(t, os.Link(d+"/z", d+"/a")) }},
		{"the first link that goes", func(t *testing.T, d string) {
			put(t, d+"/a", []byte("x"))
			must(t, os.Link(d+"/a", d+"/b"))
			must(t, os.Link(d+"/a", d+"/c"))
		}, func(t *testing.T, d string) { must(t, os.Remove(d+"/a")) }},
		{"a link that becomes a file of its own", func(t *testing.T, d string) {
			put(t, d+"/a", []byte("x"))
			must(t, os.Link(d+"/a", d+"/b"))
		}, func(t *testing.T, d string) {
			must(t, os.Remove(d+"/a"))
			put(t, d+"/a", []byte("other"))
			f, err := os.OpenFile(d+"/b", os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			_, err = f.WriteString("y")
			must(t, err)
			must(t, f.Close())
		}},
		{"two pairs of links that exchange partners", func(t *testing.T, d string) {
			put(t, d+"/a1", []byte("one"))
			must(t, os.Link(d+"/a1", d+"/a2"))
			put(t, d+"/b1", []byte("two"))
			must(t, os.Link(d+"/b1", d+"/b2"))
		}, func(t *testing.T, d string) {
			must(t, unix.Renameat2(unix.AT_FDCWD, d+"/a2", unix.AT_FDCWD, d+"/b2", unix.RENAME_EXCHANGE))
		}},
		{"two files that become one", func(t *testing.T, d string) {
			put(t, d+"/a", []byte("one"))
			put(t, d+"/b", []byte("two"))
		}, func(t *testing.T, d string) {
			must(t, os.Remove(d+"/a"))
			must(t, os.Link(d+"/b", d+"/a"))
		}},
		{"a new file that has two names at once", nil, func(t *testing.T, d string) {
			put(t, d+"/x", fill(4, 1000))
			must(t, os.Link(d+"/x", d+"/y"))
		}},
		{"a directory whose time is put back after it lost a name", func(t *testing.T, d string) {
			must(t, os.Mkdir(d+"/d", 0o755))
			put(t, d+"/d/f", []byte("x"))
			put(t, d+"/d/g", []byte("x"))
			must(t, os.Chtimes(d+"/d", time.Time{}, time.Unix(1000, 1)))
		}, func(t *testing.T, d string) {
			must(t, os.Remove(d+"/d/f"))
			must(t, os.Chtimes(d+"/d", time.Time{}, time.Unix(1000, 1)))
		}},
		{"three links of which each pair is rewritten", func(t *testing.T, d string) {
			put(t, d+"/a", []byte("one"))
			must(t, os.Link(d+"/a", d+"/b"))
			must(t, os.Link(d+"/a", d+"/c"))
		}, func(t *testing.T, d string) {
			for _, n := range []string{"a", "b", "c"} {
				put(t, d+"/new", []byte(n))
				must(t, os.Rename(d+"/new", d+"/"+n))
			}
		}},
		{"hard links of a symbolic link and of a fifo", func(t *testing.T, d string) {
			must(t, os.Symlink("t", d+"/l1"))
			must(t, os.Link(d+"/l1", d+"/l2"))
			must(t, unix.Mkfifo(d+"/p1", 0o600))
			must(t, os.Link(d+"/p1", d+"/p2"))
		}, func(t *testing.T, d string) {
			must(t, os.Link(d+"/l2", d+"/l0"))
			must(t, unix.Chmod(d+"/p2", 0o666))
		}},
		{"whiteouts that share an inode", func(t *testing.T, d string) {
			must(t, unix.Mknod(d+"/w1", unix.S_IFCHR, 0))
			must(t, os.Link(d+"/w1", d+"/w2"))
			put(t, d+"/f", []byte("x"))
		}, func(t *testing.T, d string) {
			must(t, os.Link(d+"/w1", d+"/w3"))
			must(t, os.Remove(d+"/w2"))
			must(t, os.Remove(d+"/f"))
			must(t, os.Link(d+"/w1", d+"/f"))
		}},
		{"a whiteout that becomes an opaque directory", func(t *testing.T, d string) { must(t, unix.Mknod(d+"/w", unix.S_IFCHR, 0)) }, func(t *testing.T, d string) {
			must(t, os.Remove(d+"/w"))
			must(t, os.Mkdir(d+"/w", 0o755))
			must(t, unix.Setxattr(d+"/w", "trusted.overlay.opaque", []byte("y"), 0))
		}},
		{"only the time of a directory", func(t *testing.T, d string) {
			must(t, os.Mkdir(d+"/d", 0o755))
			put(t, d+"/d/f", []byte("x"))
		}, func(t *testing.T, d string) { must(t, os.Chtimes(d+"/d", time.Time{}, time.Unix(77, 7))) }},
	}
	for _, fsys := range testFilesystems(t) {
		for _, c := range cases {
			t.Run(fsys.name+"/"+c.name, func(t *testing.T) {
				src, dst := fsys.dir(t), fsys.dir(t)
				if c.before != nil {
					c.before(t, src)
				}
				index, _, _ := pass(t, src, dst, nil, Options{})
				mustEqual(t, src, dst)
				if c.after != nil {
					c.after(t, src)
				}
				next, _, stream := pass(t, src, dst, index, Options{Frozen: true})
				mustEqual(t, src, dst)

				// Once more the same stream: nothing moves.
				if _, err := Apply(context.Background(), dst, bytes.NewReader(stream)); err != nil {
					t.Fatal(err)
				}
				mustEqual(t, src, dst)

				// And a further pass has no content to send.
				_, stats, _ := pass(t, src, dst, next, Options{Frozen: true})
				mustEqual(t, src, dst)
				if stats.Data != 0 {
					t.Errorf("a pass over an unchanged tree sent %d bytes of content", stats.Data)
				}
			})
		}
	}
}

// TestInterruptedPass cuts a stream of changes in many places, and applies the
// whole of it after each: what was half done must not show.
func TestInterruptedPass(t *testing.T) {
	testenv.NeedRoot(t)
	src := t.TempDir()
	must(t, os.MkdirAll(src+"/d/e", 0o755))
	put(t, src+"/a", fill(1, 300<<10))
	must(t, os.Link(src+"/a", src+"/d/a2"))
	put(t, src+"/d/e/f", []byte("x"))
	must(t, os.Symlink("x", src+"/s"))
	first := t.TempDir()
	index, _, base := pass(t, src, first, nil, Options{})

	must(t, os.Remove(src+"/a"))
	must(t, os.Mkdir(src+"/a", 0o755))
	put(t, src+"/a/x", []byte("new"))
	must(t, os.Link(src+"/d/a2", src+"/a/a3"))
	must(t, os.RemoveAll(src+"/d/e"))
	put(t, src+"/d/e", []byte("a file now"))
	must(t, os.Remove(src+"/s"))
	must(t, os.Symlink("y", src+"/s"))
	var wire bytes.Buffer
	if _, _, err := Send(context.Background(), src, index, &wire, Options{Frozen: true}); err != nil {
		t.Fatal(err)
	}
	change := wire.Bytes()

	dst := t.TempDir()
	for cutAt := 0; cutAt < len(change); cutAt += 1 + len(change)/150 {
		if _, err := Apply(context.Background(), dst, bytes.NewReader(base)); err != nil {
			t.Fatal(err)
		}
		if _, err := Apply(context.Background(), dst, bytes.NewReader(change[:cutAt])); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d of %d: %v, want an unexpected end", cutAt, len(change), err)
		}
		if _, err := Apply(context.Background(), dst, bytes.NewReader(change)); err != nil {
			t.Fatalf("after a cut at %d: %v", cutAt, err)
		}
		mustEqual(t, src, dst)
	}
}

func TestStreamThatDoesNotFit(t *testing.T) {
	testenv.NeedRoot(t)
	ctx := context.Background()
	src, dst := t.TempDir(), t.TempDir()
	put(t, src+"/f", []byte("1"))
	zeroth, _, full := pass(t, src, dst, nil, Options{})
	put(t, src+"/f", []byte("2"))
	first, _, one := pass(t, src, dst, zeroth, Options{})
	put(t, src+"/f", []byte("3"))
	_, _, two := pass(t, src, dst, first, Options{})

	apply := func(dst string, stream []byte) error {
		_, err := Apply(ctx, dst, bytes.NewReader(stream))
		return err
	}
	if err := apply(dst, one); !errors.Is(err, ErrBase) {
		t.Errorf("an older pass over a newer one: %v, want ErrBase", err)
	}
	mustEqual(t, src, dst)
	if err := apply(t.TempDir(), two); !errors.Is(err, ErrBase) {
		t.Errorf("changes into an empty directory: %v, want ErrBase", err)
	}
	other := t.TempDir()
	put(t, other+"/precious", []byte("x"))
	if err := apply(other, full); !errors.Is(err, ErrBase) {
		t.Errorf("everything into a foreign directory: %v, want ErrBase", err)
	}
	if _, err := os.Stat(other + "/precious"); err != nil {
		t.Errorf("the foreign directory lost a file: %v", err)
	}
	if err := apply(dst, full); err != nil {
		t.Errorf("everything over an earlier state: %v", err)
	}
	if err := apply(dst, two); !errors.Is(err, ErrBase) {
		t.Errorf("a pass skipped: %v, want ErrBase", err)
	}
	if err := errors.Join(apply(dst, one), apply(dst, two)); err != nil {
		t.Error(err)
	}
	mustEqual(t, src, dst)
	scan, err := Scan(ctx, src)
	must(t, err)
	if _, _, err := Send(ctx, src, scan, io.Discard, Options{}); !errors.Is(err, ErrBase) {
		t.Errorf("send since a scan: %v, want ErrBase", err)
	}
	if scan.Files() != 2 || scan.Bytes() != 1 {
		t.Errorf("scan counts %d files, %d bytes; want 2 and 1", scan.Files(), scan.Bytes())
	}
}

func TestFullDisk(t *testing.T) {
	testenv.NeedRoot(t)
	src := t.TempDir()
	put(t, src+"/large", fill(3, 3<<20))
	dst := mountTmpfs(t, "size=1m")
	var wire bytes.Buffer
	_, _, err := Send(context.Background(), src, nil, &wire, Options{})
	must(t, err)
	_, err = Apply(context.Background(), dst, &wire)
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("%v, want ENOSPC", err)
	}
	if !strings.Contains(err.Error(), "large") {
		t.Errorf("%v does not name the file", err)
	}
}

func TestCancelledPassIsAnError(t *testing.T) {
	testenv.NeedRoot(t)
	src, dst := t.TempDir(), t.TempDir()
	put(t, src+"/f", fill(1, 1<<20))
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("operator's word")
	cancel(why)
	if _, _, err := Send(ctx, src, nil, io.Discard, Options{}); !errors.Is(err, why) {
		t.Errorf("send: %v, want the cause", err)
	}
	var wire bytes.Buffer
	_, _, err := Send(context.Background(), src, nil, &wire, Options{})
	must(t, err)
	if _, err := Apply(ctx, dst, &wire); !errors.Is(err, why) {
		t.Errorf("apply: %v, want the cause", err)
	}
}

func TestBrokenWriterIsAnError(t *testing.T) {
	testenv.NeedRoot(t)
	src := t.TempDir()
	put(t, src+"/f", fill(1, 3<<20))
	broken := errors.New("link down")
	for _, after := range []int{0, 10, 1 << 20} {
		if _, _, err := Send(context.Background(), src, nil, &brokenWriter{after, broken}, Options{}); !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v, want the writer's error", after, err)
		}
	}
}

type brokenWriter struct {
	left int
	err  error
}

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.left -= len(p); w.left < 0 {
		return 0, w.err
	}
	return len(p), nil
}

// TestDeepTree is deeper than PATH_MAX allows in one path.
func TestDeepTree(t *testing.T) {
	testenv.NeedRoot(t)
	src, dst := t.TempDir(), t.TempDir()
	build := func(leaf string) {
		fd, err := unix.Open(src, unix.O_DIRECTORY, 0)
		must(t, err)
		name := strings.Repeat("d", 200)
		for range 100 {
			if err := unix.Mkdirat(fd, name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
				t.Fatal(err)
			}
			next, err := unix.Openat(fd, name, unix.O_DIRECTORY, 0)
			must(t, err)
			unix.Close(fd)
			fd = next
		}
		f, err := unix.Openat(fd, leaf, unix.O_CREAT|unix.O_WRONLY, 0o644)
		must(t, err)
		_, err = unix.Write(f, []byte(leaf))
		must(t, err)
		unix.Close(f)
		unix.Close(fd)
	}
	build("one")
	index, _, _ := pass(t, src, dst, nil, Options{})
	build("two")
	pass(t, src, dst, index, Options{Frozen: true})
	// Neither side can be described by paths that long; a third tree made by
	// another pass from the destination must not differ from the source.
	srcScan, err := Scan(context.Background(), src)
	must(t, err)
	dstScan, err := Scan(context.Background(), dst)
	must(t, err)
	want, have := map[string]stamp{}, map[string]stamp{}
	srcScan.root.each(func(n *node) { want[n.path()] = n.mtime })
	dstScan.root.each(func(n *node) { have[n.path()] = n.mtime })
	if len(want) != 103 || len(have) != len(want) {
		t.Fatalf("%d paths at the source, %d at the destination; want 103", len(want), len(have))
	}
	for path, mtime := range want {
		if have[path] != mtime {
			t.Errorf("%.20q… (%d bytes): mtime %v, want %v", path, len(path), have[path], mtime)
		}
	}
}

// TestTerabyteOfHoles must cost what the data costs, at both sides.
func TestTerabyteOfHoles(t *testing.T) {
	testenv.NeedRoot(t)
	for _, fsys := range testFilesystems(t) {
		t.Run(fsys.name, func(t *testing.T) {
			src, dst := fsys.dir(t), fsys.dir(t)
			f, err := os.Create(src + "/f")
			must(t, err)
			defer f.Close()
			must(t, f.Truncate(1<<40))
			word := []byte("deep inside")
			_, err = f.WriteAt(word, 1<<39-3)
			must(t, err)
			check := func(words ...int64) {
				t.Helper()
				g, err := os.Open(dst + "/f")
				must(t, err)
				defer g.Close()
				var st unix.Stat_t
				must(t, unix.Fstat(int(g.Fd()), &st))
				if st.Size != 1<<40 || st.Blocks*512 > 64<<10 {
					t.Fatalf("size %d in %d blocks, want %d in few", st.Size, st.Blocks, int64(1)<<40)
				}
				for _, at := range []int64{1<<39 - 3, 1<<38 - 3} {
					got := make([]byte, len(word))
					_, err = g.ReadAt(got, at)
					must(t, err)
					if want := slices.Contains(words, at); want != bytes.Equal(got, word) {
						t.Errorf("at %d: %q", at, got)
					}
				}
			}
			index, _, _ := pass(t, src, dst, nil, Options{})
			check(1<<39 - 3)
			must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 1<<39-1<<20, 2<<20))
			_, err = f.WriteAt(word, 1<<38-3)
			must(t, err)
			pass(t, src, dst, index, Options{Frozen: true})
			check(1<<38 - 3)
		})
	}
}

// TestMappedWrite is the case that times cannot show: a page that is dirty and
// mapped writable is written again.
func TestMappedWrite(t *testing.T) {
	testenv.NeedRoot(t)
	for _, fsys := range testFilesystems(t) {
		t.Run(fsys.name, func(t *testing.T) {
			src, dst := fsys.dir(t), fsys.dir(t)
			put(t, src+"/f", fill(1, 1<<20))
			must(t, os.Link(src+"/f", src+"/g"))
			f, err := os.OpenFile(src+"/f", os.O_RDWR, 0)
			must(t, err)
			defer f.Close()
			m, err := unix.Mmap(int(f.Fd()), 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			must(t, err)
			defer unix.Munmap(m) //nolint:errcheck // the test is over
			m[5000]++            // the page is dirty from here on
			// Old enough that the times of the file would be trusted.
			waitSettled(t, src)
			// Listed under its other name: it is the inode that counts.
			index, _, _ := pass(t, src, dst, nil, Options{AlwaysCompare: []string{"/g", "/not/there"}})
			before := ctimeOf(t, src+"/f")
			m[5001]++
			if ctimeOf(t, src+"/f") != before {
				t.Skip("this kernel moves ctime at each write, so there is nothing to show")
			}
			// Not listed again: the mapping of the last pass is reason enough.
			_, stats, _ := pass(t, src, dst, index, Options{Frozen: true})
			mustEqual(t, src, dst)
			if stats.Data != chunkSize {
				t.Errorf("sent %d bytes, want one chunk", stats.Data)
			}
			// And listed only now, after a pass that did not list it.
			must(t, os.Remove(src+"/g"))
			waitSettled(t, src)
			index, _, _ = pass(t, src, dst, nil, Options{})
			m[5002]++
			pass(t, src, dst, index, Options{Frozen: true, AlwaysCompare: []string{"f"}})
			mustEqual(t, src, dst)
		})
	}
}

func TestFrozenLayerThatChanges(t *testing.T) {
	testenv.NeedRoot(t)
	src := t.TempDir()
	put(t, src+"/a", fill(1, 8<<20))
	put(t, src+"/b", []byte("x"))
	// The writer blocks after the first bytes; then the file changes.
	w := &hookWriter{hook: func() { must(t, os.WriteFile(src+"/b", []byte("yy"), 0o600)); must(t, os.Remove(src+"/b")) }}
	if _, _, err := Send(context.Background(), src, nil, w, Options{Frozen: true}); !errors.Is(err, ErrChanging) {
		t.Errorf("frozen: %v, want ErrChanging", err)
	}
	put(t, src+"/b", []byte("x"))
	w = &hookWriter{hook: func() { must(t, os.Remove(src+"/b")) }}
	_, stats, err := Send(context.Background(), src, nil, w, Options{})
	must(t, err)
	if stats.Unsteady != 1 {
		t.Errorf("running: %d unsteady paths, want 1", stats.Unsteady)
	}
}

type hookWriter struct{ hook func() }

func (w *hookWriter) Write(p []byte) (int, error) {
	if w.hook != nil {
		w.hook()
		w.hook = nil
	}
	return len(p), nil
}

func TestOneApplyAtATime(t *testing.T) {
	testenv.NeedRoot(t)
	src, dst := t.TempDir(), t.TempDir()
	put(t, src+"/f", []byte("x"))
	var wire bytes.Buffer
	_, _, err := Send(context.Background(), src, nil, &wire, Options{})
	must(t, err)
	fd, err := unix.Open(dst, unix.O_DIRECTORY, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Flock(fd, unix.LOCK_EX))
	if _, err := Apply(context.Background(), dst, &wire); !errors.Is(err, ErrBusy) {
		t.Errorf("%v, want ErrBusy", err)
	}
}

func TestSync(t *testing.T) {
	must(t, Sync(t.TempDir()))
	if err := Sync(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v, want not exist", err)
	}
}
