package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/tranship/tranship/checkpoint"
	"github.com/tranship/tranship/checkpoint/track"
)

// heapVerb copies the private anonymous memory of a process to a file: HEAP PID
// FILE. Pages of zeros are left out: most of them are not populated, and the
// page road sends none of them.
const heapVerb = "heap"

func heapMain(args []string) int {
	pid, err := strconv.Atoi(args[0])
	if err == nil {
		err = copyHeap(pid, args[1])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "heap:", err)
		return 1
	}
	return 0
}

func copyHeap(pid int, path string) (err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	out := bufio.NewWriterSize(f, chunk)
	buf := make([]byte, chunk)
	zero := make([]byte, checkpoint.PageSize)
	for line := range strings.Lines(string(maps)) {
		from, to, ok := anonymous(line)
		for at := from; ok && at < to; at += chunk {
			part := buf[:min(chunk, to-at)]
			if err := track.ReadMemory(pid, at, part, func(uint64, checkpoint.Pages) {}); err != nil {
				return err
			}
			for ; len(part) > 0; part = part[checkpoint.PageSize:] {
				if page := part[:checkpoint.PageSize]; !bytes.Equal(page, zero) {
					if _, err := out.Write(page); err != nil {
						return err
					}
				}
			}
		}
	}
	return out.Flush()
}

// anonymous says whether a line of /proc/PID/maps is private, writable memory
// of no file, and where.
func anonymous(line string) (from, to uint64, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 5 || fields[1] != "rw-p" || fields[4] != "0" || len(fields) > 5 && fields[5] != "[heap]" {
		return 0, 0, false
	}
	low, high, _ := strings.Cut(fields[0], "-")
	from, err := strconv.ParseUint(low, 16, 64)
	to, err2 := strconv.ParseUint(high, 16, 64)
	return from, to, err == nil && err2 == nil
}
