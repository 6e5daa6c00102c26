package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	core_x86 "github.com/checkpoint-restore/go-criu/v7/crit/images/core-x86"
	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"google.golang.org/protobuf/proto"

	"github.com/tranship/tranship/checkpoint"
)

const page = checkpoint.PageSize

func TestSettleRuns(t *testing.T) {
	anon := VMA{Start: 0x10 * page, End: 0x20 * page, Flags: mapPrivate | mapAnonymous}
	file := VMA{Start: 0x20 * page, End: 0x30 * page, Flags: mapPrivate}
	guard := VMA{Start: 0x12 * page, End: 0x13 * page, Flags: mapPrivate | mapAnonymous, Status: Guard}
	locked := VMA{Start: 0x40 * page, End: 0x50 * page, Flags: mapPrivate | mapAnonymous | mapLocked}
	huge := VMA{Start: 0x50 * page, End: 0x60 * page, Flags: mapPrivate | mapAnonymous | mapHugeTLB}
	vdso := VMA{Start: 0x60 * page, End: 0x62 * page, Flags: mapPrivate | mapAnonymous, Status: VDSO}
	vmas := []VMA{anon, file, locked, huge, vdso, guard}
	run := func(from, pages uint64, flags Flags) Run {
		return Run{Addr: from * page, Pages: checkpoint.Pages(pages), Flags: flags}
	}
	for name, c := range map[string]struct {
		runs   []Run
		stacks []uint64
		want   []Run
		bad    bool
	}{
		"nothing":                          {},
		"what CRIU wrote stays":            {runs: []Run{run(0x10, 2, Lazy), run(0x20, 1, Present)}, want: []Run{run(0x10, 2, Lazy), run(0x20, 1, Present)}},
		"anonymous memory is lazy":         {runs: []Run{run(0x10, 16, Parent)}, want: []Run{run(0x10, 16, Lazy)}},
		"a file's private pages are not":   {runs: []Run{run(0x21, 3, Parent)}, want: []Run{run(0x21, 3, Present)}},
		"a run over two mappings is cut":   {runs: []Run{run(0x1f, 2, Parent)}, want: []Run{run(0x1f, 1, Lazy), run(0x20, 1, Present)}},
		"locked, huge and vdso are not":    {runs: []Run{run(0x40, 1, Parent), run(0x50, 1, Parent), run(0x60, 2, Parent)}, want: []Run{run(0x40, 1, Present), run(0x50, 1, Present), run(0x60, 2, Present)}},
		"a stack pointer's page is not":    {runs: []Run{run(0x10, 4, Parent)}, stacks: []uint64{0x12, 0x30}, want: []Run{run(0x10, 2, Lazy), run(0x12, 1, Present), run(0x13, 1, Lazy)}},
		"two stack pointers side by side":  {runs: []Run{run(0x10, 4, Parent)}, stacks: []uint64{0x13, 0x12, 0x10}, want: []Run{run(0x10, 1, Present), run(0x11, 1, Lazy), run(0x12, 2, Present)}},
		"neighbours are joined":            {runs: []Run{run(0x10, 1, Parent), run(0x11, 1, Parent)}, want: []Run{run(0x10, 2, Lazy)}},
		"but never with what CRIU wrote":   {runs: []Run{run(0x20, 1, Present), run(0x21, 1, Parent), run(0x22, 1, Present)}, want: []Run{run(0x20, 1, Present), run(0x21, 1, Present), run(0x22, 1, Present)}},
		"a page in no mapping is an error": {runs: []Run{run(0x30, 1, Parent)}, bad: true},
		"so is one behind all":             {runs: []Run{run(0x70, 1, Parent)}, bad: true},
		"so is a run that goes back":       {runs: []Run{run(0x12, 1, Parent), run(0x11, 1, Parent)}, bad: true},
		"so is one over a hole":            {runs: []Run{run(0x2f, 0x12, Parent)}, bad: true},
	} {
		t.Run(name, func(t *testing.T) {
			stacks := map[uint64]bool{}
			for _, s := range c.stacks {
				stacks[s*page] = true
			}
			s := settler{vmas: vmas, stacks: stacks}
			var got []Run
			emit := func(r Run, _ bool) error { got = append(got, r); return nil }
			var err error
			for _, r := range c.runs {
				if err == nil {
					err = s.run(r, emit)
				}
			}
			if err == nil {
				err = s.flush(emit)
			}
			if c.bad {
				if !errors.Is(err, ErrMalformed) {
					t.Fatalf("got %v, %v", got, err)
				}
				return
			}
			if err != nil || !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %v, %v, want %v", got, err, c.want)
			}
		})
	}
}

