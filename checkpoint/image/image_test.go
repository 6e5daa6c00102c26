package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/tranship/tranship/checkpoint"
)

// testdata holds two dumps of one small program by CRIU 4.2.1, one with all
// pages, one with --lazy-pages. The program maps 64 pages at 0x10000000 and
// writes the first 16 and every other one of 32 to 39, maps 8 shared pages at
// 0x20000000 and writes three, holds an open file and one whose name was
// removed but which has another, and forks; the child writes page 50.
const (
	parentPID checkpoint.PID = 3365
	childPID  checkpoint.PID = 3367
)

// readers are all decoders, by the sample that each must accept.
var readers = map[string]func(io.Reader) (any, error){
	"full/pagemap-3365.img":      func(r io.Reader) (any, error) { return ReadPagemap(r) },
	"lazy/pagemap-3367.img":      func(r io.Reader) (any, error) { return ReadPagemap(r) },
	"full/pagemap-shmem-556.img": func(r io.Reader) (any, error) { return ReadPagemap(r) },
	"full/pstree.img":            func(r io.Reader) (any, error) { return ReadProcessTree(r) },
	"full/mm-3365.img":           func(r io.Reader) (any, error) { return ReadMM(r) },
	"full/ids-3365.img":          func(r io.Reader) (any, error) { return ReadIDs(r) },
	"full/inventory.img":         func(r io.Reader) (any, error) { return ReadInventory(r) },
	"full/files.img":             func(r io.Reader) (any, error) { return ReadRegFiles(r) },
	"stats-dump":                 func(r io.Reader) (any, error) { return ReadStats(r) },
}

func sample(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestPagemapOfRealDumps(t *testing.T) {
	arena := func(p Pagemap) (runs []Run) {
		for _, r := range p.Runs {
			if r.Addr >= 0x10000000 && r.Addr < 0x10040000 {
				runs = append(runs, r)
			}
		}
		return runs
	}
	want := []Run{{0x10000000, 16, 0}, {0x10020000, 1, 0}, {0x10022000, 1, 0}, {0x10024000, 1, 0}, {0x10026000, 1, 0}}
	for dir, flags := range map[string]Flags{"full": Lazy | Present, "lazy": Lazy} {
		for i := range want {
			want[i].Flags = flags
		}
		p, err := ReadPagemap(bytes.NewReader(sample(t, dir+"/pagemap-3365.img")))
		if err != nil {
			t.Fatal(err)
		}
		if got := arena(p); !slices.Equal(got, want) {
			t.Errorf("%s: parent has %v, want %v", dir, got, want)
		}
		p, err = ReadPagemap(bytes.NewReader(sample(t, dir+"/pagemap-3367.img")))
		if err != nil {
			t.Fatal(err)
		}
		if got := arena(p); !slices.Equal(got, append(slices.Clone(want), Run{0x10032000, 1, flags})) {
			t.Errorf("%s: child has %v", dir, got)
		}
	}
	p, err := ReadPagemap(bytes.NewReader(sample(t, "full/pagemap-shmem-556.img")))
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Runs) != 1 || p.Runs[0] != (Run{0, 3, Present}) || p.PagesID == 0 {
		t.Errorf("shared memory is %+v, want three pages from 0", p)
	}
}

func TestProcessesOfARealDump(t *testing.T) {
	tasks, err := ReadProcessTree(bytes.NewReader(sample(t, "full/pstree.img")))
	if err != nil {
		t.Fatal(err)
	}
	want := []Task{
		{PID: parentPID, Group: parentPID, Session: parentPID, Threads: []checkpoint.PID{parentPID}},
		{PID: childPID, Parent: parentPID, Group: parentPID, Session: parentPID, Threads: []checkpoint.PID{childPID}},
	}
	if !reflect.DeepEqual(tasks, want) {
		t.Errorf("processes are %+v, want %+v", tasks, want)
	}

	m, err := ReadMM(bytes.NewReader(sample(t, "full/mm-3365.img")))
	if err != nil {
		t.Fatal(err)
	}
	find := func(addr uint64) VMA {
		i := slices.IndexFunc(m.VMAs, func(v VMA) bool { return v.Start == addr })
		if i < 0 {
			t.Fatalf("no mapping at %#x in %+v", addr, m.VMAs)
		}
		return m.VMAs[i]
	}
	if v := find(0x10000000); v.End != 0x10040000 || v.Status != Regular|AnonPrivate || v.Prot != 3 {
		t.Errorf("private memory is %+v", v)
	}
	if v := find(0x20000000); v.End != 0x20008000 || v.Status != Regular|FileShared|Memfd || v.ShmID == 0 || v.FD != -1 {
		// Shared anonymous memory is dumped as the memfd that it is inside.
		t.Errorf("shared memory is %+v", v)
	}
	if m.ExeFileID == 0 {
		t.Error("the program's file has no id")
	}

	a, err := ReadIDs(bytes.NewReader(sample(t, "full/ids-3365.img")))
	if err != nil {
		t.Fatal(err)
	}
	b, err := ReadIDs(bytes.NewReader(sample(t, "full/ids-3367.img")))
	if err != nil {
		t.Fatal(err)
	}
	if a.VM == b.VM || a.MntNS != b.MntNS || a.MntNS == 0 {
		t.Errorf("parent %+v and child %+v should have memory of their own and share namespaces", a, b)
	}

	inv, err := ReadInventory(bytes.NewReader(sample(t, "full/inventory.img")))
	if err != nil {
		t.Fatal(err)
	}
	if inv.Version != 2 || len(inv.RunID) != 36 || inv.Root.VM == 0 {
		t.Errorf("inventory is %+v, want version 2 and a run id", inv)
	}
}

