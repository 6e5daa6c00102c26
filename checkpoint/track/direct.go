package track

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// pinsPages says whether a process could have input under way that the kernel
// writes into pages pinned beforehand, without going through the page tables:
// it has a file open with O_DIRECT, or sees a file system whose server may
// choose such a transfer for any file. In doubt it says yes.
func pinsPages(hostPID int) bool {
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", hostPID))
	if err != nil || pinningMount(mounts) {
		return true
	}
	dir := fmt.Sprintf("/proc/%d/fd", hostPID)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return true
	}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		// Only what has a path can be a file; a closed descriptor is none.
		if err != nil || !strings.HasPrefix(link, "/") {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", hostPID, e.Name()))
		if err == nil && openedDirect(info) {
			return true
		}
	}
	return false
}

// pinningMount looks through /proc/PID/mountinfo (proc_pid_mountinfo(5)).
func pinningMount(mountinfo []byte) bool {
	for line := range bytes.Lines(mountinfo) {
		// Optional fields end with a hyphen; the type follows.
		_, rest, ok := bytes.Cut(line, []byte(" - "))
		if !ok {
			continue
		}
		kind, _, _ := bytes.Cut(rest, []byte(" "))
		switch {
		case bytes.Equal(kind, []byte("fusectl")):
		case bytes.HasPrefix(kind, []byte("fuse")), bytes.Equal(kind, []byte("virtiofs")), bytes.Equal(kind, []byte("9p")):
			return true
		}
	}
	return false
}

// openedDirect looks at the octal flags of /proc/PID/fdinfo/FD.
func openedDirect(fdinfo []byte) bool {
	value, ok := statusField(fdinfo, "flags")
	if !ok {
		return true
	}
	flags, err := strconv.ParseUint(value, 8, 64)
	return err != nil || flags&unix.O_DIRECT != 0
}
