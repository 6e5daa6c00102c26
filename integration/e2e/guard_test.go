//go:build integration

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tranship/tranship/integration/lab"
	"github.com/tranship/tranship/integration/leak"
)

// leakPatience is how long containerd and the kernel may take to clean up.
const leakPatience = 20 * time.Second

// ignores are leak.Standing, and what containers leave that tranship did not make.
var ignores = append(leak.Standing[:len(leak.Standing):len(leak.Standing)], leak.Ignore{
	Category: leak.Cgroup, Key: regexp.MustCompile(`^/default$`),
	Why: "the parent of the cgroups of ctr's containers: runc makes it with the first one, and keeps it",
})

var guards struct {
	sync.Mutex
	tests map[string]bool // by name: those under a guard
}

// guarded says whether t or a test above it is under a guard.
func guarded(t *testing.T) bool {
	for name := t.Name(); ; {
		if guards.tests[name] {
			return true
		}
		i := strings.LastIndexByte(name, '/')
		if i < 0 {
			return false
		}
		name = name[:i]
	}
}

// guard takes the inventory of every host of the pool, and again after all other
// clean-up of the test: what is more or missing then fails it. hostOf calls it
// when a test first reaches for a host, so no test can forget it, and its own
// clean-up, registered later, runs earlier.
func guard(t *testing.T) {
	t.Helper()
	guards.Lock()
	defer guards.Unlock()
	if guarded(t) {
		return
	}
	if t.Context().Err() != nil {
		t.Fatal("clean-up that reaches for a host is registered before the test's first use of one: call guard first")
	}
	// Not this binary: the race detector makes an inventory take ten times as long.
	helper := goBuilt(t, "leakcheck", "integration/leak/cmd/leakcheck")
	hosts := theLab.Hosts()
	before := make([]leak.Snapshot, len(hosts))
	onAll := func(ctx context.Context, f func(ctx context.Context, i int, h *lab.Host) error) error {
		ctx, cancel := context.WithTimeout(ctx, leakPatience)
		defer cancel()
		all, ctx := errgroup.WithContext(ctx)
		for i, h := range hosts {
			all.Go(func() error {
				if err := f(ctx, i, h); err != nil {
					return fmt.Errorf("%s: %w", h.Name(), err)
				}
				return nil
			})
		}
		return all.Wait()
	}
	if err := onAll(t.Context(), func(ctx context.Context, i int, h *lab.Host) (err error) {
		before[i], err = leak.Settled(ctx, h, helper)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if guards.tests == nil {
		guards.tests = map[string]bool{}
	}
	guards.tests[t.Name()] = true
	t.Cleanup(func() {
		if err := onAll(context.WithoutCancel(t.Context()), func(ctx context.Context, i int, h *lab.Host) error {
			changes, err := leak.Await(ctx, h, helper, before[i], ignores)
			for _, c := range changes {
				t.Errorf("leak: %v", c)
			}
			return err
		}); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			for _, h := range hosts {
				t.Logf("the daemon of %s said last:\n%s", h.Name(), tail(h.LogPath("transhipd"), 60))
			}
		}
		guards.Lock()
		defer guards.Unlock()
		delete(guards.tests, t.Name())
	})
}

// tail returns the last lines of a file, or why not.
func tail(path string, lines int) []byte {
	raw, err := os.ReadFile(path)
	if err != nil {
		return []byte(err.Error())
	}
	all := bytes.SplitAfter(raw, []byte("\n"))
	return bytes.Join(all[max(0, len(all)-lines):], nil)
}

var images struct {
	sync.Mutex
	imported map[string]bool
}

// importImage puts an image on every host, once: images stay for the tests that
// follow, so they come before the guard's inventory.
func importImage(t *testing.T, spec lab.ImageSpec) {
	t.Helper()
	images.Lock()
	defer images.Unlock()
	if images.imported[spec.Name] {
		return
	}
	guards.Lock()
	late := guarded(t)
	guards.Unlock()
	if late {
		t.Fatalf("image %s: import images before the test's first use of a host", spec.Name)
	}
	if err := theLab.Image(t.Context(), "default", spec); err != nil {
		t.Fatal(err)
	}
	// An import leaves content that nothing refers to, until containerd next
	// collects garbage; a lease that is deleted in step makes it do so now.
	for _, h := range theLab.Hosts() {
		for _, verb := range [][]string{{"create", "--id", "settle"}, {"delete", "--sync", "settle"}} {
			if _, err := h.Exec(t.Context(), append([]string{"ctr", "leases"}, verb...)...); err != nil {
				t.Fatal(err)
			}
		}
	}
	if images.imported == nil {
		images.imported = map[string]bool{}
	}
	images.imported[spec.Name] = true
}

// workDir holds what the tests build for all of them; run removes it.
var workDir = sync.OnceValues(func() (string, error) { return os.MkdirTemp("", "tranship-e2e-") })

// built makes a program once for all tests and returns its path, the same in
// every host and in the images that it is packed into.
func built(t *testing.T, name string, build func(ctx context.Context, out string) error) string {
	t.Helper()
	dir, err := workDir()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if err := build(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// goBuilt is built for a program of this module, static, so that an image may be
// of that one file.
func goBuilt(t *testing.T, name, pkg string) string {
	t.Helper()
	return built(t, name, func(ctx context.Context, out string) error {
		cmd := exec.CommandContext(ctx, "go", "build", "-o", out, "github.com/tranship/tranship/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", name, err, msg)
		}
		return nil
	})
}
