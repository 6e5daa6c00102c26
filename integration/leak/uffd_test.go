package leak

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

const uffdVerb = "hold-userfaultfd"

// serveUffd makes this test binary a process that holds a userfaultfd until it
// gets SIGTERM, if it was started as such.
func serveUffd() {
	if len(os.Args) < 2 || os.Args[1] != uffdVerb {
		return
	}
	const userModeOnly = 1 // UFFD_USER_MODE_ONLY, linux/userfaultfd.h
	if _, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK|userModeOnly, 0, 0); errno != 0 {
		fmt.Fprintln(os.Stderr, "userfaultfd:", errno)
		os.Exit(1)
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	fmt.Println("ready")
	<-end
	os.Exit(0)
}
