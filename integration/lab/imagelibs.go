package lab

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// addLibraries adds an ELF file's loader and, one after the other, everything
// that it needs. Files of other formats need nothing.
func (t *tree) addLibraries(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		var format *elf.FormatError
		if errors.As(err, &format) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		return err
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		raw, err := io.ReadAll(p.Open())
		if err != nil {
			return fmt.Errorf("%s: interpreter: %w", path, err)
		}
		if _, err := t.addPath(string(bytes.TrimRight(raw, "\x00"))); err != nil {
			return fmt.Errorf("%s: interpreter: %w", path, err)
		}
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	for _, name := range needed {
		if err := t.addLibrary(f, path, name); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) addLibrary(of *elf.File, path, name string) error {
	if t.libs == nil {
		t.libs = map[string]string{}
	}
	dirs := append(runPaths(of, path), libraryDirs()...)
	for _, dir := range dirs {
		lib := filepath.Join(dir, name)
		if t.libs[lib] != "" {
			return nil
		}
		if !sameMachine(of, lib) {
			continue
		}
		t.libs[lib] = path
		real, err := t.addPath(lib)
		if err != nil {
			return err
		}
		return t.addLibraries(real)
	}
	return fmt.Errorf("%s needs %s, which is in none of %s", path, name, strings.Join(dirs, ", "))
}

// runPaths are the directories that an ELF file names itself.
func runPaths(f *elf.File, path string) []string {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		values, _ := f.DynString(tag) // absent in most files
		for _, v := range values {
			for _, dir := range filepath.SplitList(v) {
				origin := filepath.Dir(path)
				dir = strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(dir)
				dirs = append(dirs, filepath.Clean(dir))
			}
		}
	}
	return dirs
}

// libraryDirs are the loader's: configured ones, then the defaults.
func libraryDirs() []string {
	var dirs []string
	configs, _ := filepath.Glob("/etc/ld.so.conf.d/*.conf")
	for _, config := range configs {
		raw, err := os.ReadFile(config)
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(raw), "\n") {
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "/") {
				dirs = append(dirs, line)
			}
		}
	}
	return append(dirs, "/lib", "/usr/lib", "/lib64", "/usr/lib64")
}

func sameMachine(of *elf.File, path string) bool {
	lib, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer lib.Close()
	return lib.Machine == of.Machine && lib.Class == of.Class
}
