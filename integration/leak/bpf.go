package leak

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bpfObjects are the maps, programs and links that a process of the host holds
// or that are pinned on it, by kind and id: a daemon that was started anew finds
// them pinned and holds other descriptors of the same objects. What only another
// object holds (a program's types) goes with it and is not counted.
type bpfObjects map[string]*bpfObject

type bpfObject struct{ what, pin, holder string }

// bpfInfo reads /proc/PID/fdinfo/FD of a BPF descriptor; false for any other.
// The lines are those of map, prog and link in the kernel's kernel/bpf/syscall.c.
func bpfInfo(fdinfo string) (id, what string, ok bool) {
	v := map[string]string{}
	for line := range strings.Lines(fdinfo) {
		name, value, _ := strings.Cut(line, ":")
		v[name] = strings.TrimSpace(value)
	}
	switch {
	case v["link_id"] != "":
		return "link " + v["link_id"], fmt.Sprintf("link of type %s to program %s", v["link_type"], v["prog_tag"]), true
	case v["map_id"] != "":
		return "map " + v["map_id"], fmt.Sprintf("map of type %s, %s + %s bytes, %s entries", v["map_type"], v["key_size"], v["value_size"], v["max_entries"]), true
	case v["prog_id"] != "":
		return "program " + v["prog_id"], fmt.Sprintf("program of type %s, %s", v["prog_type"], v["prog_tag"]), true
	}
	return "", "", false
}

// note files the object behind a descriptor of a process.
func (o bpfObjects) note(pid, fd, holder, pin string) error {
	raw, err := os.ReadFile(filepath.Join("/proc", pid, "fdinfo", fd))
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	id, what, ok := bpfInfo(string(raw))
	if !ok {
		return nil
	}
	have := o[id]
	if have == nil {
		have = &bpfObject{what: what, holder: holder}
		o[id] = have
	}
	if pin != "" {
		have.pin = pin
	}
	return nil
}

// pinned files what is pinned below a directory of a bpf file system.
func (o bpfObjects) pinned(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // unpinned meanwhile
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fd, err := getPinned(path)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) {
			return nil // the latter: the kernel's own iterators (maps.debug, progs.debug)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		defer unix.Close(fd)
		return o.note("self", strconv.Itoa(fd), "", path)
	})
}

// getPinned opens a pinned object (bpf(2), BPF_OBJ_GET).
func getPinned(path string) (int, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	attr := struct {
		path  uint64
		fd    uint32
		flags uint32
	}{path: uint64(uintptr(unsafe.Pointer(name)))}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// bpf lists what was found.
func (s *Snapshot) bpf(o bpfObjects) error {
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	all, err := parseMountinfo(raw)
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.fstype == "bpf" {
			if err := o.pinned(m.at); err != nil {
				return err
			}
		}
	}
	for id, object := range o {
		where := "held by " + object.holder
		if object.pin != "" {
			where = "pinned at " + withoutNumbers(object.pin)
		}
		s.add(BPF, object.what+", "+where, id)
	}
	return nil
}