// dump writes a directory with one process: two pages of a file's that CRIU
// wrote, others that it took to be in the parent.
func dump(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	put := func(name string, write func(io.Writer) error) {
		if err := writeFile(filepath.Join(dir, name), write); err != nil {
			t.Fatal(err)
		}
	}
	message := func(kind magic, m proto.Message) func(io.Writer) error {
		return func(w io.Writer) error {
			img, err := newImage(w, kind)
			if err != nil {
				return err
			}
			return img.message(m)
		}
	}
	put("pstree.img", func(w io.Writer) error {
		return WriteProcessTree(w, []Task{{PID: 7, Threads: []checkpoint.PID{7}}, {PID: 8, Threads: []checkpoint.PID{8}}})
	})
	area := func(from, to uint64, flags uint32) *vma.VmaEntry {
		return &vma.VmaEntry{
			Start: proto.Uint64(from * page), End: proto.Uint64(to * page), Pgoff: proto.Uint64(0), Shmid: proto.Uint64(0),
			Prot: proto.Uint32(3), Flags: proto.Uint32(flags), Status: proto.Uint32(uint32(Regular)), Fd: proto.Int64(-1),
		}
	}
	zero := proto.Uint64(0)
	put("mm-7.img", message(mmMagic, &mm.MmEntry{
		MmStartCode: zero, MmEndCode: zero, MmStartData: zero, MmEndData: zero, MmStartStack: zero, MmStartBrk: zero, MmBrk: zero,
		MmArgStart: zero, MmArgEnd: zero, MmEnvStart: zero, MmEnvEnd: zero, ExeFileId: proto.Uint32(1),
		Vmas: []*vma.VmaEntry{area(0x10, 0x20, mapPrivate), area(0x20, 0x30, mapPrivate|mapAnonymous)},
	}))
	reg := core_x86.UserX86RegsEntry{}
	for _, f := range []**uint64{
		&reg.R15, &reg.R14, &reg.R13, &reg.R12, &reg.Bp, &reg.Bx, &reg.R11, &reg.R10, &reg.R9, &reg.R8, &reg.Ax,
		&reg.Cx, &reg.Dx, &reg.Si, &reg.Di, &reg.OrigAx, &reg.Ip, &reg.Cs, &reg.Flags, &reg.Ss, &reg.FsBase, &reg.GsBase, &reg.Ds, &reg.Es, &reg.Fs, &reg.Gs,
	} {
		*f = zero
	}
	reg.Sp = proto.Uint64(0x21*page + 0x123)
	small := proto.Uint32(0)
	fp := core_x86.UserX86FpregsEntry{Cwd: small, Swd: small, Twd: small, Fop: small, Rip: zero, Rdp: zero, Mxcsr: small, MxcsrMask: small}
	march := criucore.CoreEntry_X86_64
	put("core-7.img", message(coreMagic, &criucore.CoreEntry{Mtype: &march, ThreadInfo: &core_x86.ThreadInfoX86{ClearTidAddr: zero, Gpregs: &reg, Fpregs: &fp}}))
	put("pagemap-7.img", func(w io.Writer) error {
		return WritePagemap(w, Pagemap{PagesID: 3, Runs: []Run{
			{Addr: 0x10 * page, Pages: 1, Flags: Parent},
			{Addr: 0x11 * page, Pages: 2, Flags: Present},
			{Addr: 0x13 * page, Pages: 1, Flags: Parent},
			{Addr: 0x20 * page, Pages: 4, Flags: Parent},
		}})
	})
	put("pages-3.img", func(w io.Writer) error {
		_, err := w.Write(append(bytes.Repeat([]byte{0x11}, page), bytes.Repeat([]byte{0x12}, page)...))
		return err
	})
	return dir
}

func TestSettleWritesThePagesInTheirOrder(t *testing.T) {
	dir := dump(t)
	n, err := Settle(dir, func(pid checkpoint.PID, addr uint64, buf []byte) error {
		if pid != 7 {
			return fmt.Errorf("process %d", pid)
		}
		for i := range buf {
			buf[i] = byte((addr + uint64(i)) / page)
		}
		return nil
	})
	if err != nil || n != 3*page {
		t.Fatalf("%d bytes, %v", n, err)
	}
	pm, err := readFile(filepath.Join(dir, "pagemap-7.img"), ReadPagemap)
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for _, r := range pm.Runs {
		if r.Flags == Parent {
			t.Errorf("left over: %+v", r)
		}
		for i := range uint64(r.Pages) {
			if r.Flags == Present {
				want = append(want, bytes.Repeat([]byte{byte(r.Addr/page + i)}, page)...)
			}
		}
	}
	got, err := os.ReadFile(filepath.Join(dir, "pages-3.img"))
	if err != nil || !bytes.Equal(got, want) || len(got) != 5*page {
		t.Errorf("%d bytes instead of %d, or others; %v", len(got), len(want), err)
	}
	lazy, err := LazyExtents(dir)
	if err != nil || !reflect.DeepEqual(lazy[7], []checkpoint.Extent{{PID: 7, Addr: 0x20 * page, Pages: 1}, {PID: 7, Addr: 0x22 * page, Pages: 2}}) {
		t.Errorf("lazy: %v, %v", lazy, err)
	}
	before, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(before) != 6 { // lazy-7.img is new
		t.Errorf("left over: %v", before)
	}
	// Again: there is nothing left to do, and nothing to read.
	n, err = Settle(dir, func(checkpoint.PID, uint64, []byte) error { return errors.New("read again") })
	if err != nil || n != 0 {
		t.Errorf("again: %d bytes, %v", n, err)
	}
}

