package lab

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tree is the content of an image layer: paths without the leading slash, and
// where each comes from.
type tree struct {
	entries map[string]entry
	// programs are the programs that were asked for, by their path in the image.
	programs []string
	// libs caches where a library was found, by machine and name.
	libs map[string]string
}

type entry struct {
	header tar.Header
	source string // a file of this machine, or "" for data
	data   []byte
}

// rootfsTree takes a directory as it is.
func rootfsTree(ctx context.Context, dir string) (*tree, error) {
	t := &tree{entries: map[string]entry{}}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || name == "." {
			return err
		}
		return t.put(name, path, true)
	})
	if err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	return t, nil
}

// programTree collects programs with all that they load, and the few files
// without which no program feels at home.
func programTree(ctx context.Context, bins []string) (*tree, error) {
	t := &tree{entries: map[string]entry{}, libs: map[string]string{}}
	if err := t.skeleton(ctx); err != nil {
		return nil, err
	}
	for _, bin := range bins {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		path, err := findProgram(bin)
		if err != nil {
			return nil, err
		}
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		if info.IsDir() {
			err = t.addDir(ctx, path)
		} else {
			t.programs = append(t.programs, path)
			err = t.addProgram(ctx, path)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", bin, err)
		}
	}
	return t, nil
}

// findProgram makes a path absolute. A name without a slash is looked up where
// hosts look first, and only then on this process's own PATH, which may lead to
// a wrapper in somebody's home.
func findProgram(name string) (string, error) {
	if strings.Contains(name, "/") {
		return filepath.Abs(name)
	}
	if path, err := lookPath(name, "/", []string{"PATH=" + systemPath}); err == nil {
		return path, nil
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// skeleton is what every image of programs has. Users are those whose names
// the packed services look up.
func (t *tree) skeleton(ctx context.Context) error {
	for dir, mode := range map[string]int64{
		"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "root": 0o700, "etc": 0o755,
		"tmp": 0o1777, "var": 0o755, "var/tmp": 0o1777, "var/lib": 0o755, "data": 0o1777,
	} {
		t.entries[dir] = entry{header: tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: mode}}
	}
	for name, data := range map[string]string{
		"etc/passwd":        passwdLines("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"),
		"etc/group":         passwdLines("/etc/group", "root:x:0:\nnogroup:x:65534:\n"),
		"etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
		"etc/hosts":         "127.0.0.1 localhost\n::1 localhost\n",
	} {
		t.entries[name] = entry{header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}, data: []byte(data)}
	}
	t.entries["var/run"] = entry{header: tar.Header{Typeflag: tar.TypeSymlink, Name: "var/run", Linkname: "/run", Mode: 0o777}}
	// On a merged-/usr machine /bin and its like are links, under whose names
	// scripts look for programs that were added by their other name.
	for _, dir := range []string{"/bin", "/sbin", "/lib", "/lib64"} {
		if info, err := os.Lstat(dir); err == nil && info.Mode()&fs.ModeSymlink != 0 {
			if err := t.put(dir[1:], dir, false); err != nil {
				return err
			}
		}
	}
	// Optional: C.UTF-8, and where libraries outside the standard places are.
	for _, path := range []string{"/usr/lib/locale/C.utf8", "/etc/ld.so.cache"} {
		if !exists(path) {
			continue
		}
		if err := t.addDir(ctx, path); err != nil {
			return err
		}
	}
	return nil
}

// passwdLines adds the machine's service users to a base.
func passwdLines(path, base string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return base
	}
	for _, line := range strings.Split(string(raw), "\n") {
		if name, _, _ := strings.Cut(line, ":"); name == "postgres" || name == "redis" {
			base += line + "\n"
		}
	}
	return base
}

// addProgram adds a program with what it needs: a script's interpreter, an
// ELF file's loader and libraries, a language's own files.
func (t *tree) addProgram(ctx context.Context, path string) error {
	real, err := t.addPath(path)
	if err != nil {
		return err
	}
	if interp, err := scriptInterpreter(real); err != nil {
		return err
	} else if len(interp) > 0 {
		for _, program := range interp {
			found, err := findProgram(program)
			if err != nil {
				return err
			}
			if err := t.addProgram(ctx, found); err != nil {
				return err
			}
		}
		return nil
	}
	if err := t.addLibraries(real); err != nil {
		return err
	}
	return t.addCompanions(ctx, real)
}

// scriptInterpreter reads the #! line; env's argument is a program as well.
func scriptInterpreter(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// The kernel reads 256 bytes of it.
	line, err := bufio.NewReader(io.LimitReader(f, 256)).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	rest, ok := strings.CutPrefix(line, "#!")
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return nil, nil
	}
	if filepath.Base(fields[0]) != "env" {
		return fields[:1], nil
	}
	for _, arg := range fields[1:] {
		if !strings.HasPrefix(arg, "-") && !strings.Contains(arg, "=") {
			return []string{fields[0], arg}, nil
		}
	}
	return fields[:1], nil
}

