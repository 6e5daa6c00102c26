// Command shard is what the integration tests run inside a container: it
// counts, answers with its count on TCP, and ends on SIGTERM.
package main

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
)

func main() {
	host, _ := os.Hostname()
	fmt.Printf("up %s %v %s\n", host, os.Args[1:], os.Getenv("GREETING"))
	if len(os.Args) > 1 && os.Args[1] == "exit" {
		os.Exit(3)
	}
	if err := os.WriteFile("/written", []byte("by the shard\n"), 0o644); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	var count atomic.Int64
	if l, err := net.Listen("tcp", ":7000"); err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%d\n", count.Add(1))
				c.Close()
			}
		}()
	}
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	<-term
	fmt.Println("term")
}