func TestLazyRunsAreJoinedForCRIUAlone(t *testing.T) {
	lazy := VMA{Start: 0x10 * page, End: 0x20 * page, Flags: mapPrivate | mapAnonymous}
	next := VMA{Start: 0x20 * page, End: 0x30 * page, Flags: mapPrivate | mapAnonymous}
	file := VMA{Start: 0x30 * page, End: 0x40 * page, Flags: mapPrivate}
	far := VMA{Start: 0x50 * page, End: 0x60 * page, Flags: mapPrivate | mapAnonymous}
	run := func(from, pages uint64, flags Flags) Run {
		return Run{Addr: from * page, Pages: checkpoint.Pages(pages), Flags: flags}
	}
	for name, c := range map[string]struct {
		runs, joined []Run
		guarded      bool
	}{
		"over a hole":                       {runs: []Run{run(0x10, 1, Lazy), run(0x12, 2, Lazy), run(0x18, 1, Lazy)}, joined: []Run{run(0x10, 9, Lazy)}},
		"over a hole where two meet":        {runs: []Run{run(0x10, 1, Lazy), run(0x20, 1, Lazy), run(0x22, 1, Lazy)}, joined: []Run{run(0x10, 0x13, Lazy)}},
		"not over what is in the images":    {runs: []Run{run(0x10, 1, Lazy), run(0x11, 1, Present), run(0x13, 1, Lazy)}, joined: []Run{run(0x10, 1, Lazy), run(0x11, 1, Present), run(0x13, 1, Lazy)}},
		"not over two mappings' holes":      {runs: []Run{run(0x1e, 1, Lazy), run(0x22, 1, Lazy)}, joined: []Run{run(0x1e, 1, Lazy), run(0x22, 1, Lazy)}},
		"not over what is not mapped":       {runs: []Run{run(0x2f, 1, Lazy), run(0x50, 1, Lazy)}, joined: []Run{run(0x2f, 1, Lazy), run(0x50, 1, Lazy)}},
		"not what CRIU both left and wrote": {runs: []Run{run(0x10, 1, Lazy|Present), run(0x12, 1, Lazy)}, joined: []Run{run(0x10, 1, Lazy|Present), run(0x12, 1, Lazy)}},
		"not with guards":                   {runs: []Run{run(0x10, 1, Lazy), run(0x12, 2, Lazy)}, joined: []Run{run(0x10, 1, Lazy), run(0x12, 2, Lazy)}, guarded: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := settler{vmas: []VMA{lazy, next, file, far}, guarded: c.guarded}
			var in, joined, exact bytes.Buffer
			if err := WritePagemap(&in, Pagemap{PagesID: 9, Runs: c.runs}); err != nil {
				t.Fatal(err)
			}
			id, err := s.pagemap(&joined, &exact, &in, func(Run, bool) {})
			if err != nil || id != 9 {
				t.Fatalf("%d, %v", id, err)
			}
			for what, got := range map[string]struct {
				img  *bytes.Buffer
				want []Run
			}{"joined": {&joined, c.joined}, "exact": {&exact, c.runs}} {
				pm, err := ReadPagemap(got.img)
				if err != nil || pm.PagesID != 9 || !reflect.DeepEqual(pm.Runs, got.want) {
					t.Errorf("%s: got %v, %v, want %v", what, pm, err, got.want)
				}
			}
		})
	}
}

func TestAPageThatCannotBeReadEndsTheDump(t *testing.T) {
	dir := dump(t)
	why := errors.New("no such process")
	if _, err := Settle(dir, func(checkpoint.PID, uint64, []byte) error { return why }); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	if err := os.Truncate(filepath.Join(dir, "pages-3.img"), page); err != nil {
		t.Fatal(err)
	}
	if _, err := Settle(dir, func(checkpoint.PID, uint64, []byte) error { return nil }); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		t.Errorf("pages that CRIU wrote are gone: %v", err)
	}
}

func TestParentImagesHaveEverything(t *testing.T) {
	dir := t.TempDir()
	if err := WriteParent(dir, []checkpoint.PID{1, 22}, 5); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{1, 22} {
		pm, err := readFile(filepath.Join(dir, fmt.Sprintf("pagemap-%d.img", pid)), ReadPagemap)
		if err != nil {
			t.Fatal(err)
		}
		at := uint64(0)
		for _, r := range pm.Runs {
			if r.Addr != at || uint64(r.Pages) > 1<<32-1 {
				t.Fatalf("run %+v after %#x", r, at)
			}
			at = r.End()
		}
		if at != 1<<48 {
			t.Errorf("it ends at %#x", at)
		}
	}
	inv, err := readFile(filepath.Join(dir, "inventory.img"), ReadInventory)
	if err != nil || inv.UptimeUsec <= 5 {
		t.Errorf("%+v, %v", inv, err)
	}
}
