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
	process := fmt.Sprintf("/proc/%d", hostPID)
	mounts, err := os.ReadFile(process + "/mountinfo")
	files.pinning = err != nil || pinningMount(mounts)
	if err := files.look(process); err != nil {
		files.pinning = true
		return files
	}
	for _, thread := range OwnTables(hostPID) {
		_ = files.look(thread) // fails only once it has ended
	}
	return files
}

// look looks through the table of a process, or of a thread, by its directory.
func (files *openFiles) look(dir string) error {
	entries, err := os.ReadDir(dir + "/fd")
	if err != nil {
		return err
	}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, "fd", e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		files.userfaultfd = files.userfaultfd || link == userfaultfdLink
		// Only what has a path can be a file.
		if files.pinning || !strings.HasPrefix(link, "/") {
			continue
		}
		info, err := os.ReadFile(filepath.Join(dir, "fdinfo", e.Name()))
		files.pinning = err == nil && openedDirect(info)
	}
	return nil
}

// kcmpFiles is KCMP_FILES of include/uapi/linux/kcmp.h.
const kcmpFiles = 2

// OwnTables lists, by their directories in /proc, the threads of a process that have
// files in a table that is not the process's (unshare(2), CLONE_FILES). Without
// kcmp(2) there is none, but CRIU does not do without it either.
func OwnTables(hostPID int) []string {
	dir := fmt.Sprintf("/proc/%d/task", hostPID)
	threads, err := os.ReadDir(dir)
	if err != nil {
		return nil // it has ended
	}
	var own []string
	for _, t := range threads {
		tid, err := strconv.Atoi(t.Name())
		if err != nil || tid == hostPID {
			continue
		}
		order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(hostPID), uintptr(tid), kcmpFiles, 0, 0, 0)
		if errno != 0 || order == 0 {
			continue
		}
		// A thread that is ending has no table any more.
		thread := filepath.Join(dir, t.Name())
		if files, err := os.ReadDir(thread + "/fd"); err == nil && len(files) > 0 {
			own = append(own, thread)
		}
	}
	return own
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
