//go:build integration

package runtime_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tranship/tranship/daemon/runtime"
)

func ptr[T any](v T) *T { return &v }

// kernelLimit is the memory limit that the kernel enforces on a shard.
func kernelLimit(t *testing.T, h *host, name string) string {
	t.Helper()
	cg, err := h.Cgroup(t.Context(), namespace, name)
	must(t, err)
	for _, file := range []string{"memory.limit_in_bytes", "memory.max"} {
		if raw, err := os.ReadFile(filepath.Join(cg.Memory, file)); err == nil {
			return strings.TrimSpace(string(raw))
		}
	}
	t.Fatalf("%s has no memory limit in %s", name, cg.Memory)
	return ""
}

func TestLimitsChangeUnderARunningShard(t *testing.T) {
	h := newHost(t, "a")
	h.addImage(t)
	ctx := t.Context()
	s := h.run(t, runtime.RunSpec{
		Name: "web-0", Memory: 64 << 20, CPUs: 0.5, Index: ptr(0), Spec: "d1",
		Labels: map[string]string{runtime.LabelWorkload: "web", runtime.LabelPriority: "3", "mine": "x"},
	})
	var settings map[string]runtime.Settings
	check := func(got *runtime.Shard, cpus float64, memory int64) {
		t.Helper()
		var err error
		settings, err = h.Settings(ctx, namespace, settings)
		must(t, err)
		if s := settings["web-0"]; !s.Running || s.CPUs != cpus || s.Image != got.Image || s.Incoming != "" || !maps.Equal(s.Labels, got.Labels) {
			t.Errorf("settings %+v; wanted %v CPUs of %+v", s, cpus, got)
		}
		if got.PID != s.PID || got.CPUs != cpus || got.MemoryLimit != memory {
			t.Errorf("pid %d, %v CPUs, %d bytes; wanted %d, %v, %d", got.PID, got.CPUs, got.MemoryLimit, s.PID, cpus, memory)
		}
		want := fmt.Sprint(memory)
		if limit := kernelLimit(t, h, "web-0"); memory > 0 && limit != want || memory == 0 && len(limit) < 15 && limit != "max" {
			t.Errorf("the kernel's limit is %s", limit)
		}
	}
	for range 2 { // may run twice
		got, err := h.Resize(ctx, namespace, "web-0", runtime.Resize{
			Memory: ptr(int64(128 << 20)), Labels: map[string]string{runtime.LabelPriority: "7", "mine": ""},
		})
		must(t, err)
		check(got, 0.5, 128<<20)
		if _, there := got.Labels["mine"]; there || got.Labels[runtime.LabelPriority] != "7" || got.Labels[runtime.LabelIndex] != "0" {
			t.Errorf("labels %v", got.Labels)
		}
	}
	got, err := h.Resize(ctx, namespace, "web-0", runtime.Resize{CPUs: ptr(1.5)})
	must(t, err)
	check(got, 1.5, 128<<20)
	got, err = h.Resize(ctx, namespace, "web-0", runtime.Resize{CPUs: ptr(0.0), Memory: ptr(int64(0))})
	must(t, err)
	check(got, 0, 0)
	got, err = h.Resize(ctx, namespace, "web-0", runtime.Resize{CPUs: ptr(0.5), Memory: ptr(int64(64 << 20))})
	must(t, err)
	check(got, 0.5, 64<<20)
	if _, err := h.Resize(ctx, namespace, "web-0", runtime.Resize{Memory: ptr(int64(1))}); !errors.Is(err, runtime.ErrInvalid) {
		t.Errorf("a byte of memory: %v", err)
	}
	if started, err := h.UndoRun(ctx, namespace, "web-0"); err != nil || !started {
		t.Errorf("a shard that runs is undone: %v", err)
	}
	must(t, h.Remove(ctx, namespace, "web-0", true))
	if settings, err := h.Settings(ctx, namespace, settings); err != nil || len(settings) != 0 {
		t.Errorf("settings of nothing: %v %v", settings, err)
	}
	for range 2 {
		if started, err := h.UndoRun(ctx, namespace, "web-0"); err != nil || started {
			t.Errorf("nothing is undone: %v %v", started, err)
		}
	}
	h.empty(t)
}