func TestFilesOfARealDump(t *testing.T) {
	files, err := ReadRegFiles(bytes.NewReader(sample(t, "full/files.img")))
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]RegFile{}
	var remaps []string
	for _, f := range files {
		byName[f.Name] = f
		if f.LinkRemap() {
			remaps = append(remaps, f.Name)
		}
	}
	if f := byName["/srv/sample/opened"]; f.Pos != 5 || f.Size != 5 || f.Mode&0o777 != 0o644 {
		t.Errorf("the open file is %+v", f)
	}
	if !slices.Equal(remaps, []string{"/srv/sample/link_remap.7"}) {
		t.Errorf("links by CRIU are %v", remaps)
	}
}

func TestLinkRemapNames(t *testing.T) {
	for name, want := range map[string]bool{
		"/a/link_remap.7": true, "link_remap.123": true,
		"/a/link_remap.": false, "/a/link_remap.7x": false, "/a/my_link_remap.7": false, "/link_remap.7/b": false, "": false,
	} {
		if got := (RegFile{Name: name}).LinkRemap(); got != want {
			t.Errorf("%q: %v, want %v", name, got, want)
		}
	}
}

func TestLazyExtents(t *testing.T) {
	got, err := LazyExtents("testdata/lazy")
	if err != nil {
		t.Fatal(err)
	}
	if pids := slices.Sorted(maps.Keys(got)); !slices.Equal(pids, []checkpoint.PID{parentPID, childPID}) {
		t.Fatalf("processes %v", pids)
	}
	if !slices.Contains(got[childPID], checkpoint.Extent{PID: childPID, Addr: 0x10032000, Pages: 1}) {
		t.Errorf("the child lacks the page that it wrote: %v", got[childPID])
	}
	for pid, extents := range got {
		for i, e := range extents {
			if e.PID != pid || i > 0 && extents[i-1].End() >= e.Addr {
				t.Errorf("process %d: %v out of order, or not joined", pid, e)
			}
		}
	}
}

func TestLazyExtentsOfDirectoriesThatAreWrong(t *testing.T) {
	build := func(t *testing.T, runs []Run) string {
		dir := t.TempDir()
		write(t, dir+"/pstree.img", func(w io.Writer) error { return WriteProcessTree(w, []Task{{PID: 1}, {PID: 2, Parent: 1}}) })
		write(t, dir+"/pagemap-1.img", func(w io.Writer) error { return WritePagemap(w, Pagemap{PagesID: 1, Runs: runs}) })
		return dir
	}
	t.Run("a zombie has no memory", func(t *testing.T) {
		got, err := LazyExtents(build(t, []Run{
			{0x5000, 2, Lazy}, {0x1000, 2, Lazy}, {0x3000, 2, Lazy | Present}, {0x9000, 1, Present}, {0x10000, 1, Parent},
		}))
		want := map[checkpoint.PID][]checkpoint.Extent{1: {{PID: 1, Addr: 0x1000, Pages: 6}}}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	})
	t.Run("a process with memory must have a pagemap", func(t *testing.T) {
		dir := build(t, nil)
		write(t, dir+"/mm-2.img", func(io.Writer) error { return nil })
		if _, err := LazyExtents(dir); !errors.Is(err, ErrMalformed) {
			t.Errorf("%v, want ErrMalformed", err)
		}
	})
	t.Run("runs must not overlap", func(t *testing.T) {
		if _, err := LazyExtents(build(t, []Run{{0x1000, 2, Lazy}, {0x2000, 2, Lazy}})); !errors.Is(err, ErrMalformed) {
			t.Errorf("%v, want ErrMalformed", err)
		}
	})
	t.Run("no directory", func(t *testing.T) {
		if _, err := LazyExtents(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v, want not exist", err)
		}
	})
}

