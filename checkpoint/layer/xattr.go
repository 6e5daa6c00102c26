package layer

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"
)

// xattrCalls are the calls on one inode: by descriptor, or by a path in /proc
// for those that cannot be opened.
type xattrCalls struct {
	list   func([]byte) (int, error)
	get    func(string, []byte) (int, error)
	set    func(string, []byte) error
	remove func(string) error
}

func fdXattrs(fd int) xattrCalls {
	return xattrCalls{
		list:   func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		get:    func(name string, b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) },
		set:    func(name string, v []byte) error { return unix.Fsetxattr(fd, name, v, 0) },
		remove: func(name string) error { return unix.Fremovexattr(fd, name) },
	}
}

func pathXattrs(path string) xattrCalls {
	return xattrCalls{
		list:   func(b []byte) (int, error) { return unix.Listxattr(path, b) },
		get:    func(name string, b []byte) (int, error) { return unix.Getxattr(path, name, b) },
		set:    func(name string, v []byte) error { return unix.Setxattr(path, name, v, 0) },
		remove: func(name string) error { return unix.Removexattr(path, name) },
	}
}

// readXattrs returns all attributes sorted by name: overlayfs's marks, file
// capabilities and ACLs among them, each literally.
func readXattrs(x xattrCalls, root bool) ([]xattr, error) {
	names, err := listXattrs(x)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	var out []xattr
	total := 0
	for _, name := range names {
		if root && name == markerXattr {
			continue
		}
		value, err := sized(func(b []byte) (int, error) { return x.get(name, b) })
		if errors.Is(err, unix.ENODATA) {
			continue // removed meanwhile, which moved ctime
		}
		if err != nil {
			return nil, fmt.Errorf("get %s: %w", name, err)
		}
		if total += len(name) + len(value); total > maxXattrs {
			return nil, fmt.Errorf("more than %d bytes", maxXattrs)
		}
		out = append(out, xattr{Name: name, Value: value})
	}
	return out, nil
}

func listXattrs(x xattrCalls) ([]string, error) {
	raw, err := sized(x.list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list: %w", err)
	}
	if len(raw) == 0 {
		return nil, nil
	}
	names := strings.Split(string(bytes.TrimSuffix(raw, []byte{0})), "\x00")
	slices.Sort(names)
	return names, nil
}

// sized calls for a length, then for so many bytes, and again if it grew.
func sized(call func([]byte) (int, error)) ([]byte, error) {
	for {
		n, err := call(nil)
		if err != nil || n == 0 {
			return nil, err
		}
		buf := make([]byte, n)
		n, err = call(buf)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return buf[:n], nil
	}
}

func hashXattrs(list []xattr) xxh3.Uint128 {
	if len(list) == 0 {
		return xxh3.Uint128{}
	}
	var b []byte
	for _, x := range list {
		b = binary.AppendUvarint(b, uint64(len(x.Name)))
		b = append(b, x.Name...)
		b = binary.AppendUvarint(b, uint64(len(x.Value)))
		b = append(b, x.Value...)
	}
	return xxh3.Hash128(b)
}

// writeXattrs makes the attributes exactly those wanted.
func writeXattrs(x xattrCalls, wanted []xattr, root bool) error {
	have, err := listXattrs(x)
	if err != nil {
		return err
	}
	for _, name := range have {
		if slices.ContainsFunc(wanted, func(w xattr) bool { return w.Name == name }) {
			continue
		}
		// A new inode has its host's label, which cannot be taken away; and an
		// inherited ACL, which must be.
		if name == "security.selinux" || root && name == markerXattr {
			continue
		}
		if err := x.remove(name); err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("remove attribute %s: %w", name, err)
		}
	}
	for _, w := range wanted {
		if err := x.set(w.Name, w.Value); err != nil {
			return fmt.Errorf("set attribute %s: %w", w.Name, err)
		}
	}
	return nil
}
