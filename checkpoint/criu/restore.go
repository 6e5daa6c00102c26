package criu

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// RestoreConfig is what stock runc does not pass to CRIU; it travels in a CRIU
// configuration file that the OCI annotation org.criu.config names.
type RestoreConfig struct {
	LazyPages      bool
	TCPEstablished bool
	IgnoreCgroups  bool
	// Mounts are mounts that the dump left out besides the runtime's: At is their
	// source on this host.
	Mounts   []ExternalMount
	LogLevel int
}

// Write writes the file, creating its directory.
func (c RestoreConfig) Write(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("criu restore configuration: %w", err)
	}
	if err := os.WriteFile(path, c.bytes(), 0o600); err != nil {
		return fmt.Errorf("criu restore configuration: %w", err)
	}
	return nil
}

func (c RestoreConfig) bytes() []byte {
	var b bytes.Buffer
	if c.LazyPages {
		b.WriteString("lazy-pages\n")
	}
	if c.TCPEstablished {
		b.WriteString("tcp-established\n")
	}
	if c.IgnoreCgroups {
		b.WriteString("manage-cgroups ignore\n")
	}
	for _, m := range c.Mounts {
		fmt.Fprintf(&b, "external mnt[%s]:%s\n", m.Key, m.At)
	}
	b.WriteString("file-locks\n")
	// Its argument is optional, so that after a space it would not be taken for
	// one: runc's level 4 would become 5 (criu/config.c).
	fmt.Fprintf(&b, "verbosity=%d\n", c.LogLevel)
	return b.Bytes()
}

// descriptorsFile is where runc looks for what the container's fds 0 to 2 were,
// so that pipes of the old shim are replaced by those of the new one.
const descriptorsFile = "descriptors.json"

// WriteDescriptors records what the file descriptors 0 to 2 of a process link
// to, in runc's format, in the image directory.
func WriteDescriptors(imageDir string, pid int) error {
	links := make([]string, 3)
	for fd := range links {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
		if err != nil {
			// A process may have closed its stdin; runc skips what is no pipe.
			target = "/dev/null"
		}
		links[fd] = target
	}
	b, err := json.Marshal(links)
	if err != nil {
		return fmt.Errorf("descriptors of process %d: %w", pid, err)
	}
	if err := os.WriteFile(filepath.Join(imageDir, descriptorsFile), b, 0o600); err != nil {
		return fmt.Errorf("descriptors of process %d: %w", pid, err)
	}
	return nil
}