func write(t *testing.T, name string, f func(io.Writer) error) {
	t.Helper()
	var b bytes.Buffer
	if err := f(&b); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPagemapRoundTrip(t *testing.T) {
	for name, p := range map[string]Pagemap{
		"empty":            {PagesID: 1},
		"one run":          {PagesID: 7, Runs: []Run{{0x7f0000000000, 1 << 33, Lazy}}},
		"all combinations": {PagesID: 1 << 31, Runs: []Run{{0, 1, 0}, {0x1000, 2, Parent}, {0x4000, 3, Lazy | Present}, {0x2000, 1, Present}}},
	} {
		var b bytes.Buffer
		if err := WritePagemap(&b, p); err != nil {
			t.Fatal(err)
		}
		got, err := ReadPagemap(&b)
		if err != nil || !reflect.DeepEqual(got, p) {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, p)
		}
	}
	// What CRIU wrote comes back byte for byte.
	raw := sample(t, "lazy/pagemap-3367.img")
	p, err := ReadPagemap(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := WritePagemap(&b, p); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Bytes(), raw) {
		t.Errorf("written again:\n%x\nwant\n%x", b.Bytes(), raw)
	}
}

func TestProcessTreeRoundTrip(t *testing.T) {
	raw := sample(t, "full/pstree.img")
	tasks, err := ReadProcessTree(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := WriteProcessTree(&b, tasks); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b.Bytes(), raw) {
		t.Errorf("written again:\n%x\nwant\n%x", b.Bytes(), raw)
	}
}

// image builds an image of raw entries.
func image(kind magic, entries ...[]byte) []byte {
	var b bytes.Buffer
	w, err := newImage(&b, kind)
	for _, e := range entries {
		err = errors.Join(err, w.entry(e))
	}
	if err != nil {
		panic(err)
	}
	return b.Bytes()
}

func TestOldFormsOfRuns(t *testing.T) {
	head := appendVarint(nil, 1, 3)
	cases := []struct {
		name  string
		entry []byte
		want  Run
	}{
		{"32-bit count without flags is in the image", fieldsOf(1, 0x1000, 2, 5), Run{0x1000, 5, Present}},
		{"in_parent", fieldsOf(1, 0x1000, 2, 5, 3, 1), Run{0x1000, 5, Parent}},
		{"in_parent of false", fieldsOf(1, 0x1000, 2, 5, 3, 0), Run{0x1000, 5, Present}},
		{"in_parent adds to flags", fieldsOf(1, 0x1000, 2, 5, 3, 1, 4, uint64(Lazy)), Run{0x1000, 5, Parent | Lazy}},
		{"flags with the old count", fieldsOf(1, 0x1000, 2, 5, 4, uint64(Lazy)), Run{0x1000, 5, Lazy}},
		{"the new count wins", fieldsOf(1, 0x1000, 2, 0, 4, uint64(Lazy), 5, 1<<33), Run{0x1000, 1 << 33, Lazy}},
		{"unknown fields are passed over", append(fieldsOf(1, 0x1000, 2, 5, 99, 1), 0x7a, 1, 'x'), Run{0x1000, 5, Present}},
	}
	for _, c := range cases {
		p, err := ReadPagemap(bytes.NewReader(image(pagemapMagic, head, c.entry)))
		if err != nil || !slices.Equal(p.Runs, []Run{c.want}) || p.PagesID != 3 {
			t.Errorf("%s: %+v, %v; want %v", c.name, p, err, c.want)
		}
	}
}

func fieldsOf(pairs ...uint64) []byte {
	var b []byte
	for i := 0; i < len(pairs); i += 2 {
		b = appendVarint(b, protowire.Number(pairs[i]), pairs[i+1])
	}
	return b
}

