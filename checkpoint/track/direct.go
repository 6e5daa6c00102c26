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

// openFiles is what a process has open, as far as it matters here.
type openFiles struct {
	// pinning says that input could be under way that the kernel writes into
	// pages pinned beforehand, without going through the page tables: a file is
	// open with O_DIRECT, or there is a file system whose server may choose such a
	// transfer for any file.
	pinning bool
	// userfaultfd says that a userfaultfd is open.
	userfaultfd bool
}

// surveyFiles looks through the files of a process. In doubt it takes them for
// pinning.
func surveyFiles(hostPID int) openFiles {
	var files openFiles
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", hostPID))
	files.pinning = err != nil || pinningMount(mounts)
	dir := fmt.Sprintf("/proc/%d/fd", hostPID)
	entries, err := os.ReadDir(dir)
	if err != nil {
		files.pinning = true
		return files
	}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		files.userfaultfd = files.userfaultfd || link == userfaultfdLink
		// Only what has a path can be a file.
		if files.pinning || !strings.HasPrefix(link, "/") {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", hostPID, e.Name()))
		files.pinning = err == nil && openedDirect(info)
	}
	return files
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