// addPath adds one path and every directory and link on the way, and returns
// where it ends: /bin/sh becomes bin → usr/bin, usr/bin/sh → dash, usr/bin/dash.
func (t *tree) addPath(path string) (string, error) {
	done, rest := "/", strings.Split(strings.Trim(filepath.Clean(path), "/"), "/")
	for links := 0; len(rest) > 0; {
		at := filepath.Join(done, rest[0])
		info, err := os.Lstat(at)
		if err != nil {
			return "", err
		}
		if err := t.put(at[1:], at, false); err != nil {
			return "", err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			done, rest = at, rest[1:]
			continue
		}
		if links++; links > 40 {
			return "", fmt.Errorf("%s: %w", path, unix.ELOOP)
		}
		to, err := os.Readlink(at)
		if err != nil {
			return "", err
		}
		if !filepath.IsAbs(to) {
			to = filepath.Join(done, to)
		}
		to = filepath.Join(append([]string{to}, rest[1:]...)...)
		done, rest = "/", strings.Split(strings.Trim(to, "/"), "/")
	}
	return done, nil
}

// addDir adds a directory or file with everything below, and the libraries of
// what is ELF in it (plug-ins, a language's modules). Names that match a
// pattern in skip are left out.
func (t *tree) addDir(ctx context.Context, dir string, skip ...string) error {
	top, err := t.addPath(dir)
	if err != nil {
		return err
	}
	return filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		matches := func(pattern string) bool { ok, _ := filepath.Match(pattern, d.Name()); return ok }
		if path != top && slices.ContainsFunc(skip, matches) {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		if d.Type()&fs.ModeSymlink != 0 {
			if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
				return t.put(path[1:], path, false) // dangling: as it is
			}
			_, err := t.addPath(path)
			return err
		}
		if err := t.put(path[1:], path, false); err != nil {
			return err
		}
		if d.Type().IsRegular() {
			return t.addLibraries(path)
		}
		return nil
	})
}

// put records one file, directory or link.
func (t *tree) put(name, source string, owners bool) error {
	if _, ok := t.entries[name]; ok {
		return nil
	}
	info, err := os.Lstat(source)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket != 0 {
		return nil // means nothing without its process
	}
	link := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(source); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name = name
	if info.IsDir() {
		h.Name += "/"
	}
	h.Uname, h.Gname, h.AccessTime, h.ChangeTime = "", "", time.Time{}, time.Time{}
	h.ModTime = h.ModTime.Truncate(time.Second)
	if !owners {
		h.Uid, h.Gid = 0, 0
	} else if st, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode()&fs.ModeDevice != 0 {
		h.Devmajor, h.Devminor = int64(unix.Major(uint64(st.Rdev))), int64(unix.Minor(uint64(st.Rdev)))
	}
	t.entries[name] = entry{header: *h, source: source}
	return nil
}

var (
	pythonPattern   = regexp.MustCompile(`^python(3(\.\d+)?)?$`)
	postgresPattern = regexp.MustCompile(`^/usr/lib/postgresql/(\d+)/bin/`)
)

// addCompanions adds what a known program reads besides its libraries.
func (t *tree) addCompanions(ctx context.Context, path string) error {
	if pythonPattern.MatchString(filepath.Base(path)) {
		out, err := exec.CommandContext(ctx, path, "-c", "import sysconfig; print(sysconfig.get_path('stdlib')); print(sysconfig.get_path('platstdlib'))").Output()
		if err != nil {
			return fmt.Errorf("asking for the standard library: %w", err)
		}
		for _, dir := range strings.Fields(string(out)) {
			// A hundred megabytes that no shard of a test imports.
			if err := t.addDir(ctx, dir, "test", "tests", "site-packages", "idlelib", "tkinter", "ensurepip", "lib2to3", "config-3*", "__pycache__"); err != nil {
				return err
			}
		}
	}
	if m := postgresPattern.FindStringSubmatch(path); m != nil {
		for _, dir := range []string{"/usr/lib/postgresql/" + m[1], "/usr/share/postgresql/" + m[1], "/usr/share/zoneinfo"} {
			if !exists(dir) {
				continue
			}
			// Without llvmjit.so it does not compile queries, and does not need
			// LLVM, which is four times as large as everything else.
			if err := t.addDir(ctx, dir, "llvmjit.so", "bitcode", "pgxs", "man"); err != nil {
				return err
			}
		}
	}
	return nil
}

// write writes the layer, parents before children.
func (t *tree) write(ctx context.Context, w io.Writer) error {
	names := make([]string, 0, len(t.entries))
	for name := range t.entries {
		names = append(names, name)
	}
	slices.Sort(names)
	tw := tar.NewWriter(w)
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e := t.entries[name]
		if err := tw.WriteHeader(&e.header); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if e.header.Typeflag != tar.TypeReg {
			continue
		}
		if err := copyEntry(tw, e); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return tw.Close()
}

func copyEntry(w io.Writer, e entry) error {
	if e.source == "" {
		_, err := w.Write(e.data)
		return err
	}
	f, err := os.Open(e.source)
	if err != nil {
		return err
	}
	defer f.Close()
	// A file that grew meanwhile is cut to its recorded size; one that shrank
	// is an error.
	_, err = io.CopyN(w, f, e.header.Size)
	return err
}