func TestRefusals(t *testing.T) {
	head := appendVarint(nil, 1, 3)
	huge := binary.LittleEndian.AppendUint32(image(pagemapMagic), 0xffffffff)
	cases := []struct {
		name string
		raw  []byte
		read func(io.Reader) (any, error)
		want error
	}{
		{"nothing", nil, readers["full/pstree.img"], ErrTruncated},
		{"another kind of image", sample(t, "full/mm-3365.img"), readers["full/pstree.img"], ErrMagic},
		{"a magic of its own", []byte("#!/bin/sh\n"), readers["full/files.img"], ErrMagic},
		{"an inventory where a common magic belongs", sample(t, "full/inventory.img"), readers["full/ids-3365.img"], ErrMagic},
		{"a pagemap without its head", image(pagemapMagic), readers["full/pagemap-3365.img"], ErrTruncated},
		{"a process tree without processes", image(pstreeMagic), readers["full/pstree.img"], ErrTruncated},
		{"a process twice", image(pstreeMagic, fieldsOf(1, 1, 2, 0, 3, 1, 4, 1), fieldsOf(1, 1, 2, 0, 3, 1, 4, 1)), readers["full/pstree.img"], ErrMalformed},
		{"process 0", image(pstreeMagic, fieldsOf(1, 0, 2, 0, 3, 1, 4, 1)), readers["full/pstree.img"], ErrMalformed},
		{"a process without its parent", image(pstreeMagic, fieldsOf(1, 1)), readers["full/pstree.img"], ErrMalformed},
		{"no entry where one is needed", image(mmMagic), readers["full/mm-3365.img"], ErrTruncated},
		{"two entries where one belongs", append(sample(t, "full/ids-3365.img"), sample(t, "full/ids-3365.img")[8:]...), readers["full/ids-3365.img"], ErrMalformed},
		{"a length of 4 GiB", huge, readers["full/pagemap-3365.img"], ErrTooLarge},
		{"a run without address", image(pagemapMagic, head, fieldsOf(2, 1)), readers["full/pagemap-3365.img"], ErrMalformed},
		{"a run without count", image(pagemapMagic, head, fieldsOf(1, 0x1000)), readers["full/pagemap-3365.img"], ErrMalformed},
		{"a run of no pages", image(pagemapMagic, head, fieldsOf(1, 0x1000, 2, 0)), readers["full/pagemap-3365.img"], ErrMalformed},
		{"a run in the middle of a page", image(pagemapMagic, head, fieldsOf(1, 0x1001, 2, 1)), readers["full/pagemap-3365.img"], ErrMalformed},
		{"a run around the end of memory", image(pagemapMagic, head, fieldsOf(1, 0xfffffffffffff000, 2, 0, 5, 2)), readers["full/pagemap-3365.img"], ErrMalformed},
		{"more pages than there are", image(pagemapMagic, head, fieldsOf(1, 0, 2, 0, 5, 1<<52)), readers["full/pagemap-3365.img"], ErrMalformed},
		{"an unknown version", image(inventoryMagic, fieldsOf(1, 3)), readers["full/inventory.img"], ErrMalformed},
		{"a file without content", image(filesMagic, fieldsOf(1, regType, 2, 9)), readers["full/files.img"], ErrMalformed},
		{"not protobuf", image(filesMagic, []byte{0xff}), readers["full/files.img"], ErrMalformed},
	}
	for _, c := range cases {
		if _, err := c.read(bytes.NewReader(c.raw)); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	// A type of file that is newer than this code does not hide the others.
	files, err := ReadRegFiles(bytes.NewReader(append(sample(t, "full/files.img"), image(filesMagic, fieldsOf(1, 20, 2, 77))[8:]...)))
	if err != nil || len(files) == 0 {
		t.Errorf("beside a file of unknown type: %d files, %v", len(files), err)
	}
}

// TestCutAtEveryByte: an image that is cut is an error, or, between two entries,
// a shorter image; what it still holds is then right.
func TestCutAtEveryByte(t *testing.T) {
	for name, read := range readers {
		raw := sample(t, name)
		if _, err := read(bytes.NewReader(raw)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		boundary := boundaries(raw, name == "full/inventory.img")
		for n := range raw {
			_, err := read(bytes.NewReader(raw[:n]))
			switch {
			case err == nil && !boundary[n]:
				t.Errorf("%s cut at %d of %d: no error", name, n, len(raw))
			case err != nil && !errors.Is(err, ErrTruncated):
				t.Errorf("%s cut at %d of %d: %v, want ErrTruncated", name, n, len(raw), err)
			}
		}
	}
}

// boundaries returns where entries end.
func boundaries(raw []byte, short bool) map[int]bool {
	at := 8
	if short {
		at = 4
	}
	out := map[int]bool{at: true}
	for at < len(raw) {
		at += 4 + int(binary.LittleEndian.Uint32(raw[at:]))
		out[at] = true
	}
	return out
}

func FuzzReaders(f *testing.F) {
	for name := range readers {
		f.Add(sample(f, name))
	}
	f.Add(image(pagemapMagic, fieldsOf(1, 3), fieldsOf(1, 0x1000, 2, 5, 3, 1)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		for name, read := range readers {
			v, err := read(bytes.NewReader(raw))
			if err != nil {
				continue
			}
			var again any
			var b bytes.Buffer
			switch v := v.(type) {
			case Pagemap:
				for _, r := range v.Runs {
					if r.Pages <= 0 || r.End() <= r.Addr {
						t.Fatalf("run %+v", r)
					}
				}
				err = WritePagemap(&b, v)
			case []Task:
				err = WriteProcessTree(&b, v)
			default:
				continue
			}
			if err == nil {
				again, err = read(&b)
			}
			if err != nil || !reflect.DeepEqual(v, again) {
				t.Fatalf("%s: %+v, written and read again: %+v, %v", name, v, again, err)
			}
		}
	})
}
