//go:build integration

package leak

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/internal/testenv"
)

// TestEveryKindOfLeakIsNamed makes one leak of each kind on a host of a lab and
// wants each to be told; then it removes them and wants silence.
func TestEveryKindOfLeakIsNamed(t *testing.T) {
	testenv.NeedRoot(t)
	up, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := lab.Down(up); err != nil {
		t.Fatal(err)
	}
	l, err := lab.Up(up, lab.Options{Hosts: 1, NoDaemon: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.Down(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	h, err := l.Host("host-1")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sh := func(script string) {
		t.Helper()
		if _, err := h.Exec(t.Context(), "sh", "-ec", script); err != nil {
			t.Fatal(err)
		}
	}
	before, err := Take(t.Context(), h, self)
	if err != nil {
		t.Fatal(err)
	}
	if changes, err := Await(t.Context(), h, self, before, nil); err != nil || changes != nil {
		t.Fatalf("a host to which nothing happened: %v, %v", changes, err)
	}

	// v1 has a hierarchy for the freezer, v2 has one for all.
	sh(`f=/sys/fs/cgroup/freezer; [ -d $f ] || f=/sys/fs/cgroup
		mkdir -p $f/leaktest/frozen
		if [ -e $f/leaktest/frozen/freezer.state ]; then echo FROZEN > $f/leaktest/frozen/freezer.state; else echo 1 > $f/leaktest/frozen/cgroup.freeze; fi
		mkdir -p /run/tranship/store/m1; echo x > /run/tranship/store/m1/pages
		mkdir /run/leaktest; mount -t tmpfs leaktest /run/leaktest; head -c 8M /dev/zero > /run/leaktest/image
		head -c 4M /dev/zero > /run/left
		ip netns add leaktest
		ip netns exec leaktest nft add table inet CRIU-17
		ip link add leak0 type bridge
		nft add table ip leaktest
		ctr leases create --id leaktest
		ctr snapshots prepare leaktest
		ctr images ls -q >/dev/null
		head -c 1000 /dev/urandom | ctr content ingest leaktest
	`)
	uffd := h.Command(t.Context(), self, uffdVerb)
	out, err := uffd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := uffd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}

	after, err := Take(t.Context(), h, self)
	if err != nil {
		t.Fatal(err)
	}
	told := fmt.Sprint(Err(Diff(before, after, Standing)))
	for _, want := range []string{
		"process left behind: " + self + " " + uffdVerb,
		"userfaultfd left behind: held by ",
		"cgroup left behind: /leaktest/frozen (frozen)",
		"mount left behind: tmpfs at /run/leaktest",
		"mount left behind: namespace at /run/netns/leaktest",
		"network namespace left behind: held by mount at /run/netns/leaktest",
		`nft object left behind: table {"family":"inet","name":"CRIU-17"} in the namespace of mount at /run/netns/leaktest`,
		`nft object left behind: table {"family":"ip","name":"leaktest"} in the namespace of the host's own`,
		"link left behind: bridge leak0, down in the namespace of the host's own",
		"lease left behind: leaktest in default",
		"snapshot left behind: Active leaktest in default",
		"content left behind: sha256:",
		"file left behind: /run/tranship/store/m1/pages",
		"tmpfs usage left behind: /run (",
	} {
		if !strings.Contains(told, want) {
			t.Errorf("not told: %s", want)
		}
	}
	if t.Failed() {
		t.Logf("told was:\n%s", told)
	}

	if err := uffd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := uffd.Wait(); err != nil {
		t.Fatal(err)
	}
	sh(`f=/sys/fs/cgroup/freezer; [ -d $f ] || f=/sys/fs/cgroup
		rmdir $f/leaktest/frozen $f/leaktest
		rm -r /run/tranship/store/m1; rmdir -p --ignore-fail-on-non-empty /run/tranship/store
		umount /run/leaktest; rmdir /run/leaktest
		rm /run/left
		ip netns del leaktest
		rmdir --ignore-fail-on-non-empty /run/netns || umount -l /run/netns && rmdir /run/netns
		ip link del leak0
		nft delete table ip leaktest
		ctr snapshots rm leaktest
		ctr content rm $(ctr content ls -q)
		ctr leases delete --sync leaktest
	`)
	ctx, cancelAwait := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancelAwait()
	changes, err := Await(ctx, h, self, before, append(Standing,
		ignore(File, `/var/lib/containerd/io\.containerd\.snapshotter\.v1\.overlayfs/snapshots/N/`, "containerd removes it when it next collects garbage"),
		ignore(Mount, `tmpfs at /run/netns`, "ip netns binds the directory to itself and leaves that"),
	))
	if err != nil {
		t.Fatal(err)
	}
	if err := Err(changes); err != nil {
		t.Errorf("after the clean-up: %v", err)
	}
}
